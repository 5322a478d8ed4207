"""geglu on the CPU: the reference against PyTorch's own GELU, and how the operator behaves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hdit_kernels import geglu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(1, 40), st.integers(0, 2**31))
def test_equals_value_times_pytorchs_gelu(leading, d_ff, seed) -> None:
    values = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, 2 * d_ff, generator=values, dtype=torch.float64) * 3
    torch.testing.assert_close(geglu(x), x[..., :d_ff] * F.gelu(x[..., d_ff:], approximate="none"))


def test_the_value_comes_first_and_gelu_is_exact() -> None:
    x = torch.tensor([2.0, 10.0, 1.0, -1.0], dtype=torch.float64)
    wanted = torch.tensor([2 * 0.8413447460685429, 10 * -0.15865525393145707], dtype=torch.float64)
    torch.testing.assert_close(geglu(x), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 1, 3, 8)])
def test_gradient(shape, seed) -> None:
    assert torch.autograd.gradcheck(geglu, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_opcheck(seed) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, dout = torch.randn(3, 2, 10).to(dtype), torch.randn(5, 2, 3).to(dtype).transpose(0, 2)
        torch.library.opcheck(torch.ops.hdit_kernels.geglu_forward.default, (x,))
        torch.library.opcheck(torch.ops.hdit_kernels.geglu_backward.default, (dout, x))


def test_compiles_whole(seed) -> None:
    x, dout = torch.randn(3, 4, 10, requires_grad=True), torch.randn(3, 4, 5)
    wanted, found = geglu(x), torch.compile(geglu, fullgraph=True)(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, dout), torch.autograd.grad(wanted, x, dout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, seed) -> None:
    """Output and gradient in x's dtype, equal to the float64 result within one rounding."""
    x, dout = torch.randn(5, 12).to(dtype).requires_grad_(), torch.randn(5, 6).to(dtype)
    exact = x.detach().double().requires_grad_()
    out, wanted = geglu(x), geglu(exact)
    (dx,), (wanted_dx,) = torch.autograd.grad(out, x, dout), torch.autograd.grad(wanted, exact, dout.double())
    assert out.dtype == dx.dtype == dtype
    torch.testing.assert_close(out, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(dx, wanted_dx.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_and_the_values(dtype, seed) -> None:
    x, dout = torch.randn(5, 12).to(dtype).requires_grad_(), torch.randn(5, 6).to(dtype)
    wanted = geglu(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = geglu(x)
        (dx,) = torch.autograd.grad(found, x, dout)
    assert found.dtype == dtype and torch.equal(found, wanted)
    assert torch.equal(dx, torch.autograd.grad(wanted, x, dout)[0])


def test_strides(seed) -> None:
    x = torch.randn(4, 3, 20)
    wanted = geglu(x)
    wide = torch.full((3, 4, 23), float("nan"))
    wide[..., 2:22] = x.transpose(0, 1)
    found = geglu(wide[..., 2:22].transpose(0, 1))
    assert torch.equal(found, wanted) and found.is_contiguous()


def test_without_gradient_nothing_is_recorded(seed) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert not geglu(x).requires_grad
    assert geglu(x).requires_grad and not geglu(x.detach()).requires_grad


BAD = [
    ([1.0, 2.0], TypeError, r"x: expected a torch.Tensor, got list"),
    (torch.ones(2, 4).long(), TypeError, r"x: expected bfloat16, .*, got int64"),
    (torch.ones(2, 5), ValueError, r"x: expected shape \[..., 2·d_ff\], got \[2, 5\]"),
    (torch.ones(3, 0), ValueError, r"x: expected shape \[..., 2·d_ff\], got \[3, 0\]"),
    (torch.ones(()), ValueError, r"x: expected shape \[..., 2·d_ff\], got \[\]"),
]


@pytest.mark.parametrize(("x", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input(x, error, message) -> None:
    with pytest.raises(error, match=message):
        geglu(x)
