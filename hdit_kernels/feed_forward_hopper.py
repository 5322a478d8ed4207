"""`feed_forward` in one kernel for Hopper GPUs, in Gluon, at the widths 128 and 256 and in 16-bit types.

A program has two warpgroups and keeps each one's tile of ROWS tokens on chip: the normed tile in shared memory, the
output's accumulator in registers. Chunk by chunk of d_ff it multiplies with the up projection, applies GEGLU in
registers and multiplies with the down projection. The warpgroups run free of each other (one's GEGLU beside the other's
products) and share the weights' chunks, which come by TMA through two rings: of the up projection, filled by the first
warpgroup, and of the down projection, filled by the second. (No warps of their own for copies: ptxas serialises all
products of a function where some warps get fewer registers by setmaxnreg in Triton's dispatch loop.)

From memory x is read once and out written once; from the L2 every program reads all weights for each tile of 2·ROWS
tokens, 4.5·C² · b bytes a token at ROWS 64: 302 MB for 131,072 tokens of width 128 in bfloat16.

The accumulator starts from 2·x: GELU's factor 1/2 is left out, and out = acc / 2 holds the residual.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.hopper_plan import gluon_known

CONFIGS: dict[int, dict[str, Any]] = {  # by width; registers for each thread: a multiprocessor has one program
    128: {"ROWS": 64, "CHUNK": 64, "UPS": 3, "DOWNS": 3, "ORDER": False, "XREG": True, "REGISTERS": 240},
    256: {"ROWS": 64, "CHUNK": 64, "UPS": 2, "DOWNS": 1, "ORDER": False, "XREG": False, "REGISTERS": 256},
}


def takes(x: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether the kernel takes these contiguous tensors, and whether it is a Hopper GPU."""
    return (
        launch.gpu_family(x.device) == "hopper"
        and gluon_known()
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] in CONFIGS
        and down.shape[1] % CONFIGS[x.shape[-1]]["CHUNK"] == 0
        and x.numel() // x.shape[-1] < 2**31 - 2**8  # rows are counted in 32 bits
        and launch.aligned(x, up, down)
    )


def forward_launch(x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float, out: Tensor) -> launch.Launch:
    channels, d_ff = down.shape
    config = CONFIGS[channels]
    rows, chunk = config["ROWS"], config["CHUNK"]
    length = x.numel() // (x.shape[0] * channels)  # of a sample
    per_sample = launch.cdiv(length, 2 * rows)
    tiles = x.shape[0] * per_sample
    scale = launch.dense(scale)
    wide, narrow = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(2 * chunk, 16, 2)
    descriptors = (
        TensorDescriptor.from_tensor(x.view(-1, channels), [rows, channels], wide),
        TensorDescriptor.from_tensor(up, [chunk, 64], wide),
        TensorDescriptor.from_tensor(down, [channels, chunk], narrow),
    )
    numbers = (tiles, per_sample, length, d_ff // chunk, scale.stride(0), eps)
    constants = {"C": channels, **config, "num_warps": 4, "maxnreg": config["REGISTERS"]}
    grid = (min(tiles, launch.multiprocessors(x.device)), 1, 1)
    return launch.Launch(_feed_forward_hopper_kernel, grid, (scale, out), numbers, constants, descriptors=descriptors)


thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6 and 3.7


@gluon.constexpr_function
def product_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(columns, 256), 16])


