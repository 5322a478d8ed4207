"""Draws images from a trained model: python -m hdit.sample CHECKPOINT [options]"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from hdit import sampling
from hdit._files import quoted
from hdit._memory import require_memory
from hdit._pictures import (
    FORMATS,
    Grid,
    ImageExport,
    alone_in,
    check_grid,
    grid_beside,
    image_grid,
    picture_or_folder,
    save,
    to_image,
)
from hdit._runtime import (
    Parser,
    at_least,
    autocast,
    compile_kernels,
    needs,
    one_line_errors,
    pick_device,
    printable,
    progress,
    tell,
    writable,
)
from hdit.checkpoint import load_checkpoint, read_details
from hdit.config import HDiTConfig
from hdit.cuda_graphs import Captured
from hdit.data import MODES, seed_of
from hdit.denoiser import Denoiser
from hdit.model import HDiT, dtype_of
from hdit_kernels import checks

__all__ = ["SAMPLERS", "class_indices", "generate", "generate_batches", "image_grid", "main", "to_image"]

MOST_IMAGES = 10_000_000  # of one call
SAMPLERS = {name.removeprefix("sample_"): f for name, f in vars(sampling).items() if name.startswith("sample_")}


def generate(
    model: HDiT,
    count: int,
    classes: Sequence[int] | Tensor | None = None,
    *,
    guidance: float = 1.0,
    sampler: str = "dpmpp_3m_sde",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    capture: bool = True,
) -> Tensor:
    """Samples count images with the Karras schedule between the config's sigma_max and sigma_min.

    classes: class index of each image, exactly if the model has classes. guidance: scale of classifier-free guidance,
    1 for none. sampler: a name in SAMPLERS. An image depends on seed and its own number, not on batch_size. capture: on
    a GPU the model runs as CUDA graphs (hdit.capture), with the same images.
    Returns uint8 [count, C, H, W] on the CPU. Raises TypeError or ValueError, naming the argument, on what doesn't fit
    the model, and ValueError if an image comes out as NaN.
    """
    batches = generate_batches(
        model, range(checks.integer("count", count, 1, MOST_IMAGES)), classes, guidance=guidance, sampler=sampler,
        steps=steps, seed=seed, batch_size=batch_size, capture=capture,
    )  # fmt: skip
    return torch.cat([images for _, images in batches])


def generate_batches(
    model: HDiT,
    numbers: Sequence[int],
    classes: Sequence[int] | Tensor | None = None,
    *,
    guidance: float = 1.0,
    sampler: str = "dpmpp_3m_sde",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    capture: bool = True,
) -> Generator[tuple[Sequence[int], Tensor], None, None]:
    """Samples the images of these numbers as `generate` does, batch by batch, so that any number fits into memory.

    classes: class index of each of numbers. Yields (numbers, uint8 images [N, C, H, W] on the CPU). Raises as
    `generate`, before anything is sampled.
    """
    config = getattr(model, "config", None)  # torch.compile's wrapper has it too
    if not isinstance(config, HDiTConfig):
        raise TypeError(f"model: expected an HDiT, got {type(model).__name__}")
    device, dtype = next(model.parameters()).device, dtype_of(model, torch.float32)
    if device.type == "meta" or (dtype != torch.float32 and device.type != "cuda"):  # which has autocast
        raise TypeError(f"model: expected float32 weights, got {dtype} on {device}")
    if isinstance(classes, Tensor) and not classes.is_meta:
        classes = classes.tolist()
    if not isinstance(numbers, range):
        checks.sizes("numbers", numbers)
    if (classes is None) == bool(config.num_classes):
        wanted = f"one of {config.num_classes - 1} for each image" if classes is None else "None, the model has none"
        raise ValueError(f"classes: expected {wanted}, got {checks.shown(classes)}")
    if classes is not None:
        if not isinstance(classes, Sequence) or len(classes) != len(numbers):
            got = len(classes) if isinstance(classes, Sequence) else checks.shown(classes)
            raise ValueError(f"classes: expected one for each of {len(numbers)} images, got {got}")
        for index in classes:
            if checks.integer("classes", index, 0) >= config.num_classes:
                raise ValueError(f"classes: expected indices below {config.num_classes}, got {index}")
    checks.choice("sampler", sampler, SAMPLERS)
    if sampling.check_guidance("guidance", guidance) != 1 and classes is None:
        raise ValueError(f"guidance: expected 1 for a model without classes, got {guidance:g}: leave it out")
    checks.integer("steps", steps, 1, sampling.MOST_STEPS)
    checks.seed("seed", seed)
    checks.integer("batch_size", batch_size, 1, MOST_IMAGES)
    require_memory("model", config, device, min(batch_size, len(numbers)), training=False)
    checks.boolean("capture", capture)
    return _batches(model, numbers, classes, guidance, sampler, steps, seed, batch_size, capture)


def _batches(
    model: HDiT,
    numbers: Sequence[int],
    classes: Sequence[int] | None,
    guidance: float,
    sampler: str,
    steps: int,
    seed: int,
    batch_size: int,
    capture: bool,
) -> Generator[tuple[Sequence[int], Tensor], None, None]:
    config, device = model.config, next(model.parameters()).device
    eager: Any = Denoiser(model, config.sigma_data)
    if guidance != 1 and config.null_class is not None:
        eager = sampling.ClassifierFreeGuidance(eager, guidance, config.null_class)
    denoise = Captured(eager, fixed_weights=True) if capture and device.type == "cuda" else eager
    sigmas = sampling.get_sigmas_karras(steps, config.sigma_min, config.sigma_max, device=device)
    function, shape = SAMPLERS[sampler], (config.in_channels, *config.image_size)
    firsts = range(0, len(numbers), batch_size)
    with progress(total=len(firsts) * steps, desc="sampling", leave=False) as bar:
        for first in firsts:
            batch = numbers[first : first + batch_size]
            noise = _Noise(shape, [seed_of(seed, "sample", number) for number in batch], device)
            extra: dict[str, Any] = {"extra_args": {}, "callback": lambda _: bar.update()}
            if classes is not None:
                chosen = torch.tensor(list(classes[first : first + batch_size]), device=device)
                extra["extra_args"]["class_cond"] = chosen
            if "noise_sampler" in inspect.signature(function).parameters:
                extra["noise_sampler"] = noise
            with torch.no_grad(), autocast(device):
                if isinstance(denoise, Captured):
                    denoise.renew()  # the caller may have changed the weights since the last batch
                x = noise() * sigmas[0]
                if first == 0:
                    compile_kernels(device, functools.partial(eager, x, sigmas[0], **extra["extra_args"]))
                x = function(denoise, x, sigmas, disable=True, **extra)
            x = x.float().cpu()
            finite = x.isfinite().flatten(1).all(1)
            if not finite.all():
                raise ValueError(
                    f"image {batch[int(finite.int().argmin())]} is NaN or infinite: {_advice(model, guidance)}"
                )
            yield batch, ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _advice(model: HDiT, guidance: float) -> str:
    """What to do about images that aren't finite."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return "so are weights of the model; take an earlier checkpoint"
    if not 0 <= guidance <= 1:
        return f"lower the guidance of {guidance:g}, or if it is no better at 1, take an earlier checkpoint"
    return "the model's training went wrong; take an earlier checkpoint"


