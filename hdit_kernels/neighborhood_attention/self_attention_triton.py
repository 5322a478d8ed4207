"""Launchers of `neighborhood_self_attention`: the kernels of `qk_norm_rope` and `na2d` over slices of packed
tensors, planned first and run together, so that a first call compiles them side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.backward import backward_launches
from hdit_kernels.neighborhood_attention.forward import forward_launch
from hdit_kernels.rope_triton import qk_norm_rope_backward_launches, qk_norm_rope_forward_launch

DILATION = (1, 1)


def forward(
    qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, window: Sequence[int], eps: float, save: bool
) -> list[Tensor]:
    batch, height, width, _, heads, dim = qkv.shape
    ready = qkv.new_empty((batch, height, width, 2, heads, dim))
    make_ready = qk_norm_rope_forward_launch(ready, qkv, scale, theta_y, theta_x, eps)
    query, key = ready.unbind(3)
    (out, *stats), attend = forward_launch(query, key, qkv[:, :, :, 2], window, DILATION, 1.0, False, save)
    launch.run(make_ready, attend)
    return [out, ready, *stats] if save else [out]


def backward(
    dout: Tensor,
    qkv: Tensor,
    scale: Tensor,
    theta_y: Tensor,
    theta_x: Tensor,
    ready: Tensor,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    dqkv = qkv.new_empty(qkv.shape)
    query, key = ready.unbind(3)
    dq, dk, dv = dqkv.unbind(3)
    launches = backward_launches(dq, dk, dv, dout, None, query, key, qkv[:, :, :, 2], out, stats, window, DILATION, 1.0)
    dscale, rotate_back = qk_norm_rope_backward_launches(dqkv, dqkv, qkv, scale, theta_y, theta_x, eps)
    launch.run(*launches, *rotate_back)
    return dqkv, dscale
