"""Launch configurations of the neighborhood attention kernels: plain functions of GPU family, dtype and head_dim."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A program handles tile_y x tile_x queries (keys in the dK/dV kernel) and reads the other side in boxes of
    box_y x box_x. max_registers a thread, where fewer than the compiler takes let more programs run at a time.
    """

    tile_y: int
    tile_x: int
    box_y: int
    box_x: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launch takes as keywords (AMD's has no limit of registers)."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


def forward_config(family: str, dtype: torch.dtype, head_dim: int) -> Config:
    if dtype == torch.float32:
        return Config(4, 8, 1, 16, 4, 2 if head_dim <= 64 else 1)
    if family == "hopper":
        return Config(8, 8, 2, 16, 4, 3, 128 if head_dim <= 64 else 168)
    return Config(8, 8, 2, 16, 4, 2)


def dq_config(family: str, dtype: torch.dtype, head_dim: int) -> Config:
    if dtype == torch.float32:
        return Config(4, 8, 1, 16, 4, 1)
    if family == "hopper":
        return Config(8, 8, 2, 16, 4, 2, 128 if head_dim <= 64 else 168)
    return Config(8, 8, 2, 16, 4, 2 if head_dim <= 64 else 1)


def dkdv_config(family: str, dtype: torch.dtype, head_dim: int) -> Config:
    if family == "hopper" and dtype != torch.float32 and head_dim <= 64:
        return Config(8, 8, 1, 16, 4, 3, 128)
    return dq_config(family, dtype, head_dim)._replace(max_registers=None)
