"""na2d's options in the portable kernels, on tiny grids: forward, LSE and every gradient beside the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hdit_kernels import reference
from hdit_kernels.neighborhood_attention.dispatch import na2d_backward, na2d_forward
from hdit_kernels.testing import FLOOR, relative_error
from tests.lanes import kernels_only

NAMES = ("dquery", "dkey", "dvalue")


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
    dtype: torch.dtype = torch.float32,
) -> None:
    heads, dim = 1, 8
    tensors = [strided(torch.randn(1, *grid, heads, dim).to(dtype)) for _ in range(3)]
    dout, dlse = strided(torch.randn(1, *grid, heads, dim).to(dtype)), torch.randn(1, *grid, heads)
    exact = [t.double() for t in tensors]
    axes: dict[str, Any] = dict(dilation=dilation, is_causal=causal or (False, False), scale=0.5)
    out, lse = reference.na2d(*exact, window, **axes)
    wanted = reference.na2d_backward(dout.double(), dlse.double(), *exact, window, **axes)

    settings = ([*window], None, [*dilation], causal, 0.5)
    with kernels_only():
        found, found_lse, stats = na2d_forward(*tensors, None, None, *settings, True, True)
        gradients = na2d_backward(dout, dlse, *tensors, None, None, found, stats, *settings)
    assert relative_error(found, out) <= FLOOR[dtype]
    assert (found_lse.double() - lse).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=False):
        assert gradient.dtype == dtype and gradient.is_contiguous()
        assert relative_error(gradient, want) <= FLOOR[dtype], name


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "causal", "dtype"),
    [
        ((7, 9), (3, 4), (1, 1), (True, False), torch.float32),
        ((3, 11), (3, 4), (1, 2), (False, True), torch.float16),
        ((5, 9), (4, 3), (1, 1), (True, True), torch.float32),
    ],
)
def test_causal(grid, window, dilation, causal, dtype, seed) -> None:
    check(grid, window, dilation, causal, dtype)
