"""Forward kernel of `na2d`; on Hopper, `hopper_forward` takes what it can.

A program takes one head's tile of queries and walks the box of keys that their windows cover, box_y rows x box_x
columns at a time, with a running softmax; keys outside a query's own window are masked. Least traffic: q, k, v read
once, out written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention import hopper
from hdit_kernels.neighborhood_attention.configs import Configure, forward_config
from hdit_kernels.neighborhood_attention.op import stats_shape

LOG2_E = math.log2(math.e)
MAX_GRID = 65535  # programs along any axis but the first
REACH = 2**31  # of offsets in 32 bits
LOWEST = tl.constexpr(-3e38)  # where a running maximum starts: finite, so that it can be subtracted


def na2d_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: None,
    add_v: None,
    window: Sequence[int],
    stride: Sequence[int] | None,
    dilation: Sequence[int],
    causal: Sequence[bool] | None,
    scale: float,
    return_lse: bool,
    save_stats: bool,
) -> list[Tensor]:
    """Launcher: arguments as checked by `op.na2d`; add_k, add_v, stride and causal have their defaults on a GPU.

    Returns what `forward_launch` does.
    """
    results, forward = forward_launch(query, key, value, window, dilation, scale, return_lse, save_stats)
    launch.run(forward)
    return results


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
    if launch.gpu_family(query.device) == "hopper" and hopper.takes_forward(query, key, value, window, dilation):
        from hdit_kernels.neighborhood_attention import hopper_forward

        return hopper_forward.forward_launch(query, key, value, window, scale * LOG2_E, return_lse, save_stats)
    return portable_forward_launch(query, key, value, window, dilation, scale * LOG2_E, return_lse, save_stats)


def portable_forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    dilation: Sequence[int],
    logit_scale: float,
    return_lse: bool,
    save_stats: bool,
    configure: Configure = forward_config,
) -> tuple[list[Tensor], launch.Launch]:
    """As `forward_launch`, of the kernel of this module; inputs are dense."""
    out, lse, stats = empty_results(query, return_lse, save_stats)
    grid, integers, constants = plan(
        configure, launch.gpu_family(query.device), query.dtype, query.shape,
        (query.stride(), key.stride(), value.stride()), aligned(query, key, value), tuple(window), tuple(dilation),
    )  # fmt: skip
    constants = constants | {"HAS_LSE": return_lse, "PRECISION": launch.input_precision(query.dtype)}
    numbers = [logit_scale, int(save_stats), query.shape[:-1].numel(), *integers]
    tensors = (query, key, value, out, stats, lse)
    forward = launch.Launch(_na2d_forward_kernel, grid, tensors, numbers, constants)
    return [out] + return_lse * [lse] + save_stats * [stats], forward


def empty_results(query: Tensor, return_lse: bool, save_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and statistics, to be filled; what nobody asked for is something that a kernel can be given."""
    tokens, nothing = query.shape[:-1], _nothing(query.device)
    lse = nothing.new_empty(tokens) if return_lse else nothing
    stats = nothing.new_empty(stats_shape(tokens, query.dtype)) if save_stats else nothing
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse, stats


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)  # once, since even this takes microseconds


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@functools.lru_cache(maxsize=4096)
def plan(
    configure: Configure,
    family: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    all_aligned: bool,
    window: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int, int], list[int], dict[str, Any]]:
    """Grid, integer arguments and constants of a launch over tiles of [B, H, W, heads, head_dim] tensors.

    Cached, since it costs as much host time as the launch itself.
    """
    batch, height, width, heads, head_dim = shape
    config = configure(family, dtype, head_dim, window)
    tiles_y = triton.cdiv(triton.cdiv(height, dilation[0]), config.tile_y)  # of the largest dilation sub-grid
    tiles_x = triton.cdiv(triton.cdiv(width, dilation[1]), config.tile_x)
    tokens = [stride for tensor in strides for stride in tensor[:-1]]
    vector = 8 if all_aligned and all(stride % 8 == 0 for stride in tokens) else 1
    images = batch * dilation[0] * dilation[1]
    layers = triton.cdiv(images, MAX_GRID)
    integers = [images, height, width, heads, tiles_x, *window, *dilation, *(stride // vector for stride in tokens)]
    box_y, box_x = max(config.tile_y, config.box_y), max(config.tile_x, config.box_x)
    steps = [(stride[1] * dilation[0], stride[2] * dilation[1]) for stride in strides]
    steps.append((width * heads * head_dim * dilation[0], heads * head_dim * dilation[1]))  # the output's
    wide = any(box_y * step_y + box_x * step_x >= REACH for step_y, step_x in steps)
    constants = dict(
        HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), VECTOR=vector, WIDE=wide,
        TILE_Y=config.tile_y, TILE_X=config.tile_x, BOX_Y=config.box_y, BOX_X=config.box_x, **config.options,
    )  # fmt: skip
    return (tiles_y * tiles_x * heads, triton.cdiv(images, layers), layers), integers, constants


@triton.jit
def tile_of_program(images, height, width, heads, tiles_x, dilation_y, dilation_x):
    """batch, head, tile and dilation residue of this program, and the lengths of its sub-grid's axes."""
    pid = tl.program_id(0).to(tl.uint32)  # unsigned division is cheaper
    tile = pid // heads.to(tl.uint32)
    head = pid - tile * heads  # neighbours in memory run side by side
    tile_y = tile // tiles_x.to(tl.uint32)
    tile_x = tile - tile_y * tiles_x
    batch, residue_y, residue_x = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1), 0, 0
    length_y, length_x = tl.where(batch < images, height, 0), width
    if dilation_y * dilation_x > 1:
        residue_x = batch % dilation_x
        residue_y = batch // dilation_x % dilation_y
        batch = batch // dilation_x // dilation_y
        length_y = (length_y - residue_y + dilation_y - 1) // dilation_y
        length_x = (width - residue_x + dilation_x - 1) // dilation_x
    return (
        batch, head.to(tl.int32), tile_y.to(tl.int32), tile_x.to(tl.int32), residue_y, residue_x, length_y, length_x
    )  # fmt: skip


