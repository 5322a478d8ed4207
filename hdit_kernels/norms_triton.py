"""Kernels and launchers of the norms and gates.

All are bound by memory: a norm reads x and writes the output, its backward reads dout and x and writes dx; the gate
reads x and y and writes the output, its backward reads dout and y and writes dy. Each is touched once: for N elements
of b bytes 2·N·b forward (gate 3·N·b) and 3·N·b backward. Parameters and the float32 partial sums are small beside them.

A program holds whole rows, several where they are narrow, in registers. So backward recomputes a row's statistics from
the x that it reads anyway: saving them would add an output to every forward and spare no bytes. The leading dimensions
are seen as [n0, n1, n2], n0 being the batch where every sample has its own parameters. A line is the n2 rows of one
(i0, i1); programs never cross a line.

Forward, a program asks for all that it reads at once; a loop would wait for the parameters first. A norm's row is cut
into parts of 512 bytes, or fewer that divide it, so that one warp has whole rows and adds them up without a barrier,
and no lane is idle at widths like 384 and 768. From 1,024 channels on, several warps share a row.
Backward, few programs, all of them at work at once, each walk a run of blocks of one line, with the next blocks' loads
under way, and add up their parameter gradients on the way. So few partial sums are left for `launch.sum_launch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.launch import Launch

MAX_CHANNELS = 16384
STAGES = 3  # of backward's loop: blocks under way at once, the one that is worked on included
LINES = 32768  # of one of the grid's axes, which has at most 65,535 programs
LINES_OF_AN_AXIS = tl.constexpr(LINES)
UNDER_WAY = 16384  # bytes of one tensor in the blocks that a multiprocessor's programs work on, in backward


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, None, weight, eps)


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, None, weight, eps)


def ada_rms_norm_forward(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, None, scale, eps)


def ada_rms_norm_backward(
    dout: Tensor, x: Tensor, scale: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """residual: of x's shape and dtype, contiguous; what x has as gradient beside the norm's."""
    return _norm_backward(dout, x, None, scale, eps, residual)


def ada_layer_norm_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, shift, scale, eps)


def ada_layer_norm_backward(dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, shift, scale, eps)


def _norm_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    """With a shift a layer norm. scale [C] multiplies as it is; scale [B, C], one per sample, as 1 + scale."""
    tensors, plan = _planned((x,), (scale if shift is None else shift, scale), _norm_forward_block)
    out = launch.empty_like(x)
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    launch.run(Launch(_norm_forward_kernel, plan.grid, (*tensors, out), (*plan.integers, eps), constants))
    return out


def _norm_backward(
    dout: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """dx, residual added, then dshift if there is a shift, then dscale."""
    tensors, plan = _planned((dout, x), (scale,), _backward_block)
    parameters = (scale,) if shift is None else (shift, scale)
    dx, partials = launch.empty_like(x), [scale.new_empty(plan.partials, dtype=torch.float32) for _ in parameters]
    tensors = (*tensors, dx if residual is None else residual, dx, partials[0], partials[-1])
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    constants["RESIDUAL"] = residual is not None
    backward = Launch(_norm_backward_kernel, plan.grid, tensors, (*plan.integers, eps), constants)
    gradients, sums = zip(*map(launch.sum_launch, partials, parameters), strict=True)
    launch.run(backward, *sums)
    return dx, *gradients


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    tensors, plan = _planned((x, y), (gate,), _gate_forward_block)
    out = launch.empty_like(x)
    launch.run(Launch(_gate_forward_kernel, plan.grid, (*tensors, out), plan.integers, plan.constants))
    return out


def gated_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    tensors, plan = _planned((dout, y), (gate,), _backward_block)
    dy, partials = launch.empty_like(y), gate.new_empty(plan.partials, dtype=torch.float32)
    backward = Launch(_gate_backward_kernel, plan.grid, (*tensors, dy, partials), plan.integers, plan.constants)
    dgate, summing = launch.sum_launch(partials, gate)
    launch.run(backward, summing)
    return dy, dgate


class _Plan(NamedTuple):
    """What a launch takes beside its tensors and eps; and a backward's partial sums: [groups, programs of each, C]."""

    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    constants: dict[str, int]
    partials: tuple[int, int, int]


