"""qk_norm_rope, the pass of its own before attention.

Least traffic: forward reads and writes the packed q, k, v; backward reads the gradient of all three and q and k, and
writes the gradient of all three.
"""

from __future__ import annotations

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from benchmarks.kernels.neighborhood_attention import LEVELS, SMALL, packed
from hdit_kernels import reference


def qk_norm_rope(
    batch: int,
    height: int,
    width: int,
    heads: int,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    full_size: bool = True,
) -> Case:
    settings = settings_of(locals())
    one = size(batch, height, width, heads, head_dim, dtype=dtype)
    angles = size(height + width, heads, head_dim // 8, dtype="float32")
    return Case(
        family="rope",
        operator="qk_norm_rope",
        label=f"{batch}x{height}x{width}x{heads}x{head_dim}",
        settings=settings,
        build=qk_norm_rope,
        ours=hdit_kernels.qk_norm_rope,
        reference=reference.qk_norm_rope,
        bytes=both(6 * one + angles, 8 * one + angles),
        flops=both(0, 0),
        grid=("height", "width"),
        full_size=full_size,
        **packed(batch, height, width, heads, head_dim),
    )


def cases() -> list[Case]:
    return [qk_norm_rope(*level) for level in LEVELS] + [qk_norm_rope(*SMALL, "float32", full_size=False)]