@gluon.constexpr_function
def store_layout(rows, columns):
    """8 bytes a thread, the four lanes of a row beside each other: as product_layout but for one exchange in a quad."""
    registers = [[0, 1], [0, 2], [0, 16], *([0, n] for n in (32, 64, 128) if n < columns), [8, 0]]
    registers += [[64, 0]] if rows == 128 else []
    return gl.DistributedLinearLayout(
        registers, [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [rows, columns]
    )


@gluon.jit
def tanh_approx(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def twice_geglu(a, g):
    """2 · a · gelu(g); the normal distribution by tanh: at most 2.6e-5 off, and what the instruction adds."""
    t = gl.minimum(g * g, 16.0)
    p = gl.fma(
        gl.fma(t, gl.full_like(t, -0.00035170749), gl.full_like(t, 0.03700682106)), t, gl.full_like(t, 0.79750659197)
    )
    return a * gl.fma(g, tanh_approx(g * p), g)


@gluon.jit
def load_up(
    up_desc, up_s, up_full, up_empty, n, chunk, d_ff, needed, C: gl.constexpr, CHUNK: gl.constexpr, UPS: gl.constexpr
):  # fmt: skip
    """Chunk number n of this program, `chunk` of the weights: both halves, 64 columns at a time."""
    KB: gl.constexpr = C // 64
    # the same memory, in which 64 columns of all rows lie together
    parts = up_s._reinterpret(up_s.dtype, [UPS * KB, 2 * CHUNK, 64], up_desc.layout)
    slot = n % UPS
    bar = up_full.index(slot)
    mbarrier.wait(up_empty.index(slot), (n // UPS & 1) ^ 1, pred=needed)
    mbarrier.expect(bar, 2 * CHUNK * C * 2, pred=needed)
    for kb in gl.static_range(KB):
        place = parts.index(slot * KB + kb)
        tma.async_copy_global_to_shared(up_desc, [chunk * CHUNK, kb * 64], bar, place.slice(0, CHUNK), pred=needed)
        tma.async_copy_global_to_shared(
            up_desc, [d_ff + chunk * CHUNK, kb * 64], bar, place.slice(CHUNK, CHUNK), pred=needed
        )


@gluon.jit
def load_down(
    down_desc, down_s, down_full, down_empty, n, chunk, needed,
    C: gl.constexpr, CHUNK: gl.constexpr, DOWNS: gl.constexpr,
):  # fmt: skip
    slot = n % DOWNS
    bar = down_full.index(slot)
    mbarrier.wait(down_empty.index(slot), (n // DOWNS & 1) ^ 1, pred=needed)
    mbarrier.expect(bar, CHUNK * C * 2, pred=needed)
    tma.async_copy_global_to_shared(down_desc, [0, chunk * CHUNK], bar, down_s.index(slot), pred=needed)


@gluon.jit
def consume(
    x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s, x_full, up_full, up_empty, down_full,
    down_empty, order, WHICH: gl.constexpr, tiles, per_sample, length, chunks, scale_stride, eps,
    C: gl.constexpr, ROWS: gl.constexpr, CHUNK: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr,
    ORDER: gl.constexpr, XREG: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = product_layout(C)
    UP: gl.constexpr = product_layout(2 * CHUNK)
    HIDDEN: gl.constexpr = product_layout(CHUNK)
    WIDE: gl.constexpr = store_layout(ROWS, C)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    x_own, full = x_s.index(WHICH), x_full.index(WHICH)
    column = gl.arange(0, C, gl.SliceLayout(0, ACC))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, C, gl.SliceLayout(0, WIDE))

    tile = gl.program_id(0)
    first = tile % per_sample * (2 * ROWS) + WHICH * ROWS  # row in the sample
    mbarrier.expect(full, ROWS * C * 2)
    tma.async_copy_global_to_shared(x_desc, [tile // per_sample * length + first, 0], full, x_own)
    total = ((tiles - 1 - tile) // gl.num_programs(0) + 1) * chunks  # chunks that this program comes to
    ahead = tile * 0  # the chunk of the weights that this consumer asks for next: of up the first, of down the second
    if WHICH == 0:
        for n in range(UPS - 1):
            load_up(up_desc, up_s, up_full, up_empty, n, ahead, chunks * CHUNK, n < total, C, CHUNK, UPS)
            ahead = gl.where(ahead + 1 == chunks, 0, ahead + 1)
    else:
        for n in range(DOWNS - 1):
            load_down(down_desc, down_s, down_full, down_empty, n, ahead, n < total, C, CHUNK, DOWNS)
            ahead = gl.where(ahead + 1 == chunks, 0, ahead + 1)
    number = tile * 0  # of the tile
    it = tile * 0
    turn = tile * 0
    while tile < tiles:
        sample = tile // per_sample
        first = tile % per_sample * (2 * ROWS) + WHICH * ROWS
        scale = 1.0 + gl.load(scale_ptr + sample.to(gl.int64) * scale_stride + column).to(gl.float32)
        mbarrier.wait(full, number & 1)
        number += 1
        x = x_own.load(ACC).to(gl.float32)
        rstd = gl.rsqrt(gl.sum(x * x, 1) * (1.0 / C) + eps)
        next_tile = tile + gl.num_programs(0)
        next_first = next_tile % per_sample * (2 * ROWS) + WHICH * ROWS
        next_row = next_tile // per_sample * length + next_first
        normed = (x * rstd[:, None] * scale[None, :]).to(dtype)
        if XREG:
            normed = gl.convert_layout(normed, gl.DotOperandLayout(0, UP, 2))
            fence_async_shared()
            thread_barrier()
            mbarrier.expect(full, ROWS * C * 2, pred=next_tile < tiles)
            tma.async_copy_global_to_shared(x_desc, [next_row, 0], full, x_own, pred=next_tile < tiles)
        else:
            x_own.store(normed)
            fence_async_shared()
        acc = warpgroup_mma_init(x + x)
        thread_barrier()
        if ORDER:
            mbarrier.wait(order.index(WHICH), (turn & 1) ^ (1 - WHICH))
            turn += 1
        for chunk in range(chunks):
            slot = it % UPS
            mbarrier.wait(up_full.index(slot), it // UPS & 1)
            up = warpgroup_mma_init(gl.zeros([ROWS, 2 * CHUNK], gl.float32, UP))
            up_own = up_s.index(slot).permute((1, 0))
            if XREG:
                up = warpgroup_mma(normed, up_own, up, use_acc=False, is_async=True)
            else:
                up = warpgroup_mma(x_own, up_own, up, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the chunk before's
            thread_barrier()
            mbarrier.arrive(down_empty.index((it + DOWNS - 1) % DOWNS), pred=chunk > 0)
            if WHICH == 1:
                load_down(
                    down_desc, down_s, down_full, down_empty, it + DOWNS - 1, ahead, it + DOWNS - 1 < total, C, CHUNK,
                    DOWNS,
                )  # fmt: skip
            if ORDER:
                mbarrier.arrive(order.index(1 - WHICH))
            up, acc = warpgroup_mma_wait(0, deps=[up, acc])
            thread_barrier()
            mbarrier.arrive(up_empty.index(slot))
            if WHICH == 0:
                load_up(
                    up_desc, up_s, up_full, up_empty, it + UPS - 1, ahead, chunks * CHUNK, it + UPS - 1 < total, C,
                    CHUNK, UPS,
                )  # fmt: skip
            ahead = gl.where(ahead + 1 == chunks, 0, ahead + 1)
            if not XREG:
                last = (chunk == chunks - 1) & (next_tile < tiles)
                mbarrier.expect(full, ROWS * C * 2, pred=last)
                tma.async_copy_global_to_shared(x_desc, [next_row, 0], full, x_own, pred=last)
            a, g = gl.split(gl.permute(gl.reshape(up, [ROWS, 2, CHUNK]), [0, 2, 1]))
            a, g = gl.convert_layout(a, HIDDEN), gl.convert_layout(g, HIDDEN)
            hidden = gl.convert_layout(twice_geglu(a, g).to(dtype), gl.DotOperandLayout(0, ACC, 2))
            slot = it % DOWNS
            if ORDER:
                mbarrier.wait(order.index(WHICH), (turn & 1) ^ (1 - WHICH))
                turn += 1
            mbarrier.wait(down_full.index(slot), it // DOWNS & 1)
            acc = warpgroup_mma(hidden, down_s.index(slot).permute((1, 0)), acc, is_async=True)
            it += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        thread_barrier()
        mbarrier.arrive(down_empty.index((it + DOWNS - 1) % DOWNS))
        if ORDER:
            mbarrier.arrive(order.index(1 - WHICH))
        out = gl.convert_layout((acc * 0.5).to(dtype), WIDE)
        at = (sample.to(gl.int64) * length + first) * C
        gl.store(out_ptr + at + row[:, None] * C + dim[None, :], out, mask=(first + row < length)[:, None])
        tile = next_tile


@functools.partial(launch.kernel, jit=gluon.jit)
def _feed_forward_hopper_kernel(
    x_desc, up_desc, down_desc, scale_ptr, out_ptr,
    tiles: tl.int32, per_sample: tl.int32, length: tl.int32, chunks: tl.int32, scale_stride: tl.int64, eps,
    C: gl.constexpr, ROWS: gl.constexpr, CHUNK: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr,
    ORDER: gl.constexpr, XREG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [B·length, C]; a tile is 2·ROWS rows of one sample, ROWS of each consumer; `chunks` of CHUNK of d_ff."""
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    x_s = gl.allocate_shared_memory(dtype, [2, ROWS, C], x_desc.layout)
    up_s = gl.allocate_shared_memory(dtype, [UPS, 2 * CHUNK, C], up_desc.layout)
    down_s = gl.allocate_shared_memory(dtype, [DOWNS, C, CHUNK], down_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    up_full = gl.allocate_shared_memory(gl.int64, [UPS, 1], mbarrier.MBarrierLayout())
    up_empty = gl.allocate_shared_memory(gl.int64, [UPS, 1], mbarrier.MBarrierLayout())
    down_full = gl.allocate_shared_memory(gl.int64, [DOWNS, 1], mbarrier.MBarrierLayout())
    down_empty = gl.allocate_shared_memory(gl.int64, [DOWNS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    for i in gl.static_range(UPS):
        mbarrier.init(up_full.index(i), count=1)
        mbarrier.init(up_empty.index(i), count=2)
    for i in gl.static_range(DOWNS):
        mbarrier.init(down_full.index(i), count=1)
        mbarrier.init(down_empty.index(i), count=2)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (consume, (
                x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s, x_full, up_full, up_empty, down_full,
                down_empty, order, FIRST, tiles, per_sample, length, chunks, scale_stride, eps, C, ROWS, CHUNK, UPS,
                DOWNS, ORDER, XREG,
            )),
            (consume, (
                x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s, x_full, up_full, up_empty, down_full,
                down_empty, order, SECOND, tiles, per_sample, length, chunks, scale_stride, eps, C, ROWS, CHUNK, UPS,
                DOWNS, ORDER, XREG,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