@triton.jit
def window_start(query, window, length):
    return tl.minimum(tl.maximum(query - (window >> 1), 0), length - window)


@triton.jit
def penalty(offset, length):
    """0 where 0 <= offset < length, else -inf. One comparison: a negative offset is a large unsigned number."""
    return tl.where(offset.to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True), 0.0, float("-inf"))


@triton.jit
def unsigned(number):
    """A number that isn't negative in 64 bits, without the work that a sign makes in a product."""
    return number.to(tl.uint32).to(tl.int64)


@triton.jit
def token_at(pointer, batch, head, y, x, stride_b, stride_h, stride_w, stride_n, VECTOR: tl.constexpr):
    """Pointer to the first element of one token and head: scalars, 64 bits."""
    offset = unsigned(batch) * stride_b + unsigned(head) * stride_n + unsigned(y) * stride_h + unsigned(x) * stride_w
    return pointer + offset * VECTOR


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """x as a factor of a product: for tf32 rounded to it, where the product would cut the bits off."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN as it is
    return x


@triton.jit
def offsets(y, x, step_y, step_x, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the tokens (y, x) of a tile or box from its first one, in 32 bits unless the box spans more."""
    if WIDE:
        return (y.to(tl.int64) * step_y + x.to(tl.int64) * step_x) * VECTOR
    return (y * step_y.to(tl.int32) + x * step_x.to(tl.int32)) * VECTOR


