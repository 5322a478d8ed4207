"""Launch configurations of the neighborhood attention kernels: a plain function of GPU family, dtype and head_dim."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A program handles tile_y x tile_x queries (keys in the dK/dV kernel) and reads the other side in boxes of
    box_y x box_x."""

    tile_y: int
    tile_x: int
    box_y: int
    box_x: int
    num_warps: int
    num_stages: int


def forward_config(family: str, dtype: torch.dtype, head_dim: int) -> Config:
    if dtype == torch.float32:
        return Config(4, 8, 1, 16, 4, 2 if head_dim <= 64 else 1)
    stages = 3 if family == "hopper" else 2
    return Config(8, 8, 2, 16, 4, stages)


def backward_config(family: str, dtype: torch.dtype, head_dim: int) -> Config:
    """For both backward kernels: dQ over tiles of queries, dK and dV over tiles of keys."""
    if dtype == torch.float32:
        return Config(4, 8, 1, 16, 4, 1)
    return Config(8, 8, 2, 16, 4, 2 if family == "hopper" or head_dim <= 64 else 1)
