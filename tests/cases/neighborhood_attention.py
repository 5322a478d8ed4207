"""Random cases of na2d and neighborhood_self_attention."""

from __future__ import annotations

import bisect
import functools
import math
import random
from collections.abc import Sequence

import torch

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, strided, turn
from tests.cases.rope import angles

HEAD_DIMS = (16, 40, 32, 64, 128)  # few compile keys: one a head_dim and dtype; in the order of `in_this_run`
OPTION_DIMS = ((16, 16), (64, 64), (64, 16), (256, 256), (32, 384))  # of queries and of values


def in_this_run(head_dim: int, window: Sequence[int], dilation: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a run has such cases: HDiT's own head_dim and window always, else half of all compile keys of Hopper's
    own kernels and a quarter of those of the portable ones.

    Half: the white squares of a chessboard of head_dims and windows, or the black ones, by the seed; float16 has those
    that bfloat16 has not, so in one or the other every run has all of what compiles Hopper's kernels anew. A quarter:
    diagonals of such a board, others for each dtype.
    """
    row, largest = HEAD_DIMS.index(head_dim), max(window)
    if dtype != torch.float32 and max(dilation) == 1 and head_dim in ((32, 64, 128) if largest <= 9 else (32, 64)):
        column = bisect.bisect_left((3, 5, 7), window[0]) if largest <= 9 else 0
        return (row + column + turn(dtype)) % 2 == 0 or (head_dim == 64 and tuple(window) == (7, 7))
    return (row + entry(window) + turn(dtype)) % 4 == 0


def options_in_this_run(head_dims: tuple[int, int], window: Sequence[int], dtype: torch.dtype) -> bool:
    """A quarter as well; wide heads have one configuration for all windows."""
    column = entry(window) if max(head_dims) <= 128 else 0
    return (OPTION_DIMS.index(head_dims) + column + turn(dtype)) % 4 == 0


def entry(window: Sequence[int]) -> int:
    """Which of the portable kernels' configurations for these windows: up to 7, up to 9 or beyond."""
    return bisect.bisect_left((7, 9), max(window))


def _axis(sizes: random.Random, window: int, dilation: int) -> int:
    """A length near the smallest allowed, where borders meet, or a few tiles long."""
    return window * dilation + sizes.choice([0, 0, 1, 2, 3, sizes.randint(0, 30)])


def na2d(
    sizes: random.Random,
    values: torch.Generator,
    dtype: torch.dtype,
    mixed: bool,
    windows: Sequence[int] = (1, 2, 3, 4, 5, 7, 7, 7, 8, 9, 11, 13),
    dilations: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (2, 2), (1, 3), (2, 1)),
    head_dims: Sequence[int] = HEAD_DIMS,
    heights: Sequence[int] = (),
) -> Case:
    """heights: to choose from; if not given, near the smallest allowed or a few tiles, as the width is."""
    while True:
        window = tuple(sizes.choice(windows) for _ in range(2))
        window = sizes.choice([window, (window[0], window[0])])
        window = (
            (1, 2) if window == (1, 1) else window
        )  # of one key the softmax is constant and dquery, dkey are rounding noise
        dilation, head_dim = sizes.choice(dilations), sizes.choice(head_dims)
        if in_this_run(head_dim, window, dilation, dtype):
            break
    height, width = (_axis(sizes, w, d) for w, d in zip(window, dilation, strict=True))
    if heights:
        height = sizes.choice(heights)
    batch, heads = sizes.randint(1, 8), sizes.randint(1, 4)
    shape = (batch, height, width, heads, head_dim)
    layout = sizes.randrange(3)
    if layout == 0:  # slices of one packed projection
        packed = torch.randn(*shape[:3], 3, *shape[3:], generator=values).to(dtype)
        query, key, value = packed.unbind(3)
    else:
        query, key, value = (torch.randn(shape, generator=values).to(dtype) for _ in range(3))
        if layout == 1:
            query, key, value = (strided(t, sizes) for t in (query, key, value))
    factor = sizes.choice([1.0, 1.0, 1.0, 4.0])  # sharper softmax
    settings = dict(kernel_size=window, dilation=dilation, scale=factor * head_dim**-0.5)
    return Case(
        f"na2d {list(shape)} window {window} dilation {dilation} layout {layout}",
        dict(query=query, key=key, value=value),
        functools.partial(hdit_kernels.na2d, **settings, return_lse=True),
        functools.partial(reference.na2d, **settings),
        # Of two keys, one often has nearly all of the weight: what is left of these gradients is a difference.
        pooled=frozenset({"query", "key"} if math.prod(window) == 2 else ()),
    )


