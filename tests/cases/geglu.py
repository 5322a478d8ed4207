"""Random cases of geglu."""

from __future__ import annotations

import random

import torch

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, strided


def geglu(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    d_ff = sizes.choice(
        [sizes.randint(1, 40), sizes.randint(1, 600), 8 * sizes.randint(1, 200), 128 * sizes.randint(1, 24)]
    )
    leading = [sizes.randint(1, 17) for _ in range(sizes.randint(1, 3))]
    x = torch.randn(*leading, 2 * d_ff, generator=values) * 2 ** sizes.uniform(-3, 3)
    return Case(
        f"geglu {list(x.shape)}",
        dict(x=strided(x.to(dtype), sizes)),
        hdit_kernels.geglu,
        reference.geglu,
    )


OPERATORS = {"geglu": geglu}
