"""`rms_norm`, `ada_rms_norm`, `ada_layer_norm` and `gated_residual`: the norms and gates around the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    Args:
        x: [..., C], bfloat16, float16 or float32 (float64 takes the reference). Any strides whose last is 1 are read
            without a copy, as long as the leading dimensions merge into three. On a GPU C is at most 16384.
        weight: [C], of x's dtype or another.
        eps: added to the mean square.

    Returns:
        [..., C] in x's dtype, contiguous; also under autocast. Statistics are float32. The gradients have their
        inputs' dtypes and are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467; HDiT section 4.
    """
    return _rms_norm(x, weight, _check_rms_norm(x, weight, eps))


def ada_rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (1 + scale), over the last dimension, with one scale per sample.

    Args:
        x: [B, ..., C], bfloat16, float16 or float32 (float64 takes the reference). Any strides whose last is 1 are read
            without a copy, as long as the dimensions between merge into two. On a GPU C is at most 16384.
        scale: [B, C], of x's dtype or another; its last stride 1, e.g. a chunk of a wider projection.
        eps: added to the mean square.

    Returns:
        [B, ..., C] in x's dtype, contiguous; also under autocast. Statistics are float32. The gradients have their
        inputs' dtypes and are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: HDiT section 4 (the conditioning enters as the norm's scale).
    """
    return _ada_rms_norm(x, scale, _check_ada_rms_norm(x, scale, eps))


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift, over the last dimension, with one shift and scale per sample.

    Args:
        x: [B, ..., C], bfloat16, float16 or float32 (float64 takes the reference). Any strides whose last is 1 are read
            without a copy, as long as the dimensions between merge into two. On a GPU C is at most 16384.
        shift, scale: [B, C], of x's dtype or another; last stride 1, e.g. chunks of a wider projection.
        eps: added to the variance.

    Returns:
        [B, ..., C] in x's dtype, contiguous; also under autocast. Statistics are float32. The gradients have their
        inputs' dtypes and are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: adaLN of DiT, Peebles & Xie 2023, arXiv:2212.09748, section 3.2.
    """
    return _ada_layer_norm(x, shift, scale, _check_ada_layer_norm(x, shift, scale, eps))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate · y with one gate per sample.

    Args:
        x: [B, ..., C], bfloat16, float16 or float32 (float64 takes the reference). Any strides whose last is 1 are read
            without a copy, as long as the dimensions between merge into two. On a GPU C is at most 16384.
        y: like x; its dtype may differ, as after a projection under autocast.
        gate: [B, C], of x's dtype or another; its last stride 1, e.g. a chunk of a wider projection.

    Returns:
        [B, ..., C] in x's dtype, contiguous; also under autocast. The sum is float32, rounded once. The gradients have
        their inputs' dtypes and are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Source: adaLN-Zero of DiT, Peebles & Xie 2023, arXiv:2212.09748, section 3.2.
    """
    _check_gated_residual(x, y, gate)
    return _gated_residual(x, y, gate)


@checks.remembered
def _check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> float:
    """Returns eps, as do the others that have one."""
    checks.floating(x=x, weight=weight)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., C] with C at least 1, got {list(x.shape)}")
    checks.shape("weight", weight, x.shape[-1:])
    return checks.eps(eps)


@checks.remembered
def _check_ada_rms_norm(x: Tensor, scale: Tensor, eps: float) -> float:
    _check_per_sample(x, scale=scale)
    return checks.eps(eps)


@checks.remembered
def _check_ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> float:
    _check_per_sample(x, shift=shift, scale=scale)
    return checks.eps(eps)


@checks.remembered
def _check_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> None:
    checks.floating(x=x, y=y, gate=gate)
    _check_per_sample(x, gate=gate)
    checks.shape("y", y, x.shape)


def _check_per_sample(x: Tensor, **parameters: Tensor) -> None:
    checks.floating(x=x, **parameters)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [B, ..., C] with C at least 1, got {list(x.shape)}")
    for name, tensor in parameters.items():
        checks.shape(name, tensor, (x.shape[0], x.shape[-1]))


def _rms_norm_vjp(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return tuple(registration.vjp(lambda x, weight: reference.rms_norm(x, weight, eps), (x, weight), (dout,)))


def _ada_rms_norm_vjp(dout: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return tuple(registration.vjp(lambda x, scale: reference.ada_rms_norm(x, scale, eps), (x, scale), (dout,)))


def _ada_layer_norm_vjp(dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    inputs = (x, shift, scale)
    return tuple(
        registration.vjp(lambda x, shift, scale: reference.ada_layer_norm(x, shift, scale, eps), inputs, (dout,))
    )


def _gated_residual_vjp(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    # x is not needed for the gradients of y and gate: dout, which has its shape and dtype, stands in for it.
    return tuple(registration.vjp(lambda y, gate: reference.gated_residual(dout, y, gate), (y, gate), (dout,)))


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Empty contiguous outputs, each of its tensor's shape and dtype."""
    return tuple(t.new_empty(t.shape) for t in tensors)


