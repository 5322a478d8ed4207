"""`qk_norm_rope`: cosine-similarity scaling and axial rotary embedding of packed queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted


def qk_norm_rope(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float = 1e-6) -> Tensor:
    """Queries and keys made ready for attention with scale 1: cosine-normalised, then rotated by axial angles.

    q and k are each multiplied by sqrt(scale) / sqrt(sum(q²) + eps). Then, with a = dims [0, D/4), b = dims [D/4, D/2)
    and the D/4 angles concat(theta_y[row], theta_x[column]): (a cos − b sin, b cos + a sin); dims from D/2 on pass
    through.

    Args:
        qkv: packed projection [B, H, W, 3, heads, D], bfloat16, float16 or float32 (float64 takes the reference); any
            strides whose last is 1. D is a multiple of 8; on a GPU at most 128.
        scale: [heads], learned, positive.
        theta_y, theta_x: angles in radians, [H, heads, D/8] and [W, heads, D/8], float32 (float64 beside float64); no
            gradient.
        eps: added to the sum of squares.

    Returns:
        [B, H, W, 3, heads, D] in qkv's dtype (the autocast dtype under autocast): q and k ready, v as it was.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Source: HDiT section 4.2 (cosine similarity attention with learned scale, axial RoPE, Su et al. 2021).
    """
    _remembered_check(qkv, scale, theta_y, theta_x)
    eps = check_scale(scale, eps)
    qkv = registration.cast(qkv, registration.autocast_dtype(qkv))
    return _qk_norm_rope(qkv, scale, theta_y, theta_x, eps)


def check_packed(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor) -> None:
    checks.floating(qkv=qkv, scale=scale, theta_y=theta_y, theta_x=theta_x)
    checks.shape("qkv", qkv, ["B", "H", "W", 3, "heads", "head_dim"])
    checks.nonempty("qkv", qkv)
    _, height, width, _, heads, dim = qkv.shape
    if dim % 8 != 0:
        raise ValueError(f"qkv: expected a head_dim that is a multiple of 8, got {dim}")
    if qkv.is_cuda and dim > 128:
        raise ValueError(f"qkv: expected a head_dim of at most 128 on a GPU, got {dim}")
    checks.shape("scale", scale, [heads])
    checks.shape("theta_y", theta_y, [height, heads, dim // 8])
    checks.shape("theta_x", theta_x, [width, heads, dim // 8])
    for name, theta in (("theta_y", theta_y), ("theta_x", theta_x)):
        if theta.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 (float64 beside float64), got {theta.dtype}")


_remembered_check = checks.remembered(check_packed)


def check_scale(scale: Tensor, eps: float) -> float:
    """What depends on values, so that it is looked at in every call; returns eps."""
    if scale.is_cpu:
        checks.values("scale", scale, checks.positive, "positive numbers")
    return checks.eps(eps)


def _reference_backward(
    dready: Tensor, qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dqkv, dscale = registration.vjp(
        lambda qkv, scale: reference.qk_norm_rope(qkv, scale, theta_y, theta_x, eps), (qkv, scale), (dready,)
    )
    return dqkv, dscale


def _kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels import rope_triton

    return rope_triton


_forward = registration.define(
    "qk_norm_rope_forward",
    "(Tensor qkv, Tensor scale, Tensor theta_y, Tensor theta_x, float eps) -> Tensor",
    reference=reference.qk_norm_rope,
    launcher=lambda: _kernels().qk_norm_rope_forward,
    fake=lambda qkv, scale, theta_y, theta_x, eps: qkv.new_empty(qkv.shape),
)
_backward = registration.define(
    "qk_norm_rope_backward",
    "(Tensor dready, Tensor qkv, Tensor scale, Tensor theta_y, Tensor theta_x, float eps) -> (Tensor, Tensor)",
    reference=_reference_backward,
    launcher=lambda: _kernels().qk_norm_rope_backward,
    fake=lambda dready, qkv, scale, theta_y, theta_x, eps: (qkv.new_empty(qkv.shape), scale.new_empty(scale.shape)),
)
_qk_norm_rope = differentiable(
    reference.qk_norm_rope,
    forward=_forward,
    backward=lambda cotangents, tensors, saved, settings, needed: wanted(
        _backward(*cotangents, *tensors, *settings), needed
    ),
    inputs=2,
    constants=2,
)
