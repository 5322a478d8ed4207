"""Launch configurations of the neighborhood attention kernels: plain functions of GPU family, dtype, head_dim and
window.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def products(self, window: Sequence[int]) -> int:
        """Keys with which each query of an inner tile is multiplied: whole boxes, of which it sees one window."""
        rows, columns = self.tile_y + window[0] - 1, self.tile_x + window[1] - 1
        return -(-rows // self.box_y) * self.box_y * -(-columns // self.box_x) * self.box_x


def fewest_products(window: Sequence[int], *configs: Config) -> Config:
    """Up to window 9 the square tile, whose columns of keys fit into one box; up to 13 the tall one, up to 17 the
    flat.
    """
    return min(configs, key=lambda config: config.products(window))


def forward_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if dtype == torch.float32:
        stages = 2 if head_dim <= 64 else 1
        return fewest_products(window, Config(4, 8, 1, 16, 4, stages), Config(8, 4, 1, 16, 4, stages))
    if family == "hopper":
        limit = 128 if head_dim <= 64 else 168
        tall = Config(16, 4, 4, 16, 4, 3, limit) if head_dim <= 64 else Config(16, 4, 2, 16, 4, 3, limit)
        return fewest_products(
            window, Config(8, 8, 2, 16, 4, 3, limit), tall, Config(4, 16, 1, 32, 4, 3, limit)
        )  # fmt: skip
    return fewest_products(window, Config(8, 8, 2, 16, 4, 2), Config(16, 4, 2, 16, 4, 2), Config(4, 16, 1, 32, 4, 2))


def dq_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    if dtype == torch.float32:
        return fewest_products(window, Config(4, 8, 1, 16, 4, 1), Config(8, 4, 1, 16, 4, 1))
    if family == "hopper":
        stages, limit = (3, 128) if head_dim <= 64 else (2, 168)
    else:
        stages, limit = (2 if head_dim <= 64 else 1), None
    return fewest_products(
        window,
        Config(8, 8, 2, 16, 4, stages, limit),
        Config(16, 4, 2, 16, 4, stages, limit),
        Config(4, 16, 1, 32, 4, stages, limit),
    )


def dkdv_config(family: str, dtype: torch.dtype, head_dim: int, window: Sequence[int]) -> Config:
    config = dq_config(family, dtype, head_dim, window)
    if family == "hopper" and dtype != torch.float32:
        if head_dim > 64:
            return config._replace(num_stages=3, max_registers=255)
        return config._replace(num_stages=3 if config.tile_y > 8 else 2, max_registers=168)
    return config._replace(max_registers=None)