def _kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels import norms_triton

    return norms_triton


_rms_norm_forward = registration.define(
    "rms_norm_forward",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    launcher=lambda: _kernels().rms_norm_forward,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
)
_rms_norm_backward = registration.define(
    "rms_norm_backward",
    "(Tensor dout, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=_rms_norm_vjp,
    launcher=lambda: _kernels().rms_norm_backward,
    fake=lambda dout, x, weight, eps: _like(x, weight),
)
_ada_rms_norm_forward = registration.define(
    "ada_rms_norm_forward",
    "(Tensor x, Tensor scale, float eps) -> Tensor",
    reference=reference.ada_rms_norm,
    launcher=lambda: _kernels().ada_rms_norm_forward,
    fake=lambda x, scale, eps: x.new_empty(x.shape),
)
_ada_rms_norm_backward = registration.define(
    "ada_rms_norm_backward",
    "(Tensor dout, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)",
    reference=_ada_rms_norm_vjp,
    launcher=lambda: _kernels().ada_rms_norm_backward,
    fake=lambda dout, x, scale, eps: _like(x, scale),
)
_ada_layer_norm_forward = registration.define(
    "ada_layer_norm_forward",
    "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
    reference=reference.ada_layer_norm,
    launcher=lambda: _kernels().ada_layer_norm_forward,
    fake=lambda x, shift, scale, eps: x.new_empty(x.shape),
)
_ada_layer_norm_backward = registration.define(
    "ada_layer_norm_backward",
    "(Tensor dout, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_ada_layer_norm_vjp,
    launcher=lambda: _kernels().ada_layer_norm_backward,
    fake=lambda dout, x, shift, scale, eps: _like(x, shift, scale),
)
_gated_residual_forward = registration.define(
    "gated_residual_forward",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    reference=reference.gated_residual,
    launcher=lambda: _kernels().gated_residual_forward,
    fake=lambda x, y, gate: x.new_empty(x.shape),
)
_gated_residual_backward = registration.define(
    "gated_residual_backward",
    "(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    reference=_gated_residual_vjp,
    launcher=lambda: _kernels().gated_residual_backward,
    fake=lambda dout, y, gate: _like(y, gate),
)


def _joined(
    reference: Callable[..., Tensor], forward: Callable[..., Tensor], backward: Callable[..., Any], inputs: int
) -> Callable[..., Tensor]:
    """A norm of `inputs` tensors and eps."""
    return differentiable(
        reference,
        forward=forward,
        backward=lambda cotangents, tensors, saved, settings, needed: wanted(
            backward(*cotangents, *tensors, *settings), needed
        ),
        inputs=inputs,
    )


_rms_norm = _joined(reference.rms_norm, _rms_norm_forward, _rms_norm_backward, 2)
_ada_rms_norm = _joined(reference.ada_rms_norm, _ada_rms_norm_forward, _ada_rms_norm_backward, 2)
_ada_layer_norm = _joined(reference.ada_layer_norm, _ada_layer_norm_forward, _ada_layer_norm_backward, 3)
_gated_residual = differentiable(
    reference.gated_residual,
    forward=_gated_residual_forward,
    backward=lambda cotangents, tensors, saved, settings, needed: (
        None,
        *wanted(_gated_residual_backward(*cotangents, *tensors[1:]), needed[1:]),
    ),
    inputs=3,
    passed_on=0,  # a registered operator may not return its argument
)
