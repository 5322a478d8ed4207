"""Which neighborhood attention Hopper's own kernels take, and how they cut it into programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hdit_kernels import launch

TILE = 8  # rows and columns of a tile of queries (of keys in the dK/dV kernel): 64 rows of a warpgroup's product
WIDEST = 9  # window: a tile's keys span TILE + window − 1 columns, and a row of keys has 16
WIDEST_STREAMED = 13  # the same of hopper_backward_wide, which has four columns beyond those
LONGEST = 32  # tiles of a strip: no longer ones were faster where measured
MIN_REACH = 16  # tiles from a strip's first row on that 32-bit offsets must reach, whatever the length of strips
TRITON = ("3.6", "3.7")  # Gluon may change from one version of Triton to the next; others take the portable kernels


@functools.cache
def gluon_known() -> bool:
    """Whether this Triton is one whose Gluon these kernels are written in."""
    return triton.__version__.startswith(tuple(version + "." for version in TRITON))


@dataclass(frozen=True, eq=False)  # hashed by identity, at no cost
class Takes:
    """What a kernel takes of neighborhood attention, beside what all of them ask for (see `takes`)."""

    head_dims: tuple[int, ...]
    windows: range  # of the longer side


FORWARD = Takes((32, 64, 128), range(1, WIDEST + 1))
BACKWARD = Takes((32, 64), range(1, WIDEST + 1))
BACKWARD_WIDE = Takes((32, 64), range(WIDEST + 1, WIDEST_STREAMED + 1))


def takes(kernel: Takes, tensors: Sequence[Tensor], window: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a Hopper kernel takes these tensors, the first a query (on a Hopper GPU).

    All ask for 16-bit types, no dilation, and what `reads_wide` says.
    """
    query = tensors[0]
    strides = tuple([tensor.stride() for tensor in tensors])
    return (
        gluon_known()
        and _takes(kernel, query.shape, strides, query.dtype, tuple(window), tuple(dilation))
        and launch.aligned(*tensors)
    )


@functools.lru_cache(maxsize=4096)
def _takes(
    kernel: Takes,
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    dtype: torch.dtype,
    window: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """What `takes` asks of all but the addresses, in one look."""
    return (
        shape[-1] in kernel.head_dims
        and max(window) in kernel.windows
        and dtype in (torch.bfloat16, torch.float16)
        and max(dilation) == 1
        and within_reach(shape, strides)
    )


def reads_wide(*tensors: Tensor) -> bool:
    """Whether tokens start at multiples of 16 bytes, and a strip's offsets fit into 32 bits; of one shape."""
    return launch.aligned(*tensors) and within_reach(tensors[0].shape, tuple([tensor.stride() for tensor in tensors]))


@functools.lru_cache(maxsize=4096)
def within_reach(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> bool:
    """What `reads_wide` asks of all but the addresses."""
    batch, height = shape[:2]
    if max(batch, height // TILE + 1) > 65535:  # programs along an axis of the grid
        return False
    wide = all(step % 8 == 0 for stride in strides for step in stride[:-1])
    return wide and tiles_in_reach(shape, strides) >= MIN_REACH


def tiles_in_reach(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """How many tiles from a strip's first row on 32-bit offsets reach. Of what is written, a packed gradient has the
    longest rows.
    """
    _, _, width, heads, head_dim = shape
    row = max([3 * width * heads * head_dim, *[step for stride in strides for step in stride[1:3]]])
    return (2**31 - 1) // (row * TILE)


def rows_of_next(window: int) -> dict[str, int]:
    """The rows of keys beyond a tile's own eight, in two blocks: window − 1 in the middle, rounded up to what fits.

    Compile keys, so there are four of them for all windows.
    """
    more, last = next(blocks for blocks in ((2, 0), (4, 0), (4, 2), (8, 0)) if window - 1 <= sum(blocks))
    return {"MORE": more, "LAST": last}


def strips_down(
    columns: int, tiles: int, length: int, longest: int, multiprocessors: int, programs: Sequence[int]
) -> tuple[int, bool]:
    """Into how many strips of whole tiles a column of tiles is cut (what is left of the height follows), `columns` of
    them in all; and whether all strips run at once.

    They do if that is a wave: as many programs a multiprocessor as the first of `programs` that leaves at most a tenth
    of the places empty (or has a place for every tile) with strips of at most `longest` tiles. Else a strip has about
    `length` tiles. Measured on an H100 (the log).
    """
    for places in (each * multiprocessors for each in programs):
        strips = min(places // columns, tiles)
        if strips and (strips == tiles or strips * columns >= 0.9 * places):
            tallest = -(-tiles // strips)
            if tallest <= longest:
                return -(-tiles // tallest), True  # the fewest of this length
    return (tiles + length // 2) // length or min(tiles, 1), False


@functools.lru_cache(maxsize=4096)
def plan_strips(
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    window: Sequence[int],
    device: torch.device,
    programs: Sequence[int] = (),
    length: int = 3,
    longest: int = LONGEST,
) -> tuple[tuple[int, int, int], list[int], dict[str, Any]]:
    """Grid, integer arguments and constants of a launch over strips of tiles of [B, H, W, heads, head_dim] tensors.

    programs, length, longest: see `strips_down`; a kernel that has no programs takes one tile each. Cached, since it
    costs as much host time as the launch itself.
    """
    batch, height, width, heads, head_dim = shape
    tiles_x, (tiles, left) = -(-width // TILE), divmod(height, TILE)
    whole, at_once = tiles, False
    if programs:
        # Copies are two tiles ahead, and the first rows of keys before the strip.
        longest = min(longest, tiles_in_reach(shape, strides) - 3)
        columns, multiprocessors = batch * heads * tiles_x, launch.multiprocessors(device)
        whole, at_once = strips_down(columns, tiles, length, longest, multiprocessors, programs)
    integers = [height, width, heads, whole, *(divmod(tiles, whole) if whole else (0, 0))]
    if programs:
        # Strips that run at once are walked down and up by turns, so that neighbours read the rows that both need at
        # the same time. An even window is not the same upwards.
        integers.append(int(at_once and window[0] % 2))
    integers += window
    integers += [step // 8 for stride in strides for step in stride[:-1]]
    constants = {"D": head_dim, "num_warps": 4}
    if max(window) <= WIDEST:
        constants |= rows_of_next(window[0])
    return (heads * tiles_x, whole + (left > 0), batch), integers, constants
