"""feed_forward, the whole feed-forward block.

Least traffic: forward reads x, scale and the weights and writes out; backward reads these and dout and writes a
gradient of each input. FLOPs: three products of all tokens with [C, d_ff] forward; backward two for each of the three,
and the two of the up projection anew.
"""

from __future__ import annotations

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from hdit_kernels import reference

# batch, tokens of each, width (d_ff is three times it): levels of flowers-256 (batch 32) and imagenet-256 (16)
LEVELS = ((32, 4096, 128), (32, 1024, 256), (32, 256, 512), (16, 4096, 384), (16, 1024, 768), (16, 256, 1536))


def feed_forward(
    batch: int, tokens: int, width: int, d_ff: int, dtype: str = "bfloat16", full_size: bool = True
) -> Case:
    settings = settings_of(locals())
    shapes = {
        "x": (batch, tokens, width),
        "scale": (batch, width),
        "up_weight": (2 * d_ff, width),
        "down_weight": (width, d_ff),
    }
    x = size(*shapes["x"], dtype=dtype)
    parameters = sum(size(*shape, dtype=dtype) for name, shape in shapes.items() if name != "x")
    product = 2 * batch * tokens * width * d_ff
    return Case(
        family="feed_forward",
        operator="feed_forward",
        label=f"{batch}x{tokens}x{width} d_ff {d_ff}",
        settings=settings,
        build=feed_forward,
        shapes=shapes,
        ours=hdit_kernels.feed_forward,
        reference=reference.feed_forward,
        bytes=both(2 * x + parameters, 3 * x + 2 * parameters),
        flops=both(3 * product, 8 * product),
        grid=("batch", "tokens"),
        full_size=full_size,
    )


def cases() -> list[Case]:
    full = [feed_forward(batch, tokens, width, 3 * width) for batch, tokens, width in LEVELS]
    return [*full, feed_forward(2, 30, 48, 96, "float32", full_size=False)]
