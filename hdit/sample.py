"""Draws images from a trained model: python -m hdit.sample CHECKPOINT [options]"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit import sampling
from hdit._extras import require
from hdit._runtime import at_least, autocast, one_line_errors, pick_device, progress
from hdit.checkpoint import load_checkpoint, read_details
from hdit.config import HDiTConfig
from hdit.data import MODES, seed_of
from hdit.denoiser import Denoiser
from hdit.model import HDiT

SAMPLERS = {name.removeprefix("sample_"): f for name, f in vars(sampling).items() if name.startswith("sample_")}


def generate(
    model: HDiT,
    count: int,
    classes: Sequence[int] | None = None,
    *,
    guidance: float = 1.0,
    sampler: str = "dpmpp_3m_sde",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Samples count images with the Karras schedule between the config's sigma_max and sigma_min.

    classes: class index of each image, exactly if the model has classes. guidance: scale of classifier-free guidance,
    1 for none. sampler: a name in SAMPLERS. An image depends on seed and its own number, not on batch_size.
    Returns uint8 [count, C, H, W] on the CPU. Raises ValueError on arguments that don't fit the model, and if the
    images come out as NaN.
    """
    config, device = model.config, next(model.parameters()).device
    if (classes is None) == bool(config.num_classes):
        known = max(config.num_classes - 1, 0)
        raise ValueError(f"classes must be given exactly if the model has some, it has {known}")
    if classes is not None and len(classes) != count:
        raise ValueError(f"classes must name one for each of {count} images, got {len(classes)}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if classes is None and guidance != 1:
        raise ValueError(f"guidance needs a model with classes, got guidance {guidance}: leave it out")

    denoise: Any = Denoiser(model, config.sigma_data)
    if guidance != 1 and config.null_class is not None:
        denoise = sampling.ClassifierFreeGuidance(denoise, guidance, config.null_class)
    sigmas = sampling.get_sigmas_karras(steps, config.sigma_min, config.sigma_max, device=device)
    function, shape = SAMPLERS[sampler], (config.in_channels, *config.image_size)
    batches = range(0, count, batch_size)
    images = []
    with progress(total=len(batches) * steps, desc="sampling", leave=False) as bar:
        for first in batches:
            numbers = range(first, min(first + batch_size, count))
            noise = _Noise(shape, [seed_of(seed, "sample", number) for number in numbers], device)
            extra: dict[str, Any] = {"extra_args": {}, "callback": lambda _: bar.update()}
            if classes is not None:
                extra["extra_args"]["class_cond"] = torch.tensor([classes[number] for number in numbers], device=device)
            if "noise_sampler" in inspect.signature(function).parameters:
                extra["noise_sampler"] = noise
            with torch.no_grad(), autocast(device):
                x = function(denoise, noise() * sigmas[0], sigmas, disable=True, **extra)
            images.append(x.float().cpu())
    x = torch.cat(images)
    if not x.isfinite().all():
        raise ValueError("the model makes NaN images: its training went wrong, take an earlier checkpoint")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class _Noise:
    """Unit normal noise [images, C, H, W], image by image from generators of their own; called as a NoiseSampler."""

    def __init__(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, *sigmas: Tensor) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g, device=self.device) for g in self.generators])


def to_image(pixels: Tensor) -> Any:
    """uint8 [C, H, W] with 1 or 3 channels -> a Pillow image."""
    if pixels.shape[0] not in MODES:
        raise ValueError(f"only images of 1 or 3 channels can be saved, got {pixels.shape[0]}")
    array = pixels.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    return require("PIL.Image", "train").fromarray(array)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 1) -> Any:
    """uint8 [N, C, H, W] -> one Pillow image, row by row; as square as possible if columns isn't given."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    canvas = images.new_zeros(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, y : y + height, x : x + width] = image
    return to_image(canvas)


def class_indices(words: Sequence[str], config: HDiTConfig, names: Sequence[str]) -> list[int]:
    """Class indices for words that are each a class's name or its index (a name comes first).

    names: of the classes, if known. Raises ValueError on a word that is neither.
    """
    count = config.num_classes - 1
    if count < 0:
        raise ValueError("--classes: the model has no classes; leave it out")
    indices = []
    for word in words:
        if word in names:
            indices.append(names.index(word))
        elif word.isdecimal() and int(word) < count:
            indices.append(int(word))
        else:
            known = f" ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})" if names else ""
            raise ValueError(f"--classes: there is no class {word!r}; pass some of 0…{count - 1}{known}")
    return indices


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m hdit.sample", description="Draws images from a trained model.")
    show = " (default: %(default)s)"
    parser.add_argument("checkpoint", help="a .safetensors file of hdit.train, or a checkpoint of k-diffusion")
    parser.add_argument("--output", default="samples.png", help="a .png for a grid, or a folder" + show)
    parser.add_argument("--count", type=at_least(1), default=64, help="how many images" + show)
    parser.add_argument("--classes", nargs="+", help="names or indices of classes, repeated in turn (default: all)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 for none" + show)
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_3m_sde", help="(default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=50, help="sampling steps" + show)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images" + show)
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images at a time" + show)
    parser.add_argument("--no-ema", action="store_true", help="take the last weights instead of their average")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args(arguments)

    with one_line_errors("hdit.sample"):
        device = pick_device(args.device)
        details = read_details(args.checkpoint)
        model = load_checkpoint(args.checkpoint, ema=not args.no_ema).to(device)
        chosen: Sequence[int] = range(model.config.num_classes - 1)
        if args.classes:
            chosen = class_indices(args.classes, model.config, details.class_names if details is not None else [])
        classes = [chosen[i % len(chosen)] for i in range(args.count)] if chosen else None
        images = generate(
            model, args.count, classes, guidance=args.guidance, sampler=args.sampler, steps=args.steps, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
        output = Path(args.output)
        grid = output if output.suffix == ".png" else output / "grid.png"
        grid.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images).save(grid)
        if grid is not output:
            for i, image in enumerate(images):
                to_image(image).save(output / f"{i:05}.png")
        print(grid)


if __name__ == "__main__":
    main()
