"""Portable backward kernels of `na2d`: deterministic, by gathering.

dQ: a tile of queries walks its keys block by block as in the forward, and leaves delta = sum(dout · out) − dlse for the
second kernel. dK, dV: a tile of keys walks the queries whose windows reach it (the inverse window: at a border the
clamped windows of more queries end in the tile). Least traffic: q, k, v, out, dout read once, dq, dk, dv written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.options import Options, with_options
from hdit_kernels.neighborhood_attention.triton_configs import Configure, dkdv_config, dq_config, plan_tiles
from hdit_kernels.neighborhood_attention.triton_device import (
    add_dkdv,
    add_dq,
    additional_bias,
    additional_keys,
    as_operand,
    first_query,
    keys_end,
    keys_seen,
    last_query,
    mask_bias,
    offsets,
    pack,
    tile_of_program,
    token_at,
    unpack,
    unsigned,
)


def dq_launch(
    dq: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    logit_scale: float,
    options: Options | None = None,
    configure: Configure = dq_config,
) -> tuple[launch.Launch, Tensor]:
    """The launch that writes the query's gradient, of the kernel of this module; all but dq are dense.

    Also returns what it leaves the second kernel of each query and head [B, H, W, heads], int64: the first statistic
    and delta, two float32 that one load brings.
    """
    terms = torch.empty(stats.shape[1:], dtype=torch.int64, device=stats.device)
    grid, integers, constants = _plan_backward(configure, options, dq, dout, query, key, value, window, dilation)
    constants = constants | {"HAS_DLSE": dlse is not None, "PRECISION": launch.input_precision(query.dtype)}
    tensors = (dout, query, key, value, out, stats, stats if dlse is None else dlse, dq, terms)
    numbers = [scale, logit_scale, terms.numel(), *integers]
    first = launch.Launch(_na2d_dq_kernel, grid, tensors, numbers, constants)
    return first if options is None else with_options(first, value.shape[-1], options.arguments()), terms


def dkdv_launch(
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Tensor,
    stats: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    logit_scale: float,
    options: Options | None = None,
    configure: Configure = dkdv_config,
) -> launch.Launch:
    """That which writes the gradients of key and value, dk and dv, with the terms of `dq_launch`."""
    grid, integers, constants = _plan_backward(configure, options, dk, dout, query, key, value, window, dilation)
    constants = constants | {"PRECISION": launch.input_precision(query.dtype)}
    tensors = (dout, query, key, value, terms, stats, dk, dv)
    numbers = [scale, logit_scale, terms.numel(), *integers]
    second = launch.Launch(_na2d_dkdv_kernel, grid, tensors, numbers, constants)
    return second if options is None else with_options(second, value.shape[-1], options.windows())


def _plan_backward(
    configure: Configure,
    options: Options | None,
    gradient: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    strides = (dout.stride(), query.stride(), key.stride(), value.stride(), gradient.stride())
    all_aligned = launch.aligned(dout, query, key, value, gradient)
    family, value_dim = launch.gpu_family(query.device), 0 if options is None else value.shape[-1]
    axes = (tuple(window), tuple(dilation))
    heads = gradient.shape[3]
    return plan_tiles(configure, family, query.dtype, query.shape, strides, all_aligned, *axes, heads, value_dim)


@launch.kernel
def _na2d_dq_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, dlse_ptr, dq_ptr, terms_ptr,
    scale, logit_scale, rows: tl.int64,
    images: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
    OPTIONS: tl.constexpr = False, VALUE_D: tl.constexpr = None, BLOCK_VALUE_D: tl.constexpr = None,
    group=None, stride_y=None, stride_x=None, causal_y=None, causal_x=None,
    extra=None, extra_k_ptr=None, extra_v_ptr=None,
):  # fmt: skip
    # Tiles, blocks, strides (o: dout; g: the gradient), stats, rows, images, VECTOR, WIDE and what follows OPTIONS: as
    # of the forward kernel. dlse: [B, H, W, heads], read if HAS_DLSE. terms: [B, H, W, heads] of int64, written for the
    # second kernel.
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        images, height, width, heads, tiles_x, dilation_y, dilation_x
    )
    head_kv = head // group if OPTIONS else head
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:
        return
    row, column = residue_y + first_y * dilation_y, residue_x + first_x * dilation_x
    in_tile = tl.arange(0, TILE_Y * TILE_X)
    tile_row, tile_column = in_tile // TILE_X, in_tile % TILE_X
    query_y, query_x = first_y + tile_row, first_x + tile_column
    is_query = (query_y < length_y) & (query_x < length_x)
    start_y, count_y = keys_seen(query_y, window_y, length_y, stride_y, causal_y)
    start_x, count_x = keys_seen(query_x, window_x, length_x, stride_x, causal_x)
    if OPTIONS:
        count_y, count_x = count_y[:, None], count_x[:, None]

    DV: tl.constexpr = VALUE_D if OPTIONS else D
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE_D if OPTIONS else BLOCK_D)
    in_dim, in_dim_v = (dim < D)[None, :], (dim_v < DV)[None, :]
    mask, mask_v = is_query[:, None] & in_dim, is_query[:, None] & in_dim_v
    query_ptr = token_at(query_ptr, batch, head, row, column, q_b, q_h, q_w, q_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * q_h, dilation_x * q_w, VECTOR, WIDE)
    q = as_operand(tl.load(query_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0), PRECISION)
    dout_ptr = token_at(dout_ptr, batch, head, row, column, o_b, o_h, o_w, o_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * o_h, dilation_x * o_w, VECTOR, WIDE)
    dout = tl.load(dout_ptr + at[:, None] + dim_v[None, :], mask=mask_v, other=0.0)

    token = (unsigned(batch) * height + row) * (unsigned(width) * heads) + (column * heads + head)
    at = offsets(tile_row, tile_column, unsigned(width) * dilation_y * heads, dilation_x * heads, 1, WIDE)
    out = tl.load(out_ptr + token * DV + (at[:, None] * DV + dim_v[None, :]), mask=mask_v, other=0.0)
    maximum = tl.load(stats_ptr + token + at, mask=is_query, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    dout = as_operand(dout, PRECISION)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + token + at, mask=is_query, other=0.0)
    log_total = None
    if query_ptr.dtype.element_ty == tl.float32:  # else the first statistic is their sum
        log_total = tl.load(stats_ptr + rows + token + at, mask=is_query, other=0.0)
    tl.store(terms_ptr + token + at, pack(maximum, delta), mask=is_query)

    low_y, _ = keys_seen(first_y, window_y, length_y, stride_y, causal_y)
    low_x, _ = keys_seen(first_x, window_x, length_x, stride_x, causal_x)
    high_y = keys_end(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y, stride_y, causal_y)
    high_x = keys_end(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x, stride_x, causal_x)
    block_row, block_column = residue_y + low_y * dilation_y, residue_x + low_x * dilation_x
    key_ptr = token_at(key_ptr, batch, head_kv, block_row, block_column, k_b, k_h, k_w, k_n, VECTOR)
    value_ptr = token_at(value_ptr, batch, head_kv, block_row, block_column, v_b, v_h, v_w, v_n, VECTOR)
    in_block = tl.arange(0, BLOCK_Y * BLOCK_X)
    block_y, block_x = in_block // BLOCK_X, in_block % BLOCK_X
    k_at = offsets(block_y, block_x, dilation_y * k_h, dilation_x * k_w, VECTOR, WIDE)[:, None] + dim[None, :]
    v_at = offsets(block_y, block_x, dilation_y * v_h, dilation_x * v_w, VECTOR, WIDE)[:, None] + dim_v[None, :]

    dq = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    if OPTIONS:
        KEYS: tl.constexpr = BLOCK_Y * BLOCK_X
        heads_kv = heads // group
        for first in range(0, extra, KEYS):
            k = additional_keys(extra_k_ptr, batch, head_kv, heads_kv, first, extra, dim, in_dim, D, KEYS)
            v = additional_keys(extra_v_ptr, batch, head_kv, heads_kv, first, extra, dim_v, in_dim_v, DV, KEYS)
            k, v = as_operand(k, PRECISION), as_operand(v, PRECISION)
            bias = additional_bias(first, extra, TILE_Y * TILE_X, KEYS)
            dq = add_dq(dq, q, k, v, dout, bias, logit_scale, maximum, log_total, delta, PRECISION)
    for x in range(low_x, high_x, BLOCK_X):  # masked as in the forward
        column_bias = mask_bias((x + block_x)[None, :] - start_x[:, None], count_x)
        first_row = start_y[:, None] - block_y[None, :]
        end = tl.where(x + block_x < high_x, high_y - block_y, low_y)
        k_ptr, v_ptr = key_ptr, value_ptr
        for y in range(low_y, high_y, BLOCK_Y):
            is_key = (y < end)[:, None]
            k = as_operand(tl.load(k_ptr + k_at, mask=is_key & in_dim, other=0.0), PRECISION)
            v = as_operand(tl.load(v_ptr + v_at, mask=is_key & in_dim_v, other=0.0), PRECISION)
            k_ptr += dilation_y * k_h * (BLOCK_Y * VECTOR)
            v_ptr += dilation_y * v_h * (BLOCK_Y * VECTOR)

            bias = column_bias + mask_bias(y - first_row, count_y)
            dq = add_dq(dq, q, k, v, dout, bias, logit_scale, maximum, log_total, delta, PRECISION)
        key_ptr += dilation_x * k_w * (BLOCK_X * VECTOR)
        value_ptr += dilation_x * v_w * (BLOCK_X * VECTOR)

    dq_ptr = token_at(dq_ptr, batch, head, row, column, g_b, g_h, g_w, g_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * g_h, dilation_x * g_w, VECTOR, WIDE)
    tl.store(dq_ptr + at[:, None] + dim[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@launch.kernel
def _na2d_dkdv_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, terms_ptr, stats_ptr, dk_ptr, dv_ptr, scale, logit_scale, rows: tl.int64,
    images: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
    OPTIONS: tl.constexpr = False, VALUE_D: tl.constexpr = None, BLOCK_VALUE_D: tl.constexpr = None,
    group=None, stride_y=None, stride_x=None, causal_y=None, causal_x=None,
):  # fmt: skip
    # A program: TILE_Y x TILE_X keys of one head, with BLOCK_Y x BLOCK_X queries at a time. Arguments: as of the kernel
    # above, whose terms it reads; dk and dv share the strides g, or are contiguous both.
    heads_kv = heads // group if OPTIONS else heads
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        images, height, width, heads_kv, tiles_x, dilation_y, dilation_x
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:
        return
    row, column = residue_y + first_y * dilation_y, residue_x + first_x * dilation_x
    in_tile = tl.arange(0, TILE_Y * TILE_X)
    tile_row, tile_column = in_tile // TILE_X, in_tile % TILE_X
    key_y, key_x = first_y + tile_row, first_x + tile_column
    is_key = (key_y < length_y) & (key_x < length_x)

    DV: tl.constexpr = VALUE_D if OPTIONS else D
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE_D if OPTIONS else BLOCK_D)
    in_dim, in_dim_v = (dim < D)[None, :], (dim_v < DV)[None, :]
    tile_mask, tile_mask_v = is_key[:, None] & in_dim, is_key[:, None] & in_dim_v
    key_ptr = token_at(key_ptr, batch, head, row, column, k_b, k_h, k_w, k_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * k_h, dilation_x * k_w, VECTOR, WIDE)
    k = as_operand(tl.load(key_ptr + at[:, None] + dim[None, :], mask=tile_mask, other=0.0), PRECISION)
    value_ptr = token_at(value_ptr, batch, head, row, column, v_b, v_h, v_w, v_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * v_h, dilation_x * v_w, VECTOR, WIDE)
    v = as_operand(tl.load(value_ptr + at[:, None] + dim_v[None, :], mask=tile_mask_v, other=0.0), PRECISION)

    # The queries that see a key are an interval on each axis, as the keys that a query sees.
    start_y = first_query(key_y, window_y, stride_y, causal_y)
    start_x = first_query(key_x, window_x, stride_x, causal_x)
    count_y = last_query(key_y, window_y, length_y, stride_y, causal_y) + 1 - start_y
    count_x = last_query(key_x, window_x, length_x, stride_x, causal_x) + 1 - start_x
    low_y = first_query(first_y, window_y, stride_y, causal_y)
    low_x = first_query(first_x, window_x, stride_x, causal_x)
    high_y = last_query(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y, stride_y, causal_y) + 1
    high_x = last_query(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x, stride_x, causal_x) + 1
    block_row, block_column = residue_y + low_y * dilation_y, residue_x + low_x * dilation_x
    first_head = head * group if OPTIONS else head
    q_head = token_at(query_ptr, batch, first_head, block_row, block_column, q_b, q_h, q_w, q_n, VECTOR)
    o_head = token_at(dout_ptr, batch, first_head, block_row, block_column, o_b, o_h, o_w, o_n, VECTOR)
    token = (unsigned(batch) * height + block_row) * (unsigned(width) * heads) + (block_column * heads + first_head)
    t_head, s_head = terms_ptr + token, stats_ptr + rows + token
    in_block = tl.arange(0, BLOCK_Y * BLOCK_X)
    block_y, block_x = in_block // BLOCK_X, in_block % BLOCK_X
    q_at = offsets(block_y, block_x, dilation_y * q_h, dilation_x * q_w, VECTOR, WIDE)[:, None] + dim[None, :]
    o_at = offsets(block_y, block_x, dilation_y * o_h, dilation_x * o_w, VECTOR, WIDE)[:, None] + dim_v[None, :]
    step_y, step_x = unsigned(width) * dilation_y * heads, unsigned(heads) * dilation_x

    dk = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_Y * TILE_X, BLOCK_VALUE_D if OPTIONS else BLOCK_D], tl.float32)
    for _ in range(0, group if OPTIONS else 1):  # heads that share these keys
        query_ptr, dout_ptr, terms_ptr, stats_ptr = q_head, o_head, t_head, s_head
        for x in range(low_x, high_x, BLOCK_X):
            column_bias = mask_bias((x + block_x)[None, :] - start_x[:, None], count_x[:, None])
            first_row = start_y[:, None] - block_y[None, :]
            end = tl.where(x + block_x < high_x, high_y - block_y, low_y)
            t_at = offsets(block_y, tl.minimum(block_x, high_x - x - 1), step_y, step_x, 1, WIDE)
            q_ptr, o_ptr, t_ptr, s_ptr = query_ptr, dout_ptr, terms_ptr, stats_ptr
            for y in range(low_y, high_y, BLOCK_Y):
                is_query = (y < end)[:, None]
                q = as_operand(tl.load(q_ptr + q_at, mask=is_query & in_dim, other=0.0), PRECISION)
                dout = as_operand(tl.load(o_ptr + o_at, mask=is_query & in_dim_v, other=0.0), PRECISION)
                inside = y + block_y < high_y
                maximum, delta = unpack(tl.load(t_ptr + t_at, mask=inside, other=0))
                bias = column_bias + mask_bias(y - first_row, count_y[:, None])
                dk, dv = add_dkdv(
                    dk, dv, k, v, q, dout, bias, logit_scale, maximum, delta, s_ptr, t_at, inside, PRECISION
                )
                q_ptr += dilation_y * q_h * (BLOCK_Y * VECTOR)
                o_ptr += dilation_y * o_h * (BLOCK_Y * VECTOR)
                t_ptr += step_y * BLOCK_Y
                s_ptr += step_y * BLOCK_Y
            query_ptr += dilation_x * q_w * (BLOCK_X * VECTOR)
            dout_ptr += dilation_x * o_w * (BLOCK_X * VECTOR)
            terms_ptr += step_x * BLOCK_X
            stats_ptr += step_x * BLOCK_X
        q_head += q_n * VECTOR
        o_head += o_n * VECTOR
        t_head += 1
        s_head += 1

    dk_ptr = token_at(dk_ptr, batch, head, row, column, g_b, g_h, g_w, g_n, VECTOR)
    if OPTIONS:
        dv_ptr += ((unsigned(batch) * height + row) * (unsigned(width) * heads_kv) + (column * heads_kv + head)) * DV
    else:
        dv_ptr = token_at(dv_ptr, batch, head, row, column, g_b, g_h, g_w, g_n, VECTOR)
    at = offsets(tile_row, tile_column, dilation_y * g_h, dilation_x * g_w, VECTOR, WIDE)[:, None] + dim[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=tile_mask)
    if OPTIONS:
        at = offsets(tile_row, tile_column, unsigned(width) * dilation_y * heads_kv, dilation_x * heads_kv, 1, WIDE)
        at = at[:, None] * DV + dim_v[None, :]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=tile_mask_v)
