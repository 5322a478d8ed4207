"""Portable forward kernel of `na2d`.

A program takes one head's tile of queries and walks the keys that their windows cover in blocks of BLOCK_Y rows x
BLOCK_X columns, with a running softmax; keys outside a query's own window are masked. Least traffic: q, k, v read
once, out written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.buffers import empty_results
from hdit_kernels.neighborhood_attention.options import Options, with_options
from hdit_kernels.neighborhood_attention.triton_configs import Configure, forward_config, plan_tiles
from hdit_kernels.neighborhood_attention.triton_device import (
    additional_bias,
    additional_keys,
    as_operand,
    attend,
    keys_end,
    keys_seen,
    mask_bias,
    offsets,
    tile_of_program,
    token_at,
    unsigned,
)

LOWEST = tl.constexpr(-3e38)  # where a running maximum starts: finite, so that it can be subtracted


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    logit_scale: float,
    return_lse: bool,
    save_stats: bool,
    options: Options | None = None,
    configure: Configure = forward_config,
) -> tuple[list[Tensor], launch.Launch]:
    """As `dispatch.forward_launch`; inputs are dense."""
    value_dim = 0 if options is None else value.shape[-1]
    out, lse, stats = empty_results(query, return_lse, save_stats, value_dim or None)
    strides = (query.stride(), key.stride(), value.stride())
    grid, integers, constants = plan_tiles(
        configure, launch.gpu_family(query.device), query.dtype, query.shape, strides,
        launch.aligned(query, key, value), tuple(window), tuple(dilation), query.shape[3], value_dim,
    )  # fmt: skip
    constants = constants | {"HAS_LSE": return_lse, "PRECISION": launch.input_precision(query.dtype)}
    numbers = [logit_scale, int(save_stats), query.shape[:-1].numel(), *integers]
    tensors = (query, key, value, out, stats, lse)
    forward = launch.Launch(_na2d_forward_kernel, grid, tensors, numbers, constants)
    if options is not None:
        forward = with_options(forward, value_dim, options.arguments())
    return [out] + return_lse * [lse] + save_stats * [stats], forward


@launch.kernel
def _na2d_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, save_stats: tl.int32, rows: tl.int64,
    images: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
    OPTIONS: tl.constexpr = False, VALUE_D: tl.constexpr = None, BLOCK_VALUE_D: tl.constexpr = None,
    group=None, stride_y=None, stride_x=None, causal_y=None, causal_x=None,
    extra=None, extra_k_ptr=None, extra_v_ptr=None,
):  # fmt: skip
    # A program: TILE_Y x TILE_X queries of one head, with BLOCK_Y x BLOCK_X keys at a time. Tensors are
    # [B, H, W, heads, D] with strides of batch, row, column and head in units of VECTOR elements; out is contiguous.
    # stats and lse are [B, H, W, heads], stats twice in float32, `rows` numbers apart. images: batch · dilation², each
    # sub-grid its own. tiles_x: tiles in a row. BLOCK_D: D as a power of 2. WIDE: a block's offsets need 64 bits.
    # OPTIONS: the arguments behind it are given. VALUE_D: D of values and out. group: heads of queries to one of keys
    # and values. stride: queries that share a window. causal: 1 for an axis of causal windows, 0 for another. extra_k
    # and extra_v: [B, extra, heads of keys, …], contiguous, seen by every query.
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        images, height, width, heads, tiles_x, dilation_y, dilation_x
    )
    head_kv = head // group if OPTIONS else head
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:  # the shorter sub-grids of a dilation
        return
    row, column = residue_y + first_y * dilation_y, residue_x + first_x * dilation_x
    in_tile = tl.arange(0, TILE_Y * TILE_X)
    query_y, query_x = first_y + in_tile // TILE_X, first_x + in_tile % TILE_X
    is_query = (query_y < length_y) & (query_x < length_x)
    start_y, count_y = keys_seen(query_y, window_y, length_y, stride_y, causal_y)
    start_x, count_x = keys_seen(query_x, window_x, length_x, stride_x, causal_x)
    if OPTIONS:
        count_y, count_x = count_y[:, None], count_x[:, None]

    DV: tl.constexpr = VALUE_D if OPTIONS else D
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE_D if OPTIONS else BLOCK_D)
    in_dim, in_dim_v = (dim < D)[None, :], (dim_v < DV)[None, :]
    query_ptr = token_at(query_ptr, batch, head, row, column, q_b, q_h, q_w, q_n, VECTOR)
    at = offsets(in_tile // TILE_X, in_tile % TILE_X, dilation_y * q_h, dilation_x * q_w, VECTOR, WIDE)
    q = tl.load(query_ptr + at[:, None] + dim[None, :], mask=is_query[:, None] & in_dim, other=0.0)
    q = as_operand(q, PRECISION)

    low_y, _ = keys_seen(first_y, window_y, length_y, stride_y, causal_y)
    low_x, _ = keys_seen(first_x, window_x, length_x, stride_x, causal_x)
    high_y = keys_end(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y, stride_y, causal_y)
    high_x = keys_end(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x, stride_x, causal_x)
    row, column = residue_y + low_y * dilation_y, residue_x + low_x * dilation_x
    key_ptr = token_at(key_ptr, batch, head_kv, row, column, k_b, k_h, k_w, k_n, VECTOR)
    value_ptr = token_at(value_ptr, batch, head_kv, row, column, v_b, v_h, v_w, v_n, VECTOR)
    in_block = tl.arange(0, BLOCK_Y * BLOCK_X)
    block_y, block_x = in_block // BLOCK_X, in_block % BLOCK_X
    k_at = offsets(block_y, block_x, dilation_y * k_h, dilation_x * k_w, VECTOR, WIDE)[:, None] + dim[None, :]
    v_at = offsets(block_y, block_x, dilation_y * v_h, dilation_x * v_w, VECTOR, WIDE)[:, None] + dim_v[None, :]

    maximum = tl.full([TILE_Y * TILE_X], LOWEST, tl.float32)
    total = tl.zeros([TILE_Y * TILE_X], tl.float32)
    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_VALUE_D if OPTIONS else BLOCK_D], tl.float32)
    if OPTIONS:
        KEYS: tl.constexpr = BLOCK_Y * BLOCK_X
        heads_kv = heads // group
        for first in range(0, extra, KEYS):
            k = additional_keys(extra_k_ptr, batch, head_kv, heads_kv, first, extra, dim, in_dim, D, KEYS)
            v = additional_keys(extra_v_ptr, batch, head_kv, heads_kv, first, extra, dim_v, in_dim_v, DV, KEYS)
            k, v = as_operand(k, PRECISION), as_operand(v, PRECISION)
            bias = additional_bias(first, extra, TILE_Y * TILE_X, KEYS)
            maximum, total, acc = attend(q, tl.trans(k), v, bias, logit_scale, maximum, total, acc, PRECISION)
    for x in range(low_x, high_x, BLOCK_X):
        # Down a column of blocks, what a query sees changes only by the rows: the bias of the columns is made once, and
        # one addition joins it to that of the rows, as the accumulator from which the product starts.
        column_bias = mask_bias((x + block_x)[None, :] - start_x[:, None], count_x)
        first_row = start_y[:, None] - block_y[None, :]
        end = tl.where(x + block_x < high_x, high_y - block_y, low_y)  # the row from which on nothing is read
        k_ptr, v_ptr = key_ptr, value_ptr
        for y in range(low_y, high_y, BLOCK_Y):
            is_key = (y < end)[:, None]
            k = as_operand(tl.load(k_ptr + k_at, mask=is_key & in_dim, other=0.0), PRECISION)
            v = as_operand(tl.load(v_ptr + v_at, mask=is_key & in_dim_v, other=0.0), PRECISION)
            k_ptr += dilation_y * k_h * (BLOCK_Y * VECTOR)
            v_ptr += dilation_y * v_h * (BLOCK_Y * VECTOR)

            maximum, total, acc = attend(
                q, tl.trans(k), v, column_bias + mask_bias(y - first_row, count_y),  # gfx1100 schedules by this order
                logit_scale, maximum, total, acc, PRECISION,
            )  # fmt: skip
        key_ptr += dilation_x * k_w * (BLOCK_X * VECTOR)
        value_ptr += dilation_x * v_w * (BLOCK_X * VECTOR)

    row, column = residue_y + first_y * dilation_y, residue_x + first_x * dilation_x
    token = (unsigned(batch) * height + row) * (unsigned(width) * heads) + (column * heads + head)
    at = offsets(in_tile // TILE_X, in_tile % TILE_X, unsigned(width) * dilation_y * heads, dilation_x * heads, 1, WIDE)
    lse = maximum + tl.log2(total)
    is_kept = is_query & (save_stats > 0)
    if query_ptr.dtype.element_ty == tl.float32:
        tl.store(stats_ptr + token + at, maximum, mask=is_kept)
        tl.store(stats_ptr + rows + token + at, tl.log2(total), mask=is_kept)
    else:
        tl.store(stats_ptr + token + at, lse, mask=is_kept)
    if HAS_LSE:
        tl.store(lse_ptr + token + at, lse * 0.6931471805599453, mask=is_query)
    out = acc * (1.0 / total)[:, None]
    at = at[:, None] * DV + dim_v[None, :]
    tl.store(out_ptr + token * DV + at, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_dim_v)
