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
from hdit_kernels.neighborhood_attention import hopper
from hdit_kernels.neighborhood_attention.forward import empty_results

TILE = gl.constexpr(hopper.TILE)
TOKENS = gl.constexpr(hopper.TILE**2)  # of a tile
COLUMNS = gl.constexpr(16)  # of a row of keys
TURN = gl.constexpr(3000)  # cycles: about what the first copies of one program a multiprocessor take
SPIN = gl.constexpr("""{  // for that many cycles
    .reg .u64 begin, now, cycles;
    .reg .pred early;
    cvt.u64.u32 cycles, $1;
    mov.u64 begin, %clock64;
    AGAIN: mov.u64 now, %clock64;
    sub.u64 now, now, begin;
    setp.lt.u64 early, now, cycles;
    @early bra AGAIN;
    mov.u32 $0, $1;
}""")


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    logit_scale: float,
    return_lse: bool,
    save_stats: bool,
) -> tuple[list[Tensor], launch.Launch]:
    """As `forward.forward_launch` for what `hopper.takes_forward`."""
    out, lse, stats = empty_results(query, return_lse, save_stats)
    strides = (query.stride(), key.stride(), value.stride())
    kernel, grid, integers, constants = _plan(query.shape, strides, tuple(window), query.device, return_lse)
    tensors, numbers = (query, key, value, out, stats, lse), [logit_scale, int(save_stats), *integers]
    forward = launch.Launch(kernel, grid, tensors, numbers, constants)
    return [out] + return_lse * [lse] + save_stats * [stats], forward


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    window: Sequence[int],
    device: torch.device,
    return_lse: bool,
) -> tuple[Any, tuple[int, int, int], list[int], dict[str, Any]]:
    """Kernel, and `hopper.plan` of it with what else it takes."""
    kernel = _na2d_hopper_forward_kernel
    if shape[-1] == 128:
        from hdit_kernels.neighborhood_attention.hopper_forward_128 import _na2d_hopper_forward_128_kernel as kernel
    # Three programs a multiprocessor, where all logits fit: at head_dim 64, those of windows 8 and 9 would spill.
    three = shape[-1] == 32 or (shape[-1] == 64 and window[0] < 8)
    programs = (2,) if not three else (3,) if shape[-1] == 32 else (2, 3)  # in that order: the fastest measured
    grid, integers, constants = hopper.plan(
        shape, strides, window, device, programs, length=4 if shape[-1] == 32 else 3,
        by_turns=8 if shape[-1] == 128 else hopper.LONGEST,
    )  # fmt: skip
    return kernel, grid, integers, constants | {"HAS_LSE": return_lse, "maxnreg": 168 if three else None}


@gluon.constexpr_function
def product_layout(columns):
    """Of a product of a tile of 64 rows with as many columns: a warp has 16 rows, a row lies in four lanes."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def row_layout(head_dim):
    """Of tokens read 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def store_layout(head_dim):
    """Of a tile as it is written, each row by the four lanes that have it in product_layout(head_dim): 16 bytes a
    thread at head_dim 64. Else 8, whose exchange Triton makes of shuffles: faster at 32, and at 128 shared memory has
    no room.
    """
    third, lane = (4, 16) if head_dim == 64 else (16, 4)
    registers = [[0, 1], [0, 2], [0, third], *([0, n] for n in (32, 64) if n < head_dim), [8, 0]]
    lanes, warps = [[0, 8], [0, lane], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [hopper.TILE**2, head_dim])


@gluon.constexpr_function
def shared_layout(head_dim):
    """Of tokens in shared memory as products read them, swizzled."""
    return gl.NVMMASharedLayout(min(2 * head_dim, 128), 16, 2)


