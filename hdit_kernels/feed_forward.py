"""`feed_forward`: the whole feed-forward block, from the norm to the residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdit_kernels import backend, checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted

WIDTHS, MULTIPLE = (128, 256), 64  # of x, and of d_ff, that one kernel on Hopper takes


def feed_forward(x: Tensor, scale: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x + down(geglu(up(ada_rms_norm(x, scale)))), without biases; backward computes what is between x and out anew.

    Args:
        x: [B, ..., C], bfloat16, float16 or float32 (float64 takes the reference); any strides, copied unless
            contiguous.
        scale: [B, C], of x's dtype or another: one for each sample; the norm multiplies by 1 + scale.
        up_weight: [2·d_ff, C], the value's rows first, then the gate's.
        down_weight: [C, d_ff]. Weights may have another dtype than x: forward and backward each round them to x's for
            the products.
        eps: added to the mean square.

    Returns:
        [B, ..., C] in x's dtype, contiguous. Under autocast x is cast to the autocast dtype first. Products accumulate
        and statistics are in float32. The gradients have their inputs' dtypes and are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: HDiT, Crowson et al. 2024, arXiv:2401.11605, sections 4 and 4.3.
    """
    eps = _check(x, scale, up_weight, down_weight, eps)
    x = registration.cast(x, registration.autocast_dtype(x))
    return _feed_forward(x, scale, up_weight, down_weight, eps)


def is_one_kernel(x: Tensor, d_ff: int) -> bool:
    """Whether forward of such an x, at a multiple of 16 bytes, is one kernel, as on Hopper GPUs at WIDTHS in 16-bit
    types. Only then is `feed_forward` faster than the separate operators where gradients are wanted: elsewhere backward
    computes anew what forward wrote to memory. (torch.compile traces this.)
    """
    return (
        x.is_cuda
        and backend.chosen == "auto"
        and x.shape[-1] in WIDTHS
        and d_ff % MULTIPLE == 0
        and registration.cast_dtype(x.dtype, registration.autocast_dtype(x)) in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
        and torch.cuda.get_device_properties(x.device).major == 9
    )


@checks.remembered
def _check(x: Tensor, scale: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float) -> float:
    """Returns eps."""
    checks.floating(x=x, scale=scale, up_weight=up_weight, down_weight=down_weight)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [B, ..., C] with C at least 1, got {list(x.shape)}")
    channels = x.shape[-1]
    checks.shape("scale", scale, (x.shape[0], channels))
    checks.shape("up_weight", up_weight, ["2·d_ff", channels])
    if up_weight.shape[0] == 0 or up_weight.shape[0] % 2 != 0:
        raise ValueError(f"up_weight: expected an even number of rows, 2·d_ff, got {up_weight.shape[0]}")
    checks.shape("down_weight", down_weight, (channels, up_weight.shape[0] // 2))
    for name, weight in (("up_weight", up_weight), ("down_weight", down_weight)):
        if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise TypeError(f"{name}: expected float64 exactly when x is, got {weight.dtype} beside {x.dtype}")
    return checks.eps(eps)


# The operators. needed: which of the gradients to compute; the others come back empty.


def _reference_backward(
    dout: Tensor, x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float, needed: list[bool]
) -> Any:
    return registration.gradients(
        lambda x, scale, up, down: reference.feed_forward(x, scale, up, down, eps), (x, scale, up, down), dout, needed
    )


def _product_flops(x: Sequence[int], down: Sequence[int]) -> int:
    """One product of all tokens with [C, d_ff]: 2 · tokens · C · d_ff; x has tokens · C elements."""
    elements = 1
    for size in x:
        elements *= size
    return 2 * elements * down[1]


def _flops(x, scale, up, down, eps):  # type: ignore[no-untyped-def]
    return 3 * _product_flops(x, down)


def _backward_flops(dout, x, scale, up, down, eps, needed):  # type: ignore[no-untyped-def]
    """The up projection anew, the hidden gradient, and what each gradient needs."""
    return (3 + 2 * (needed[0] or needed[1]) + 2 * needed[2] + needed[3]) * _product_flops(x, down)


def _kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels import feed_forward_triton

    return feed_forward_triton


_forward = registration.define(
    "feed_forward_forward",
    "(Tensor x, Tensor scale, Tensor up_weight, Tensor down_weight, float eps) -> Tensor",
    reference=reference.feed_forward,
    launcher=lambda: _kernels().feed_forward_forward,
    fake=lambda x, scale, up, down, eps: x.new_empty(x.shape),
    flops=_flops,
)
_backward = registration.define(
    "feed_forward_backward",
    "(Tensor dout, Tensor x, Tensor scale, Tensor up_weight, Tensor down_weight, float eps, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    launcher=lambda: _kernels().feed_forward_backward,
    fake=lambda dout, x, scale, up, down, eps, needed: registration.fake_gradients((x, scale, up, down), dout, needed),
    flops=_backward_flops,
)
_feed_forward = differentiable(
    reference.feed_forward,
    forward=_forward,
    backward=lambda cotangents, tensors, saved, settings, needed: wanted(
        _backward(*cotangents, *tensors, *settings, needed), needed
    ),
    inputs=4,
)
