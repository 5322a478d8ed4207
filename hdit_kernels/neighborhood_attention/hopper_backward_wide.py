"""dK/dV kernel of `na2d` for Hopper GPUs and windows from 10 to 13, in Gluon.

The parts are those of `hopper_backward`, but the queries that reach a tile of keys, 20 rows of 20 columns or more at
borders, are too many for shared memory at once. They stream through three slots: rows of 16 columns first, four at a
time, then the columns beyond, four wide. So a tile's products are with 416 queries, where rows of 32 columns would have
640. dQ is the portable kernel's, which is faster than one in this manner.
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention import hopper_plan
from hdit_kernels.neighborhood_attention.hopper_device import (
    COLUMNS,
    TILE,
    TOKENS,
    copy_numbers,
    copy_rows,
    dkdv_block,
    first_query,
    in_registers,
    last_query,
    product_layout,
    shared_layout,
    store_tile,
    strip_of_program,
)

ROWS = gl.constexpr(4)  # of a slot of 16 columns
BEYOND = gl.constexpr(4)  # columns of a slot beyond those, of TALL rows
TALL = gl.constexpr(8)


def dkdv_launch(
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Tensor,
    window: Sequence[int],
    scale: float,
    logit_scale: float,
) -> launch.Launch:
    """As `triton_backward.dkdv_launch` for what `hopper_plan.BACKWARD_WIDE` takes."""
    strides = (dout.stride(), query.stride(), key.stride(), value.stride(), dk.stride())
    grid, integers, constants = hopper_plan.plan_strips(query.shape, strides, tuple(window), query.device)
    constants = constants | {"maxnreg": 168}
    tensors = (dout, query, key, value, terms.view(torch.float32), dk, dv)
    numbers = [scale, logit_scale, *integers]
    return launch.Launch(_na2d_hopper_dkdv_wide_kernel, grid, tensors, numbers, constants)


@gluon.jit
def _copy_queries(
    q, dout, lse, delta, step, steps, rows_of_16, query_ptr, dout_ptr, terms_ptr, bottom, columns, width, heads, q_h,
    q_w, o_h, o_w, D: gl.constexpr,
):  # fmt: skip
    """Starts copying the queries of a step of dK/dV: 4 x 16 first, then 8 x 4 of the columns beyond, top to bottom."""
    slot = step % 3
    if step < rows_of_16:
        row = step * ROWS
        copy_rows(q.index(slot), query_ptr, row, 0, bottom, columns, q_h, q_w, ROWS, COLUMNS, D)
        copy_rows(dout.index(slot), dout_ptr, row, 0, bottom, columns, o_h, o_w, ROWS, COLUMNS, D)
        copy_numbers(lse.index(slot), terms_ptr, bottom, columns, width, 2 * heads, row, ROWS)
        copy_numbers(delta.index(slot), terms_ptr + 1, bottom, columns, width, 2 * heads, row, ROWS)
    elif step < steps:
        TAKEN: gl.constexpr = TALL * BEYOND
        blocks = gl.cdiv(bottom + 1, TALL)
        row, column = (step - rows_of_16) % blocks * TALL, COLUMNS + (step - rows_of_16) // blocks * BEYOND
        slot_q, slot_dout = q.index(slot).slice(0, TAKEN), dout.index(slot).slice(0, TAKEN)
        slot_lse, slot_delta = lse.index(slot).slice(0, TAKEN), delta.index(slot).slice(0, TAKEN)
        copy_rows(slot_q, query_ptr, row, 0, bottom, columns, q_h, q_w, TALL, BEYOND, D, column)
        copy_rows(slot_dout, dout_ptr, row, 0, bottom, columns, o_h, o_w, TALL, BEYOND, D, column)
        copy_numbers(slot_lse, terms_ptr, bottom, columns, width, 2 * heads, row, TALL, BEYOND, column)
        copy_numbers(slot_delta, terms_ptr + 1, bottom, columns, width, 2 * heads, row, TALL, BEYOND, column)
    async_copy.commit_group()


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_dkdv_wide_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, terms_ptr, dk_ptr, dv_ptr, scale, logit_scale,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    window_y: tl.int32, window_x: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_n: tl.int64,
    D: gl.constexpr,
):  # fmt: skip
    # Arguments: as of `hopper_backward`'s kernel; terms: lse and delta of each query and head,
    # two float32 side by side.
    SHARED: gl.constexpr = shared_layout(D)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ACC: gl.constexpr = product_layout(D)
    HALF: gl.constexpr = ROWS // 2  # rows of a block, as in hopper_backward
    BLOCK: gl.constexpr = HALF * COLUMNS
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, y, x, _ = strip_of_program(heads, strips, length, longer)
    low_y, low_x = first_query(y, window_y), first_query(x, window_x)
    bottom = last_query(gl.minimum(y + TILE, height) - 1, window_y, height) - low_y
    columns = last_query(gl.minimum(x + TILE, width) - 1, window_x, width) + 1 - low_x
    query_ptr += (batch * q_b + head * q_n + low_y * q_h + low_x * q_w) * 8
    dout_ptr += (batch * o_b + head * o_n + low_y * o_h + low_x * o_w) * 8
    key_ptr += (batch * k_b + head * k_n + y * k_h + x * k_w) * 8
    value_ptr += (batch * v_b + head * v_n + y * v_h + x * v_w) * 8
    terms_ptr += (((batch * height + low_y) * width + low_x) * heads + head) * 2
    at_gradient = (batch * g_b + head * g_n + y * g_h + x * g_w) * 8
    q_h, q_w, o_h, o_w, k_h, k_w, v_h, v_w, g_h, g_w = (
        q_h.to(gl.int32), q_w.to(gl.int32), o_h.to(gl.int32), o_w.to(gl.int32), k_h.to(gl.int32), k_w.to(gl.int32),
        v_h.to(gl.int32), v_w.to(gl.int32), g_h.to(gl.int32), g_w.to(gl.int32),
    )  # fmt: skip
    k = gl.allocate_shared_memory(dtype, [TOKENS, D], SHARED)
    v = gl.allocate_shared_memory(dtype, [TOKENS, D], SHARED)
    q = gl.allocate_shared_memory(dtype, [3, ROWS * COLUMNS, D], SHARED)
    dout = gl.allocate_shared_memory(dtype, [3, ROWS * COLUMNS, D], SHARED)
    lse = gl.allocate_shared_memory(gl.float32, [3, ROWS * COLUMNS], NUMBERS)
    delta = gl.allocate_shared_memory(gl.float32, [3, ROWS * COLUMNS], NUMBERS)
    rows_of_16 = gl.cdiv(bottom + 1, ROWS)
    blocks = gl.cdiv(bottom + 1, TALL)  # of the columns beyond
    steps = rows_of_16 + blocks * gl.cdiv(gl.maximum(columns - COLUMNS, 0), BEYOND)
    copy_rows(k, key_ptr, 0, 0, height - 1 - y, width - x, k_h, k_w, TILE, TILE, D)
    copy_rows(v, value_ptr, 0, 0, height - 1 - y, width - x, v_h, v_w, TILE, TILE, D)
    for step in gl.static_range(2):
        _copy_queries(
            q, dout, lse, delta, step, steps, rows_of_16, query_ptr, dout_ptr, terms_ptr, bottom, columns, width, heads,
            q_h, q_w, o_h, o_w, D,
        )  # fmt: skip
    exponent_scale = in_registers(logit_scale, gl.arange(0, TOKENS, gl.SliceLayout(1, ACC)))
    dk = gl.zeros([TOKENS, D], gl.float32, ACC)
    dv = gl.zeros([TOKENS, D], gl.float32, ACC)
    for step in range(rows_of_16):
        async_copy.wait_group(1)
        fence_async_shared()
        slot = step % 3
        q_own, dout_own, lse_own, delta_own = q.index(slot), dout.index(slot), lse.index(slot), delta.index(slot)
        for part in gl.static_range(2):
            row = step * ROWS + part * HALF
            dk, dv = dkdv_block(
                dk, dv, k, v, q_own.slice(part * BLOCK, BLOCK), dout_own.slice(part * BLOCK, BLOCK),
                lse_own.slice(part * BLOCK, BLOCK), delta_own.slice(part * BLOCK, BLOCK), exponent_scale,
                low_y + row, low_x, bottom - row, columns, y, x, height, width, window_y, window_x, HALF, ACC, dtype,
            )  # fmt: skip
        _copy_queries(
            q, dout, lse, delta, step + 2, steps, rows_of_16, query_ptr, dout_ptr, terms_ptr, bottom, columns, width,
            heads, q_h, q_w, o_h, o_w, D,
        )  # fmt: skip
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    for step in range(rows_of_16, steps):
        async_copy.wait_group(1)
        fence_async_shared()
        slot = step % 3
        row = (step - rows_of_16) % blocks * TALL
        column = COLUMNS + (step - rows_of_16) // blocks * BEYOND
        dk, dv = dkdv_block(
            dk, dv, k, v, q.index(slot).slice(0, TALL * BEYOND), dout.index(slot).slice(0, TALL * BEYOND),
            lse.index(slot).slice(0, TALL * BEYOND), delta.index(slot).slice(0, TALL * BEYOND), exponent_scale,
            low_y + row, low_x + column, bottom - row, columns - column, y, x, height, width, window_y, window_x, TALL,
            ACC, dtype, BEYOND,
        )  # fmt: skip
        _copy_queries(
            q, dout, lse, delta, step + 2, steps, rows_of_16, query_ptr, dout_ptr, terms_ptr, bottom, columns, width,
            heads, q_h, q_w, o_h, o_w, D,
        )  # fmt: skip
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    bottom = height - 1 - y
    store_tile(dk_ptr + at_gradient, dk * scale, 0, x, bottom, width, g_h, g_w, dtype, D)
    store_tile(dv_ptr + at_gradient, dv, 0, x, bottom, width, g_h, g_w, dtype, D)
