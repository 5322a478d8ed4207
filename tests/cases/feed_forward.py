"""Random cases of feed_forward: the widths that have one kernel on Hopper, and others."""

from __future__ import annotations

import random

import torch

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, strided


def feed_forward(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """Samples of any length, so that tiles of tokens are cut off."""
    width = sizes.choice([128, 256, 8 * sizes.randint(1, 40), sizes.randint(1, 100)])
    d_ff = 64 * sizes.choice([1, 2, 3, 6, 12]) if width in (128, 256) else sizes.randint(1, 200)
    leading = [sizes.randint(1, 5), *(sizes.randint(1, 20) for _ in range(sizes.randint(1, 2)))]
    parameters = torch.float32 if mixed else dtype
    return Case(
        f"feed_forward {leading} x {width}, d_ff {d_ff}",
        dict(
            x=strided(torch.randn(*leading, width, generator=values).to(dtype), sizes),
            scale=strided((0.3 * torch.randn(leading[0], width, generator=values)).to(parameters), sizes),
            up_weight=(torch.randn(2 * d_ff, width, generator=values) / width**0.5).to(parameters),
            down_weight=(torch.randn(width, d_ff, generator=values) / d_ff**0.5).to(parameters),
        ),
        hdit_kernels.feed_forward,
        reference.feed_forward,
        pooled=frozenset({"scale", "up_weight", "down_weight"}),
    )


OPERATORS = {"feed_forward": feed_forward}