@gluon.jit
def copy_rows(
    target, pointer, row, top, bottom, columns, stride_h, stride_w, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    D: gl.constexpr, column=0,
):  # fmt: skip
    """Starts copying ROWS x WIDTH tokens from `row` and `column` on. What is outside (rows before top or after bottom,
    columns from `columns` on) repeats the nearest token inside: always finite, masked later, and no traffic of its own.
    """
    ROW: gl.constexpr = row_layout(D)
    place = gl.arange(0, ROWS * WIDTH, gl.SliceLayout(1, ROW))
    dim = gl.arange(0, D, gl.SliceLayout(0, ROW))
    y = gl.minimum(gl.maximum(row + place // WIDTH, top), bottom)
    x = gl.minimum(column + place % WIDTH, columns - 1)
    # One 32-bit offset to each address, of which only the row's part changes from copy to copy.
    at = (y * (stride_h * 8))[:, None] + ((x * (stride_w * 8))[:, None] + dim[None, :])
    async_copy.async_copy_global_to_shared(target, pointer + at)


@gluon.jit
def copy_slot(
    slot, pointer, row, top, bottom, columns, stride_h, stride_w, whole, MORE: gl.constexpr, LAST: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """A slot of eight rows, or of the last tile's next slot the rows that it sees."""
    if whole:
        copy_rows(slot, pointer, row, top, bottom, columns, stride_h, stride_w, TILE, COLUMNS, D)
    else:
        copy_rows(
            slot.slice(0, MORE * COLUMNS), pointer, row, top, bottom, columns, stride_h, stride_w, MORE, COLUMNS, D
        )
        if LAST:
            copy_rows(
                slot.slice(MORE * COLUMNS, LAST * COLUMNS), pointer, row + MORE, top, bottom, columns, stride_h,
                stride_w, LAST, COLUMNS, D,
            )  # fmt: skip


@gluon.jit
def strip_of_program(heads, strips, length, longer):
    """batch, head, first row, column and number of tiles: `strips` of `length` tiles, the first `longer` of them
    one longer, and one of what is left of the height.
    """
    strip = gl.program_id(1)
    tile = strip * length + gl.minimum(strip, longer)
    count = length + (strip < longer).to(gl.int32)
    if strip == strips:
        count = 1
    x = gl.program_id(0) // heads
    head = gl.program_id(0) - x * heads  # neighbours in memory run side by side
    return gl.program_id(2).to(gl.int64), head.to(gl.int64), tile * TILE, x * TILE, count


@gluon.jit
def begin_by_turns(late):
    """Programs from number `late` on, the second of each multiprocessor, wait a turn: so the first has its copies
    sooner, one computes while the other waits for memory, and the last tile has the multiprocessor for itself. If
    programs come to multiprocessors in another order, that costs the turn and nothing else.
    """
    program = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    if program >= late:
        cycles = gl.full([32 * gl.num_warps()], TURN, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        gl.inline_asm_elementwise(SPIN, "=r,r", [cycles], gl.int32, False, 1)


@gluon.jit
def direction(origin, count, strips, height, facing):
    """Of a strip: the row that it starts from, the step to the next (1, or −1 where it is walked upwards), and the
    image's first and last row, counted from there in steps.
    """
    step = 1 - 2 * (facing & (gl.program_id(1) % 2) & (gl.program_id(1) < strips).to(gl.int32))
    if step < 0:
        origin += count * TILE - 1
        top, bottom = origin + 1 - height, origin
    else:
        top, bottom = -origin, height - 1 - origin
    return origin, step, top, bottom


@gluon.jit
def window_start(query, window, first, last):
    """First key of the query's window on an axis that goes from first to last."""
    return gl.minimum(gl.maximum(query - window // 2, first), last + 1 - window)


@gluon.jit
def is_within(offset, length):
    """0 <= offset < length in one comparison: a negative offset is a large unsigned number."""
    return offset.to(gl.uint32, bitcast=True) < length.to(gl.uint32)


@gluon.jit
def penalty(
    key_y, key_x, y, x, top, bottom, width, window_y, window_x, ROWS: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """[TOKENS, ROWS * COLUMNS]: 0 where the query sees the key, else minus infinity. A product starts from it, so that
    masking costs one addition a logit.
    """
    place = gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    key = gl.arange(0, ROWS * COLUMNS, gl.SliceLayout(0, LAYOUT))
    start_y = window_start(y + place // TILE, window_y, top, bottom)
    start_x = window_start(x + place % TILE, window_x, 0, width - 1)
    by_row = gl.where(is_within((key_y + key // COLUMNS)[None, :] - start_y[:, None], window_y), 0.0, float("-inf"))
    by_column = gl.where(is_within((key_x + key % COLUMNS)[None, :] - start_x[:, None], window_x), 0.0, float("-inf"))
    return by_row + by_column


@gluon.jit
def in_registers(number, like):
    """A float argument, once for each row: as an argument it would be fetched anew for every use."""
    zero = gl.zeros_like(like).to(gl.float32)
    return gl.fma(like.to(gl.float32), zero, zero + number)


@gluon.jit
def own_max(logits):
    """[TOKENS, 8] of a product's [TOKENS, multiple of 8]: of what each thread has, so that lanes exchange it once."""
    FOLDED: gl.constexpr = product_layout(8)
    return gl.convert_layout(gl.max(gl.reshape(logits, [TOKENS, logits.shape[1] // 8, 8]), 1), FOLDED)


@gluon.jit
def row_max(logits, ACC: gl.constexpr):
    return gl.convert_layout(gl.max(logits, 1), gl.SliceLayout(1, ACC))


@gluon.jit
def exponentials(logits, scale, reference, LAYOUT: gl.constexpr):
    """exp2(logits · scale − reference), both by row."""
    logits, scale = gl.broadcast(logits, gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT))[:, None])
    logits, reference = gl.broadcast(logits, -gl.convert_layout(reference, gl.SliceLayout(1, LAYOUT))[:, None])
    return gl.exp2(gl.fma(logits, scale, reference))


@gluon.jit
def row_sum(numbers, ACC: gl.constexpr):
    return gl.convert_layout(gl.sum(numbers, 1), gl.SliceLayout(1, ACC))


@gluon.jit
def operand(numbers, dtype: gl.constexpr, ACC: gl.constexpr):
    """Left factor of a product that accumulates in ACC."""
    return gl.convert_layout(numbers.to(dtype), gl.DotOperandLayout(0, ACC, 2))


@gluon.jit
def store_tile(
    pointer, tile, y, x, bottom, width, stride_h, stride_w, dtype: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Stores [TOKENS, D] at pointer, 16 bytes a thread: threads that share rows of a product exchange them."""
    WIDE: gl.constexpr = store_layout(D)
    place = gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    inside = (y + place // TILE <= bottom) & (x + place % TILE < width)
    at = (place // TILE * stride_h + place % TILE * stride_w) * 8
    gl.store(pointer + at[:, None] + dim[None, :], gl.convert_layout(tile.to(dtype), WIDE), mask=inside[:, None])


@functools.partial(launch.kernel, jit=gluon.jit)
def _na2d_hopper_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, lse_ptr, logit_scale, save_stats: tl.int32,
    height: tl.int32, width: tl.int32, heads: tl.int32, strips: tl.int32, length: tl.int32, longer: tl.int32,
    facing: tl.int32, late: tl.int32, window_y: tl.int32, window_x: tl.int32,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_w: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_w: tl.int64, v_n: tl.int64,
    HAS_LSE: gl.constexpr, D: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = shared_layout(D)
    ACC: gl.constexpr = product_layout(D)
    OWN: gl.constexpr = product_layout(TILE * COLUMNS)
    NEXT: gl.constexpr = product_layout(MORE * COLUMNS)
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    batch, head, origin, x, count = strip_of_program(heads, strips, length, longer)
    begin_by_turns(late)
    # Rows count from the strip's first query, so that offsets are small; the image has rows top to bottom.
    y = 0
    origin, step, top, bottom = direction(origin, count, strips, height, facing)
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
        own_logits = penalty(key_y, key_x, y, x, top, bottom, width, window_y, window_x, TILE, OWN)
        if MORE < TILE:
            more = penalty(key_y + TILE, key_x, y, x, top, bottom, width, window_y, window_x, MORE, NEXT)
        if tile == 0:
            async_copy.wait_group(3)
        else:
            async_copy.wait_group(1)
        fence_async_shared()
        own_logits = warpgroup_mma(q, k.index(own).permute((1, 0)), own_logits, is_async=True)
        if MORE == TILE:  # faster here where there are as many as of the own
            more = penalty(key_y + TILE, key_x, y, x, top, bottom, width, window_y, window_x, MORE, NEXT)
        if tile == 0:
            async_copy.wait_group(2)
            fence_async_shared()
        more = warpgroup_mma(q, k.index(after).slice(0, MORE * COLUMNS).permute((1, 0)), more, is_async=True)
        if LAST:
            FINAL: gl.constexpr = product_layout(LAST * COLUMNS)
            last = penalty(key_y + (TILE + MORE), key_x, y, x, top, bottom, width, window_y, window_x, LAST, FINAL)
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
