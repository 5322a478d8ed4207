"""token_merge and token_split, the steps between levels and between image and tokens.

Least traffic: a merge reads x and the weight and writes out, its backward reads x, the weight and dout and writes their
gradients; a split also reads the skip and in its backward writes the skip's gradient. FLOPs: one product of all tokens
forward, two backward.
"""

from __future__ import annotations

import functools
from typing import Any

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from hdit_kernels import reference

# batch, rows, columns of tokens after merging, channels before, channels after (patches of 2x2):
# flowers-256 (batch 32), ffhq-1024 (4), imagenet-256 (16)
LEVELS = (
    (32, 32, 32, 128, 256),
    (32, 16, 16, 256, 512),
    (4, 128, 128, 128, 256),
    (4, 64, 64, 256, 384),
    (4, 32, 32, 384, 768),
    (16, 32, 32, 384, 768),
    (16, 16, 16, 768, 1536),
)
IMAGE = (32, 64, 64, 3, 128)  # flowers-256's image, in patches of 4x4
SMALL = (2, 6, 5, 32, 48)


def token_merge(
    batch: int,
    height: int,
    width: int,
    fine: int,
    coarse: int,
    patch: int = 2,
    dtype: str = "bfloat16",
    full_size: bool = True,
) -> Case:
    settings = settings_of(locals())
    x = (batch, height * patch, width * patch, fine)
    weight = (coarse, patch * patch * fine)
    bytes_in, bytes_out = size(*x, dtype=dtype), size(batch, height, width, coarse, dtype=dtype)
    bytes_weight = size(*weight, dtype=dtype)
    flops = 2 * batch * height * width * weight[0] * weight[1]
    keywords: dict[str, Any] = {"patch_size": (patch, patch)}
    return Case(
        family="tokens",
        operator="token_merge",
        label=f"{'x'.join(map(str, x))} p{patch} to {coarse}",
        settings=settings,
        build=token_merge,
        shapes={"x": x, "weight": weight},
        ours=functools.partial(hdit_kernels.token_merge, **keywords),
        reference=functools.partial(reference.token_merge, **keywords),
        bytes=both(bytes_in + bytes_weight + bytes_out, 2 * (bytes_in + bytes_weight) + bytes_out),
        flops=both(flops, 2 * flops),
        grid=("batch", "height", "width"),
        full_size=full_size,
    )


def token_split(
    batch: int,
    height: int,
    width: int,
    fine: int,
    coarse: int,
    patch: int = 2,
    skip: bool = True,
    dtype: str = "bfloat16",
    full_size: bool = True,
) -> Case:
    settings = settings_of(locals())
    x = (batch, height, width, coarse)
    out = (batch, height * patch, width * patch, fine)
    weight = (patch * patch * fine, coarse)
    shapes = {"x": x, "weight": weight} | ({"skip": out, "fac": (1,)} if skip else {})
    bytes_x, bytes_out, bytes_weight = (size(*shape, dtype=dtype) for shape in (x, out, weight))
    bytes_skip = bytes_out if skip else 0
    flops = 2 * batch * height * width * weight[0] * weight[1]
    keywords: dict[str, Any] = {"patch_size": (patch, patch)}
    return Case(
        family="tokens",
        operator="token_split",
        label=f"{'x'.join(map(str, x))} p{patch} to {fine}{' skip' if skip else ''}",
        settings=settings,
        build=token_split,
        shapes=shapes,
        ours=functools.partial(hdit_kernels.token_split, **keywords),
        reference=functools.partial(reference.token_split, **keywords),
        bytes=both(
            bytes_x + bytes_weight + bytes_skip + bytes_out, 2 * (bytes_x + bytes_weight + bytes_skip) + bytes_out
        ),
        flops=both(flops, 2 * flops),
        grid=("batch", "height", "width"),
        float32=frozenset({"fac"}),
        intervals={"fac": (0.6, 0.9)},
        full_size=full_size,
    )


def cases() -> list[Case]:
    found = [token_merge(*shape) for shape in LEVELS] + [token_merge(*IMAGE, patch=4)]
    found += [token_split(*shape) for shape in LEVELS] + [token_split(*IMAGE, patch=4, skip=False)]
    found.append(token_merge(*SMALL, dtype="float32", full_size=False))
    found.append(token_split(*SMALL, dtype="float32", full_size=False))
    return found