@launch.kernel
def _na2d_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, save_stats: tl.int32, rows: tl.int64,
    images: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32, tiles_x: tl.int32,
    window_y: tl.int32, window_x: tl.int32, dilation_y: tl.int32, dilation_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr,
    HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile_y, tile_x, residue_y, residue_x, length_y, length_x = tile_of_program(
        images, height, width, heads, tiles_x, dilation_y, dilation_x
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if first_y >= length_y or first_x >= length_x:  # the shorter sub-grids of a dilation
        return
    row, column = residue_y + first_y * dilation_y, residue_x + first_x * dilation_x
    in_tile = tl.arange(0, TILE_Y * TILE_X)
    query_y, query_x = first_y + in_tile // TILE_X, first_x + in_tile % TILE_X
    is_query = (query_y < length_y) & (query_x < length_x)
    start_y, start_x = window_start(query_y, window_y, length_y), window_start(query_x, window_x, length_x)

    dim = tl.arange(0, BLOCK_D)
    in_dim = (dim < HEAD_DIM)[None, :]
    query_ptr = token_at(query_ptr, batch, head, row, column, q_b, q_h, q_w, q_n, VECTOR)
    at = offsets(in_tile // TILE_X, in_tile % TILE_X, dilation_y * q_h, dilation_x * q_w, VECTOR, WIDE)
    q = factor(tl.load(query_ptr + at[:, None] + dim[None, :], mask=is_query[:, None] & in_dim, other=0.0), PRECISION)

    low_y, low_x = window_start(first_y, window_y, length_y), window_start(first_x, window_x, length_x)
    high_y = window_start(tl.minimum(first_y + TILE_Y, length_y) - 1, window_y, length_y) + window_y
    high_x = window_start(tl.minimum(first_x + TILE_X, length_x) - 1, window_x, length_x) + window_x
    row, column = residue_y + low_y * dilation_y, residue_x + low_x * dilation_x
    key_ptr = token_at(key_ptr, batch, head, row, column, k_b, k_h, k_w, k_n, VECTOR)
    value_ptr = token_at(value_ptr, batch, head, row, column, v_b, v_h, v_w, v_n, VECTOR)
    in_box = tl.arange(0, BOX_Y * BOX_X)
    box_y, box_x = in_box // BOX_X, in_box % BOX_X
    k_at = offsets(box_y, box_x, dilation_y * k_h, dilation_x * k_w, VECTOR, WIDE)[:, None] + dim[None, :]
    v_at = offsets(box_y, box_x, dilation_y * v_h, dilation_x * v_w, VECTOR, WIDE)[:, None] + dim[None, :]

    maximum = tl.full([TILE_Y * TILE_X], LOWEST, tl.float32)
    total = tl.zeros([TILE_Y * TILE_X], tl.float32)
    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    for x in range(low_x, high_x, BOX_X):
        # What a query sees of a box changes from row to row only by the row: the mask of the columns is made once, and
        # one addition joins it to that of the rows, as the accumulator from which the product starts.
        column_penalty = penalty((x + box_x)[None, :] - start_x[:, None], window_x)
        first_row = start_y[:, None] - box_y[None, :]
        end = tl.where(x + box_x < high_x, high_y - box_y, low_y)  # the row from which on nothing is read
        k_ptr, v_ptr = key_ptr, value_ptr
        for y in range(low_y, high_y, BOX_Y):
            is_key = (y < end)[:, None] & in_dim
            k = factor(tl.load(k_ptr + k_at, mask=is_key, other=0.0), PRECISION)
            v = factor(tl.load(v_ptr + v_at, mask=is_key, other=0.0), PRECISION)
            k_ptr += dilation_y * k_h * (BOX_Y * VECTOR)
            v_ptr += dilation_y * v_h * (BOX_Y * VECTOR)

            products = tl.dot(q, tl.trans(k), column_penalty + penalty(y - first_row, window_y), PRECISION)
            new_maximum = tl.maximum(maximum, tl.max(products, 1) * logit_scale)
            probability = tl.exp2(tl.math.fma(products, logit_scale, -new_maximum[:, None]))
            decay = tl.exp2(maximum - new_maximum)
            total = total * decay + tl.sum(probability, 1)
            acc = tl.dot(factor(probability.to(v.dtype), PRECISION), v, acc * decay[:, None], PRECISION)
            maximum = new_maximum
        key_ptr += dilation_x * k_w * (BOX_X * VECTOR)
        value_ptr += dilation_x * v_w * (BOX_X * VECTOR)

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
    at = at[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + token * HEAD_DIM + at, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_dim)
