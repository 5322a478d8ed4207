"""`geglu`: the gated activation of the feed-forward blocks."""

from __future__ import annotations

from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable


def geglu(x: Tensor) -> Tensor:
    """a · gelu(g) with a, g = x.chunk(2, -1), the value first and the exact (erf) GELU.

    Args:
        x: [..., 2·d_ff], bfloat16, float16 or float32 (float64 takes the reference); any strides whose last is 1.

    Returns:
        [..., d_ff] in x's dtype, contiguous; also under autocast.

    Raises:
        TypeError, ValueError: x is no floating tensor, or its last dimension is odd or empty.

    Source: Shazeer 2020, arXiv:2002.05202; HDiT section 4.3.
    """
    checks.floating(x=x)
    if x.ndim < 1 or x.shape[-1] == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x: expected shape [..., 2·d_ff], got {list(x.shape)}")
    return _geglu(x)


def _reference_backward(dout: Tensor, x: Tensor) -> Tensor:
    (dx,) = registration.vjp(reference.geglu, (x,), (dout,))
    return dx


def _kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels import geglu_triton

    return geglu_triton


_forward = registration.define(
    "geglu_forward",
    "(Tensor x) -> Tensor",
    reference=reference.geglu,
    launcher=lambda: _kernels().geglu_forward,
    fake=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
_backward = registration.define(
    "geglu_backward",
    "(Tensor dout, Tensor x) -> Tensor",
    reference=_reference_backward,
    launcher=lambda: _kernels().geglu_backward,
    fake=lambda dout, x: x.new_empty(x.shape),
)
_geglu = differentiable(
    reference.geglu,
    forward=_forward,
    backward=lambda cotangents, tensors, saved, settings, needed: (_backward(*cotangents, *tensors),),
    inputs=1,
)
