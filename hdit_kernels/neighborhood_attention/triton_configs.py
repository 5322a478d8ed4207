"""Launch configurations of the portable neighborhood attention kernels: plain functions of GPU family, dtype, head_dim
and window. A family that was measured has a table, which `python -m benchmarks tune` writes; every other one has
configurations that compile and fit everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import triton

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention import triton_configs_hopper

MAX_GRID = 65535  # programs along any axis but the first
MEASURED_DIM = 128  # the largest head_dim of the tables
MAX_OFFSET = 2**31  # of offsets in 32 bits


class Config(NamedTuple):
    """A program handles tile_y x tile_x queries (keys in the dK/dV kernel) and reads the other side in blocks of
    block_y x block_x. max_registers a thread, where fewer than the compiler takes let more programs run at a time.
    """

    tile_y: int
    tile_x: int
    block_y: int
    block_x: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launch takes as keywords (AMD's has no limit of registers)."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def products(self, window: Sequence[int]) -> int:
        """Keys with which each query of an inner tile is multiplied: whole blocks, of which it sees one window."""
        rows, columns = self.tile_y + window[0] - 1, self.tile_x + window[1] - 1
        return -(-rows // self.block_y) * self.block_y * -(-columns // self.block_x) * self.block_x


# Of GPU family, dtype, the larger head_dim (queries' or values') and window.
Configure = Callable[[str, torch.dtype, int, Sequence[int]], Config]

# {(bits, head_dim): {window: the fields of a Config}}
Table = dict[tuple[int, int], dict[int, tuple[int, int, int, int, int, int, int | None]]]


def forward_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if head_dim > MEASURED_DIM:
        return wide_config(dtype, head_dim)
    if family == "hopper":
        return measured(triton_configs_hopper.FORWARD, dtype, head_dim, window)
    if dtype == torch.float32:
        stages = 2 if head_dim <= 64 else 1
        return fewest_products(window, Config(4, 8, 1, 16, 4, stages), Config(8, 4, 1, 16, 4, stages))
    return fewest_products(window, Config(8, 8, 2, 16, 4, 2), Config(16, 4, 2, 16, 4, 2), Config(4, 16, 1, 32, 4, 2))


def dq_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if head_dim > MEASURED_DIM:
        return wide_config(dtype, head_dim)
    if family == "hopper":
        return measured(triton_configs_hopper.DQ, dtype, head_dim, window)
    return backward_config(dtype, head_dim, window)


def dkdv_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if head_dim > MEASURED_DIM:
        return wide_config(dtype, head_dim)
    if family == "hopper":
        return measured(triton_configs_hopper.DKDV, dtype, head_dim, window)
    return backward_config(dtype, head_dim, window)


def wide_config(dtype: torch.dtype, head_dim: int) -> Config:
    """Small tiles, whose long rows fit into shared memory. Not measured."""
    return Config(4, 8, 1, 16, 4, 1) if head_dim * dtype.itemsize <= 512 else Config(4, 4, 1, 16, 4, 1)


def measured(table: Table, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    """Of the entries of the next larger head_dim, that of the next larger window; a rectangle counts by its larger
    side.
    """
    bits = 8 * dtype.itemsize
    windows = table[bits, next_larger(head_dim, [dim for width, dim in table if width == bits])]
    return Config(*windows[next_larger(max(window), windows)])


def next_larger(number: int, numbers: Collection[int]) -> int:
    """The smallest of the numbers that is at least the asked one; the largest where none is."""
    return min((n for n in numbers if n >= number), default=max(numbers))


def backward_config(dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if dtype == torch.float32:
        return fewest_products(window, Config(4, 8, 1, 16, 4, 1), Config(8, 4, 1, 16, 4, 1))
    stages = 2 if head_dim <= 64 else 1
    return fewest_products(
        window, Config(8, 8, 2, 16, 4, stages), Config(16, 4, 2, 16, 4, stages), Config(4, 16, 1, 32, 4, stages)
    )


def fewest_products(window: Sequence[int], *configs: Config) -> Config:
    """Up to window 9 the square tile, whose columns of keys fit into one block; up to 13 the tall one, up to 17 the
    flat.
    """
    return min(configs, key=lambda config: config.products(window))


@functools.lru_cache(maxsize=4096)
def plan_tiles(
    configure: Configure,
    family: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    all_aligned: bool,
    window: Sequence[int],
    dilation: Sequence[int],
    programs: int,
    value_dim: int = 0,
) -> tuple[tuple[int, int, int], list[int], dict[str, Any]]:
    """Grid, integer arguments and constants of a launch over tiles of [B, H, W, heads, head_dim] tensors.

    shape: of the query. programs: heads that have their own, the query's or the key's. value_dim: the head_dim of
    values, where it may be larger than the query's.

    Cached, since it costs as much host time as the launch itself.
    """
    batch, height, width, heads, head_dim = shape
    widest = max(head_dim, value_dim)
    config = configure(family, dtype, widest, window)
    tiles_y = launch.cdiv(launch.cdiv(height, dilation[0]), config.tile_y)  # of the largest dilation sub-grid
    tiles_x = launch.cdiv(launch.cdiv(width, dilation[1]), config.tile_x)
    tokens = [stride for tensor in strides for stride in tensor[:-1]]
    vector = 8 if all_aligned and all(stride % 8 == 0 for stride in tokens) else 1
    images = batch * dilation[0] * dilation[1]
    layers = launch.cdiv(images, MAX_GRID)
    integers = [images, height, width, heads, tiles_x, *window, *dilation, *(stride // vector for stride in tokens)]
    block_y, block_x = max(config.tile_y, config.block_y), max(config.tile_x, config.block_x)
    steps = [(stride[1] * dilation[0], stride[2] * dilation[1]) for stride in strides]
    steps.append((width * heads * widest * dilation[0], heads * widest * dilation[1]))  # the output's
    wide = any(block_y * step_y + block_x * step_x >= MAX_OFFSET for step_y, step_x in steps)
    constants = dict(
        D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), VECTOR=vector, WIDE=wide,
        TILE_Y=config.tile_y, TILE_X=config.tile_x, BLOCK_Y=config.block_y, BLOCK_X=config.block_x, **config.options,
    )  # fmt: skip
    return (tiles_y * tiles_x * programs, launch.cdiv(images, layers), layers), integers, constants
