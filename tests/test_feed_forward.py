"""feed_forward on the CPU: the reference against the separate operators, and how the operator behaves."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hdit_kernels import ada_rms_norm, feed_forward, geglu
from hdit_kernels.testing import relative_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def drawn(*leading: int, width: int = 6, d_ff: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, scale, up_weight, down_weight."""
    shapes = (*leading, width), (leading[0], width), (2 * d_ff, width), (width, d_ff)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def separate(x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float = 1e-6) -> Tensor:
    return x + F.linear(geglu(F.linear(ada_rms_norm(x, scale, eps), up)), down)


@pytest.mark.parametrize("leading", [(3,), (2, 4), (2, 3, 5), (0, 4)])
def test_equals_the_separate_operators(leading, seed) -> None:
    tensors = drawn(*leading)
    torch.testing.assert_close(feed_forward(*tensors, 0.1), separate(*tensors, 0.1), rtol=1e-12, atol=1e-12)


def test_gradient(seed) -> None:
    tensors = tuple(t.requires_grad_() for t in drawn(2, 3))
    assert torch.autograd.gradcheck(feed_forward, tensors)


@pytest.mark.parametrize("needed", range(4))
def test_one_gradient_alone(needed, seed) -> None:
    tensors = drawn(2, 3)
    tensors[needed].requires_grad_()
    dout = torch.randn(2, 3, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(feed_forward(*tensors), tensors[needed], dout)
    (wanted,) = torch.autograd.grad(separate(*tensors), tensors[needed], dout)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_opcheck(seed) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = drawn(3, 2, dtype=dtype)
        torch.library.opcheck(torch.ops.hdit_kernels.feed_forward_forward.default, (*tensors, 1e-6))
        for needed in ([True] * 4, [True, False, True, False]):
            torch.library.opcheck(
                torch.ops.hdit_kernels.feed_forward_backward.default, (tensors[0], *tensors, 1e-6, needed)
            )


def test_compiles_whole(seed) -> None:
    tensors = [t.requires_grad_() for t in drawn(3, 4, dtype=torch.float32)]
    dout = torch.randn(3, 4, 6)
    wanted, found = feed_forward(*tensors), torch.compile(feed_forward, fullgraph=True)(*tensors)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, tensors, dout), torch.autograd.grad(wanted, tensors, dout))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, mixed, seed) -> None:
    """Output in x's dtype and gradients in their inputs', equal to the float64 result within a rounding."""
    x, *parameters = drawn(3, 4, dtype=dtype)
    tensors = [x, *(p.float() if mixed else p for p in parameters)]
    tensors = [t.requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dout = torch.randn(3, 4, 6).to(dtype)
    out, wanted = feed_forward(*tensors), feed_forward(*exact)
    found = torch.autograd.grad(out, tensors, dout)
    gradients = torch.autograd.grad(wanted, exact, dout.double())
    assert out.dtype == dtype
    for one, other, like in zip((out, *found), (wanted, *gradients), (x, *tensors), strict=True):
        assert one.dtype == like.dtype
        assert relative_error(one, other) < max(torch.finfo(like.dtype).eps, 2e-6)


def test_autocast_casts_x_and_rounds_once(seed) -> None:
    x, *parameters = drawn(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = feed_forward(x, *parameters)
    assert found.dtype == torch.bfloat16 and torch.equal(found, feed_forward(x.bfloat16(), *parameters))


def test_flops(seed) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = [t.requires_grad_() for t in drawn(2, 5, dtype=torch.float32)]
    with FlopCounterMode(display=False) as forward:
        out = feed_forward(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * 10 * 6 * 5
    assert forward.get_total_flops() == 3 * product and backward.get_total_flops() == 8 * product


def test_what_one_kernel_takes() -> None:
    """The model asks without Triton what the launcher decides."""
    pytest.importorskip("triton")
    from hdit_kernels import feed_forward_hopper

    module = sys.modules["hdit_kernels.feed_forward"]
    assert set(feed_forward_hopper.CONFIGS) == set(module.WIDTHS)
    assert feed_forward_hopper.CHUNK.value == module.MULTIPLE
    assert not module.is_one_kernel(torch.ones(1, 2, 128, dtype=torch.bfloat16), 384)


X, SCALE, UP, DOWN = torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(6, 4), torch.ones(4, 3)
BAD = [
    (([1.0], SCALE, UP, DOWN), TypeError, r"x: expected a torch.Tensor, got list"),
    ((X[0, 0], SCALE, UP, DOWN), ValueError, r"x: expected shape \[B, ..., C\] with C at least 1, got \[4\]"),
    ((X, SCALE[:1], UP, DOWN), ValueError, r"scale: expected shape \[2, 4\], got \[1, 4\]"),
    ((X, SCALE, UP[:, :3], DOWN), ValueError, r"up_weight: expected shape \[2·d_ff, 4\], got \[6, 3\]"),
    ((X, SCALE, UP[:5], DOWN), ValueError, r"up_weight: expected an even number of rows, 2·d_ff, got 5"),
    ((X, SCALE, UP, DOWN[:, :2]), ValueError, r"down_weight: expected shape \[4, 3\], got \[4, 2\]"),
    ((X, SCALE, UP.double(), DOWN), TypeError, r"up_weight: expected float64 exactly when x is, got torch.float64"),
    ((X, SCALE, UP, DOWN, -1.0), ValueError, r"eps: "),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        feed_forward(*arguments)
