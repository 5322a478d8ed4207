"""na2d's options in the portable kernels, on tiny grids: forward, LSE and every gradient beside the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import reference
from hdit_kernels.neighborhood_attention import triton_device
from hdit_kernels.neighborhood_attention.dispatch import na2d_backward, na2d_forward
from hdit_kernels.testing import FLOOR, relative_error
from tests.lanes import kernels_only

NAMES = ("dquery", "dkey", "dvalue", "dadditional_keys", "dadditional_values")


def strided(tensor: Tensor) -> Tensor:
    """The same values with NaN between the tokens."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def check(
    grid: tuple[int, int],
    window: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    causal: tuple[bool, bool] | None = None,
    stride: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
    extra: int | None = None,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    dims: tuple[int, int] = (8, 8),
) -> None:
    heads_kv = heads_kv or heads
    sizes = [(heads, dims[0]), (heads_kv, dims[0]), (heads_kv, dims[1])]
    tensors = [strided(torch.randn(batch, *grid, *size).to(dtype)) for size in sizes]
    dout, dlse = strided(torch.randn(batch, *grid, heads, dims[1]).to(dtype)), torch.randn(batch, *grid, heads)
    more: list[Tensor | None] = [None, None]
    if extra is not None:
        more = [strided(torch.randn(batch, extra, heads_kv, dim).to(dtype)) for dim in dims]
    exact = [t.double() for t in tensors]
    exact_more = [None if t is None else t.double() for t in more]
    scale = dims[0] ** -0.5
    axes: dict[str, Any] = dict(stride=stride, dilation=dilation, is_causal=causal or (False, False), scale=scale)
    axes |= dict(additional_keys=exact_more[0], additional_values=exact_more[1])
    out, lse = reference.na2d(*exact, window, **axes)
    wanted = reference.na2d_backward(dout.double(), dlse.double(), *exact, window, **axes)

    settings = ([*window], [*stride], [*dilation], causal, scale)
    with kernels_only():
        found, found_lse, stats = na2d_forward(*tensors, *more, *settings, True, True)
        gradients = na2d_backward(dout, dlse, *tensors, *more, found, stats, *settings)
    assert relative_error(found, out) <= FLOOR[dtype]
    assert (found_lse.double() - lse).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=True):
        assert gradient.dtype == dtype and gradient.is_contiguous()
        if want is None or want.numel() == 0:
            assert gradient.shape == (0,) if want is None else want.shape
            continue
        # of windows of few keys, and of sums over all queries, which nearly cancel
        assert relative_error(gradient, want) <= 2 * FLOOR[dtype], name


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "causal", "dtype"),
    [
        ((7, 9), (3, 4), (1, 1), (True, False), torch.float32),
        ((3, 11), (3, 4), (1, 2), (False, True), torch.float16),
        ((5, 9), (4, 3), (1, 1), (True, True), torch.float32),
    ],
)
def test_causal(grid, window, dilation, causal, dtype, seed) -> None:
    check(grid, window, dilation, causal, dtype=dtype)


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "causal", "stride", "dtype"),
    [
        ((8, 9), (4, 3), (1, 1), (False, False), (3, 2), torch.float32),
        ((4, 13), (4, 4), (1, 2), (False, True), (4, 2), torch.float16),
        ((7, 8), (5, 3), (1, 1), (True, False), (4, 3), torch.float32),
    ],
)
def test_strides(grid, window, dilation, causal, stride, dtype, seed) -> None:
    check(grid, window, dilation, causal, stride, dtype)


@pytest.mark.parametrize(
    ("grid", "window", "options", "dtype"),
    [
        ((5, 4), (3, 3), dict(extra=18, heads=2), torch.float32),  # more than a block
        ((13, 10), (2, 3), dict(extra=1, causal=(True, False), stride=(2, 2)), torch.float32),  # two parts
        ((4, 6), (2, 2), dict(extra=3, batch=2, dilation=(1, 2)), torch.float16),
        ((4, 4), (3, 3), dict(extra=0), torch.float32),
    ],
)
def test_additional_keys(grid, window, options, dtype, seed) -> None:
    check(grid, window, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("grid", "window", "options", "dtype"),
    [
        ((5, 7), (3, 3), dict(dims=(8, 40), heads=2, extra=2), torch.float32),
        ((4, 6), (3, 3), dict(dims=(24, 8), dilation=(1, 2), causal=(True, False)), torch.float16),
        ((4, 4), (2, 3), dict(dims=(256, 256)), torch.float32),
        ((4, 4), (3, 2), dict(dims=(16, 264)), torch.float32),
    ],
)
def test_head_dims(grid, window, options, dtype, seed) -> None:
    check(grid, window, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("grid", "window", "options", "dtype"),
    [
        ((3, 9), (2, 4), dict(heads=3, heads_kv=1, dims=(8, 16), stride=(1, 3)), torch.float16),
        ((4, 4), (2, 2), dict(heads=4, heads_kv=2, dims=(16, 8), extra=1, dilation=(2, 1)), torch.float32),
    ],
)
def test_fewer_heads_of_keys(grid, window, options, dtype, seed) -> None:
    check(grid, window, dtype=dtype, **options)


@triton.jit
def _axis_kernel(length_ptr, window_ptr, stride_ptr, causal_ptr, token_ptr, found_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < count
    length = tl.load(length_ptr + at, inside, other=1)
    window = tl.load(window_ptr + at, inside, other=1)
    stride = tl.load(stride_ptr + at, inside, other=1)
    causal = tl.load(causal_ptr + at, inside, other=0)
    token = tl.load(token_ptr + at, inside, other=0)
    start, seen = triton_device.keys_seen(token, window, length, stride, causal)
    tl.store(found_ptr + at, start, inside)
    tl.store(found_ptr + count + at, seen, inside)
    tl.store(found_ptr + 2 * count + at, triton_device.keys_end(token, window, length, stride, causal), inside)
    tl.store(found_ptr + 3 * count + at, triton_device.first_query(token, window, stride, causal), inside)
    tl.store(found_ptr + 4 * count + at, triton_device.last_query(token, window, length, stride, causal), inside)


def test_windows_and_their_inverse() -> None:
    """Every token of every axis to 13: the keys that a query sees, and the first and last query that see a key."""
    cases, wanted = [], []
    for length in range(1, 14):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                for causal in (0, 1):
                    start, end = reference.windows(length, window, stride, bool(causal))
                    for token in range(length):
                        seeing = ((start <= token) & (token < end)).nonzero().flatten().tolist()
                        assert seeing == list(range(seeing[0], seeing[-1] + 1))
                        first, last = int(start[token]), int(end[token])
                        cases.append((length, window, stride, causal, token))
                        wanted.append((first, last - first, last, seeing[0], seeing[-1]))
    columns = torch.tensor(cases, dtype=torch.int32).T.contiguous()
    found = torch.full((5, len(cases)), -1, dtype=torch.int32)
    _axis_kernel[(1,)](*columns, found, len(cases), BLOCK=triton.next_power_of_2(len(cases)))
    assert found.T.tolist() == [list(w) for w in wanted]
