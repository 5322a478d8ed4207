"""geglu, between the projections of a feed-forward block.

Least traffic: forward reads value and gate and writes out, backward reads value, gate and dout and writes two
gradients.
"""

from __future__ import annotations

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from hdit_kernels import reference

# rows, d_ff (three times the width): the levels of flowers-256 (batch 32) and imagenet-256 (16)
ROWS = ((131072, 384), (32768, 768), (8192, 1536), (65536, 1152), (16384, 2304), (4096, 4608))


def geglu(rows: int, d_ff: int, dtype: str = "bfloat16", full_size: bool = True) -> Case:
    settings = settings_of(locals())
    one = size(rows, d_ff, dtype=dtype)
    return Case(
        family="geglu",
        operator="geglu",
        label=f"{rows}x2x{d_ff}",
        settings=settings,
        build=geglu,
        shapes={"x": (rows, 2 * d_ff)},
        ours=hdit_kernels.geglu,
        reference=reference.geglu,
        bytes=both(3 * one, 5 * one),
        flops=both(0, 0),
        grid=("rows",),
        full_size=full_size,
    )


def cases() -> list[Case]:
    return [geglu(*shape) for shape in ROWS] + [geglu(960, 96, "float32", full_size=False)]
