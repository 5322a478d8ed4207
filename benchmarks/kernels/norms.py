"""rms_norm, ada_rms_norm, ada_layer_norm and gated_residual.

Least traffic: a norm reads x and writes out, its backward reads x and dout and writes dx; a gated residual reads x and
y and writes out, its backward reads y and dout and writes dy (the gradient of x is dout itself). What is per channel or
per sample counts once.
"""

from __future__ import annotations

from collections.abc import Callable

import hdit_kernels
from benchmarks.kernels import Case, both, settings_of, size
from hdit_kernels import reference

ROWS = ((32768, 256), (32768, 512), (32768, 1024), (32768, 4096), (131072, 128))
# batch, tokens, channels: the levels of ffhq-1024 (batch 4), imagenet-256 (16) and flowers-256 (32)
LEVELS = (
    (4, 65536, 128),
    (4, 16384, 256),
    (4, 4096, 384),
    (4, 1024, 768),
    (4, 256, 1024),
    (16, 4096, 384),
    (16, 1024, 768),
    (16, 256, 1536),
    (32, 4096, 128),
    (32, 1024, 256),
    (32, 256, 512),
)
DIT = ((4, 4096, 768), (1, 65536, 768))  # DiT-B/4 at 256 and 1024 pixels
SMALL = (2, 480, 96)


def rms_norm(rows: int, channels: int, dtype: str = "bfloat16", full_size: bool = True) -> Case:
    settings = settings_of(locals())
    one, weight = size(rows, channels, dtype=dtype), size(channels, dtype=dtype)
    return Case(
        family="norms",
        operator="rms_norm",
        label=f"{rows}x{channels}",
        settings=settings,
        build=rms_norm,
        shapes={"x": (rows, channels), "weight": (channels,)},
        ours=hdit_kernels.rms_norm,
        reference=reference.rms_norm,
        bytes=both(2 * one + weight, 3 * one + 2 * weight),
        flops=both(0, 0),
        grid=("rows",),
        full_size=full_size,
    )


def ada_rms_norm(batch: int, tokens: int, channels: int, dtype: str = "bfloat16", full_size: bool = True) -> Case:
    return _per_sample("ada_rms_norm", ada_rms_norm, ("scale",), batch, tokens, channels, dtype, full_size)


def ada_layer_norm(batch: int, tokens: int, channels: int, dtype: str = "bfloat16", full_size: bool = True) -> Case:
    return _per_sample("ada_layer_norm", ada_layer_norm, ("shift", "scale"), batch, tokens, channels, dtype, full_size)


def gated_residual(batch: int, tokens: int, channels: int, dtype: str = "bfloat16", full_size: bool = True) -> Case:
    return _per_sample("gated_residual", gated_residual, ("gate",), batch, tokens, channels, dtype, full_size)


def _per_sample(
    operator: str,
    build: Callable[..., Case],
    parameters: tuple[str, ...],
    batch: int,
    tokens: int,
    channels: int,
    dtype: str,
    full_size: bool,
) -> Case:
    one, parameter = size(batch, tokens, channels, dtype=dtype), len(parameters) * size(batch, channels, dtype=dtype)
    names = ("x", "y") if operator == "gated_residual" else ("x",)
    return Case(
        family="norms",
        operator=operator,
        label=f"{batch}x{tokens}x{channels}",
        settings={"batch": batch, "tokens": tokens, "channels": channels, "dtype": dtype},
        build=build,
        shapes=dict.fromkeys(names, (batch, tokens, channels)) | dict.fromkeys(parameters, (batch, channels)),
        ours=getattr(hdit_kernels, operator),
        reference=getattr(reference, operator),
        bytes=both((len(names) + 1) * one + parameter, 3 * one + 2 * parameter),
        flops=both(0, 0),
        grid=("batch", "tokens"),
        full_size=full_size,
    )


def cases() -> list[Case]:
    found = [rms_norm(*shape) for shape in ROWS]
    found += [ada_rms_norm(*shape) for shape in LEVELS]
    found += [operator(*shape) for operator in (ada_layer_norm, gated_residual) for shape in DIT]
    found.append(rms_norm(960, 96, "float32", full_size=False))
    found += [
        operator(*SMALL, "float32", full_size=False) for operator in (ada_rms_norm, ada_layer_norm, gated_residual)
    ]
    return found
