"""`feed_forward` in one kernel for Hopper GPUs, in Gluon, at the widths 128 and 256 and in 16-bit types.

A program has two warpgroups with a tile of 64 tokens each. A warpgroup keeps its normed tile in shared memory and its
output in registers, and takes d_ff in chunks of 64: up projection, GEGLU in registers, down projection. The hidden
activations never leave the chip: from memory x is read once, out is written once.

Three choices carry it, docs/kernel-log.md has their times:
- The warpgroups run free of each other, so that one's GEGLU runs beside the other's products.
- They share the weights, which come by TMA into two rings of slots: the first fills that of the up projection, the
  second that of the down projection. Warps of their own for copies would get fewer registers by setmaxnreg, and then
  ptxas serialises all products of the function (its warning C7512).
- The L2 serves all weights to every program for each pair of tiles: 9·C² elements for 128 tokens, 302 MB for 131,072
  tokens of width 128 in bfloat16. So tiles are as tall as registers allow.

Numbers: the norm's result is halved (exact), so that a and g of GEGLU are, and GELU's factor 1/2 comes for nothing.
Hidden activations and the output's accumulator, which starts from x / 2, are halves, too; the end doubles them. So
float16 reaches further than in separate operators.
"""

from __future__ import annotations

import functools

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

from hdit_kernels import backend, launch
from hdit_kernels.neighborhood_attention.hopper_plan import gluon_known

ROWS = gl.constexpr(64)  # tokens of a warpgroup
CHUNK = gl.constexpr(64)  # of d_ff
REGISTERS = gl.constexpr(256)  # for each thread: a multiprocessor has one program of 256 threads
CONFIGS = {128: {"UPS": 3, "DOWNS": 3}, 256: {"UPS": 2, "DOWNS": 1}}  # by width C: slots of each ring, as many as fit


