"""Training: one step of hdit.train, of the presets beside the reference HDiT (k-diffusion) and DiT.

A step is the denoiser's loss on a fixed batch, its backward pass, the clipping of the gradient, AdamW and the running
average of the weights: the same code for all, only the network differs. Loading images is not part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import model

PASSES = ("step",)
BATCHES = {name: batches[-1:] for name, batches in model.BATCHES.items()}  # unless others are asked for

add_arguments = model.add_arguments


def run(args: argparse.Namespace) -> int:
    return model.run_passes(args, "train", PASSES, BATCHES)


def listing(patterns: Sequence[str] = ()) -> list[str]:
    """Lines for `python -m benchmarks list`, of cases that a pattern matches."""
    return model.list_passes("train", PASSES, patterns, BATCHES)
