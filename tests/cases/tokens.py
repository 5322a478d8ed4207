"""Random cases of token_merge and token_split, the latter with and without a skip."""

from __future__ import annotations

import functools
import random

import torch

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, strided, turn

PATCH_SIZES = ((2, 2), (4, 4), (2, 4), (3, 1), (1, 1))


def sides(
    sizes: random.Random, dtype: torch.dtype, mixed: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int, int, int], int]:
    """patch_size, the shapes of the fine and of the coarse tokens, and h·w·C.

    Channels and features decide on compile keys by being multiples of 8 or not; a kind of dtypes has one of the four.
    """
    share = turn(dtype, mixed)
    h, w = patch_size = sizes.choice(PATCH_SIZES)
    batch, height, width = sizes.randint(1, 8), sizes.randint(1, 20), sizes.randint(1, 20)
    channels = sizes.choice([8 * sizes.randint(1, 16), 64, 128] if share % 2 else [1, 3, _odd(sizes, 70)])
    features = sizes.choice([8 * sizes.randint(1, 40), 128, 256]) if share // 2 % 2 else _odd(sizes, 200)
    return patch_size, (batch, height * h, width * w, channels), (batch, height, width, features), h * w * channels


def _odd(sizes: random.Random, largest: int) -> int:
    """No multiple of 8."""
    return sizes.choice([n for n in range(1, largest) if n % 8])


def activation(
    shape: tuple[int, ...], sizes: random.Random, values: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Tokens in some layout; at random an image [B, C, H, W] seen channels last, whose last stride is not 1."""
    batch, height, width, channels = shape
    if sizes.randrange(4) == 0:
        return torch.randn(batch, channels, height, width, generator=values).to(dtype).movedim(-3, -1)
    return strided(torch.randn(shape, generator=values).to(dtype), sizes)


def parameter(
    rows: int, columns: int, sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool
) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=values) / columns**0.5
    return strided(weight if mixed else weight.to(dtype), sizes)


def token_merge(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    patch_size, fine, coarse, columns = sides(sizes, dtype, mixed)
    return Case(
        f"token_merge {list(fine)} -> {list(coarse)}",
        dict(
            x=activation(fine, sizes, values, dtype),
            weight=parameter(coarse[3], columns, sizes, values, dtype, mixed),
        ),
        functools.partial(hdit_kernels.token_merge, patch_size=patch_size),
        functools.partial(reference.token_merge, patch_size=patch_size),
        pooled=frozenset({"weight"}),
    )


def token_split(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    patch_size, fine, coarse, columns = sides(sizes, dtype, mixed)
    tensors = dict(
        x=activation(coarse, sizes, values, dtype),
        weight=parameter(columns, coarse[3], sizes, values, dtype, mixed),
    )
    if sizes.randrange(3) > 0:
        fac = torch.rand(1, generator=values)
        tensors |= dict(skip=activation(fine, sizes, values, dtype), fac=fac if mixed else fac.to(dtype))
    return Case(
        f"token_split {list(coarse)} -> {list(fine)}{', skip' if 'skip' in tensors else ''}",
        tensors,
        functools.partial(hdit_kernels.token_split, patch_size=patch_size),
        functools.partial(reference.token_split, patch_size=patch_size),
        pooled=frozenset({"weight", "fac"}),
    )


OPERATORS = {"token_merge": token_merge, "token_split": token_split}