def takes(x: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether the kernel takes these contiguous tensors, and whether it is a Hopper GPU."""
    return (
        backend.chosen == "auto"
        and launch.gpu_family(x.device) == "hopper"
        and gluon_known()
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] in CONFIGS
        and down.shape[1] % CHUNK.value == 0
        and x.numel() // x.shape[-1] < 2**31 - 2**8  # rows are counted in 32 bits
        and launch.aligned(x, up, down)
    )


def forward_launch(x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float, out: Tensor) -> launch.Launch:
    channels, d_ff = down.shape
    rows, chunk = ROWS.value, CHUNK.value
    length = x.numel() // (x.shape[0] * channels)  # of a sample
    per_sample = launch.cdiv(length, 2 * rows)
    tiles = x.shape[0] * per_sample
    scale = launch.dense(scale)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptors = (
        TensorDescriptor.from_tensor(x.view(-1, channels), [rows, channels], layout),
        TensorDescriptor.from_tensor(up, [chunk, 64], layout),
        TensorDescriptor.from_tensor(down, [channels, chunk], layout),
    )
    numbers = (tiles, per_sample, length, d_ff // chunk, scale.stride(0), eps)
    constants = {"C": channels, **CONFIGS[channels], "num_warps": 4, "maxnreg": REGISTERS.value}
    grid = (min(tiles, launch.multiprocessors(x.device)), 1, 1)
    return launch.Launch(_feed_forward_hopper_kernel, grid, (scale, out), numbers, constants, descriptors=descriptors)


thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6 and 3.7


@gluon.constexpr_function
def product_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def store_layout(columns):
    """8 bytes a thread, the four lanes of a row beside each other: as product_layout but for one exchange in a quad."""
    registers = [[0, 1], [0, 2], [0, 16], *([0, n] for n in (32, 64, 128) if n < columns), [8, 0]]
    lanes, warps = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, columns])


@gluon.jit
def tanh_approx(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def half_geglu(a, g):
    """a · gelu(g) / 2 from a / 2 and g / 2. The normal distribution is (1 + tanh(g · p(g²))) / 2 with a polynomial p,
    fitted to at most 2.6e-5 off; the instruction adds 2⁻¹¹ of tanh.
    """
    t = gl.minimum(g * g, 4.0)
    p = gl.fma(
        gl.fma(t, gl.full_like(t, -0.01125463968), gl.full_like(t, 0.29605456848)), t, gl.full_like(t, 1.59501318394)
    )
    return a * gl.fma(g, tanh_approx(g * p), g)


# The rings. A slot's `full` barrier is passed once its copies have come, its `empty` one once both warpgroups have read
# it. The n-th filling of a ring goes to slot n % slots; a wait's phase is the parity of the slot's fillings so far.


@gluon.jit
def load_up(up_desc, up_s, full, empty, n, chunk, d_ff, wanted, C: gl.constexpr, UPS: gl.constexpr):
    """The ring's n-th filling, with the weights' rows of a chunk: a's and g's, 64 columns at a time."""
    parts: gl.constexpr = C // 64
    # the same memory, in which 64 columns of all rows lie together
    memory = up_s._reinterpret(up_s.dtype, [UPS * parts, 2 * CHUNK, 64], up_desc.layout)
    slot = n % UPS
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), (n // UPS & 1) ^ 1, pred=wanted)
    mbarrier.expect(bar, 2 * CHUNK * C * 2, pred=wanted)
    for part in gl.static_range(parts):
        place = memory.index(slot * parts + part)
        a_place, g_place = place.slice(0, CHUNK), place.slice(CHUNK, CHUNK)
        tma.async_copy_global_to_shared(up_desc, [chunk * CHUNK, part * 64], bar, a_place, pred=wanted)
        tma.async_copy_global_to_shared(up_desc, [d_ff + chunk * CHUNK, part * 64], bar, g_place, pred=wanted)


@gluon.jit
def load_down(down_desc, down_s, full, empty, n, chunk, wanted, C: gl.constexpr, DOWNS: gl.constexpr):
    """The ring's n-th filling, with the weights' columns of a chunk."""
    slot = n % DOWNS
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), (n // DOWNS & 1) ^ 1, pred=wanted)
    mbarrier.expect(bar, CHUNK * C * 2, pred=wanted)
    tma.async_copy_global_to_shared(down_desc, [0, chunk * CHUNK], bar, down_s.index(slot), pred=wanted)


@gluon.jit
def warpgroup(
    WHICH: gl.constexpr, x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s,
    x_full, up_full, up_empty, down_full, down_empty, tiles, per_sample, length, chunks, scale_stride, eps,
    C: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr,
):  # fmt: skip
    """What one warpgroup does. WHICH: 0 or 1: the half of a tile that is its own, and the ring that it fills."""
    ACC: gl.constexpr = product_layout(C)
    UP: gl.constexpr = product_layout(2 * CHUNK)
    HIDDEN: gl.constexpr = product_layout(CHUNK)
    WIDE: gl.constexpr = store_layout(C)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    x_own, full = x_s.index(WHICH), x_full.index(WHICH)
    column = gl.arange(0, C, gl.SliceLayout(0, ACC))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, C, gl.SliceLayout(0, WIDE))

    tile = gl.program_id(0)
    first = tile % per_sample * (2 * ROWS) + WHICH * ROWS  # row in the sample
    mbarrier.expect(full, ROWS * C * 2)
    tma.async_copy_global_to_shared(x_desc, [tile // per_sample * length + first, 0], full, x_own)
    steps = ((tiles - 1 - tile) // gl.num_programs(0) + 1) * chunks  # of this program: a chunk of a tile each
    step = tile * 0
    asked = tile * 0  # the chunk that comes next into this warpgroup's ring
    if WHICH == 0:
        for n in range(UPS - 1):
            load_up(up_desc, up_s, up_full, up_empty, n, asked, chunks * CHUNK, n < steps, C, UPS)
            asked = gl.where(asked + 1 == chunks, 0, asked + 1)
    else:
        for n in range(DOWNS - 1):
            load_down(down_desc, down_s, down_full, down_empty, n, asked, n < steps, C, DOWNS)
            asked = gl.where(asked + 1 == chunks, 0, asked + 1)
    phase = tile * 0  # of x
    while tile < tiles:
        sample = tile // per_sample
        first = tile % per_sample * (2 * ROWS) + WHICH * ROWS
        next_tile = tile + gl.num_programs(0)
        next_row = next_tile // per_sample * length + next_tile % per_sample * (2 * ROWS) + WHICH * ROWS
        scale = 1.0 + gl.load(scale_ptr + sample.to(gl.int64) * scale_stride + column).to(gl.float32)
        mbarrier.wait(full, phase)
        phase ^= 1
        x = x_own.load(ACC).to(gl.float32)
        half_rstd = 0.5 * gl.rsqrt(gl.sum(x * x, 1) * (1.0 / C) + eps)
        x_own.store((x * half_rstd[:, None] * scale[None, :]).to(dtype))
        fence_async_shared()
        acc = warpgroup_mma_init(0.5 * x)
        thread_barrier()
        for chunk in range(chunks):
            slot = step % UPS
            mbarrier.wait(up_full.index(slot), step // UPS & 1)
            up = warpgroup_mma_init(gl.zeros([ROWS, 2 * CHUNK], gl.float32, UP))
            up = warpgroup_mma(x_own, up_s.index(slot).permute((1, 0)), up, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the down projection of the step before
            thread_barrier()
            mbarrier.arrive(down_empty.index((step + DOWNS - 1) % DOWNS), pred=chunk > 0)
            if WHICH == 1:
                n = step + DOWNS - 1
                load_down(down_desc, down_s, down_full, down_empty, n, asked, n < steps, C, DOWNS)
            up, acc = warpgroup_mma_wait(0, deps=[up, acc])
            thread_barrier()
            mbarrier.arrive(up_empty.index(slot))
            if WHICH == 0:
                n = step + UPS - 1
                load_up(up_desc, up_s, up_full, up_empty, n, asked, chunks * CHUNK, n < steps, C, UPS)
            asked = gl.where(asked + 1 == chunks, 0, asked + 1)
            is_last = (chunk == chunks - 1) & (next_tile < tiles)  # the normed tile is read no more
            mbarrier.expect(full, ROWS * C * 2, pred=is_last)
            tma.async_copy_global_to_shared(x_desc, [next_row, 0], full, x_own, pred=is_last)
            a, g = gl.split(gl.permute(gl.reshape(up, [ROWS, 2, CHUNK]), [0, 2, 1]))
            a, g = gl.convert_layout(a, HIDDEN), gl.convert_layout(g, HIDDEN)
            hidden = gl.convert_layout(half_geglu(a, g).to(dtype), gl.DotOperandLayout(0, ACC, 2))
            slot = step % DOWNS
            mbarrier.wait(down_full.index(slot), step // DOWNS & 1)
            acc = warpgroup_mma(hidden, down_s.index(slot).permute((1, 0)), acc, is_async=True)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        thread_barrier()
        mbarrier.arrive(down_empty.index((step + DOWNS - 1) % DOWNS))
        out = gl.convert_layout((2.0 * acc).to(dtype), WIDE)
        at = (sample.to(gl.int64) * length + first) * C
        gl.store(out_ptr + at + row[:, None] * C + dim[None, :], out, mask=(first + row < length)[:, None])
        tile = next_tile


@functools.partial(launch.kernel, jit=gluon.jit)
def _feed_forward_hopper_kernel(
    x_desc, up_desc, down_desc, scale_ptr, out_ptr,
    tiles: tl.int32, per_sample: tl.int32, length: tl.int32, chunks: tl.int32, scale_stride: tl.int64, eps,
    C: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr,
):  # fmt: skip
    """x, out [samples · length, C], up [2·d_ff, C], down [C, d_ff] contiguous; scale [samples, C], rows scale_stride
    apart. A tile is 2·ROWS rows of one sample, of which it has per_sample; rows beyond it are read, but not written.
    """
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    x_s = gl.allocate_shared_memory(dtype, [2, ROWS, C], x_desc.layout)
    up_s = gl.allocate_shared_memory(dtype, [UPS, 2 * CHUNK, C], up_desc.layout)
    down_s = gl.allocate_shared_memory(dtype, [DOWNS, C, CHUNK], down_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    up_full = gl.allocate_shared_memory(gl.int64, [UPS, 1], mbarrier.MBarrierLayout())
    up_empty = gl.allocate_shared_memory(gl.int64, [UPS, 1], mbarrier.MBarrierLayout())
    down_full = gl.allocate_shared_memory(gl.int64, [DOWNS, 1], mbarrier.MBarrierLayout())
    down_empty = gl.allocate_shared_memory(gl.int64, [DOWNS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(x_full.index(i), count=1)
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
            (warpgroup, (
                FIRST, x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s,
                x_full, up_full, up_empty, down_full, down_empty, tiles, per_sample, length, chunks, scale_stride, eps,
                C, UPS, DOWNS,
            )),
            (warpgroup, (
                SECOND, x_desc, up_desc, down_desc, scale_ptr, out_ptr, x_s, up_s, down_s,
                x_full, up_full, up_empty, down_full, down_empty, tiles, per_sample, length, chunks, scale_stride, eps,
                C, UPS, DOWNS,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
