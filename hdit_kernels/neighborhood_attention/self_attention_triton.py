"""Launchers of `neighborhood_self_attention`: the kernels of `qk_norm_rope` and `na2d` over slices of packed
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hdit_kernels.neighborhood_attention.backward import na2d_backward_into
from hdit_kernels.neighborhood_attention.forward import na2d_forward
from hdit_kernels.rope_triton import qk_norm_rope_backward_into, qk_norm_rope_into

ONCE, NOT_CAUSAL = (1, 1), (False, False)


def forward(
    qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, window: Sequence[int], eps: float, save: bool
) -> list[Tensor]:
    batch, height, width, _, heads, dim = qkv.shape
    ready = qkv.new_empty((batch, height, width, 2, heads, dim))
    qk_norm_rope_into(ready, qkv, scale, theta_y, theta_x, eps)
    query, key = ready.unbind(3)
    value = qkv[:, :, :, 2]
    out, *stats = na2d_forward(query, key, value, None, None, window, ONCE, ONCE, NOT_CAUSAL, 1.0, False, save)
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
    na2d_backward_into(dq, dk, dv, dout, None, query, key, qkv[:, :, :, 2], out, stats, window, ONCE, 1.0)
    return dqkv, qk_norm_rope_backward_into(dqkv, dqkv, qkv, scale, theta_y, theta_x, eps)
