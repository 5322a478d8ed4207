"""na2d and neighborhood_self_attention.

Least traffic: forward reads q, k, v and writes out; backward reads q, k, v, out, dout and writes dq, dk, dv.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from hdit_kernels import reference

# batch, height, width, heads, head_dim, kernel_size: HDiT's levels and what surrounds them
TABLE = (
    (4, 256, 256, 2, 64, 7),
    (1, 512, 512, 2, 64, 7),
    (1, 1024, 1024, 2, 64, 7),
    (1, 256, 256, 2, 64, 7),
    (8, 64, 64, 6, 64, 7),
    (32, 64, 64, 2, 64, 7),
    (4, 128, 128, 4, 64, 7),
    (32, 32, 32, 12, 64, 7),
    (4, 128, 128, 4, 128, 7),
    (1, 256, 256, 2, 64, 13),
    (4, 256, 256, 2, 64, 3),
    (4, 256, 256, 2, 64, 5),
    (4, 256, 256, 2, 64, 9),
    (4, 256, 256, 2, 64, 11),
    (4, 128, 128, 8, 32, 7),
    (4, 128, 128, 4, 96, 7),
    (4, 127, 251, 4, 64, 7),
)
LEVELS = ((4, 256, 256, 2), (4, 128, 128, 4), (8, 64, 64, 6), (32, 64, 64, 2), (32, 32, 32, 12))
"""The neighborhood levels of ffhq-1024 (batch 4), imagenet-256 and flowers-256: batch, height, width, heads."""
SMALL = (2, 24, 20, 2, 32)


class _Reference(torch.autograd.Function):
    """reference.na2d with its own backward, whose memory stays that of one tile of queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = settings
        return reference.na2d(query, key, value, **settings)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return (*reference.na2d_backward(dout, None, *ctx.saved_tensors, **ctx.settings)[:3], None)


def reference_na2d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int = 1, scale: float | None = None
) -> Tensor:
    settings = {"kernel_size": (kernel_size,) * 2, "dilation": (dilation,) * 2, "scale": scale}
    return _Reference.apply(query, key, value, settings)


def reference_self_attention(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, kernel_size: int) -> Tensor:
    wide = reference._widen(qkv)  # nothing is rounded between the two steps
    query, key, value = reference.qk_norm_rope(wide, scale, theta_y, theta_x).unbind(3)
    return reference_na2d(query, key, value, kernel_size, scale=1.0).to(qkv.dtype)


def na2d(
    batch: int,
    height: int,
    width: int,
    heads: int,
    head_dim: int,
    kernel_size: int,
    dtype: str = "bfloat16",
    dilation: int = 1,
    full_size: bool = True,
) -> Case:
    settings = settings_of(locals())
    shape = (batch, height, width, heads, head_dim)
    one = size(*shape, dtype=dtype)
    flops = 4 * batch * height * width * heads * head_dim * kernel_size**2
    keywords: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation}
    return Case(
        family="neighborhood_attention",
        operator="na2d",
        label="x".join(map(str, shape)) + f" k{kernel_size}" + (f" d{dilation}" if dilation > 1 else ""),
        settings=settings,
        build=na2d,
        shapes=dict.fromkeys(("query", "key", "value"), shape),
        ours=functools.partial(hdit_kernels.na2d, **keywords),
        reference=functools.partial(reference_na2d, **keywords),
        bytes=both(4 * one, 8 * one),
        flops=both(flops, flops * 5 // 2),
        grid=("height", "width"),
        full_size=full_size,
    )


def neighborhood_self_attention(
    batch: int,
    height: int,
    width: int,
    heads: int,
    head_dim: int = 64,
    kernel_size: int = 7,
    dtype: str = "bfloat16",
    full_size: bool = True,
) -> Case:
    settings = settings_of(locals())
    one = size(batch, height, width, heads, head_dim, dtype=dtype)
    angles = size(height + width, heads, head_dim // 8, dtype="float32")
    flops = 4 * batch * height * width * heads * head_dim * kernel_size**2
    return Case(
        family="neighborhood_attention",
        operator="neighborhood_self_attention",
        label=f"{batch}x{height}x{width}x{heads}x{head_dim} k{kernel_size}",
        settings=settings,
        build=neighborhood_self_attention,
        ours=functools.partial(hdit_kernels.neighborhood_self_attention, kernel_size=kernel_size),
        reference=functools.partial(reference_self_attention, kernel_size=kernel_size),
        bytes=both(4 * one + angles, 8 * one + angles),
        flops=both(flops, flops * 5 // 2),
        grid=("height", "width"),
        full_size=full_size,
        **packed(batch, height, width, heads, head_dim),
    )


def packed(batch: int, height: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    """The inputs of neighborhood_self_attention and qk_norm_rope."""
    return {
        "shapes": {
            "qkv": (batch, height, width, 3, heads, head_dim),
            "scale": (heads,),
            "theta_y": (height, heads, head_dim // 8),
            "theta_x": (width, heads, head_dim // 8),
        },
        "float32": frozenset({"scale", "theta_y", "theta_x"}),
        "intervals": {"scale": (5.0, 15.0), "theta_y": (-10.0, 10.0), "theta_x": (-10.0, 10.0)},
        "frozen": frozenset({"theta_y", "theta_x"}),
    }


def cases() -> list[Case]:
    found = [na2d(*shape) for shape in TABLE]
    found.append(na2d(4, 128, 128, 4, 64, 7, dilation=2))
    found.append(na2d(4, 256, 256, 2, 64, 7, "float16"))
    found += [na2d(1, 256, 256, 2, 64, 7, dtype) for dtype in ("float32", "float32 tf32")]
    found += [na2d(*SMALL, 7, dtype, full_size=False) for dtype in ("float32", "bfloat16")]
    found += [neighborhood_self_attention(*level) for level in LEVELS]
    found.append(neighborhood_self_attention(*SMALL, dtype="float32", full_size=False))
    return found