def na2d_small_windows(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """What Hopper's own kernels take: HDiT's windows and head_dims."""
    windows = (1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9)
    return na2d(sizes, values, dtype, mixed, windows, dilations=((1, 1),), head_dims=(32, 64, 64, 128))


def na2d_strips(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """Of what Hopper's own kernels take: many tiles down, and few even windows, which are not walked upwards."""
    windows, heights = (1, 3, 3, 5, 5, 7, 7, 7, 8, 9), range(16, 131)
    return na2d(sizes, values, dtype, mixed, windows, ((1, 1),), (32, 64, 128), heights)


def na2d_large_windows(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """What Hopper's dK/dV kernel for larger windows takes (float32 goes to the portable ones, of any head_dim)."""
    head_dims = HEAD_DIMS if dtype == torch.float32 else (32, 64)
    return na2d(sizes, values, dtype, mixed, (10, 11, 12, 13, 13), dilations=((1, 1),), head_dims=head_dims)


def na2d_options(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """What only the portable kernels take, in variants of their own: few head_dims and windows, since each may compile
    anew.
    """
    while True:
        window = tuple(sizes.choice((1, 2, 3, 4, 6, 7, 7, 9, 12)) for _ in range(2))
        head_dim, head_dim_v = head_dims = sizes.choice(OPTION_DIMS)
        # of fewer keys the gradients of query and key are mostly rounding
        if math.prod(window) > 2 and options_in_this_run(head_dims, window, dtype):
            break
    dilation = sizes.choice(((1, 1), (1, 1), (2, 2), (1, 3), (2, 1)))
    causal = (sizes.random() < 0.5, sizes.random() < 0.5)
    stride = tuple(sizes.choice((1, 1, 2, w, sizes.randint(1, w))) for w in window)
    stride = tuple(min(s, w) for s, w in zip(stride, window, strict=True))
    height, width = (_axis(sizes, w, d) for w, d in zip(window, dilation, strict=True))
    batch, heads_kv, group = sizes.randint(1, 4), sizes.randint(1, 3), sizes.choice((1, 1, 2, 3))
    shapes = ((heads_kv * group, head_dim), (heads_kv, head_dim), (heads_kv, head_dim_v))
    query, key, value = (
        strided(torch.randn(batch, height, width, *shape, generator=values).to(dtype), sizes) for shape in shapes
    )
    tensors = dict(query=query, key=key, value=value)
    extra = sizes.choice((None, None, 1, 4, 40))
    if extra is not None:
        for name, dim in (("additional_keys", head_dim), ("additional_values", head_dim_v)):
            more = torch.randn(batch, extra, heads_kv, dim, generator=values).to(dtype)
            tensors[name] = strided(more, sizes)
    settings = dict(kernel_size=window, stride=stride, dilation=dilation, is_causal=causal, scale=head_dim**-0.5)
    few_keys = math.prod(window) <= 6 and any(causal)  # one often has nearly all of the weight
    options = f"window {window} stride {stride} dilation {dilation} causal {causal} extra {extra}"
    return Case(
        f"na2d {list(query.shape)} values {list(value.shape[3:])} {options}",
        tensors,
        functools.partial(hdit_kernels.na2d, **settings, return_lse=True),
        functools.partial(reference.na2d, **settings),
        pooled=frozenset({"additional_keys", "additional_values"} | ({"query", "key"} if few_keys else set())),
    )


def na2d_large_logits(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    """Logits up to ±1e4: the running maximum is what keeps the softmax finite."""
    while True:
        case = na2d(sizes, values, dtype, mixed)
        query, key = case.tensors["query"], case.tensors["key"]
        # A softmax of such logits is mostly one-hot: of too few queries none would have a gradient beyond rounding.
        if query.shape[:-1].numel() >= 300:
            break
    dim = query.shape[-1]
    case.tensors["query"] = (query.float() / query.float().abs().max() * 100).to(dtype)
    case.tensors["key"] = (key.float() / key.float().abs().max() * 100).to(dtype)
    settings = {**case.call.keywords, "scale": 1.0 / dim}
    case.call.keywords.update(settings)
    case.reference.keywords.update(scale=1.0 / dim)
    return case._replace(description=case.description + " large logits")


def neighborhood_self_attention(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    every = [(window, head_dim) for window in (3, 4, 5, 7, 7, 7, 9) for head_dim in HEAD_DIMS]
    window, head_dim = sizes.choice([(w, d) for w, d in every if in_this_run(d, (w, w), (1, 1), dtype)])
    shape = (
        sizes.randint(1, 8),
        _axis(sizes, window, 1),
        _axis(sizes, window, 1),
        3,
        sizes.randint(1, 4),
        head_dim,
    )
    scale = torch.empty(shape[4]).uniform_(2.0, 12.0, generator=values)
    theta_y, theta_x = angles(shape, values)
    settings = dict(kernel_size=(window, window))
    return Case(
        f"neighborhood_self_attention {list(shape)} window {window}",
        dict(
            qkv=strided(torch.randn(shape, generator=values).to(dtype), sizes),
            scale=scale if mixed else scale.to(dtype),
            theta_y=theta_y,
            theta_x=theta_x,
        ),
        functools.partial(hdit_kernels.neighborhood_self_attention, **settings),
        functools.partial(reference.neighborhood_self_attention, **settings),
        frozen=frozenset({"theta_y", "theta_x"}),
        pooled=frozenset({"scale"}),
    )


OPERATORS = {
    "na2d": na2d,
    "na2d_small_windows": na2d_small_windows,
    "na2d_large_windows": na2d_large_windows,
    "na2d_large_logits": na2d_large_logits,
    "na2d_options": na2d_options,
    "neighborhood_self_attention": neighborhood_self_attention,
}
