"""The norms and gates on the CPU: the reference against PyTorch's own norms, and how the operators behave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdit_kernels import ada_layer_norm, ada_rms_norm, gated_residual, rms_norm

FUNCTIONS = {f.__name__: f for f in (rms_norm, ada_rms_norm, ada_layer_norm, gated_residual)}
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)  # [B, ...], then C
channels, seeds = st.integers(1, 40), st.integers(0, 2**31)


def draw(name: str, shape=(2, 3, 5), dtype=torch.float64, parameter_dtype=None) -> list[Tensor]:
    """The tensors that the function takes, in order, with gradients."""
    parameter_dtype = parameter_dtype or dtype
    kinds = {"rms_norm": "xw", "ada_rms_norm": "xs", "ada_layer_norm": "xss", "gated_residual": "xxs"}[name]
    sizes = {"x": shape, "w": shape[-1:], "s": (shape[0], shape[-1])}
    return [torch.randn(sizes[k]).to(dtype if k == "x" else parameter_dtype).requires_grad_() for k in kinds]


def per_sample(parameter: Tensor, x: Tensor) -> Tensor:
    """[B, C] -> x's shape, built row by row."""
    return torch.stack([row.expand(x.shape[1:]) for row in parameter])


@settings(max_examples=30, deadline=None)
@given(shapes, channels, seeds)
def test_equal_pytorchs_norms(leading, width, seed) -> None:
    torch.manual_seed(seed)
    shape = (*leading, width)
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    weight = torch.randn(width, dtype=torch.float64)
    shift, scale = torch.randn(2, shape[0], width, dtype=torch.float64)
    plain, layer = F.rms_norm(x, (width,), eps=1e-3), F.layer_norm(x, (width,), eps=1e-3)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), plain * weight)
    torch.testing.assert_close(ada_rms_norm(x, scale, 1e-3), plain * (1 + per_sample(scale, x)))
    wanted = layer * (1 + per_sample(scale, x)) + per_sample(shift, x)
    torch.testing.assert_close(ada_layer_norm(x, shift, scale, 1e-3), wanted)
    torch.testing.assert_close(gated_residual(x, y, scale), x + per_sample(scale, x) * y)


