"""Trains an HDiT on one device: python -m hdit.train --data FOLDER --config PRESET --output RUN

The run's folder gets checkpoint.safetensors (see hdit.checkpoint), loss.csv and samples/<step>.png. Ctrl-C or SIGTERM
saves a checkpoint and stops; --resume continues with exactly the losses that an unbroken run has: batches, noise,
noise levels and dropout are functions of the seed and the step alone, so no generator's state needs saving.

The recipe is k-diffusion's for HDiT (Crowson et al. 2024, arXiv 2401.11605): AdamW, gradients clipped to norm 1, noise
levels from the interpolated cosine schedule, stratified over the batch, soft-min-SNR weighting, an average of the
weights with a warm-up, one label in ten dropped for classifier-free guidance, bfloat16 autocast on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hdit._runtime import at_least, autocast, one_line_errors, pick_device, progress
from hdit.checkpoint import CheckpointError, Details, read_details, resume, save_checkpoint
from hdit.config import HDiTConfig, presets, require_memory
from hdit.data import BatchOrder, DataError, Digits, Images, open_images, seed_of
from hdit.denoiser import Denoiser
from hdit.densities import enable_stratified, rand_cosine_interpolated
from hdit.ema import ema_decay, ema_update
from hdit.kdiffusion import config_from_kdiffusion
from hdit.model import HDiT
from hdit.sample import generate, image_grid

CHECKPOINT = "checkpoint.safetensors"
CLASS_DROPOUT = 0.1
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Options:
    """What a run is made with, beside the model's configuration. Kept in its checkpoint.

    data: what hdit.data.open_images takes. steps: of the optimizer, in all. lr: learning rate (a third of it for the
    mapping network). save_every, sample_every: steps between checkpoints, and between grids of samples (0: no grids).
    workers: processes that read images.
    """

    data: str
    steps: int = 100_000
    batch_size: int = 64
    lr: float = 5e-4
    seed: int = 0
    save_every: int = 1000
    sample_every: int = 1000
    workers: int = 4


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


class Stopped(Exception):
    """A signal ended the run; number: which one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def train(
    config: HDiTConfig, images: Images, options: Options, output: Path, device: torch.device, resuming: bool = False
) -> HDiT:
    """Trains a model from its beginning, or from the checkpoint in output if resuming, until options.steps.

    Returns the averaged model. Raises CheckpointError if output has a checkpoint and shouldn't, or the other way round;
    DataError if resuming with other images; NonFiniteLoss, keeping the last checkpoint; Stopped after a signal, with
    the checkpoint saved.
    """
    path = output / CHECKPOINT
    if path.exists() and not resuming:
        raise CheckpointError(f"{path} exists: pass --resume to go on with it, or another --output")
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed_of(options.seed, "model"))
    model = HDiT(config).to(device).train()
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.param_groups(options.lr), betas=(0.9, 0.95), weight_decay=1e-3, fused=device.type == "cuda"
    )
    denoiser = Denoiser(model, config.sigma_data, weighting="soft-min-snr")
    details = Details(
        config.to_dict(), 0, asdict(options), list(images.class_names), list(images.excluded), images.fingerprint
    )
    if resuming:
        found = resume(path, model, ema_model, optimizer)
        if found.data != details.data:
            raise DataError(f"{options.data} holds other images than those {path} was trained on: restore them")
        if found.step >= options.steps:
            raise CheckpointError(f"{path} has done {found.step} of {options.steps} steps: pass a larger --steps")
        details = replace(details, step=found.step)

    order = BatchOrder(len(images), options.batch_size, options.seed, details.step, options.steps)
    workers = 0 if isinstance(images, Digits) else options.workers  # the digits are in memory
    pinned = device.type == "cuda"
    loader = DataLoader(
        images, batch_sampler=order, num_workers=workers, pin_memory=pinned, worker_init_fn=_leave_group
    )
    with (
        LossLog(output / "loss.csv", details.step) as log,
        progress(loader, desc="training", initial=details.step, total=options.steps) as bar,
        stop_signals() as caught,
    ):
        for step, (pixels, labels) in enumerate(bar, details.step + 1):
            torch.manual_seed(seed_of(options.seed, "step", step))
            optimizer.zero_grad()
            loss = batch_loss(denoiser, config, pixels.to(device, non_blocking=True), labels.to(device))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            values = torch.stack([loss.detach(), norm]).tolist()  # the step's one wait for a GPU
            if not all(map(math.isfinite, values)):
                kept = f"{path} holds step {details.step}: --resume from it" if details.step else "start again"
                what = f"step {step}: the loss is {values[0]:g} and the norm of its gradient {values[1]:g}"
                raise NonFiniteLoss(f"{what}; {kept} with a lower --lr than {options.lr:g}")
            optimizer.step()
            ema_update(model, ema_model, ema_decay(step - 1))

            bar.set_postfix(loss=f"{log.write(step, *values):.4f}", refresh=False)
            last = step == options.steps or bool(caught)
            if last or step % options.save_every == 0:
                details = replace(details, step=step)
                save_checkpoint(path, model, ema_model, optimizer, details)
            if caught:
                raise Stopped(caught[0])
            if options.sample_every and (last or step % options.sample_every == 0):
                save_samples(ema_model, output / "samples" / f"{step:08}.png")
    return ema_model


