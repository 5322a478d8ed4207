"""`neighborhood_self_attention`: HDiT's neighborhood attention from the packed projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted
from hdit_kernels.neighborhood_attention.buffers import stats_shape
from hdit_kernels.neighborhood_attention.na2d import check_window, flops_forward, kernels, softmax_stats
from hdit_kernels.rope import check_packed, check_scale


def neighborhood_self_attention(
    qkv: Tensor,
    scale: Tensor,
    theta_y: Tensor,
    theta_x: Tensor,
    kernel_size: int | Sequence[int],
    eps: float = 1e-6,
) -> Tensor:
    """Cosine-similarity neighborhood attention with axial RoPE: `na2d` with scale 1 over `qk_norm_rope(qkv, …)`.

    Args:
        qkv: packed projection [B, H, W, 3, heads, D], bfloat16, float16 or float32 (float64 takes the reference); any
            strides whose last is 1. D is a multiple of 8; on a GPU at most 128.
        scale: [heads], learned, positive.
        theta_y, theta_x: angles in radians, [H, heads, D/8] and [W, heads, D/8], float32 (float64 beside float64); no
            gradient.
        kernel_size: window, one number or (rows, columns), any parity, at most (H, W).
        eps: added to the sum of squares of a query or key.

    Returns:
        [B, H, W, heads, D] in qkv's dtype (the autocast dtype under autocast). The gradients of qkv (one packed tensor)
        and scale are deterministic.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: HDiT section 4.2.
    """
    window = _checked_window(qkv, scale, theta_y, theta_x, kernel_size)
    eps = check_scale(scale, eps)
    qkv = registration.cast(qkv, registration.autocast_dtype(qkv))
    return _self_attention(qkv, scale, theta_y, theta_x, window, eps)


@checks.remembered
def _checked_window(
    qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, kernel_size: int | Sequence[int]
) -> tuple[int, int]:
    check_packed(qkv, scale, theta_y, theta_x)
    window = checks.pair("kernel_size", kernel_size)
    check_window(qkv.shape[1:3], window)
    return window


def _reference_forward(qkv, scale, theta_y, theta_x, window, eps, save):
    wide = qkv if qkv.dtype == torch.float64 else qkv.float()
    ready = reference.qk_norm_rope(wide, scale, theta_y, theta_x, eps)
    query, key, value = ready.unbind(3)
    out, lse = reference.na2d(query, key, value, window, scale=1.0)
    out = out.to(qkv.dtype)
    return [out, ready[:, :, :, :2].to(qkv.dtype), softmax_stats(lse, qkv.dtype)] if save else [out]


def _reference_backward(dout, qkv, scale, theta_y, theta_x, ready, out, stats, window, eps):
    wide = qkv if qkv.dtype == torch.float64 else qkv.float()
    query, key, value = reference.qk_norm_rope(wide, scale, theta_y, theta_x, eps).unbind(3)  # `ready` is rounded
    dready = reference.na2d_backward(dout, None, query, key, value, window, scale=1.0)[:3]
    dqkv, dscale = registration.vjp(
        lambda qkv, scale: reference.qk_norm_rope(qkv, scale, theta_y, theta_x, eps),
        (wide, scale),
        (torch.stack(dready, 3),),
    )
    return dqkv.to(qkv.dtype), dscale


def _fake_forward(qkv, scale, theta_y, theta_x, window, eps, save):
    batch, height, width, _, heads, dim = qkv.shape
    out = qkv.new_empty((batch, height, width, heads, dim))
    if not save:
        return [out]
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    stats = qkv.new_empty(stats_shape((batch, height, width, heads), qkv.dtype), dtype=wide)
    return [out, qkv.new_empty((batch, height, width, 2, heads, dim)), stats]


def _flops_forward(qkv, scale, theta_y, theta_x, window, *_):
    query = (*qkv[:3], *qkv[4:])
    return flops_forward(query, query, query, None, None, window)


def _flops_backward(dout, qkv, scale, theta_y, theta_x, ready, out, stats, window, eps):
    return _flops_forward(qkv, scale, theta_y, theta_x, window) * 5 // 2


_forward = registration.define(
    "neighborhood_self_attention_forward",
    "(Tensor qkv, Tensor scale, Tensor theta_y, Tensor theta_x, int[] kernel_size, float eps, bool save) -> Tensor[]",
    reference=_reference_forward,
    launcher=lambda: kernels().self_attention_forward,
    fake=_fake_forward,
    flops=_flops_forward,
)
_backward = registration.define(
    "neighborhood_self_attention_backward",
    "(Tensor dout, Tensor qkv, Tensor scale, Tensor theta_y, Tensor theta_x, Tensor ready, Tensor out, "
    "Tensor softmax_stats, int[] kernel_size, float eps) -> (Tensor, Tensor)",
    reference=_reference_backward,
    launcher=lambda: kernels().self_attention_backward,
    fake=lambda dout, qkv, scale, *_: (qkv.new_empty(qkv.shape), scale.new_empty(scale.shape)),
    flops=_flops_backward,
)


def _gradients(cotangents, tensors, saved, settings, needed):
    out, ready, stats = saved
    return wanted(_backward(*cotangents, *tensors, ready, out, stats, *settings), needed)


_self_attention = differentiable(
    reference.neighborhood_self_attention,
    forward=_forward,
    backward=_gradients,
    inputs=2,
    constants=2,
    extras=2,
)
