"""The launchers of `na2d` and `neighborhood_self_attention`, and which backend's kernels each call takes: Hopper's own
where they can, else the portable ones. The only file that knows both; Hopper's modules are imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hdit_kernels import backend, launch, rope_triton
from hdit_kernels.neighborhood_attention import hopper_plan, triton_additional, triton_backward, triton_forward
from hdit_kernels.neighborhood_attention.buffers import dense
from hdit_kernels.neighborhood_attention.options import options

LOG2_E = math.log2(math.e)
NO_DILATION = (1, 1)


def na2d_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: Tensor | None,
    add_v: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int] | None,
    dilation: Sequence[int],
    causal: Sequence[bool] | None,
    scale: float,
    return_lse: bool,
    save_stats: bool,
) -> list[Tensor]:
    """Launcher: arguments as checked by `na2d.na2d`. Returns what `forward_launch` does."""
    more = options(query, key, value, add_k, add_v, stride, causal)
    if more is None:
        results, forward = forward_launch(query, key, value, window, dilation, scale, return_lse, save_stats)
    else:
        settings = (window, dilation, scale * LOG2_E, return_lse, save_stats, more)
        results, forward = triton_forward.forward_launch(dense(query), dense(key), dense(value), *settings)
    launch.run(forward)
    return results


def na2d_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: Tensor | None,
    add_v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    stride: Sequence[int] | None,
    dilation: Sequence[int],
    causal: Sequence[bool] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher: arguments as of `na2d_forward`."""
    dq, dk, dv = (query.new_empty(tensor.shape) for tensor in (query, key, value))
    more = options(query, key, value, add_k, add_v, stride, causal)
    if more is None:
        launch.run(*backward_launches(dq, dk, dv, dout, dlse, query, key, value, out, stats, window, dilation, scale))
        return dq, dk, dv, query.new_empty(0), query.new_empty(0)
    dlse = None if dlse is None else dlse.contiguous()
    tensors, scales = (dense(dout), dense(query), dense(key), dense(value)), (scale, scale * LOG2_E)
    first, terms = triton_backward.dq_launch(dq, *tensors, dlse, out, stats, window, dilation, *scales, more)
    second = triton_backward.dkdv_launch(dk, dv, *tensors, terms, stats, window, dilation, *scales, more)
    if more.extra > 0:
        dextra_k, dextra_v, *others = triton_additional.launches(*tensors[:2], terms, stats, *scales, more)
        launch.run(first, second, *others)
    else:
        dextra_k, dextra_v = (query.new_empty(0 if t is None else t.shape) for t in (add_k, add_v))
        launch.run(first, second)
    return dq, dk, dv, dextra_k, dextra_v


def self_attention_forward(
    qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, window: Sequence[int], eps: float, save: bool
) -> list[Tensor]:
    """Launcher: the kernels of `qk_norm_rope` and `na2d` over slices of packed tensors, planned first and run together,
    so that a first call compiles them side by side.
    """
    batch, height, width, _, heads, dim = qkv.shape
    ready = qkv.new_empty((batch, height, width, 2, heads, dim))
    make_ready = rope_triton.qk_norm_rope_forward_launch(ready, qkv, scale, theta_y, theta_x, eps)
    query, key = ready.unbind(3)
    (out, *stats), attend = forward_launch(query, key, qkv[:, :, :, 2], window, NO_DILATION, 1.0, False, save)
    launch.run(make_ready, attend)
    return [out, ready, *stats] if save else [out]


def self_attention_backward(
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
    """Launcher: as `self_attention_forward`."""
    dqkv = qkv.new_empty(qkv.shape)
    query, key = ready.unbind(3)
    dq, dk, dv = dqkv.unbind(3)
    launches = backward_launches(
        dq, dk, dv, dout, None, query, key, qkv[:, :, :, 2], out, stats, window, NO_DILATION, 1.0
    )
    dscale, rotate_back = rope_triton.qk_norm_rope_backward_launches(dqkv, dqkv, qkv, scale, theta_y, theta_x, eps)
    launch.run(*launches, *rotate_back)
    return dqkv, dscale


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    return_lse: bool,
    save_stats: bool,
) -> tuple[list[Tensor], launch.Launch]:
    """The results and the launch that fills them.

    Results are out, with return_lse lse, and with save_stats the softmax statistics for the backward: in float32
    [2, B, H, W, heads], the largest logit and the logarithm of the sum of exp(logit − largest), base 2; in 16
    bits [1, B, H, W, heads], their sum. Two numbers, because at logits of 1e4 their sum is only good to 1e-3. With the
    fused multiply-add that forward and backward share, the rounding of the largest cancels.
    """
    query, key, value = dense(query), dense(key), dense(value)
    logit_scale = scale * LOG2_E
    if on_hopper(query) and hopper_plan.takes(hopper_plan.FORWARD, (query, key, value), window, dilation):
        from hdit_kernels.neighborhood_attention import hopper_forward

        return hopper_forward.forward_launch(query, key, value, window, logit_scale, return_lse, save_stats)
    return triton_forward.forward_launch(query, key, value, window, dilation, logit_scale, return_lse, save_stats)


def backward_launches(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[launch.Launch, launch.Launch]:
    """The launches that write the gradients into dq, dk, dv, which share their strides (slices of one packed tensor,
    say).
    """
    dout, query, key, value = dense(dout), dense(query), dense(key), dense(value)
    dlse = None if dlse is None else dlse.contiguous()
    tensors, scales = (dout, query, key, value), (scale, scale * LOG2_E)
    if on_hopper(query) and hopper_plan.takes(hopper_plan.BACKWARD, (query, key, value), window, dilation):
        from hdit_kernels.neighborhood_attention import hopper_backward

        return hopper_backward.backward_launches(dq, dk, dv, *tensors, dlse, out, stats, window, *scales)
    dq_launch, terms = triton_backward.dq_launch(dq, *tensors, dlse, out, stats, window, dilation, *scales)
    if on_hopper(query) and hopper_plan.takes(hopper_plan.BACKWARD_WIDE, (query, key, value, dout), window, dilation):
        from hdit_kernels.neighborhood_attention import hopper_backward_wide

        return dq_launch, hopper_backward_wide.dkdv_launch(dk, dv, *tensors, terms, window, *scales)
    return dq_launch, triton_backward.dkdv_launch(dk, dv, *tensors, terms, stats, window, dilation, *scales)


def on_hopper(tensor: Tensor) -> bool:
    """Whether Hopper's own kernels may be asked."""
    return backend.chosen == "auto" and launch.gpu_family(tensor.device) == "hopper"
