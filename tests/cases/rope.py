"""Random cases of qk_norm_rope."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, strided, turn

HEAD_DIMS = (8, 24, 64, 128)


def angles(shape: Sequence[int], values: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """theta_y and theta_x for packed [B, H, W, 3, heads, D]: positions in [−1, 1] times frequencies up to 10π."""
    _, height, width, _, heads, dim = shape
    limit = 10 * math.pi
    return tuple(torch.empty(n, heads, dim // 8).uniform_(-limit, limit, generator=values) for n in (height, width))


def qk_norm_rope(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    shape = (
        sizes.randint(1, 8),
        sizes.randint(1, 40),
        sizes.randint(1, 40),
        3,
        sizes.randint(1, 6),
        HEAD_DIMS[turn(dtype, mixed) % 4],
    )
    scale = torch.empty(shape[4]).uniform_(0.5, 20.0, generator=values)
    theta_y, theta_x = angles(shape, values)
    return Case(
        f"qk_norm_rope {list(shape)}",
        dict(
            qkv=strided(torch.randn(shape, generator=values).to(dtype), sizes),
            scale=scale if mixed else scale.to(dtype),
            theta_y=theta_y,
            theta_x=theta_x,
        ),
        hdit_kernels.qk_norm_rope,
        reference.qk_norm_rope,
        frozen=frozenset({"theta_y", "theta_x"}),
        pooled=frozenset({"scale"}),
    )


OPERATORS = {"qk_norm_rope": qk_norm_rope}
