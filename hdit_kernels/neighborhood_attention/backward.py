"""Backward kernels of `na2d`: deterministic, by gathering.

dQ: a tile of queries walks its box of keys as in the forward, and leaves delta = sum(dout · out) − dlse for the second
kernel. dK, dV: a tile of keys walks the box of queries whose windows reach it (the inverse window: at a border the
clamped windows of more queries end in the tile). Least traffic: q, k, v, out, dout read once, dq, dk, dv written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.configs import dkdv_config, dq_config
from hdit_kernels.neighborhood_attention.forward import (
    LOG2_E,
    NOWHERE,
    aligned,
    dense,
    is_within,
    plan,
    tile_of_program,
    token_offset,
    window_start,
)


def na2d_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: None,
    add_v: None,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher: arguments as checked by `op.na2d`; add_k, add_v, stride and causal have their defaults on a GPU."""
    dq, dk, dv = (query.new_empty(query.shape) for _ in range(3))
    na2d_backward_into(dq, dk, dv, dout, dlse, query, key, value, out, stats, window, dilation, scale)
    return dq, dk, dv, query.new_empty(0), query.new_empty(0)


def na2d_backward_into(
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
) -> None:
    """Writes the gradients into dq, dk, dv, which share their strides (slices of one packed tensor, say)."""
    dout, query, key, value = dense(dout), dense(query), dense(key), dense(value)
    dlse = None if dlse is None else dlse.contiguous()
    delta = stats.new_empty(stats.shape[1:])
    strides = (dout.stride(), query.stride(), key.stride(), value.stride(), dq.stride())
    place = (
        launch.gpu_family(query.device), query.dtype, query.shape, strides,
        aligned(dout, query, key, value, dq, dk, dv), tuple(window), tuple(dilation),
    )  # fmt: skip
    scales = (scale, scale * LOG2_E, delta.numel())
    precision = launch.input_precision(query.dtype)
    programs, integers, constants = plan(dq_config, *place)
    _na2d_dq_kernel[(programs,)](
        dout, query, key, value, out, stats, stats if dlse is None else dlse, dq, delta, *scales, *integers,
        HAS_DLSE=dlse is not None, PRECISION=precision, **constants,
    )  # fmt: skip
    programs, integers, constants = plan(dkdv_config, *place)
    _na2d_dkdv_kernel[(programs,)](
        dout, query, key, value, stats, delta, dk, dv, *scales, *integers, PRECISION=precision, **constants
    )


