"""Forward kernel of `na2d` for Hopper GPUs, in Gluon, Triton's language of explicit layouts and shared memory.

A program walks down a strip of tiles, 8x8 queries each. Rows of 16 keys and values come by asynchronous copies into two
slots of eight rows: a tile sees its own slot and the first rows of the next, so neighbours share what is read. All of a
tile's logits are in registers at once, hence a softmax without a running maximum. Least traffic: q, k, v read once, out
written once. docs/kernel-log.md says what each of these brought.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention import hopper_plan
from hdit_kernels.neighborhood_attention.buffers import empty_results
from hdit_kernels.neighborhood_attention.hopper_device import (
    COLUMNS,
    TILE,
    TOKENS,
    copy_rows,
    copy_slot,
    direction,
    exponentials,
    in_registers,
    mask_bias,
    operand,
    own_max,
    product_layout,
    row_max,
    row_sum,
    shared_layout,
    store_tile,
    strip_of_program,
    window_start,
)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    logit_scale: float,
    return_lse: bool,
    save_stats: bool,
) -> tuple[list[Tensor], launch.Launch]:
    """As `dispatch.forward_launch` for what `hopper_plan.FORWARD` takes."""
    out, lse, stats = empty_results(query, return_lse, save_stats)
    strides = (query.stride(), key.stride(), value.stride())
    kernel, grid, integers, constants = _plan_forward(query.shape, strides, tuple(window), query.device, return_lse)
    tensors = (query, key, value, out, stats, lse)
    numbers = [logit_scale, int(save_stats), *integers]
    forward = launch.Launch(kernel, grid, tensors, numbers, constants)
    return [out] + return_lse * [lse] + save_stats * [stats], forward


@functools.lru_cache(maxsize=4096)
def _plan_forward(
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    window: Sequence[int],
    device: torch.device,
    return_lse: bool,
) -> tuple[Any, tuple[int, int, int], list[int], dict[str, Any]]:
    """Kernel, and `hopper_plan.plan_strips` of it with what else it takes."""
    kernel = _na2d_hopper_forward_128_kernel if shape[-1] == 128 else _na2d_hopper_forward_kernel
    # Three programs a multiprocessor, where all logits fit: at head_dim 64, those of windows 8 and 9 would spill.
    three = shape[-1] == 32 or (shape[-1] == 64 and window[0] < 8)
    programs = (2,) if not three else (3,) if shape[-1] == 32 else (2, 3)  # in that order: the fastest measured
    grid, integers, constants = hopper_plan.plan_strips(
        shape, strides, window, device, programs, length=4 if shape[-1] == 32 else 3,
    )  # fmt: skip
    return kernel, grid, integers, constants | {"HAS_LSE": return_lse, "maxnreg": 168 if three else None}


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, save_stats: tl.int32,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    serpentine: tl.int32, window_y: tl.int32, window_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    HAS_LSE: gl.constexpr, D: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    # A program: a strip of `length` tiles (the first `longer` strips have one more), `strips` in a column of tiles and
    # one more for the rows left over. Tensors are [B, H, W, heads, D] with strides of batch, row, column and head in
    # units of 8 elements; out, stats and lse are contiguous. serpentine: every other strip is walked upwards.
    # MORE, LAST: rows of the next slot that a tile sees, in two blocks.
    SHARED: gl.constexpr = shared_layout(D)
    ACC: gl.constexpr = product_layout(D)
    OWN: gl.constexpr = product_layout(TILE * COLUMNS)
    NEXT: gl.constexpr = product_layout(MORE * COLUMNS)
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, origin, x, count = strip_of_program(heads, strips, length, longer)
    # Rows count from the strip's first query, so that offsets are small; the image has rows top to bottom.
    y = 0
    origin, step, top, bottom = direction(origin, count, strips, height, serpentine)
    key_y = gl.minimum(-(window_y // 2), bottom + 1 - window_y)  # may be before the first row
    key_x = window_start(x, window_x, 0, width - 1)
    columns = window_start(gl.minimum(x + TILE, width) - 1, window_x, 0, width - 1) + window_x - key_x

    query_ptr += (batch * q_b + head * q_n + origin * q_h + x * q_w) * 8
    key_ptr += (batch * k_b + head * k_n + origin * k_h + key_x * k_w) * 8
    value_ptr += (batch * v_b + head * v_n + origin * v_h + key_x * v_w) * 8
    token = ((batch * height + origin) * width + x) * heads + head
    q_h, q_w, k_h, k_w, v_h, v_w = (
        step * q_h.to(gl.int32), q_w.to(gl.int32), step * k_h.to(gl.int32), k_w.to(gl.int32),
        step * v_h.to(gl.int32), v_w.to(gl.int32),
    )  # fmt: skip
    row = step * width * heads  # of tokens in memory order
    q = gl.allocate_shared_memory(dtype, [TOKENS, D], SHARED)
    k = gl.allocate_shared_memory(dtype, [2, TILE * COLUMNS, D], SHARED)
    v = gl.allocate_shared_memory(dtype, [2, TILE * COLUMNS, D], SHARED)
    copy_rows(q, query_ptr, y, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
    copy_rows(k.index(0), key_ptr, key_y, top, bottom, columns, k_h, k_w, TILE, COLUMNS, D)
    async_copy.commit_group()
    copy_slot(k.index(1), key_ptr, key_y + TILE, top, bottom, columns, k_h, k_w, count > 1, MORE, LAST, D)
    async_copy.commit_group()
    copy_rows(v.index(0), value_ptr, key_y, top, bottom, columns, v_h, v_w, TILE, COLUMNS, D)
    async_copy.commit_group()
    copy_slot(v.index(1), value_ptr, key_y + TILE, top, bottom, columns, v_h, v_w, count > 1, MORE, LAST, D)
    async_copy.commit_group()

    place = gl.arange(0, TOKENS, gl.SliceLayout(1, ACC))
    scale = in_registers(logit_scale, place)
    for tile in range(count):
        # The copies of a tile are asked for a tile ahead, each as soon as its slot is free: first the next queries and
        # the keys after next, then the values after next. So here all but the youngest group must have come.
        own, after = tile % 2, (tile + 1) % 2
        own_logits = mask_bias(key_y, key_x, y, x, top, bottom, width, window_y, window_x, TILE, OWN)
        if MORE < TILE:
            more = mask_bias(key_y + TILE, key_x, y, x, top, bottom, width, window_y, window_x, MORE, NEXT)
        if tile == 0:
            async_copy.wait_group(3)
        else:
            async_copy.wait_group(1)
        fence_async_shared()
        own_logits = warpgroup_mma(q, k.index(own).permute((1, 0)), own_logits, is_async=True)
        if MORE == TILE:  # faster here where there are as many as of the own
            more = mask_bias(key_y + TILE, key_x, y, x, top, bottom, width, window_y, window_x, MORE, NEXT)
        if tile == 0:
            async_copy.wait_group(2)
            fence_async_shared()
        more = warpgroup_mma(q, k.index(after).slice(0, MORE * COLUMNS).permute((1, 0)), more, is_async=True)
        if LAST:
            FINAL: gl.constexpr = product_layout(LAST * COLUMNS)
            last = mask_bias(key_y + (TILE + MORE), key_x, y, x, top, bottom, width, window_y, window_x, LAST, FINAL)
            keys = k.index(after).slice(MORE * COLUMNS, LAST * COLUMNS)
            last = warpgroup_mma(q, keys.permute((1, 0)), last, is_async=True)
            own_logits = warpgroup_mma_wait(2, deps=[own_logits])
            maximum = own_max(own_logits)
            more, last = warpgroup_mma_wait(0, deps=[more, last])
            maximum = gl.maximum(gl.maximum(maximum, own_max(more)), own_max(last))
        else:
            own_logits = warpgroup_mma_wait(1, deps=[own_logits])
            maximum = own_max(own_logits)
            more = warpgroup_mma_wait(0, deps=[more])
            maximum = gl.maximum(maximum, own_max(more))
        maximum = row_max(maximum, ACC) * scale
        if tile + 1 < count:
            copy_rows(q, query_ptr, y + TILE, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
            whole = tile + 2 < count
            copy_slot(k.index(own), key_ptr, key_y + 2 * TILE, top, bottom, columns, k_h, k_w, whole, MORE, LAST, D)
        async_copy.commit_group()

        numbers = exponentials(own_logits, scale, maximum, OWN)
        total = row_sum(numbers, ACC)
        acc = gl.zeros([TOKENS, D], gl.float32, ACC)
        if tile == 0:
            async_copy.wait_group(2)
            fence_async_shared()
        acc = warpgroup_mma(operand(numbers, dtype, ACC), v.index(own), acc, use_acc=False, is_async=True)
        numbers = exponentials(more, scale, maximum, NEXT)
        total += row_sum(numbers, ACC)
        left = operand(numbers, dtype, ACC)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if tile + 1 < count:
            whole = tile + 2 < count
            copy_slot(v.index(own), value_ptr, key_y + 2 * TILE, top, bottom, columns, v_h, v_w, whole, MORE, LAST, D)
        async_copy.commit_group()
        async_copy.wait_group(2)
        fence_async_shared()
        acc = warpgroup_mma(left, v.index(after).slice(0, MORE * COLUMNS), acc, is_async=True)
        if LAST:
            numbers = exponentials(last, scale, maximum, FINAL)
            total += row_sum(numbers, ACC)
            left = operand(numbers, dtype, ACC)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = warpgroup_mma(left, v.index(after).slice(MORE * COLUMNS, LAST * COLUMNS), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

        inside = (y + place // TILE <= bottom) & (x + place % TILE < width)
        at = token + place // TILE * row + place % TILE * heads
        lse = maximum + gl.log2(total)
        gl.store(stats_ptr + at, lse, mask=inside & (save_stats > 0))
        if HAS_LSE:
            gl.store(lse_ptr + at, lse * 0.6931471805599453, mask=inside)
        acc *= (1.0 / total)[:, None]
        store_tile(out_ptr + token * D, acc, y, x, bottom, width, row * (D // 8), heads * (D // 8), dtype, D)
        token += row.to(gl.int64) * TILE
        y += TILE
        key_y += TILE


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_forward_128_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, save_stats: tl.int32,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    serpentine: tl.int32, window_y: tl.int32, window_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    HAS_LSE: gl.constexpr, D: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    # For head_dim 128; arguments as above. Two slots of keys and two of values would leave room for one program only:
    # three slots take turns. Of a tile they hold its own keys, the next keys and its own values. The next values go
    # where its own keys were, the keys after next where its own values were, so that a tile on, each slot has the part
    # of its neighbour. (As one kernel with the other, by a constexpr, one of the two gets other registers.)
    SHARED: gl.constexpr = shared_layout(D)
    ACC: gl.constexpr = product_layout(D)
    OWN: gl.constexpr = product_layout(TILE * COLUMNS)
    NEXT: gl.constexpr = product_layout(MORE * COLUMNS)
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, origin, x, count = strip_of_program(heads, strips, length, longer)
    # Rows count from the strip's first query, so that offsets are small; the image has rows top to bottom.
    y = 0
    origin, step, top, bottom = direction(origin, count, strips, height, serpentine)
    key_y = gl.minimum(-(window_y // 2), bottom + 1 - window_y)  # may be before the first row
    key_x = window_start(x, window_x, 0, width - 1)
    columns = window_start(gl.minimum(x + TILE, width) - 1, window_x, 0, width - 1) + window_x - key_x

    query_ptr += (batch * q_b + head * q_n + origin * q_h + x * q_w) * 8
    key_ptr += (batch * k_b + head * k_n + origin * k_h + key_x * k_w) * 8
    value_ptr += (batch * v_b + head * v_n + origin * v_h + key_x * v_w) * 8
    token = ((batch * height + origin) * width + x) * heads + head
    q_h, q_w, k_h, k_w, v_h, v_w = (
        step * q_h.to(gl.int32), q_w.to(gl.int32), step * k_h.to(gl.int32), k_w.to(gl.int32),
        step * v_h.to(gl.int32), v_w.to(gl.int32),
    )  # fmt: skip
    row = step * width * heads  # of tokens in memory order
    q = gl.allocate_shared_memory(dtype, [TOKENS, D], SHARED)
    slots = gl.allocate_shared_memory(dtype, [3, TILE * COLUMNS, D], SHARED)
    copy_rows(q, query_ptr, y, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
    copy_rows(slots.index(0), key_ptr, key_y, top, bottom, columns, k_h, k_w, TILE, COLUMNS, D)
    async_copy.commit_group()
    copy_slot(slots.index(1), key_ptr, key_y + TILE, top, bottom, columns, k_h, k_w, count > 1, MORE, LAST, D)
    copy_rows(slots.index(2), value_ptr, key_y, top, bottom, columns, v_h, v_w, TILE, COLUMNS, D)
    async_copy.commit_group()

    place = gl.arange(0, TOKENS, gl.SliceLayout(1, ACC))
    scale = in_registers(logit_scale, place)
    for tile in range(count):
        own_keys, more_keys = slots.index(tile % 3), slots.index((tile + 1) % 3)
        own_values = slots.index((tile + 2) % 3)
        own_logits = mask_bias(key_y, key_x, y, x, top, bottom, width, window_y, window_x, TILE, OWN)
        more = mask_bias(key_y + TILE, key_x, y, x, top, bottom, width, window_y, window_x, MORE, NEXT)
        async_copy.wait_group(1)
        fence_async_shared()
        own_logits = warpgroup_mma(q, own_keys.permute((1, 0)), own_logits, is_async=True)
        async_copy.wait_group(0)
        fence_async_shared()
        more = warpgroup_mma(q, more_keys.slice(0, MORE * COLUMNS).permute((1, 0)), more, is_async=True)
        if LAST:
            FINAL: gl.constexpr = product_layout(LAST * COLUMNS)
            last = mask_bias(key_y + (TILE + MORE), key_x, y, x, top, bottom, width, window_y, window_x, LAST, FINAL)
            keys = more_keys.slice(MORE * COLUMNS, LAST * COLUMNS)
            last = warpgroup_mma(q, keys.permute((1, 0)), last, is_async=True)
            own_logits = warpgroup_mma_wait(2, deps=[own_logits])
            maximum = own_max(own_logits)
            more, last = warpgroup_mma_wait(0, deps=[more, last])
            maximum = gl.maximum(gl.maximum(maximum, own_max(more)), own_max(last))
        else:
            own_logits = warpgroup_mma_wait(1, deps=[own_logits])
            maximum = own_max(own_logits)
            more = warpgroup_mma_wait(0, deps=[more])
            maximum = gl.maximum(maximum, own_max(more))
        maximum = row_max(maximum, ACC) * scale
        further = tile + 1 < count
        copy_slot(own_keys, value_ptr, key_y + TILE, top, bottom, columns, v_h, v_w, further, MORE, LAST, D)
        if further:
            copy_rows(q, query_ptr, y + TILE, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
        async_copy.commit_group()

        numbers = exponentials(own_logits, scale, maximum, OWN)
        total = row_sum(numbers, ACC)
        acc = gl.zeros([TOKENS, D], gl.float32, ACC)
        acc = warpgroup_mma(operand(numbers, dtype, ACC), own_values, acc, use_acc=False, is_async=True)
        numbers = exponentials(more, scale, maximum, NEXT)
        total += row_sum(numbers, ACC)
        left = operand(numbers, dtype, ACC)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if further:
            whole = tile + 2 < count
            copy_slot(own_values, key_ptr, key_y + 2 * TILE, top, bottom, columns, k_h, k_w, whole, MORE, LAST, D)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        acc = warpgroup_mma(left, own_keys.slice(0, MORE * COLUMNS), acc, is_async=True)
        if LAST:
            numbers = exponentials(last, scale, maximum, FINAL)
            total += row_sum(numbers, ACC)
            left = operand(numbers, dtype, ACC)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = warpgroup_mma(left, own_keys.slice(MORE * COLUMNS, LAST * COLUMNS), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

        inside = (y + place // TILE <= bottom) & (x + place % TILE < width)
        at = token + place // TILE * row + place % TILE * heads
        lse = maximum + gl.log2(total)
        gl.store(stats_ptr + at, lse, mask=inside & (save_stats > 0))
        if HAS_LSE:
            gl.store(lse_ptr + at, lse * 0.6931471805599453, mask=inside)
        acc *= (1.0 / total)[:, None]
        store_tile(out_ptr + token * D, acc, y, x, bottom, width, row * (D // 8), heads * (D // 8), dtype, D)
        token += row.to(gl.int64) * TILE
        y += TILE
        key_y += TILE