def batch_loss(denoiser: Denoiser, config: HDiTConfig, pixels: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a batch: pixels uint8 [B, C, H, W], labels int64 [B]. Random by torch's global generator."""
    x = pixels.float() / 127.5 - 1
    cond: dict[str, Tensor] = {}
    if config.null_class is not None:
        dropped = torch.rand(labels.shape, device=labels.device) < CLASS_DROPOUT
        cond["class_cond"] = labels.masked_fill(dropped, config.null_class)
    side = max(config.image_size)
    with enable_stratified():
        sigma = rand_cosine_interpolated(
            x.shape[:1], image_d=side, noise_d_low=min(32, side), noise_d_high=side, sigma_data=config.sigma_data,
            min_value=min(config.sigma_min, 1e-3), max_value=max(config.sigma_max, 1e3), device=x.device,
        )  # fmt: skip
    with autocast(x.device):
        return denoiser.loss(x, torch.randn_like(x), sigma, **cond).mean()


def save_samples(model: HDiT, path: Path, count: int = 36) -> None:
    """Writes a grid of samples, of each class in turn."""
    classes = [i % (model.config.num_classes - 1) for i in range(count)] if model.config.num_classes else None
    path.parent.mkdir(exist_ok=True)
    image_grid(generate(model, count, classes)).save(path)


class LossLog:
    """loss.csv: step, loss, gradient_norm; a line a step, on disk at once. Lines after step `last` are taken back."""

    def __init__(self, path: Path, last: int) -> None:
        path.touch()
        self._file = open(path, "r+", buffering=1)
        whole = [line for line in self._file.readlines()[1:] if line.endswith("\n")]
        kept = [line for line in whole if int(line.partition(",")[0]) <= last]
        self._file.seek(0)
        self._file.truncate()
        self._file.writelines(["step,loss,gradient_norm\n", *kept])
        self._mean: float | None = None

    def write(self, step: int, loss: float, norm: float) -> float:
        """Adds a line; returns the loss smoothed over about fifty steps."""
        self._file.write(f"{step},{loss!r},{norm!r}\n")
        self._mean = loss if self._mean is None else self._mean + 0.02 * (loss - self._mean)
        return self._mean

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM inside enters; the second has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _leave_group(worker: int) -> None:
    """Signals to the process group (Ctrl-C, a scheduler's SIGTERM) reach the main process only, which ends the workers
    once it has saved.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_config(name: str) -> HDiTConfig:
    """A preset by its name, or a .json file with HDiTConfig.to_dict() or a k-diffusion configuration.

    Raises ValueError, naming the file, if it is neither.
    """
    if name in presets:
        return presets[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {name}, and the presets are {', '.join(presets)}")
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return config_from_kdiffusion(content) if "model" in content else HDiTConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {name}: {error}") from error


def fit_classes(config: HDiTConfig, images: Images, class_cond: bool | None) -> HDiTConfig:
    """config with the class table that class_cond asks for: made for the data's classes, none, or left as it is.

    Raises DataError if the table and the data's classes don't fit.
    """
    count = len(images.class_names)
    if class_cond is False:
        return replace(config, num_classes=0)
    if class_cond and not count:
        raise DataError("--class-cond: the images have no classes; put each into a folder named after its class")
    if class_cond:
        return replace(config, num_classes=count + 1)
    if config.num_classes and config.num_classes != count + 1:
        raise DataError(
            f"the model has {config.num_classes - 1} classes, the data {count}: "
            "pass --class-cond to make the model's as the data's, or --no-class-cond to train without"
        )
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    default = {field.name: field.default for field in fields(Options)}
    parser = argparse.ArgumentParser(
        "python -m hdit.train", description="Trains an HDiT on one device.", argument_default=argparse.SUPPRESS
    )

    def add(name: str, kind: Any, text: str) -> None:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (default: {default[name]})")

    parser.add_argument("--data", help="an image folder, a .zip of one, or the word digits")
    parser.add_argument("--config", help=f".json of hdit or k-diffusion, or a preset: {', '.join(presets)}")
    parser.add_argument("--output", default="run", help="folder of this run (default: run)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, as it was started")
    parser.add_argument("--image-size", type=at_least(1), help="side of the images in pixels, instead of the config's")
    parser.add_argument(
        "--class-cond", action=argparse.BooleanOptionalAction, help="the data's classes or none (default: the config's)"
    )
    add("steps", at_least(1), "steps in all")
    add("batch_size", at_least(1), "images a step")
    add("lr", float, "learning rate")
    add("seed", int, "seed of everything random")
    add("save_every", at_least(1), "steps between checkpoints")
    add("sample_every", at_least(0), "steps between grids of samples, 0 for none")
    add("workers", at_least(0), "processes that read images")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    args = vars(parser.parse_args(arguments))

    with one_line_errors("hdit.train"):
        output, resuming, device = Path(args["output"]), "resume" in args, pick_device(args.get("device"))
        chosen = {name: value for name, value in args.items() if name in default}
        details = read_details(output / CHECKPOINT) if resuming else None
        if resuming and details is None:
            raise CheckpointError(f"{output / CHECKPOINT} was not written by hdit.train: pass another --output")
        if details is not None:
            options = Options(**(details.options | chosen))
            config = read_config(args["config"]) if "config" in args else HDiTConfig.from_dict(details.config)
        elif "data" in args and "config" in args:
            options, config = Options(**chosen), read_config(args["config"])
        else:
            raise ValueError("--data and --config are needed (or --resume): see --help")
        if "image_size" in args:
            config = replace(config, image_size=(args["image_size"], args["image_size"]))
        excluded = details.excluded if details is not None else None
        images = open_images(options.data, config.image_size, config.in_channels, excluded)
        config = fit_classes(config, images, args.get("class_cond"))
        require_memory(config, device)
        print(f"{len(images):,} images, {len(images.class_names) or 'no'} classes, on {device}", file=sys.stderr)
        try:
            train(config, images, options, output, device, resuming)
        except Stopped as stop:
            print(f"hdit.train: {stop}; saved {output / CHECKPOINT}, go on with --resume", file=sys.stderr)
            sys.exit(128 + stop.number)
        print(output / CHECKPOINT)


if __name__ == "__main__":
    main()
