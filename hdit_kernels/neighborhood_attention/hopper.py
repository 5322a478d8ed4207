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
WIDEST_STREAMED = 13  # of hopper_backward_13, which has four columns beyond those
STRIP = 3  # tiles that a program walks down, see tiles_of_a_strip
LONGEST = 8
TRITON = ("3.6", "3.7")  # Gluon may change from one version of Triton to the next; others take the portable kernels


@functools.cache
def gluon_known() -> bool:
    """Whether this Triton is one whose Gluon these kernels are written in."""
    return triton.__version__.startswith(tuple(version + "." for version in TRITON))


def takes_forward(query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether Hopper's forward kernels take these tensors (on a Hopper GPU).

    16-bit types, no dilation, tokens that start at multiples of 16 bytes; head_dim 32, 64 or 128, windows up to 9x9.
    """
    return query.shape[-1] in (32, 64, 128) and max(window) <= WIDEST and _takes(query, key, value, dilation)


def takes_backward(query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], dilation: Sequence[int]) -> bool:
    """The same of the backward kernels: head_dim 32 or 64, windows up to 13x13."""
    return query.shape[-1] in (32, 64) and max(window) <= WIDEST_STREAMED and _takes(query, key, value, dilation)


def _takes(query: Tensor, key: Tensor, value: Tensor, dilation: Sequence[int]) -> bool:
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and max(dilation) == 1
        and gluon_known()
        and aligned(query, key, value)
        and within_reach(query.shape, (query.stride(), key.stride(), value.stride()))
    )


def aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@functools.lru_cache(maxsize=4096)
def within_reach(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> bool:
    """Whether tokens start at multiples of 8 elements, and the offsets of a strip fit into 32 bits in these tensors and
    in a packed gradient, whose rows are the longest that are written.
    """
    _, _, width, heads, head_dim = shape
    row = max(3 * width * heads * head_dim, *(step for stride in strides for step in stride[1:3]))
    return row * TILE * (LONGEST + 3) < 2**31 and all(step % 8 == 0 for stride in strides for step in stride[:-1])


def rows_of_next(window: int) -> dict[str, int]:
    """The rows of keys beyond a tile's own eight, in two boxes: window − 1 in the middle, rounded up to what fits.

    Compile keys, so there are four of them for all windows.
    """
    more, last = next(boxes for boxes in ((2, 0), (4, 0), (4, 2), (8, 0)) if window - 1 <= sum(boxes))
    return {"MORE": more, "LAST": last}


@functools.lru_cache(maxsize=4096)
def strips_down(columns: int, tiles: int, at_once: int) -> int:
    """Into how many strips of whole tiles each of the columns of tiles is cut."""
    for_one_wave = at_once * 132 // columns
    if for_one_wave and tiles <= LONGEST * for_one_wave:
        return min(for_one_wave, tiles)
    return -(-tiles // STRIP)


@functools.lru_cache(maxsize=4096)
def plan(
    shape: Sequence[int], strides: Sequence[Sequence[int]], window: Sequence[int], at_once: int
) -> tuple[tuple[int], list[int], dict[str, Any]]:
    """Grid, integer arguments and constants of a launch over strips of tiles of [B, H, W, heads, head_dim] tensors.

    at_once: programs that a multiprocessor runs at a time; 0 for programs that take one tile each. Cached, since it costs
    as much host time as the launch itself.
    """
    batch, height, width, heads, head_dim = shape
    tiles_x = -(-width // TILE)
    whole = height // TILE
    down = (strips_down(batch * heads * tiles_x, whole, at_once) if at_once else whole) + (height % TILE > 0)
    integers = [height, width, heads, down, tiles_x, *window]
    integers += [step // 8 for stride in strides for step in stride[:-1]]
    constants = {"D": head_dim, "num_warps": 4}
    if max(window) <= WIDEST:
        constants |= rows_of_next(window[0])
    return (batch * heads * down * tiles_x,), integers, constants
