"""A small HDiT learns handwritten digits: trained, saved, loaded, sampled from and judged, in a few minutes on a CPU.

Writes samples.png and loss.png into demo_output/. On a GPU the same code runs the Triton kernels, at larger sizes.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from hdit._extras import require
from hdit._runtime import Parser, environment, one_line_errors, pick_device, printable, writable
from hdit.checkpoint import load_checkpoint
from hdit.config import GlobalAttention, HDiTConfig, Level, Mapping, NeighborhoodAttention
from hdit.data import Digits
from hdit.sample import generate, image_grid
from hdit.train import CHECKPOINT, Options, train

OUTPUT = Path("demo_output")
ENOUGH = 0.8  # share of the samples that must be recognised
PICTURES = ("samples", "loss")
NEEDS = ("safetensors.torch", "PIL.Image", "tqdm", "numpy", "matplotlib.figure", "sklearn.svm")


@dataclass(frozen=True)
class Settings:
    """How large the digits' model is, how long it trains and how it is sampled from."""

    config: HDiTConfig
    steps: int
    batch_size: int
    lr: float
    guidance: float
    sampling_steps: int = 25
    per_class: int = 10


def _digits_config(side: int, depth: int, kernel_size: int, width: int, head_dim: int) -> HDiTConfig:
    return HDiTConfig(
        levels=(
            Level(depth, width, attention=NeighborhoodAttention(head_dim, kernel_size)),
            Level(2, 2 * width, attention=GlobalAttention(head_dim)),
        ),
        mapping=Mapping(depth=1, width=2 * width),
        image_size=(side, side),
        in_channels=1,
        patch_size=(2, 2),
        num_classes=11,
        sigma_data=0.7,  # the standard deviation of the digits' pixels
        sigma_max=80.0,
    )


ON_CPU = Settings(_digits_config(16, 1, 3, 64, 32), steps=1000, batch_size=32, lr=2e-3, guidance=2.0)
ON_GPU = Settings(_digits_config(32, 2, 7, 128, 64), steps=2000, batch_size=256, lr=1e-3, guidance=2.0)


def digits_demo(output: Path, settings: Settings, device: torch.device) -> float:
    """Trains, saves, loads and samples a model of the digits; writes samples.png and loss.png into output.

    Returns the share of the samples that a classifier fitted on the real digits takes for the digit asked for.
    """
    config, run = settings.config, output / "digits"
    shutil.rmtree(run, ignore_errors=True)  # of an earlier demonstration
    images = Digits(config.image_size, config.in_channels)
    steps, batch_size, lr = settings.steps, settings.batch_size, settings.lr
    options = Options("digits", steps, batch_size, lr, save_every=steps, sample_every=0)
    train(config, images, options, run, device)

    model = load_checkpoint(run / CHECKPOINT).to(device)
    classes = [digit for _ in range(settings.per_class) for digit in range(10)]  # a row has each digit once
    samples = generate(
        model, len(classes), classes, guidance=settings.guidance, steps=settings.sampling_steps, batch_size=len(classes)
    )
    image_grid(samples, columns=10).resize((10 * 48, settings.per_class * 48), 0).save(output / "samples.png")
    plot_loss(run / "loss.csv", output / "loss.png")

    share, accuracy = recognised(images, samples, classes)
    print(f"{share:.0%} of the {len(classes)} samples are taken for the digit that was asked for,")
    print(f"by a classifier that is right about {accuracy:.1%} of the real digits held out from it")
    return share


def recognised(images: Digits, samples: Tensor, classes: Sequence[int]) -> tuple[float, float]:
    """The share of samples given their class by a support vector machine fitted on three quarters of images.

    Also returns the machine's accuracy on the last quarter.
    """
    split = require("sklearn.model_selection", "demo").train_test_split
    pixels = images.images.flatten(1).numpy() / 255
    labels = images.labels
    fitted, held_out, digits, truth = split(pixels, labels, test_size=0.25, random_state=0, stratify=labels)
    classifier = require("sklearn.svm", "demo").SVC().fit(fitted, digits)
    return classifier.score(samples.flatten(1).numpy() / 255, classes), classifier.score(held_out, truth)


def plot_loss(log: Path, picture: Path) -> None:
    """Draws the losses in a run's loss.csv, and their mean over the steps up to 25 away."""
    with open(log, newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    reach = [min(25, i, len(losses) - 1 - i) for i in range(len(losses))]
    means = [fmean(losses[i - r : i + r + 1]) for i, r in enumerate(reach)]
    figure = require("matplotlib.figure", "demo").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", label="a step's loss")
    axes.plot(range(1, len(losses) + 1), means, color="C0", label="mean of 51 steps")
    axes.set(xlabel="step", ylabel="loss (soft-min-SNR weighted)", yscale="log", title="HDiT on scikit-learn's digits")
    axes.legend()
    figure.savefig(picture, dpi=120)


def look_ahead() -> None:
    """Raises ModuleNotFoundError, OSError or ValueError for what would stop the demonstration at its end."""
    for module in NEEDS:
        require(module, "demo")
    writable(OUTPUT)
    for name in PICTURES:
        if (OUTPUT / f"{name}.png").is_dir():
            raise ValueError(f"can't write {OUTPUT / name}.png: it is a folder")


def main(argv: Sequence[str] | None = None) -> None:
    Parser("python -m hdit.demo", description=__doc__).parse_args(argv)
    with one_line_errors("hdit.demo"):
        device = pick_device()
        look_ahead()
        OUTPUT.mkdir(exist_ok=True)
        threads = torch.get_num_threads()
        # A second thread brings tensors this small next to nothing, and on busy cores makes them ten times slower:
        # OpenMP's threads wait for each other by spinning.
        torch.set_num_threads(1)
        share = digits_demo(OUTPUT, ON_CPU if device.type == "cpu" else ON_GPU, device)
        torch.set_num_threads(threads)

        print()
        for name in PICTURES:
            print(printable(f"{name:7} {(OUTPUT / name).resolve()}.png"))
        print("\n".join(environment()))
        if share < ENOUGH:
            sys.exit(f"hdit.demo: error: only {share:.0%} of the samples are recognised, {ENOUGH:.0%} are expected")


if __name__ == "__main__":
    main()
