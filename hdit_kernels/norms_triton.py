"""Kernels and launchers of the norms and gates.

All are bound by memory: a norm reads x and writes the output, its backward reads dout and x and writes dx; the gate
reads x and y and writes the output, its backward reads dout and y and writes dy. Each is touched once: for N elements
of b bytes 2·N·b forward (gate 3·N·b) and 3·N·b backward. Parameters and the float32 partial sums are small beside them.

A program holds whole rows, several where they are narrow, as blocks [ROWS, BLOCK] in registers. So backward recomputes
a row's statistics from the x that it reads anyway: saving them would add an output to every forward and spare no bytes.

The leading dimensions are seen as [n0, n1, n2], n0 being the batch where every sample has its own parameters. A line is
the n2 rows of one (i0, i1); blocks of ROWS rows never cross a line, so that only the line is found by division. A
program walks a run of blocks of one line. In backward it adds up its parameter gradients on the way: few programs, all
of them at work at once, leave few partial sums, and `launch.sum_launch` adds a sample's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.launch import Launch

MAX_CHANNELS = 16384


class Shape(NamedTuple):
    """How the rows are spread over programs."""

    elements: int  # of a block, unless one row is longer
    lane: int  # elements of a thread
    stages: int  # blocks under way at once, the one that is worked on included
    programs: int  # for each multiprocessor, about; 0: one for each block


FORWARD = Shape(elements=2048, lane=16, stages=1, programs=0)
BACKWARD = Shape(elements=2048, lane=16, stages=3, programs=4)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, None, weight, eps)


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, None, weight, eps)


def ada_rms_norm_forward(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, None, scale, eps)


def ada_rms_norm_backward(dout: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, None, scale, eps)


def ada_layer_norm_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, shift, scale, eps)


def ada_layer_norm_backward(dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, shift, scale, eps)


def _norm_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    """With a shift a layer norm. scale [C] multiplies as it is; scale [B, C], one per sample, as 1 + scale."""
    tensors, plan = _planned((x,), (scale if shift is None else shift, scale))
    out = launch.empty_like(x)
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    launch.run(Launch(_norm_forward_kernel, plan.grid, (*tensors, out), (*plan.integers, eps), constants))
    return out


def _norm_backward(dout: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    """dx, then dshift if there is a shift, then dscale."""
    tensors, plan = _planned((dout, x), (scale,), backward=True)
    dx, scale_partials = launch.empty_like(x), scale.new_empty(plan.partials, dtype=torch.float32)
    shift_partials = scale_partials if shift is None else torch.empty_like(scale_partials)
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    tensors = (*tensors, dx, shift_partials, scale_partials)
    backward = Launch(_norm_backward_kernel, plan.grid, tensors, (*plan.integers, eps), constants)
    dscale, sum_scale = launch.sum_launch(scale_partials, scale)
    if shift is None:
        launch.run(backward, sum_scale)
        return dx, dscale
    dshift, sum_shift = launch.sum_launch(shift_partials, shift)
    launch.run(backward, sum_shift, sum_scale)
    return dx, dshift, dscale


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    tensors, plan = _planned((x, y), (gate,))
    out = launch.empty_like(x)
    launch.run(Launch(_gate_forward_kernel, plan.grid, (*tensors, out), plan.integers, plan.constants))
    return out


def gated_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    tensors, plan = _planned((dout, y), (gate,), backward=True)
    dy, partials = launch.empty_like(y), gate.new_empty(plan.partials, dtype=torch.float32)
    backward = Launch(_gate_backward_kernel, plan.grid, (*tensors, dy, partials), plan.integers, plan.constants)
    dgate, sum_gate = launch.sum_launch(partials, gate)
    launch.run(backward, sum_gate)
    return dy, dgate


class _Plan(NamedTuple):
    """What a launch takes beside its tensors and eps; and a backward's partial sums: [groups, programs of each, C]."""

    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    constants: dict[str, int]
    partials: tuple[int, int, int]