Block = dict[str, Any]  # a kernel's constants that say what of a line it takes at once: ROWS and how wide they are


def _norm_forward_block(channels: int, element_size: int) -> Block:
    if channels >= 1024:
        width = triton.next_power_of_2(channels)
        rows, warps = max(1, 2048 // width), min(16, max(4, width // 512))
        return {"ROWS": rows, "PARTS": 1, "WIDTH": width, "EXACT": width == channels, "num_warps": warps}
    widest = 512 // element_size
    dividing = [width for width in (256, 128, 64) if width <= widest and channels % width == 0]
    width = max(dividing, default=min(widest, max(16, triton.next_power_of_2(channels))))
    parts = launch.cdiv(channels, width)
    rows = 4 * 2 * (widest // width)  # for 4 warps, 2 times what a warp reads at once
    return {"ROWS": rows, "PARTS": parts, "WIDTH": width, "EXACT": parts * width == channels, "num_warps": 4}


def _gate_forward_block(channels: int, element_size: int) -> Block:
    block = max(16, triton.next_power_of_2(channels))
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _backward_block(channels: int, element_size: int) -> Block:
    """Wide rows one by one: registers hold several such blocks and the sums."""
    block = max(16, triton.next_power_of_2(channels))
    rows = 2048 // block if block <= 512 else 1
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512)), "STAGES": STAGES}