class _Noise:
    """Unit normal noise [images, C, H, W], image by image from generators of their own; called as a NoiseSampler."""

    def __init__(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, *sigmas: Tensor) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g, device=self.device) for g in self.generators])


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
        elif word.isdecimal() and len(word) < 10 and int(word) < count:
            indices.append(int(word))
        else:
            known = f" ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})" if names else ""
            raise ValueError(f"--classes: there is no class {quoted(word)}; pass some of 0…{count - 1}{known}")
    return indices


def weights_digest(model: HDiT) -> str:
    """A digest of the configuration and the weights, by which an image is known to be of this model."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("python -m hdit.sample", description="Draws images from a trained model.")
    show = " (default: %(default)s)"
    parser.add_argument(
        "checkpoint", help="a .safetensors file of hdit.train or hdit.export, or a checkpoint of k-diffusion"
    )
    parser.add_argument(
        "--output", default="samples.png",
        help=f"a picture ({', '.join(FORMATS)}) for a grid; or a folder, in which the same command goes on after an "
        "interruption, with a grid of the first images beside it" + show,
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="delete images of another run from the folder")
    parser.add_argument("--count", type=at_least(1, MOST_IMAGES), default=64, help="how many images" + show)
    parser.add_argument("--classes", nargs="+", help="names or indices of classes, repeated in turn (default: all)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 for none" + show)
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_3m_sde", help="(default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1, sampling.MOST_STEPS), default=50, help="sampling steps" + show)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images" + show)
    parser.add_argument("--batch-size", type=at_least(1, MOST_IMAGES), default=64, help="images at a time" + show)
    parser.add_argument("--no-ema", action="store_true", help="take the last weights instead of their average")
    parser.add_argument("--no-capture", action="store_true", help="on a GPU, don't run the model as CUDA graphs")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args(arguments)

    with one_line_errors("hdit.sample"):
        sampling.check_guidance("--guidance", args.guidance)
        checks.seed("--seed", args.seed)
        needs("numpy", "PIL.Image", "tqdm")
        output, is_folder = picture_or_folder(args.output)
        if args.overwrite and not is_folder:
            raise ValueError("--overwrite: it is for a folder of images; a picture is replaced without it")
        grid = grid_beside(output) if is_folder else output
        if grid.is_dir():
            raise ValueError(f"--output {args.output}: the grid {grid} is a folder; pass another name")
        for folder in (output if is_folder else output.parent, grid.parent):
            writable(folder)
        device = pick_device(args.device)
        details = read_details(args.checkpoint)
        model = load_checkpoint(args.checkpoint, ema=not args.no_ema)
        config = model.config
        require_memory(args.checkpoint, config, device, min(args.batch_size, args.count), training=False)
        if config.in_channels not in MODES:
            raise ValueError(
                f"{args.checkpoint}: its images have {config.in_channels} channels, only 1 or 3 can be saved"
            )
        chosen: Sequence[int] = range(config.num_classes - 1)
        if args.classes:
            chosen = class_indices(args.classes, config, details.class_names if details is not None else [])
        classes = [chosen[i % len(chosen)] for i in range(args.count)] if chosen else None
        options = {name: vars(args)[name] for name in ("guidance", "sampler", "steps", "seed")}
        if is_folder:
            settings = {
                "model": weights_digest(model),
                "size": list(config.image_size),
                "device": device.type,
            } | options
            export = ImageExport(output, settings, classes, args.count)
            options |= {"batch_size": args.batch_size, "capture": not args.no_capture}
            draw_folder(model.to(device), export, args.overwrite, **options)
            print(printable(str(output)))
        else:
            check_grid(output, args.count, *config.image_size)
            picture = Grid(args.count, *config.image_size)
            options |= {"batch_size": args.batch_size, "capture": not args.no_capture}
            batches = generate_batches(model.to(device), range(args.count), classes, **options)
            for _, images in batches:
                picture.add(images)
            output.parent.mkdir(parents=True, exist_ok=True)
            save(picture.picture(), output)
        print(printable(str(grid)))


def draw_folder(model: HDiT, export: ImageExport, overwrite: bool, **options: Any) -> None:
    """Draws the images that the folder doesn't hold yet, and the grid beside it."""
    batches = generate_batches(model, range(export.count), export.classes, **options)  # looks at the options
    export.path.mkdir(parents=True, exist_ok=True)
    with alone_in(export.path):
        done = export.finished(overwrite)
        if done:
            tell(f"hdit.sample: {len(done)} of {export.count} images are there already")
            left = [number for number in range(export.count) if number not in done]
            classes = None if export.classes is None else [export.classes[number] for number in left]
            batches = generate_batches(model, left, classes, **options)
        written = len(done)
        try:
            with closing(batches):  # the bar is gone before an error is told
                for numbers, images in batches:
                    for number, image in zip(numbers, images, strict=True):
                        export.write(number, image)
                        written += 1
        except KeyboardInterrupt:
            what = f"{written} of {export.count} images are in {export.path}, the same command goes on"
            tell(f"hdit.sample: interrupted; {what}")
            sys.exit(130)
        export.write_grid()


if __name__ == "__main__":
    main()
