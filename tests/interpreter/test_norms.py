"""The norms and gates: the launchers themselves, on tiny tensors."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from hdit_kernels import norms_triton, reference, testing
from hdit_kernels.testing import relative_error
from tests.lanes import kernels_only

# Several blocks of rows, one channel, widths of no power of two and of no multiple of 8, of three and of five parts that
# forward reads, of parts that are not all full, more than a block holds.
SHAPES = [
    (3, 7, 24),
    (2, 150, 16),
    (2, 3, 5, 33),
    (5, 64),
    (4, 1),
    (1, 2, 2, 3, 200),
    (1, 9, 384),
    (2, 2, 320),
    (1, 2, 600),
    (1, 2, 2100),
]
# activations, parameters
DTYPES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
]
# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
LIMIT = testing.FLOOR | {torch.bfloat16: 2 * testing.FLOOR[torch.bfloat16]}
FORWARD = {
    "rms_norm": norms_triton.rms_norm_forward,
    "ada_rms_norm": norms_triton.ada_rms_norm_forward,
    "ada_layer_norm": norms_triton.ada_layer_norm_forward,
    "gated_residual": norms_triton.gated_residual_forward,
}
BACKWARD = {
    "rms_norm": norms_triton.rms_norm_backward,
    "ada_rms_norm": norms_triton.ada_rms_norm_backward,
    "ada_layer_norm": norms_triton.ada_layer_norm_backward,
    "gated_residual": norms_triton.gated_residual_backward,
}


def check(name: str, inputs: dict[str, Tensor], dout: Tensor, eps: float = 1e-6) -> None:
    """Output and gradients of the launchers against the reference in float64 (dx of gated_residual is dout itself)."""
    settings = () if name == "gated_residual" else (eps,)
    leaves = [t.double().detach().requires_grad_() for t in inputs.values()]
    wanted = getattr(reference, name)(*leaves, *settings)
    gradients = dict(zip(inputs, torch.autograd.grad(wanted, leaves, dout.double(), retain_graph=True), strict=True))
    terms = {key: torch.zeros_like(leaf) for key, leaf in zip(inputs, leaves, strict=True)}  # of a sum: their sizes
    rows = dout.shape[:-1].numel()
    for row in dout.double() * torch.eye(rows).view(rows, *dout.shape[:-1], 1):
        for key, term in zip(inputs, torch.autograd.grad(wanted, leaves, row, retain_graph=True), strict=True):
            terms[key] += term.abs()
    saved = list(inputs.values())
    if name == "gated_residual":
        saved, gradients = saved[1:], {k: g for k, g in gradients.items() if k != "x"}

    with kernels_only():
        out = FORWARD[name](*inputs.values(), *settings)
        found = BACKWARD[name](dout, *saved, *settings)
    assert out.dtype == inputs["x"].dtype and out.is_contiguous() and out.shape == wanted.shape
    assert relative_error(out, wanted) <= LIMIT[out.dtype], "out"
    assert len(found) == len(gradients)
    for (key, want), gradient in zip(gradients.items(), found, strict=True):
        assert gradient.dtype == inputs[key].dtype and gradient.is_contiguous() and gradient.shape == want.shape
        # Sums over rows may nearly cancel: they are judged by what rounding may do to their terms.
        size = (want if key in ("x", "y") else terms[key]).norm()
        assert (gradient.double() - want).norm() <= LIMIT[gradient.dtype] * size, f"d{key}"


def inputs_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, parameter_dtype: torch.dtype) -> dict[str, Tensor]:
    per_sample = [torch.randn(shape[0], shape[-1]).to(parameter_dtype) for _ in range(2)]
    x, y = (torch.randn(shape) + 0.5).to(dtype), torch.randn(shape).to(dtype)
    return {
        "rms_norm": {"x": x, "weight": torch.randn(shape[-1]).to(parameter_dtype)},
        "ada_rms_norm": {"x": x, "scale": per_sample[0]},
        "ada_layer_norm": {"x": x, "shift": per_sample[0], "scale": per_sample[1]},
        "gated_residual": {"x": x, "y": y, "gate": per_sample[0]},
    }[name]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_shapes(name, shape, seed) -> None:
    # With one channel and a small eps the gradient of x is nothing but cancellation.
    eps = 1.0 if shape[-1] == 1 else 1e-6
    check(name, inputs_of(name, shape, torch.float32, torch.float32), torch.randn(shape), eps)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_dtypes(name, dtype, parameter_dtype, seed) -> None:
    for shape in [(2, 5, 3, 56), (3, 4, 37), (1, 3, 768)]:
        check(name, inputs_of(name, shape, dtype, parameter_dtype), torch.randn(shape).to(dtype))


@pytest.mark.parametrize("name", ["ada_layer_norm", "gated_residual"])
def test_more_lines_than_an_axis_of_the_grid(name, seed, monkeypatch) -> None:
    monkeypatch.setattr(norms_triton, "LINES", 2)
    monkeypatch.setattr(norms_triton, "LINES_OF_AN_AXIS", tl.constexpr(2))
    norms_triton._plan.cache_clear()
    check(name, inputs_of(name, (5, 3, 16), torch.float32, torch.float32), torch.randn(5, 3, 16))
    norms_triton._plan.cache_clear()


@pytest.mark.parametrize("name", FORWARD)
def test_several_runs_a_line(name, seed, monkeypatch) -> None:
    """Partial sums of many programs: more blocks than one run holds, runs of unequal length."""
    monkeypatch.setattr(norms_triton, "UNDER_WAY", 1)
    monkeypatch.setattr(norms_triton.launch, "multiprocessors", lambda device: 6)
    inputs = inputs_of(name, (2, 11, 13, 40), torch.float32, torch.float32)
    check(name, inputs, torch.randn(2, 11, 13, 40))


def _gaps(tensor: Tensor, before: int, after: int) -> Tensor:
    """The same values inside a wider tensor of NaN."""
    return torch.nn.functional.pad(tensor, (before, after), value=float("nan"))[..., before : before + tensor.shape[-1]]


LAYOUTS = {
    "aligned gaps": lambda t: _gaps(t, 0, 8),
    "unaligned rows": lambda t: _gaps(t, 0, 3),
    "unaligned pointer": lambda t: _gaps(t, 1, 7),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 2 else t,
    "last stride 2": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORWARD)
def test_strides(name, layout, seed) -> None:
    """Where a kernel reads two tensors, they differ in the strides of the first two dimensions."""

    def swapped(tensor: Tensor) -> Tensor:
        return LAYOUTS[layout](tensor.transpose(0, 1)).transpose(0, 1)

    for shape in [(3, 4, 5, 24), (2, 9, 17)]:
        inputs, dout = inputs_of(name, shape, torch.float32, torch.float32), torch.randn(shape)
        inputs = {key: swapped(t) if key == "y" else LAYOUTS[layout](t) for key, t in inputs.items()}
        check(name, inputs, LAYOUTS[layout](dout) if "y" in inputs else swapped(dout))


@pytest.mark.parametrize("name", FORWARD)
def test_expanded_and_many_dimensions(name, seed) -> None:
    inputs = inputs_of(name, (2, 3, 2, 3, 2, 16), torch.float32, torch.float32)
    inputs["x"] = inputs["x"].permute(0, 3, 2, 1, 4, 5)  # four leading dimensions that do not merge
    if "y" in inputs:
        inputs["y"] = inputs["y"].permute(0, 3, 2, 1, 4, 5)
    check(name, inputs, torch.randn(2, 1, 2, 3, 1, 16).expand(2, 3, 2, 3, 2, 16))


@pytest.mark.parametrize("name", FORWARD)
def test_no_rows(name, seed) -> None:
    for shape in [(2, 0, 24), (0, 3, 24)]:
        check(name, inputs_of(name, shape, torch.float32, torch.float32), torch.randn(shape))


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in the padding, from numpy
@pytest.mark.parametrize("name", ["rms_norm", "ada_rms_norm", "ada_layer_norm"])
def test_eps_zero_and_wide_range(name, seed) -> None:
    """Rows of very different size, and no eps: the rows that pad the last block must not spill NaN into the sums."""
    inputs = inputs_of(name, (2, 5, 40), torch.float32, torch.float32)
    inputs["x"] *= torch.logspace(-4, 4, 5)[:, None]
    check(name, inputs, torch.randn(2, 5, 40), eps=0.0)
    check(name, inputs, torch.randn(2, 5, 40), eps=1e-2)


@pytest.mark.parametrize("name", FORWARD)
def test_too_many_channels(name) -> None:
    inputs = inputs_of(name, (1, 1, norms_triton.MAX_CHANNELS + 1), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="x: expected at most 16384 channels on a GPU, got 16385"):
        FORWARD[name](*inputs.values(), *(() if name == "gated_residual" else (1e-6,)))
