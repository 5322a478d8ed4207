"""geglu: the launchers themselves, on tiny tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hdit_kernels import geglu, reference, set_backend
from hdit_kernels.geglu_triton import geglu_backward, geglu_forward
from hdit_kernels.testing import FLOOR, relative_error
from tests.lanes import kernels_only

DTYPES = [torch.float32, torch.float16]  # not bfloat16: the interpreter's stores truncate it


def check(x: Tensor, dout: Tensor) -> None:
    leaf = x.double().requires_grad_()
    out = reference.geglu(leaf)
    (dx,) = torch.autograd.grad(out, leaf, dout.double())
    with kernels_only():
        found, found_dx = geglu_forward(x), geglu_backward(dout, x)
    assert found.dtype == found_dx.dtype == x.dtype
    assert found.is_contiguous() and found_dx.is_contiguous()
    assert relative_error(found, out) <= FLOOR[x.dtype]
    assert relative_error(found_dx, dx) <= FLOOR[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_ff", [1, 5, 8, 32, 40, 129, 264])
def test_geglu(d_ff: int, dtype: torch.dtype, seed: int) -> None:
    check((torch.randn(3, 7, 2 * d_ff) * 2).to(dtype), torch.randn(3, 7, d_ff).to(dtype))


@pytest.mark.parametrize("d_ff", [24, 27])
@pytest.mark.parametrize("gap", [8, 3])
def test_strided(d_ff: int, gap: int, seed: int) -> None:
    """Gaps between rows, swapped dimensions, and x and dout laid out differently, wide (gap 8) and not."""
    x = torch.randn(4, 3, 5, 2 * d_ff + gap).transpose(0, 2)[..., : 2 * d_ff]
    dout = torch.randn(3, 5, 4, d_ff + gap).permute(1, 0, 2, 3)[..., :d_ff]
    check(x, dout)


def test_many_dimensions(seed: int) -> None:
    """Four leading dimensions that do not merge, and some that do; every second element."""
    check(torch.randn(2, 3, 2, 3, 24).permute(0, 3, 2, 1, 4), torch.randn(2, 3, 2, 3, 12))
    check(torch.randn(2, 3, 2, 3, 24), torch.randn(2, 3, 2, 3, 24)[..., ::2])


def test_offset_start(seed: int) -> None:
    """x begins in the middle of a 16-byte word, though its strides are multiples of one."""
    check(torch.randn(5, 64)[:, 3:51], torch.randn(5, 24))


def test_many_rows_and_large_values(seed: int) -> None:
    x = torch.randn(300, 2 * 12) * torch.logspace(-3, 2, 300)[:, None]
    check(x, torch.randn(300, 12))


@pytest.mark.parametrize(("start", "end", "limit"), [(-9, -6, 6e-6), (-6, -3, 3e-6), (-3, 0, 1e-6), (0, 9, 1e-6)])
def test_the_normal_distribution_over_its_whole_range(start: int, end: int, limit: float) -> None:
    """The polynomial's relative error, in the tail too, where 0.5 + 0.5 · erf has none of its digits left."""
    g = torch.linspace(start, end, 4099)[1:-1]
    x, exact = torch.stack([torch.ones_like(g), g], 1), g.double()
    cdf = torch.special.erfc(-exact / 2**0.5) / 2
    density = torch.exp(-exact * exact / 2) / (2 * torch.pi) ** 0.5
    with kernels_only():
        out, dx = geglu_forward(x)[:, 0], geglu_backward(torch.ones(len(g), 1), x)
    torch.testing.assert_close(out.double(), exact * cdf, rtol=limit, atol=0)
    torch.testing.assert_close(dx[:, 0], out, rtol=0, atol=0)
    # the slope's two terms nearly cancel where it crosses 0
    assert ((dx[:, 1] - (cdf + exact * density)).abs() <= limit * (cdf + exact.abs() * density)).all()


@pytest.mark.filterwarnings("ignore:overflow")  # from numpy
def test_values_beyond_float32s_squares(seed: int) -> None:
    x = torch.tensor([[2.0, 1e30], [2.0, -1e30], [2.0, float("nan")]])
    with kernels_only():
        out = geglu_forward(x)[:, 0]
    assert out[0] == 2e30 and out[1] == 0 and out[2].isnan()


def test_expanded_gradient(seed: int) -> None:
    """The gradient of a sum: every element the same one."""
    check(torch.randn(6, 48), torch.ones(()).expand(6, 24))


def test_the_backend_triton_runs_the_kernels_on_a_cpu(seed: int) -> None:
    x = torch.randn(3, 24, requires_grad=True)
    wanted = reference.geglu(x)
    (dx,) = torch.autograd.grad(wanted.sum(), x)
    before = set_backend("triton")
    try:
        with kernels_only():
            found = geglu(x)
            (found_dx,) = torch.autograd.grad(found.sum(), x)
    finally:
        set_backend(before)
    assert relative_error(found, wanted) <= FLOOR[torch.float32]
    assert relative_error(found_dx, dx) <= FLOOR[torch.float32]


def test_empty() -> None:
    with kernels_only():
        assert geglu_forward(torch.randn(0, 8)).shape == (0, 4)
        assert geglu_backward(torch.randn(0, 4), torch.randn(0, 8)).shape == (0, 8)
