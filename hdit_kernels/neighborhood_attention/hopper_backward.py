"""Backward kernels of `na2d` for Hopper GPUs, in Gluon: deterministic, by gathering.

dQ walks down a strip of tiles as the forward does, and leaves delta = sum(dout · out) − dlse for the second kernel. dK
and dV take one tile of keys a program and gather the queries whose windows reach it. Probabilities come from the
forward's lse, so blocks of keys (or queries) are independent of each other. Least traffic: as in `triton_backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention import hopper_plan
from hdit_kernels.neighborhood_attention.hopper_device import (
    COLUMNS,
    TILE,
    TOKENS,
    copy_numbers,
    copy_rows,
    copy_slot,
    direction,
    dkdv_block,
    first_query,
    in_registers,
    last_query,
    mask_bias,
    operand,
    product_layout,
    row_layout,
    shared_layout,
    store_tile,
    strip_of_program,
    window_start,
)


def backward_launches(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    window: Sequence[int],
    scale: float,
    logit_scale: float,
) -> tuple[launch.Launch, launch.Launch]:
    """As `dispatch.backward_launches` for what `hopper_plan.BACKWARD` takes."""
    if not hopper_plan.reads_wide(dout):
        dout = dout.clone(memory_format=torch.contiguous_format)
    if out.data_ptr() % 16:  # a hook on saved tensors may have moved it
        out = out.clone()
    delta = stats.new_empty(stats.shape[1:])
    strides = (dout.stride(), query.stride(), key.stride(), value.stride(), dq.stride())
    shape, window, device = query.shape, tuple(window), query.device
    longest = 8 if max(window) < 8 else hopper_plan.LONGEST  # the fastest measured
    grid, integers, constants = hopper_plan.plan_strips(shape, strides, window, device, (2,), longest=longest)
    constants = constants | {"HAS_DLSE": dlse is not None}
    numbers = [scale, logit_scale, *integers]
    dq_tensors = (dout, query, key, value, out, stats, stats if dlse is None else dlse, dq, delta)
    dq_launch = launch.Launch(_na2d_hopper_dq_kernel, grid, dq_tensors, numbers, constants)
    grid, integers, constants = hopper_plan.plan_strips(shape, strides, window, device)
    constants = constants | {"maxnreg": 168}
    numbers = [scale, logit_scale, *integers]
    dkdv_tensors = (dout, query, key, value, stats, delta, dk, dv)
    return dq_launch, launch.Launch(_na2d_hopper_dkdv_kernel, grid, dkdv_tensors, numbers, constants)


@gluon.jit
def _dq_block(
    dq, q, dout, k, v, lse, delta, scale, key_y, key_x, y, x, top, bottom, width, window_y, window_x,
    ROWS: gl.constexpr, ACC: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Adds what ROWS rows of keys give to dq; the last product is still under way."""
    LOGITS: gl.constexpr = product_layout(ROWS * COLUMNS)
    logits = mask_bias(key_y, key_x, y, x, top, bottom, width, window_y, window_x, ROWS, LOGITS)
    logits, lse = gl.broadcast(logits, -gl.convert_layout(lse, gl.SliceLayout(1, LOGITS))[:, None])
    logits, scale = gl.broadcast(logits, gl.convert_layout(scale, gl.SliceLayout(1, LOGITS))[:, None])
    # dout · v − delta: the subtraction is what the product starts from
    logits, centred = gl.broadcast(logits, -gl.convert_layout(delta, gl.SliceLayout(1, LOGITS))[:, None])
    logits = warpgroup_mma(q, k.permute((1, 0)), logits, is_async=True)
    centred = warpgroup_mma(dout, v.permute((1, 0)), centred, is_async=True)
    logits, centred, dq = warpgroup_mma_wait(0, deps=[logits, centred, dq])
    dlogits = gl.exp2(gl.fma(logits, scale, lse)) * centred
    return warpgroup_mma(operand(dlogits, dtype, ACC), k, dq, is_async=True)


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_dq_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, dlse_ptr, dq_ptr, delta_ptr, scale, logit_scale,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    serpentine: tl.int32, window_y: tl.int32, window_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    HAS_DLSE: gl.constexpr, D: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    # Strips, strides (o: dout; g: the gradient), serpentine, MORE and LAST: as of the forward kernel. stats, dlse (read
    # if HAS_DLSE) and delta, which is written for the second kernel: [B, H, W, heads], contiguous, as is out.
    SHARED: gl.constexpr = shared_layout(D)
    ACC: gl.constexpr = product_layout(D)
    ROW: gl.constexpr = row_layout(D)
    HALF: gl.constexpr = TILE // 2  # rows of a block
    BLOCK: gl.constexpr = HALF * COLUMNS
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, origin, x, count = strip_of_program(heads, strips, length, longer)
    y = 0  # rows count from the strip's first query, as in the forward
    origin, step, top, bottom = direction(origin, count, strips, height, serpentine)
    key_y = gl.minimum(-(window_y // 2), bottom + 1 - window_y)
    key_x = window_start(x, window_x, 0, width - 1)
    columns = window_start(gl.minimum(x + TILE, width) - 1, window_x, 0, width - 1) + window_x - key_x

    token = ((batch * height + origin) * width + x) * heads + head
    out_ptr += token * D
    stats_ptr += token
    delta_ptr += token
    dlse_ptr += token
    query_ptr += (batch * q_b + head * q_n + origin * q_h + x * q_w) * 8
    dout_ptr += (batch * o_b + head * o_n + origin * o_h + x * o_w) * 8
    key_ptr += (batch * k_b + head * k_n + origin * k_h + key_x * k_w) * 8
    value_ptr += (batch * v_b + head * v_n + origin * v_h + key_x * v_w) * 8
    dq_ptr += (batch * g_b + head * g_n + origin * g_h + x * g_w) * 8
    q_h, q_w, o_h, o_w, k_h, k_w, v_h, v_w, g_h, g_w = (
        step * q_h.to(gl.int32), q_w.to(gl.int32), step * o_h.to(gl.int32), o_w.to(gl.int32),
        step * k_h.to(gl.int32), k_w.to(gl.int32), step * v_h.to(gl.int32), v_w.to(gl.int32),
        step * g_h.to(gl.int32), g_w.to(gl.int32),
    )  # fmt: skip
    row_h = step * width * heads  # of tokens in memory order
    out_w, out_h = heads * (D // 8), row_h * (D // 8)
    q = gl.allocate_shared_memory(dtype, [2, TOKENS, D], SHARED)
    dout = gl.allocate_shared_memory(dtype, [2, TOKENS, D], SHARED)
    out = gl.allocate_shared_memory(dtype, [TOKENS, D], SHARED)
    k = gl.allocate_shared_memory(dtype, [2, TILE * COLUMNS, D], SHARED)
    v = gl.allocate_shared_memory(dtype, [2, TILE * COLUMNS, D], SHARED)
    copy_rows(q.index(0), query_ptr, y, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
    copy_rows(dout.index(0), dout_ptr, y, top, bottom, width - x, o_h, o_w, TILE, TILE, D)
    copy_rows(out, out_ptr, y, top, bottom, width - x, out_h, out_w, TILE, TILE, D)
    copy_rows(k.index(0), key_ptr, key_y, top, bottom, columns, k_h, k_w, TILE, COLUMNS, D)
    copy_rows(v.index(0), value_ptr, key_y, top, bottom, columns, v_h, v_w, TILE, COLUMNS, D)
    async_copy.commit_group()
    copy_slot(k.index(1), key_ptr, key_y + TILE, top, bottom, columns, k_h, k_w, count > 1, MORE, LAST, D)
    copy_slot(v.index(1), value_ptr, key_y + TILE, top, bottom, columns, v_h, v_w, count > 1, MORE, LAST, D)
    async_copy.commit_group()

    place = gl.arange(0, TOKENS, gl.SliceLayout(1, ACC))
    column = gl.minimum(place % TILE, width - 1 - x)
    lse = gl.load(stats_ptr + gl.minimum(place // TILE, bottom) * row_h + column * heads)
    exponent_scale = in_registers(logit_scale, place)
    for tile in range(count):
        # Copies are asked for a tile ahead: the next queries here, the keys and values after next once the first blocks
        # have freed their slot.
        own, after = tile % 2, (tile + 1) % 2
        async_copy.wait_group(1)
        fence_async_shared()
        q_own, dout_own, k_own, v_own = q.index(own), dout.index(own), k.index(own), v.index(own)
        delta = gl.sum(dout_own.load(ROW).to(gl.float32) * out.load(ROW).to(gl.float32), 1)
        row = gl.arange(0, TOKENS, gl.SliceLayout(1, ROW))
        inside = (y + row // TILE <= bottom) & (x + row % TILE < width)
        at = (y + row // TILE) * row_h + row % TILE * heads
        if HAS_DLSE:
            delta -= gl.load(dlse_ptr + at, mask=inside, other=0.0)
        gl.store(delta_ptr + at, delta, mask=inside)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, ACC))
        if tile + 1 < count:
            copy_rows(q.index(after), query_ptr, y + TILE, top, bottom, width - x, q_h, q_w, TILE, TILE, D)
            copy_rows(dout.index(after), dout_ptr, y + TILE, top, bottom, width - x, o_h, o_w, TILE, TILE, D)
            copy_rows(out, out_ptr, y + TILE, top, bottom, width - x, out_h, out_w, TILE, TILE, D)
        async_copy.commit_group()
        next_lse = gl.load(stats_ptr + gl.minimum(y + TILE + place // TILE, bottom) * row_h + column * heads)

        dq = gl.zeros([TOKENS, D], gl.float32, ACC)
        for part in gl.static_range(2):
            dq = _dq_block(
                dq, q_own, dout_own, k_own.slice(part * BLOCK, BLOCK), v_own.slice(part * BLOCK, BLOCK), lse, delta,
                exponent_scale, key_y + part * HALF, key_x, y, x, top, bottom, width, window_y, window_x, HALF, ACC,
                dtype,
            )  # fmt: skip
        dq = warpgroup_mma_wait(0, deps=[dq])
        if tile + 1 < count:
            whole = tile + 2 < count
            copy_slot(k_own, key_ptr, key_y + 2 * TILE, top, bottom, columns, k_h, k_w, whole, MORE, LAST, D)
            copy_slot(v_own, value_ptr, key_y + 2 * TILE, top, bottom, columns, v_h, v_w, whole, MORE, LAST, D)
        async_copy.commit_group()
        async_copy.wait_group(2)
        fence_async_shared()
        k_after, v_after = k.index(after), v.index(after)
        ROWS: gl.constexpr = HALF if MORE > HALF else MORE
        for part in gl.static_range(MORE // ROWS):
            dq = _dq_block(
                dq, q_own, dout_own, k_after.slice(part * BLOCK, ROWS * COLUMNS),
                v_after.slice(part * BLOCK, ROWS * COLUMNS), lse, delta, exponent_scale, key_y + (TILE + part * HALF),
                key_x, y, x, top, bottom, width, window_y, window_x, ROWS, ACC, dtype,
            )  # fmt: skip
        if LAST:
            dq = _dq_block(
                dq, q_own, dout_own, k_after.slice(MORE * COLUMNS, LAST * COLUMNS),
                v_after.slice(MORE * COLUMNS, LAST * COLUMNS), lse, delta, exponent_scale, key_y + (TILE + MORE), key_x,
                y, x, top, bottom, width, window_y, window_x, LAST, ACC, dtype,
            )  # fmt: skip
        dq = warpgroup_mma_wait(0, deps=[dq])
        store_tile(dq_ptr + tl.cast(y, gl.int64) * g_h * 8, dq * scale, y, x, bottom, width, g_h, g_w, dtype, D)
        y += TILE
        key_y += TILE
        lse = next_lse


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_dkdv_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr, scale, logit_scale,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    window_y: tl.int32, window_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    D: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    # A program: a tile of keys; strips, length and longer say which. Arguments: as of the kernel above, whose delta it
    # reads; dk and dv share the strides g. MORE, LAST: rows of queries beyond the first eight, in two blocks.
    SHARED: gl.constexpr = shared_layout(D)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ACC: gl.constexpr = product_layout(D)
    ROWS: gl.constexpr = (
        2  # of a block: with more, dk, dv and what is between need more registers than three programs have
    )
    BLOCK: gl.constexpr = ROWS * COLUMNS
    CHUNK: gl.constexpr = TILE + MORE + LAST
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, y, x, _ = strip_of_program(heads, strips, length, longer)
    low_y, low_x = first_query(y, window_y), first_query(x, window_x)
    high_y = last_query(gl.minimum(y + TILE, height) - 1, window_y, height) + 1
    high_x = last_query(gl.minimum(x + TILE, width) - 1, window_x, width) + 1
    query_ptr += (batch * q_b + head * q_n) * 8
    dout_ptr += (batch * o_b + head * o_n) * 8
    key_ptr += (batch * k_b + head * k_n + y * k_h + x * k_w) * 8
    value_ptr += (batch * v_b + head * v_n + y * v_h + x * v_w) * 8
    at_gradient = (batch * g_b + head * g_n + y * g_h + x * g_w) * 8
    q_h32, q_w32, o_h32, o_w32 = q_h.to(gl.int32), q_w.to(gl.int32), o_h.to(gl.int32), o_w.to(gl.int32)

    k = gl.allocate_shared_memory(dtype, [1, TOKENS, D], SHARED)
    v = gl.allocate_shared_memory(dtype, [1, TOKENS, D], SHARED)
    q = gl.allocate_shared_memory(dtype, [1, TILE * COLUMNS, D], SHARED)
    dout = gl.allocate_shared_memory(dtype, [1, TILE * COLUMNS, D], SHARED)
    lse = gl.allocate_shared_memory(gl.float32, [1, TILE * COLUMNS], NUMBERS)
    delta = gl.allocate_shared_memory(gl.float32, [1, TILE * COLUMNS], NUMBERS)
    more_q = gl.allocate_shared_memory(dtype, [1, MORE * COLUMNS, D], SHARED)
    more_dout = gl.allocate_shared_memory(dtype, [1, MORE * COLUMNS, D], SHARED)
    more_lse = gl.allocate_shared_memory(gl.float32, [1, MORE * COLUMNS], NUMBERS)
    more_delta = gl.allocate_shared_memory(gl.float32, [1, MORE * COLUMNS], NUMBERS)
    if LAST:
        last_q = gl.allocate_shared_memory(dtype, [1, LAST * COLUMNS, D], SHARED)
        last_dout = gl.allocate_shared_memory(dtype, [1, LAST * COLUMNS, D], SHARED)
        last_lse = gl.allocate_shared_memory(gl.float32, [1, LAST * COLUMNS], NUMBERS)
        last_delta = gl.allocate_shared_memory(gl.float32, [1, LAST * COLUMNS], NUMBERS)
    k_h32, k_w32, v_h32, v_w32 = k_h.to(gl.int32), k_w.to(gl.int32), v_h.to(gl.int32), v_w.to(gl.int32)
    copy_rows(k.index(0), key_ptr, 0, 0, height - 1 - y, width - x, k_h32, k_w32, TILE, TILE, D)
    copy_rows(v.index(0), value_ptr, 0, 0, height - 1 - y, width - x, v_h32, v_w32, TILE, TILE, D)

    exponent_scale = in_registers(logit_scale, gl.arange(0, TOKENS, gl.SliceLayout(1, ACC)))
    dk = gl.zeros([TOKENS, D], gl.float32, ACC)
    dv = gl.zeros([TOKENS, D], gl.float32, ACC)
    # One chunk of queries in the middle, more at borders, where the clamped windows of more queries end in the tile.
    chunks_y = gl.cdiv(high_y - low_y, CHUNK)
    for chunk in range(chunks_y * gl.cdiv(high_x - low_x, COLUMNS)):
        query_x, query_y = low_x + chunk // chunks_y * COLUMNS, low_y + chunk % chunks_y * CHUNK
        columns, bottom = gl.minimum(high_x - query_x, COLUMNS), high_y - 1 - query_y
        q_at = query_ptr + (query_y * q_h + query_x * q_w) * 8
        dout_at = dout_ptr + (query_y * o_h + query_x * o_w) * 8
        token = ((batch * height + query_y) * width + query_x) * heads + head
        stats_at, delta_at = stats_ptr + token, delta_ptr + token
        # Always 0, which the compiler can't know: else it would compute the addresses of all products ahead of the loop
        # and spill them.
        zero = chunk >> 30
        q0, dout0, lse0, delta0 = q.index(zero), dout.index(zero), lse.index(zero), delta.index(zero)
        q1, dout1, lse1, delta1 = (
            more_q.index(zero), more_dout.index(zero), more_lse.index(zero), more_delta.index(zero),
        )  # fmt: skip
        copy_rows(q0, q_at, 0, 0, bottom, columns, q_h32, q_w32, TILE, COLUMNS, D)
        copy_rows(dout0, dout_at, 0, 0, bottom, columns, o_h32, o_w32, TILE, COLUMNS, D)
        copy_numbers(lse0, stats_at, bottom, columns, width, heads, 0, TILE)
        copy_numbers(delta0, delta_at, bottom, columns, width, heads, 0, TILE)
        async_copy.commit_group()
        copy_rows(q1, q_at, TILE, 0, bottom, columns, q_h32, q_w32, MORE, COLUMNS, D)
        copy_rows(dout1, dout_at, TILE, 0, bottom, columns, o_h32, o_w32, MORE, COLUMNS, D)
        copy_numbers(lse1, stats_at, bottom, columns, width, heads, TILE, MORE)
        copy_numbers(delta1, delta_at, bottom, columns, width, heads, TILE, MORE)
        if LAST:
            q2, dout2, lse2, delta2 = (
                last_q.index(zero), last_dout.index(zero), last_lse.index(zero), last_delta.index(zero),
            )  # fmt: skip
            copy_rows(q2, q_at, TILE + MORE, 0, bottom, columns, q_h32, q_w32, LAST, COLUMNS, D)
            copy_rows(dout2, dout_at, TILE + MORE, 0, bottom, columns, o_h32, o_w32, LAST, COLUMNS, D)
            copy_numbers(lse2, stats_at, bottom, columns, width, heads, TILE + MORE, LAST)
            copy_numbers(delta2, delta_at, bottom, columns, width, heads, TILE + MORE, LAST)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        k0, v0 = k.index(zero), v.index(zero)
        for part in gl.static_range(TILE // ROWS):
            dk, dv = dkdv_block(
                dk, dv, k0, v0, q0.slice(part * BLOCK, BLOCK), dout0.slice(part * BLOCK, BLOCK),
                lse0.slice(part * BLOCK, BLOCK), delta0.slice(part * BLOCK, BLOCK), exponent_scale,
                query_y + part * ROWS, query_x, bottom - part * ROWS, columns, y, x, height, width, window_y, window_x,
                ROWS, ACC, dtype,
            )  # fmt: skip
        async_copy.wait_group(0)
        fence_async_shared()
        for part in gl.static_range(MORE // ROWS):
            dk, dv = dkdv_block(
                dk, dv, k0, v0, q1.slice(part * BLOCK, BLOCK), dout1.slice(part * BLOCK, BLOCK),
                lse1.slice(part * BLOCK, BLOCK), delta1.slice(part * BLOCK, BLOCK), exponent_scale,
                query_y + (TILE + part * ROWS), query_x, bottom - (TILE + part * ROWS), columns, y, x, height, width,
                window_y, window_x, ROWS, ACC, dtype,
            )  # fmt: skip
        if LAST:
            dk, dv = dkdv_block(
                dk, dv, k0, v0, q2, dout2, lse2, delta2, exponent_scale, query_y + (TILE + MORE), query_x,
                bottom - (TILE + MORE), columns, y, x, height, width, window_y, window_x, LAST, ACC, dtype,
            )  # fmt: skip
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    bottom = height - 1 - y
    g_h32, g_w32 = g_h.to(gl.int32), g_w.to(gl.int32)
    store_tile(dk_ptr + at_gradient, dk * scale, 0, x, bottom, width, g_h32, g_w32, dtype, D)
    store_tile(dv_ptr + at_gradient, dv, 0, x, bottom, width, g_h32, g_w32, dtype, D)