def _planned(
    tensors: tuple[Tensor, ...], parameters: tuple[Tensor, ...], backward: bool = False
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
    return given, _plan(
        given[0].shape, strides, len(tensors), per_sample, launch.aligned(*given), backward, given[0].device
    )


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(
    shape: Sequence[int],
    given_strides: tuple[Sequence[int], ...],
    tensors: int,
    per_sample: bool,
    aligned: bool,
    backward: bool,
    device: torch.device,
) -> _Plan:
    """given_strides: those of so many tensors, then those of the parameters.

    C (`channels`) and all strides are in units of VECTOR elements: kernels multiply them back, which tells the compiler
    that they are multiples of it, so that it moves 16 bytes at a time.
    """
    channels = shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x: expected at most {MAX_CHANNELS} channels on a GPU, got {channels}")
    (n0, n1, n2), strides = launch.merged(shape, given_strides[:tensors], per_sample)
    strides = [*strides, *[stride[0] if per_sample else 0 for stride in given_strides[tensors:]]]
    vector = launch.vector_width(aligned, channels, *strides)
    block = max(16, triton.next_power_of_2(channels))
    spread = BACKWARD if backward else FORWARD
    rows = max(1, spread.elements // block)
    blocks, lines = launch.cdiv(n2, rows), n0 * n1
    length = 1  # blocks of a program's run
    if spread.programs:
        length = launch.cdiv(blocks, max(1, launch.multiprocessors(device) * spread.programs // max(1, lines)))
    runs = launch.cdiv(blocks, length) if blocks else 0  # of a line
    warps = min(16, max(1, rows * block // (32 * spread.lane)))
    integers = (*[s // vector for s in strides], n1, n2, blocks, length, runs, channels // vector)
    constants = {"ROWS": rows, "BLOCK": block, "VECTOR": vector, "STAGES": spread.stages, "num_warps": warps}
    partials = (n0, n1 * runs, channels) if per_sample else (1, lines * runs, channels)
    return _Plan((lines * runs, 1, 1), integers, constants, partials)


@triton.jit
def _run(n1, blocks, length, runs):
    """The program's i0, i1 and line, its first block and the one after its last."""
    line, first = tl.program_id(0) // runs, tl.program_id(0) % runs * length
    return line // n1, line % n1, line, first, min(first + length, blocks)


@triton.jit
def _block(block, n2, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block's row indices [ROWS], columns [BLOCK] and which elements exist [ROWS, BLOCK]."""
    row, column = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    return row, column, (row < n2)[:, None] & (column < channels)[None, :]


@triton.jit
def _parameter(pointer, i0, s0, channels, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """A parameter's row [1, BLOCK] in float32, 0 beyond the channels."""
    column = tl.arange(0, BLOCK)
    values = tl.load(pointer + i0.to(tl.int64) * s0 * VECTOR + column, column < channels, other=0.0)
    return values.to(tl.float32)[None, :]


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
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    channels = channels * VECTOR
    i0, i1, line, first, end = _run(n1, blocks, length, runs)
    scale = _parameter(scale_ptr, i0, scale_s0, channels, BLOCK, VECTOR)
    if PER_SAMPLE:
        scale += 1.0
    if CENTRED:
        shift = _parameter(shift_ptr, i0, shift_s0, channels, BLOCK, VECTOR)

    for block in tl.range(first, end, num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        x_at = launch.strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR)
        x = tl.load(x_ptr + x_at, inside, other=0.0).to(tl.float32)
        normal, _ = _normal(x, inside, 1.0 / channels, eps, CENTRED)
        out = normal * scale
        if CENTRED:
            out += shift
        tl.store(out_ptr + launch.contiguous(line, row, column, n2, channels), out, inside)


@launch.kernel
def _norm_backward_kernel(
    dout_ptr, x_ptr, scale_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, scale_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """With n the normalised x and g = dout · scale: dx = rstd · (g − n · mean(g · n)), less rstd · mean(g) where x is
    centred; dscale = Σ dout · n; dshift = Σ dout."""
    channels = channels * VECTOR
    share = 1.0 / channels
    i0, i1, line, first, end = _run(n1, blocks, length, runs)
    scale = _parameter(scale_ptr, i0, scale_s0, channels, BLOCK, VECTOR)
    if PER_SAMPLE:
        scale += 1.0
    dscale = tl.zeros([ROWS, BLOCK], tl.float32)
    dshift = tl.zeros([ROWS, BLOCK], tl.float32)

    for block in tl.range(first, end, num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        x_at = launch.strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR)
        dout_at = launch.strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
        x = tl.load(x_ptr + x_at, inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
        normal, rstd = _normal(x, inside, share, eps, CENTRED)
        normal = tl.where(inside, normal, 0.0)  # rows beyond the last are 0 · infinity where eps is 0
        dscale += dout * normal
        dnormal = dout * scale
        dx = dnormal - normal * (tl.sum(dnormal * normal, 1) * share)[:, None]
        if CENTRED:
            dshift += dout
            dx -= (tl.sum(dnormal, 1) * share)[:, None]
        tl.store(dx_ptr + launch.contiguous(line, row, column, n2, channels), dx * rstd, inside)

    _store_partial(dscale_ptr, dscale, channels, BLOCK)
    if CENTRED:
        _store_partial(dshift_ptr, dshift, channels, BLOCK)


@launch.kernel
def _gate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64, gate_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    channels = channels * VECTOR
    i0, i1, line, first, end = _run(n1, blocks, length, runs)
    gate = _parameter(gate_ptr, i0, gate_s0, channels, BLOCK, VECTOR)

    for block in tl.range(first, end, num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        x_at = launch.strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR)
        y_at = launch.strided(i0, i1, row, column, y_s0, y_s1, y_s2, VECTOR)
        x = tl.load(x_ptr + x_at, inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + y_at, inside, other=0.0).to(tl.float32)
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
    i0, i1, line, first, end = _run(n1, blocks, length, runs)
    gate = _parameter(gate_ptr, i0, gate_s0, channels, BLOCK, VECTOR)
    dgate = tl.zeros([ROWS, BLOCK], tl.float32)

    for block in tl.range(first, end, num_stages=STAGES):
        row, column, inside = _block(block, n2, channels, ROWS, BLOCK)
        dout_at = launch.strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
        y_at = launch.strided(i0, i1, row, column, y_s0, y_s1, y_s2, VECTOR)
        dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + y_at, inside, other=0.0).to(tl.float32)
        dgate += dout * y
        tl.store(dy_ptr + launch.contiguous(line, row, column, n2, channels), dout * gate, inside)

    _store_partial(dgate_ptr, dgate, channels, BLOCK)
