"""What a run of hdit.train is made with, beside the model's configuration and the recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hdit._runtime import Parser, at_least
from hdit.checkpoint import CheckpointError, Details
from hdit.config import presets
from hdit.recipe import Recipe
from hdit_kernels import checks

RANGES = {
    "steps": (1, 10**12),
    "batch_size": (1, 10**6),
    "seed": (-(2**63), 2**63 - 1),
    "save_every": (1, 10**12),
    "sample_every": (0, 10**12),
    "workers": (0, 1000),
}  # of an integer option, the least and the most
EXACTNESS = {"seed": "the losses", "batch_size": "the losses and the order of the images"}  # that a change changes


@dataclass(frozen=True)
class Options:
    """What a run is made with, beside the model's configuration. Kept in its checkpoint.

    data: what hdit.data.open_images takes. steps: of the optimizer, in all. lr: learning rate (a third of it for the
    mapping network), at most 1, None for the recipe's. seed: any integer. save_every, sample_every: steps between
    checkpoints, and between grids of samples (0: no grids). workers: processes that read images. capture: steps and
    samples as CUDA graphs, where the device is a GPU; the numbers are the same.
    Raises TypeError or ValueError, naming the option.
    """

    data: str
    steps: int = 100_000
    batch_size: int = 64
    lr: float | None = None
    seed: int = 0
    save_every: int = 1000
    sample_every: int = 1000
    workers: int = 4
    capture: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(f"data: expected a folder, a .zip file or the word digits, got {self.data!r}")
        for name, (least, most) in RANGES.items():
            value = checks.integer(name, getattr(self, name), least, most)
            object.__setattr__(self, name, value)  # NumPy's integers are no JSON
        checks.boolean("capture", self.capture)
        if self.lr is not None:
            object.__setattr__(self, "lr", checks.number("lr", self.lr, above=0, at_most=1))


def options_of(path: Path, details: Details) -> Options:
    """The options in the details of the checkpoint at path. Raises CheckpointError if they are none."""
    try:
        return Options(**details.options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its options are damaged or of another version of hdit ({error})") from error


def chosen_options(chosen: dict[str, Any], before: Options | None = None) -> Options:
    """Options of the command line, the rest as before or by default. Raises ValueError, naming the argument."""
    try:
        return Options(**chosen) if before is None else replace(before, **chosen)
    except (TypeError, ValueError) as error:
        name, _, what = str(error).partition(":")
        raise ValueError(f"--{name.replace('_', '-')}:{what}") from error


def changes(before: Mapping[str, Any], now: Options) -> list[str]:
    """A line on each option of a resumed run that is not what it was before."""
    lines = []
    for name, value in asdict(now).items():
        if before.get(name, value) != value:
            what = f"; {EXACTNESS[name]} are not those of an unbroken run from here on" if name in EXACTNESS else ""
            lines.append(f"--{name.replace('_', '-')} is {value} now and was {before[name]}{what}")
    return lines


def parser() -> Parser:
    """Of the command line; it gives only the arguments that are passed, --output apart."""
    default = {field.name: field.default for field in fields(Options)}
    command = Parser(
        "python -m hdit.train",
        description="Trains an HDiT on one device, or on several: torchrun --nproc_per_node N -m hdit.train …",
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, kind: Any, text: str) -> None:
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (default: {default[name]})")

    command.add_argument("--data", help="an image folder, a .zip of one, or the word digits")
    command.add_argument("--config", help=f".json of hdit or k-diffusion, or a preset: {', '.join(presets)}")
    command.add_argument("--output", default="run", help="folder of this run (default: run)")
    command.add_argument("--resume", action="store_true", help="go on with the run in --output, as it was started")
    command.add_argument("--image-size", type=at_least(1), help="side of the images in pixels, instead of the config's")
    command.add_argument(
        "--class-cond", action=argparse.BooleanOptionalAction, help="the data's classes or none (default: the config's)"
    )
    add("steps", at_least(1), "steps in all")
    add("batch_size", at_least(1), "images a step, of all processes together")
    command.add_argument("--lr", type=float, help=f"learning rate (default: the config's, or {Recipe.lr})")
    add("seed", int, "seed of everything random")
    add("save_every", at_least(1), "steps between checkpoints")
    add("sample_every", at_least(0), "steps between grids of samples, 0 for none")
    add("workers", at_least(0), "processes that read images")
    command.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, help="steps and samples as CUDA graphs (default: on a GPU)"
    )
    command.add_argument(
        "--device",
        help="cpu, cuda, cuda:<number> or mps (default: a GPU if there is one; of several processes each has its own)",
    )
    return command
