"""Which neighborhood attention Hopper's own kernels take, and how they cut it into programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

TILE = 8  # rows and columns of a tile of queries (of keys in the dK/dV kernel): 64 rows of a warpgroup's product
WIDEST = 9  # window: a tile's keys span TILE + window − 1 columns, and a row of keys has 16
STRIP = 3  # tiles that a program walks down, see tiles_of_a_strip
LONGEST = 8
TRITON = ("3.6", "3.7")  # Gluon may change from one version of Triton to the next; others take the portable kernels


@functools.cache
def gluon_known() -> bool:
    """Whether this Triton is one whose Gluon these kernels are written in."""
    return triton.__version__.startswith(tuple(version + "." for version in TRITON))


def takes(query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether Hopper's kernels take these tensors (on a Hopper GPU), forward and backward alike.

    16-bit types, head_dim 32 or 64, windows up to 9x9 without dilation, rows that start at multiples of 16 bytes.
    """
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in (32, 64)
        and max(window) <= WIDEST
        and max(dilation) == 1
        and gluon_known()
        and all(reads_wide(tensor) for tensor in (query, key, value))
    )


def reads_wide(tensor: Tensor) -> bool:
    """Whether every token starts at a multiple of 16 bytes and a strip's offsets fit into 32 bits."""
    row = max(tensor.stride(1), 3 * tensor.stride(2))  # 3: the gradient may be a slice of a packed one
    return (
        tensor.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
        and row * TILE * (LONGEST + 3) < 2**31
    )


def rows_of_next(window: int) -> dict[str, int]:
    """The rows of keys beyond a tile's own eight, in two boxes: window − 1 in the middle, rounded up to what fits.

    Compile keys, so there are four of them for all windows.
    """
    more, last = next(boxes for boxes in ((2, 0), (4, 0), (4, 2), (8, 0)) if window - 1 <= sum(boxes))
    return {"MORE": more, "LAST": last}


@functools.lru_cache(maxsize=4096)
def tiles_of_a_strip(batch: int, height: int, width: int, heads: int) -> int:
    """How many tiles a program walks down, keeping the rows of keys that the next tile shares.

    Measured on an H100: three are at or within a hundredth of the best; whole short columns gain 2%, and a grid whose
    strips of eight are all in flight at once gains up to 7%.
    """
    tiles, columns = height // TILE, batch * heads * -(-width // TILE)
    if tiles % LONGEST == 0 and 132 < tiles // LONGEST * columns <= 3 * 132:
        return LONGEST
    return 4 if tiles == 4 else STRIP


def strips(batch: int, height: int, width: int, heads: int) -> tuple[int, dict[str, int]]:
    """Number of programs and their integers: strips of whole tiles, and of what is left of the height one more."""
    tiles = tiles_of_a_strip(batch, height, width, heads)
    down, across = -(-(height // TILE) // tiles) + (height % TILE > 0), -(-width // TILE)
    return batch * heads * down * across, {"tiles": tiles, "strips": down, "tiles_x": across}


def strides(*tensors: Tensor) -> list[int]:
    """In units of eight elements, of all dimensions but the last."""
    return [stride // 8 for tensor in tensors for stride in tensor.stride()[:-1]]


def settings(query: Tensor, window: Sequence[int]) -> dict[str, Any]:
    """What every launch is given beside pointers and strides."""
    return {"D": query.shape[-1], "num_warps": 4, **rows_of_next(window[0])}