def test_eps_is_added_to_the_mean_square_or_variance() -> None:
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    wanted = 1e-3 / (1e-6 + 1e-6) ** 0.5  # the default eps is as large as the mean square
    torch.testing.assert_close(rms_norm(x, torch.ones(4, dtype=torch.float64)), torch.full_like(x, wanted))
    torch.testing.assert_close(ada_rms_norm(x, zero), torch.full_like(x, wanted))
    pair = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64) + 5
    zero = torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(ada_layer_norm(pair, zero, zero), torch.tensor([[wanted, -wanted]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 2, 4)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name, shape, seed) -> None:
    assert torch.autograd.gradcheck(FUNCTIONS[name], draw(name, shape))


def test_gate_returns_the_gradient_of_x_as_it_came(seed) -> None:
    x, y, gate = draw("gated_residual", (2, 3, 4), torch.bfloat16, torch.float32)
    dout = torch.randn(2, 3, 4).bfloat16()
    (dx,) = torch.autograd.grad(gated_residual(x, y, gate), [x], dout)
    assert torch.equal(dx, dout)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_gradient_at_a_time(name, seed) -> None:
    """Frozen inputs don't change the gradients of the others."""
    inputs = draw(name)
    dout = torch.randn(inputs[0].shape, dtype=torch.float64)
    wanted = torch.autograd.grad(FUNCTIONS[name](*inputs), inputs, dout)
    for position, want in enumerate(wanted):
        alone = [t.detach() for t in inputs]
        alone[position].requires_grad_()
        (found,) = torch.autograd.grad(FUNCTIONS[name](*alone), [alone[position]], dout)
        assert torch.equal(found, want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name, seed) -> None:
    operators = torch.ops.hdit_kernels
    for dtype, parameter_dtype in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]:
        inputs = [t.detach() for t in draw(name, (2, 3, 5), dtype, parameter_dtype)]
        dout = torch.randn(5, 3, 2).to(dtype).transpose(0, 2)
        eps = () if name == "gated_residual" else (1e-6,)
        torch.library.opcheck(getattr(operators, f"{name}_forward").default, (*inputs, *eps))
        saved = inputs[1:] if name == "gated_residual" else inputs
        torch.library.opcheck(getattr(operators, f"{name}_backward").default, (dout, *saved, *eps))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole(name, seed) -> None:
    inputs = draw(name, dtype=torch.float32)
    wanted, found = FUNCTIONS[name](*inputs), torch.compile(FUNCTIONS[name], fullgraph=True)(*inputs)
    torch.testing.assert_close(found, wanted)
    dout = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, dout), torch.autograd.grad(wanted, inputs, dout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes(name, dtype, parameter_dtype, seed) -> None:
    """Output in x's dtype, each gradient in its input's, equal to the float64 result within one rounding."""
    inputs = draw(name, (3, 4, 6), dtype, parameter_dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, wanted = FUNCTIONS[name](*inputs), FUNCTIONS[name](*exact)
    dout = torch.randn(out.shape).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    gradients = torch.autograd.grad(out, inputs, dout), torch.autograd.grad(wanted, exact, dout.double())
    for tensor, found, want in zip(inputs, *gradients, strict=True):
        assert found.dtype == tensor.dtype
        torch.testing.assert_close(found, want.to(found.dtype), rtol=torch.finfo(found.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_keeps_the_dtype_and_the_values(name, seed) -> None:
    inputs = draw(name, dtype=torch.float32)
    wanted = FUNCTIONS[name](*inputs)
    dout = torch.randn_like(wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = FUNCTIONS[name](*inputs)
        gradients = torch.autograd.grad(found, inputs, dout)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    for gradient, want in zip(gradients, torch.autograd.grad(wanted, inputs, dout), strict=True):
        assert torch.equal(gradient, want)


def test_gate_takes_the_output_of_an_autocast_projection(seed) -> None:
    x, y, gate = draw("gated_residual", dtype=torch.float32)
    out = gated_residual(x, y.bfloat16(), gate)
    assert out.dtype == torch.float32
    (dy,) = torch.autograd.grad(out.sum(), [y])
    torch.testing.assert_close(dy, per_sample(gate, x).bfloat16().float())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides_and_no_alias(name, seed) -> None:
    inputs = draw(name, (4, 3, 6))
    wanted = FUNCTIONS[name](*inputs)
    turned = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    found = FUNCTIONS[name](*turned)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()
    assert all(found.data_ptr() != t.data_ptr() for t in turned)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows(name) -> None:
    inputs = draw(name, (2, 0, 6))
    out = FUNCTIONS[name](*inputs)
    assert out.shape == (2, 0, 6)
    for tensor, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


X, WEIGHT, ROW = torch.ones(2, 3, 5), torch.ones(5), torch.ones(2, 5)
BAD = [
    (rms_norm, ([1.0], WEIGHT), TypeError, r"x: expected a torch.Tensor, got list"),
    (rms_norm, (X.int(), WEIGHT), TypeError, r"x: expected bfloat16, .*, got int32"),
    (rms_norm, (torch.ones(()), WEIGHT), ValueError, r"x: expected shape \[..., C\] with C at least 1, got \[\]"),
    (rms_norm, (torch.ones(2, 0), torch.ones(0)), ValueError, r"x: expected shape \[..., C\].*got \[2, 0\]"),
    (rms_norm, (X, torch.ones(4)), ValueError, r"weight: expected shape \[5\], got \[4\]"),
    (rms_norm, (X, WEIGHT, -1.0), ValueError, r"eps: expected a number of at least 0, got -1.0"),
    (ada_rms_norm, (WEIGHT, ROW), ValueError, r"x: expected shape \[B, ..., C\] with C at least 1, got \[5\]"),
    (ada_rms_norm, (X, torch.ones(1, 5)), ValueError, r"scale: expected shape \[2, 5\], got \[1, 5\]"),
    (ada_rms_norm, (X, WEIGHT), ValueError, r"scale: expected shape \[2, 5\], got \[5\]"),
    (ada_rms_norm, (X, ROW, float("nan")), ValueError, r"eps: expected a number of at least 0, got nan"),
    (ada_layer_norm, (X, torch.ones(2, 4), ROW), ValueError, r"shift: expected shape \[2, 5\], got \[2, 4\]"),
    (ada_layer_norm, (X, ROW, ROW.long()), TypeError, r"scale: expected bfloat16, .*, got int64"),
    (gated_residual, (X, torch.ones(2, 1, 5), ROW), ValueError, r"y: expected shape \[2, 3, 5\], got \[2, 1, 5\]"),
    (gated_residual, (X, X, torch.ones(2, 3, 5)), ValueError, r"gate: expected shape \[2, 5\], got \[2, 3, 5\]"),
    (gated_residual, (X, X.to("meta"), ROW), ValueError, r"y: expected a tensor on cpu like x, got one on meta"),
]


@pytest.mark.parametrize(("function", "inputs", "error", "message"), BAD, ids=[case[3] for case in BAD])
def test_bad_input(function, inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        function(*inputs)