def _planned(
    tensors: tuple[Tensor, ...], parameters: tuple[Tensor, ...], block_of: Callable[[int, int], Block]
) -> tuple[tuple[Tensor, ...], _Plan]:
    """Tensors and parameters, so that kernels can read them, and the plan. Parameters are all [C], or all [B, C] with
    one row for each index of the first dimension.
    """
    per_sample = parameters[0].ndim == 2
    given = (*tensors, *parameters)
    strides = tuple([tensor.stride() for tensor in given])
    if not launch.readable(strides):
        given = (*launch.rows(*tensors, keep_first=per_sample), *[launch.dense(each) for each in parameters])
        strides = tuple([tensor.stride() for tensor in given])
    x, aligned = given[0], launch.aligned(*given)
    multiprocessors = launch.multiprocessors(x.device) if block_of is _backward_block else 0
    return given, _plan(
        x.shape, strides, len(tensors), per_sample, aligned, x.element_size(), block_of, multiprocessors
    )


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(
    shape: Sequence[int],
    given_strides: tuple[Sequence[int], ...],
    tensors: int,
    per_sample: bool,
    aligned: bool,
    element_size: int,
    block_of: Callable[[int, int], Block],
    multiprocessors: int,
) -> _Plan:
    """given_strides: those of so many tensors, then those of the parameters. multiprocessors: 0 in forward.

    C (`channels`) and all strides are in units of VECTOR elements: kernels multiply them back, which tells the compiler
    that they are multiples of it, so that it moves 16 bytes at a time.
    """
    channels = shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x: expected at most {MAX_CHANNELS} channels on a GPU, got {channels}")
    (n0, n1, n2), strides = launch.merged(shape, given_strides[:tensors], per_sample)
    strides = [*strides, *[stride[0] if per_sample else 0 for stride in given_strides[tensors:]]]
    vector = launch.vector_width(aligned, channels, *strides)
    constants = {**block_of(channels, element_size), "VECTOR": vector}
    blocks, lines = launch.cdiv(n2, constants["ROWS"]), n0 * n1  # blocks of a line
    strides = [stride // vector for stride in strides]
    if not multiprocessors:
        grid = (blocks, min(lines, LINES), launch.cdiv(lines, LINES))
        return _Plan(grid, (*strides, n1, n2, lines, channels // vector), constants | {"ONE": n1 == 1}, (0, 0, 0))
    programs = multiprocessors * max(1, UNDER_WAY // (constants["ROWS"] * constants["BLOCK"] * element_size))
    length = max(1, launch.cdiv(blocks, max(1, programs // max(1, lines))))  # blocks of a program's run
    runs = launch.cdiv(blocks, length)  # of a line
    partials = (n0, n1 * runs, channels) if per_sample else (1, lines * runs, channels)
    return _Plan(
        (lines * runs, 1, 1), (*strides, n1, n2, blocks, length, runs, channels // vector), constants, partials
    )


@triton.jit
def _forward_line(n1, ONE: tl.constexpr):
    """A forward program's i0, i1 and line, without a division where each i0 has one line."""
    line = tl.program_id(1) + tl.program_id(2) * LINES_OF_AN_AXIS
    if ONE:
        return line, line * 0, line
    else:
        return line // n1, line % n1, line


@triton.jit
def _line(n1, programs):
    """A backward program's i0, i1 and line, and its number among the programs of the line."""
    line, number = tl.program_id(0) // programs, tl.program_id(0) % programs
    return line // n1, line % n1, line, number


@triton.jit
def _block(block, n2, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block's row indices [ROWS], columns [BLOCK] and which elements exist [ROWS, BLOCK]."""
    row, column = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    return row, column, (row < n2)[:, None] & (column < channels)[None, :]


@triton.jit
def _read(pointer, i0, i1, row, column, inside, s0, s1, s2, VECTOR: tl.constexpr):
    """A block [ROWS, BLOCK] in float32, 0 outside."""
    return tl.load(pointer + launch.strided(i0, i1, row, column, s0, s1, s2, VECTOR), inside, other=0.0).to(tl.float32)


@triton.jit
def _parameter(pointer, i0, s0, channels, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """A parameter's row [1, BLOCK] in float32, 0 beyond the channels; 1 more if asked."""
    column = tl.arange(0, BLOCK)
    values = tl.load(pointer + i0.to(tl.int64) * s0 * VECTOR + column, column < channels, other=0.0).to(tl.float32)
    return (values + 1.0 if PLUS_ONE else values)[None, :]


@triton.jit
def _own_parameter(pointer, i0, s0, column, inside, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """A parameter's channels for each of ROWS rows in float32, 1 more if asked. Each warp reads its own: one row that
    all share would go through shared memory, behind a barrier.
    """
    at = i0.to(tl.int64) * s0 * VECTOR + tl.zeros([ROWS, 1], tl.int32) + column[None, :]
    values = tl.load(pointer + at, inside, other=0.0).to(tl.float32)
    return values + 1.0 if PLUS_ONE else values


@triton.jit
def _normal(x, inside, share, eps, CENTRED: tl.constexpr):
    """x / sqrt(mean(x²) + eps), x (0 outside) centred first where CENTRED, and the factor 1 / sqrt(…), [ROWS, 1].
    share: of one channel in a mean."""
    if CENTRED:
        x = tl.where(inside, x - (tl.sum(x, 1) * share)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) * share + eps)[:, None]
    return x * rstd, rstd


@triton.jit
def _store_partial(pointer, sums, channels, BLOCK: tl.constexpr):
    """A program's sums [ROWS, BLOCK] over its rows."""
    column = tl.arange(0, BLOCK)
    tl.store(pointer + tl.program_id(0).to(tl.int64) * channels + column, tl.sum(sums, 0), column < channels)


@launch.kernel
def _norm_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, shift_s0: tl.int64, scale_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, lines: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr,
    ONE: tl.constexpr, PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """A row is PARTS parts of WIDTH channels; EXACT: all of them exist."""
    channels = channels * VECTOR
    share = 1.0 / channels
    i0, i1, line = _forward_line(n1, ONE)
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    exists = ((row < n2) & (line < lines))[:, None]
    x_at = launch.strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR)
    out_at = launch.contiguous(line, row, column, n2, channels)
    xs = ()
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        inside = exists if EXACT else exists & (column + part * WIDTH < channels)[None, :]
        x = tl.load(x_ptr + x_at + part * WIDTH, inside, other=0.0)
        xs = xs + (x,)  # type: ignore[assignment]  # Triton's tuples grow
        if CENTRED:
            sums += x.to(tl.float32)
    mean = (tl.sum(sums, 1) * share)[:, None] if CENTRED else 0.0
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        x = xs[part].to(tl.float32) - mean
        if CENTRED and not EXACT:
            x = tl.where((column + part * WIDTH < channels)[None, :], x, 0.0)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 1) * share + eps)[:, None]
    for part in tl.static_range(PARTS):
        inside = exists if EXACT else exists & (column + part * WIDTH < channels)[None, :]
        scale = _own_parameter(scale_ptr, i0, scale_s0, column + part * WIDTH, inside, PER_SAMPLE, ROWS, VECTOR)
        out = (xs[part].to(tl.float32) - mean) * rstd * scale
        if CENTRED:
            out += _own_parameter(shift_ptr, i0, shift_s0, column + part * WIDTH, inside, False, ROWS, VECTOR)
        tl.store(out_ptr + out_at + part * WIDTH, out, inside)


@launch.kernel
def _norm_backward_kernel(
    dout_ptr, x_ptr, scale_ptr, residual_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, scale_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """With n the normalised x and g = dout · scale: dx = rstd · (g − n · mean(g · n)), less rstd · mean(g) where x is
    centred; dscale = Σ dout · n; dshift = Σ dout. A residual is added to dx."""
    channels = channels * VECTOR
    share = 1.0 / channels
    i0, i1, line, run = _line(n1, runs)
    scale = _parameter(scale_ptr, i0, scale_s0, channels, PER_SAMPLE, BLOCK, VECTOR)
    dscale, dshift = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(run * length, min(run * length + length, blocks), num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        x = _read(x_ptr, i0, i1, row, column, inside, x_s0, x_s1, x_s2, VECTOR)
        dout = _read(dout_ptr, i0, i1, row, column, inside, dout_s0, dout_s1, dout_s2, VECTOR)
        normal, rstd = _normal(x, inside, share, eps, CENTRED)
        normal = tl.where(inside, normal, 0.0)  # rows beyond the last are 0 · infinity where eps is 0
        dscale += dout * normal
        dnormal = dout * scale
        dx = dnormal - normal * (tl.sum(dnormal * normal, 1) * share)[:, None]
        if CENTRED:
            dshift += dout
            dx -= (tl.sum(dnormal, 1) * share)[:, None]
        dx *= rstd
        dx_at = launch.contiguous(line, row, column, n2, channels)
        if RESIDUAL:
            dx += tl.load(residual_ptr + dx_at, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dx_at, dx, inside)

    _store_partial(dscale_ptr, dscale, channels, BLOCK)
    if CENTRED:
        _store_partial(dshift_ptr, dshift, channels, BLOCK)


@launch.kernel
def _gate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64, gate_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, lines: tl.int32, channels: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    channels = channels * VECTOR
    i0, i1, line = _forward_line(n1, ONE)
    row, column, inside = _block(tl.program_id(0), n2, channels, ROWS, BLOCK)
    inside &= line < lines
    x = _read(x_ptr, i0, i1, row, column, inside, x_s0, x_s1, x_s2, VECTOR)
    y = _read(y_ptr, i0, i1, row, column, inside, y_s0, y_s1, y_s2, VECTOR)
    gate = _own_parameter(gate_ptr, i0, gate_s0, column, inside, False, ROWS, VECTOR)
    tl.store(out_ptr + launch.contiguous(line, row, column, n2, channels), x + gate * y, inside)


@launch.kernel
def _gate_backward_kernel(
    dout_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64, gate_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy = dout · gate; dgate = Σ dout · y."""
    channels = channels * VECTOR
    i0, i1, line, run = _line(n1, runs)
    gate = _parameter(gate_ptr, i0, gate_s0, channels, False, BLOCK, VECTOR)
    dgate = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(run * length, min(run * length + length, blocks), num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        dout = _read(dout_ptr, i0, i1, row, column, inside, dout_s0, dout_s1, dout_s2, VECTOR)
        y = _read(y_ptr, i0, i1, row, column, inside, y_s0, y_s1, y_s2, VECTOR)
        dgate += dout * y
        tl.store(dy_ptr + launch.contiguous(line, row, column, n2, channels), dout * gate, inside)

    _store_partial(dgate_ptr, dgate, channels, BLOCK)
