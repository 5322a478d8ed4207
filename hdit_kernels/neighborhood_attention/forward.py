"""Forward kernel of `na2d`.

A program takes one head's tile of queries and walks the box of keys that their windows cover, box_y rows x box_x
columns at a time, with a running softmax; keys outside a query's own window are masked. Least traffic: q, k, v read
once, out written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.configs import Config, forward_config

LOG2_E = math.log2(math.e)


def na2d_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: None,
    add_v: None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher: arguments as checked by `op.na2d`; add_k, add_v, stride and causal have their defaults on a GPU.

    Returns out, lse (empty unless return_lse) and the softmax statistics for the backward [2, B, H, W, heads]: the
    largest logit and the logarithm of the sum of exp(logit − largest), base 2. Two numbers, because at logits of 1e4
    their sum is only good to 1e-3 in float32. With the fused multiply-add that forward and backward share, the
    rounding of the largest cancels.
    """
    query, key, value = dense(query), dense(key), dense(value)
    out = query.new_empty(query.shape)
    stats = query.new_empty((2, *query.shape[:-1]), dtype=torch.float32)
    lse = query.new_empty(query.shape[:-1] if return_lse else 0, dtype=torch.float32)
    programs, integers, constants = plan(
        forward_config, launch.gpu_family(query.device), query.dtype, query.shape,
        (query.stride(), key.stride(), value.stride()), aligned(query, key, value), tuple(window), tuple(dilation),
    )  # fmt: skip
    _na2d_forward_kernel[(programs,)](
        query, key, value, out, stats, lse, scale * LOG2_E, stats.numel() // 2, *integers,
        HAS_LSE=return_lse, PRECISION=launch.input_precision(query.dtype), **constants,
    )  # fmt: skip
    return out, lse, stats


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@functools.lru_cache(maxsize=4096)
def plan(
    configure: Callable[[str, torch.dtype, int], Config],
    family: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    all_aligned: bool,
    window: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, list[int], dict[str, Any]]:
    """Number of programs, integer arguments and constants of a launch over tiles of [B, H, W, heads, head_dim] tensors.

    Cached, since it costs as much host time as the launch itself.
    """
    batch, height, width, heads, head_dim = shape
    config = configure(family, dtype, head_dim)
    tiles_y = triton.cdiv(triton.cdiv(height, dilation[0]), config.tile_y)  # of the largest dilation sub-grid
    tiles_x = triton.cdiv(triton.cdiv(width, dilation[1]), config.tile_x)
    tokens = [stride for tensor in strides for stride in tensor[:-1]]
    vector = 8 if all_aligned and all(stride % 8 == 0 for stride in tokens) else 1
    integers = [height, width, heads, tiles_y, tiles_x, *window, *dilation, *(stride // vector for stride in tokens)]
    constants = dict(
        HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), VECTOR=vector,
        TILE_Y=config.tile_y, TILE_X=config.tile_x, BOX_Y=config.box_y, BOX_X=config.box_x, **config.options,
    )  # fmt: skip
    return batch * dilation[0] * dilation[1] * tiles_y * tiles_x * heads, integers, constants


@triton.jit
def tile_of_program(height, width, heads, tiles_y, tiles_x, dilation_y, dilation_x):
    """batch, head, tile and dilation residue of this program, and the lengths of its sub-grid's axes."""
    pid = tl.program_id(0)
    head = pid % heads  # neighbours in memory run side by side
    pid //= heads
    tile_x = pid % tiles_x
    pid //= tiles_x
    tile_y = pid % tiles_y
    pid //= tiles_y
    residue_x = pid % dilation_x
    pid //= dilation_x
    residue_y = pid % dilation_y
    batch = (pid // dilation_y).to(tl.int64)
    length_y = (height - residue_y + dilation_y - 1) // dilation_y
    length_x = (width - residue_x + dilation_x - 1) // dilation_x
    return batch, head.to(tl.int64), tile_y, tile_x, residue_y, residue_x, length_y, length_x


@triton.jit
def window_start(query, window, length):
    return tl.minimum(tl.maximum(query - window // 2, 0), length - window)


NOWHERE = tl.constexpr(2**30)  # a row that no window reaches


@triton.jit
def is_within(offset, length):
    """0 <= offset < length in one comparison: a negative offset is a large unsigned number."""
    return offset.to(tl.uint32, bitcast=True) < length.to(tl.uint32)


@triton.jit
def token_offset(y, x, stride_h, stride_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR: tl.constexpr):
    """Offset of the token at (y, x) of a dilation sub-grid within its image and head."""
    row, column = (residue_y + y * dilation_y).to(tl.int64), (residue_x + x * dilation_x).to(tl.int64)
    return (row * stride_h + column * stride_w) * VECTOR


@launch.kernel
def _na2d_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, rows: tl.int64,
    height: tl.int32, width: tl.int32, heads: tl.int32, tiles_y: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr,
    HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        height, width, heads, tiles_y, tiles_x, dilation_y, dilation_x
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:  # the shorter sub-grids of a dilation
        return
    lane = tl.arange(0, TILE_Y * TILE_X)
    query_y, query_x = first_y + lane // TILE_X, first_x + lane % TILE_X
    is_query = (query_y < length_y) & (query_x < length_x)
    query_y, query_x = tl.minimum(query_y, length_y - 1), tl.minimum(query_x, length_x - 1)
    start_y, start_x = window_start(query_y, window_y, length_y), window_start(query_x, window_x, length_x)

    dim = tl.arange(0, BLOCK_D)
    in_dim = dim < HEAD_DIM
    query_ptr += (batch * q_b + head * q_n) * VECTOR
    key_ptr += (batch * k_b + head * k_n) * VECTOR
    value_ptr += (batch * v_b + head * v_n) * VECTOR
    at = token_offset(query_y, query_x, q_h, q_w, residue_y, residue_x, dilation_y, dilation_x, VECTOR)
    q = tl.load(query_ptr + at[:, None] + dim[None, :], mask=in_dim[None, :], other=0.0)

    low_y, low_x = window_start(first_y, window_y, length_y), window_start(first_x, window_x, length_x)
    high_y = window_start(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y) + window_y
    high_x = window_start(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x) + window_x
    in_box = tl.arange(0, BOX_Y * BOX_X)
    row_in_box = in_box // BOX_X

    maximum = tl.full([TILE_Y * TILE_X], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Y * TILE_X], tl.float32)
    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    for first_column in range(low_x, high_x, BOX_X):
        # What a query sees of a box changes from row to row only by the row; the columns it doesn't see get a row that
        # never comes. So one subtraction, one comparison and one selection mask a product.
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
            products = tl.where(is_within(y - first_row, window_y), products, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(products, 1) * logit_scale)
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a query may see nothing of this box
            probability = tl.exp2(tl.math.fma(products, logit_scale, -finite[:, None]))
            decay = tl.exp2(maximum - finite)
            total = total * decay + tl.sum(probability, 1)
            acc = tl.dot(probability.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            maximum = new_maximum

    row, column = residue_y + query_y * dilation_y, residue_x + query_x * dilation_x
    token = ((batch * height + row) * width + column) * heads + head
    tl.store(stats_ptr + token, maximum, mask=is_query)
    tl.store(stats_ptr + rows + token, tl.log2(total), mask=is_query)
    if HAS_LSE:
        tl.store(lse_ptr + token, (maximum + tl.log2(total)) * 0.6931471805599453, mask=is_query)
    at = token[:, None] * HEAD_DIM + dim[None, :]
    tl.store(
        out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_dim[None, :]
    )