@launch.kernel
def _na2d_dq_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, dlse_ptr, dq_ptr, delta_ptr,
    scale, logit_scale, rows: tl.int64,
    height: tl.int32, width: tl.int32, heads: tl.int32, tiles_y: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        height, width, heads, tiles_y, tiles_x, dilation_y, dilation_x
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:
        return
    lane = tl.arange(0, TILE_Y * TILE_X)
    query_y, query_x = first_y + lane // TILE_X, first_x + lane % TILE_X
    is_query = (query_y < length_y) & (query_x < length_x)
    query_y, query_x = tl.minimum(query_y, length_y - 1), tl.minimum(query_x, length_x - 1)
    start_y, start_x = window_start(query_y, window_y, length_y), window_start(query_x, window_x, length_x)

    dim = tl.arange(0, BLOCK_D)
    in_dim = dim < HEAD_DIM
    key_ptr += (batch * k_b + head * k_n) * VECTOR
    value_ptr += (batch * v_b + head * v_n) * VECTOR
    at = (batch * q_b + head * q_n) * VECTOR
    at += token_offset(query_y, query_x, q_h, q_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    q = tl.load(query_ptr + at[:, None] + dim[None, :], mask=in_dim[None, :], other=0.0)
    at = (batch * o_b + head * o_n) * VECTOR
    at += token_offset(query_y, query_x, o_h, o_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    dout = tl.load(dout_ptr + at[:, None] + dim[None, :], mask=in_dim[None, :], other=0.0)

    row, column = residue_y + query_y * dilation_y, residue_x + query_x * dilation_x
    token = ((batch * height + row) * width + column) * heads + head
    out = tl.load(out_ptr + token[:, None] * HEAD_DIM + dim[None, :], mask=in_dim[None, :], other=0.0)
    maximum, log_total = tl.load(stats_ptr + token), tl.load(stats_ptr + rows + token)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + token)
    tl.store(delta_ptr + token, delta, mask=is_query)

    low_y, low_x = window_start(first_y, window_y, length_y), window_start(first_x, window_x, length_x)
    high_y = window_start(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y) + window_y
    high_x = window_start(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x) + window_x
    in_box = tl.arange(0, BOX_Y * BOX_X)
    row_in_box = in_box // BOX_X

    dq = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    for first_column in range(low_x, high_x, BOX_X):  # masked as in the forward
        key_x = first_column + in_box % BOX_X
        sees_column = is_within(key_x[None, :] - start_x[:, None], window_x)
        first_row = tl.where(sees_column, start_y[:, None] - row_in_box[None, :], NOWHERE)
        key_x = tl.minimum(key_x, length_x - 1)
        k_at = token_offset(row_in_box, key_x, k_h, k_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
        v_at = token_offset(row_in_box, key_x, v_h, v_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
        for y in range(low_y, high_y, BOX_Y):
            is_key = (y + row_in_box < high_y)[:, None] & in_dim[None, :]
            base = (y * dilation_y).to(tl.int64) * VECTOR
            k = tl.load(key_ptr + base * k_h + k_at[:, None] + dim[None, :], mask=is_key, other=0.0)
            v = tl.load(value_ptr + base * v_h + v_at[:, None] + dim[None, :], mask=is_key, other=0.0)

            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            exponent = tl.math.fma(products, logit_scale, -maximum[:, None]) - log_total[:, None]
            probability = tl.where(is_within(y - first_row, window_y), tl.exp2(exponent), 0.0)
            dprobability = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            dlogits = probability * (dprobability - delta[:, None])
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)

    at = (batch * g_b + head * g_n) * VECTOR
    at += token_offset(query_y, query_x, g_h, g_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    mask = is_query[:, None] & in_dim[None, :]
    tl.store(dq_ptr + at[:, None] + dim[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_query(key, window):
    """The first query whose window reaches the key, along one axis."""
    return tl.where(key < window, 0, key - window + 1 + window // 2)


@triton.jit
def last_query(key, window, length):
    """The last query whose window reaches the key: everyone clamped at the end sees the last `window` keys."""
    return tl.where(key >= length - window, length - 1, key + window // 2)


@launch.kernel
def _na2d_dkdv_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr, scale, logit_scale, rows: tl.int64,
    height: tl.int32, width: tl.int32, heads: tl.int32, tiles_y: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        height, width, heads, tiles_y, tiles_x, dilation_y, dilation_x
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:
        return
    lane = tl.arange(0, TILE_Y * TILE_X)
    key_y, key_x = first_y + lane // TILE_X, first_x + lane % TILE_X
    is_key = (key_y < length_y) & (key_x < length_x)
    key_y, key_x = tl.minimum(key_y, length_y - 1), tl.minimum(key_x, length_x - 1)

    dim = tl.arange(0, BLOCK_D)
    in_dim = dim < HEAD_DIM
    query_ptr += (batch * q_b + head * q_n) * VECTOR
    dout_ptr += (batch * o_b + head * o_n) * VECTOR
    at = (batch * k_b + head * k_n) * VECTOR
    at += token_offset(key_y, key_x, k_h, k_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    k = tl.load(key_ptr + at[:, None] + dim[None, :], mask=in_dim[None, :], other=0.0)
    at = (batch * v_b + head * v_n) * VECTOR
    at += token_offset(key_y, key_x, v_h, v_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    v = tl.load(value_ptr + at[:, None] + dim[None, :], mask=in_dim[None, :], other=0.0)

    low_y, low_x = first_query(first_y, window_y), first_query(first_x, window_x)
    high_y = last_query(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y) + 1
    high_x = last_query(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x) + 1
    in_box = tl.arange(0, BOX_Y * BOX_X)
    row_in_box = in_box // BOX_X

    dk = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    for first_column in range(low_x, high_x, BOX_X):
        query_x = first_column + in_box % BOX_X
        sees_column = is_within(key_x[:, None] - window_start(query_x, window_x, length_x)[None, :], window_x)
        key_row = tl.where(sees_column & (query_x < high_x)[None, :], key_y[:, None], -NOWHERE)
        query_x = tl.minimum(query_x, length_x - 1)
        q_at = token_offset(row_in_box, query_x, q_h, q_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
        o_at = token_offset(row_in_box, query_x, o_h, o_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
        token_at = token_offset(row_in_box, query_x, width, 1, residue_y, residue_x, dilation_y, dilation_x, 1)
        token_at = (batch * height * width + token_at) * heads + head
        for y in range(low_y, high_y, BOX_Y):
            query_y = y + row_in_box
            is_query = query_y < high_y
            mask = is_query[:, None] & in_dim[None, :]
            base = (y * dilation_y).to(tl.int64)
            q = tl.load(query_ptr + base * q_h * VECTOR + q_at[:, None] + dim[None, :], mask=mask, other=0.0)
            dout = tl.load(dout_ptr + base * o_h * VECTOR + o_at[:, None] + dim[None, :], mask=mask, other=0.0)
            token = base * width * heads + token_at
            maximum = tl.load(stats_ptr + token, mask=is_query, other=0.0)
            log_total = tl.load(stats_ptr + rows + token, mask=is_query, other=0.0)
            delta = tl.load(delta_ptr + token, mask=is_query, other=0.0)

            start_y = tl.where(is_query, window_start(query_y, window_y, length_y), NOWHERE)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            exponent = tl.math.fma(products, logit_scale, -maximum[None, :]) - log_total[None, :]
            probability = tl.where(is_within(key_row - start_y[None, :], window_y), tl.exp2(exponent), 0.0)
            dv = tl.dot(probability.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dprobability = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dlogits = probability * (dprobability - delta[None, :])
            dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)

    at = (batch * g_b + head * g_n) * VECTOR
    at += token_offset(key_y, key_x, g_h, g_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    mask = is_key[:, None] & in_dim[None, :]
    tl.store(dk_ptr + at[:, None] + dim[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at[:, None] + dim[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)
