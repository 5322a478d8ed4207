"""Kernels and launchers of the norms and gates.

All are bound by memory: a norm reads x and writes the output, its backward reads dout and x and writes dx; the gate
reads x and y and writes the output, its backward reads dout and y and writes dy. Each is touched once: for N elements
of b bytes 2·N·b forward (gate 3·N·b) and 3·N·b backward. Parameters and the float32 partial sums are small beside them.

A program holds whole rows, several where they are narrow, as blocks [ROWS, BLOCK] in registers. So backward recomputes
a row's statistics from the x that it reads anyway: saving them would add an output to every forward and spare no bytes.

The leading dimensions are seen as [n0, n1, n2], n0 being the batch where every sample has its own parameters. A line is
the n2 rows of one (i0, i1); blocks of ROWS rows never cross a line, so that only the line is found by division. In
backward a program adds up its parameter gradients over a run of blocks of one line, and `launch.sum_launch` adds a
sample's runs.
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
BLOCK_ELEMENTS = 2048  # with 4 warps 16 a thread: two 16-byte loads of bfloat16
RUNS = 2048  # programs of a backward, about: a few waves on the largest GPUs, and few enough partial sums
RUN_ROWS = 8  # at least, so that partial sums stay small beside the rows


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
    tensors, plan = _planned((x,), (scale if shift is None else shift, scale))
    out = launch.empty_like(x)
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    launch.run(Launch(_norm_forward_kernel, plan.grid, (*tensors, out), (*plan.integers, eps), constants))
    return out


def _norm_backward(
    dout: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """dx, residual added, then dshift if there is a shift, then dscale."""
    tensors, plan = _planned((dout, x), (scale,), backward=True)
    dx, scale_partials = launch.empty_like(x), scale.new_empty(plan.partials, dtype=torch.float32)
    shift_partials = scale_partials if shift is None else torch.empty_like(scale_partials)
    constants = plan.constants | {"PER_SAMPLE": scale.ndim == 2, "CENTRED": shift is not None}
    constants["RESIDUAL"] = residual is not None
    tensors = (*tensors, dx if residual is None else residual, dx, shift_partials, scale_partials)
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
    return given, _plan(given[0].shape, strides, len(tensors), per_sample, launch.aligned(*given), backward)


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(
    shape: Sequence[int],
    given_strides: tuple[Sequence[int], ...],
    tensors: int,
    per_sample: bool,
    aligned: bool,
    backward: bool,
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
    rows = max(1, BLOCK_ELEMENTS // block)
    blocks = launch.cdiv(n2, rows)  # of a line
    integers = (*[s // vector for s in strides], n1, n2, blocks)
    constants = {"ROWS": rows, "BLOCK": block, "VECTOR": vector, "num_warps": min(16, rows * block // 512)}
    if not backward:
        return _Plan((n0 * n1 * blocks, 1, 1), (*integers, channels // vector), constants, (0, 0, 0))
    length = max(launch.cdiv(n0 * n1 * blocks, RUNS), launch.cdiv(RUN_ROWS, rows))  # blocks of a program's run
    runs = launch.cdiv(blocks, length)  # of a line
    partials = (n0, n1 * runs, channels) if per_sample else (1, n0 * n1 * runs, channels)
    return _Plan((n0 * n1 * runs, 1, 1), (*integers, length, runs, channels // vector), constants, partials)


@triton.jit
def _strided(i0, i1, row, column, s0, s1, s2, VECTOR: tl.constexpr):
    """Offsets [ROWS, BLOCK] in a tensor of the given strides, int64."""
    return (i0.to(tl.int64) * s0 + i1.to(tl.int64) * s1) * VECTOR + (row * s2 * VECTOR)[:, None] + column[None, :]


@triton.jit
def _contiguous(line, row, column, n2, channels):
    """Offsets [ROWS, BLOCK] in a contiguous tensor, int64."""
    return ((line.to(tl.int64) * n2 + row) * channels)[:, None] + column[None, :]


@triton.jit
def _parameter(pointer, i0, s0, column, channels, VECTOR: tl.constexpr):
    """A parameter's row [1, BLOCK] in float32, 0 beyond the channels."""
    values = tl.load(pointer + i0.to(tl.int64) * s0 * VECTOR + column, column < channels, other=0.0)
    return values.to(tl.float32)[None, :]


@triton.jit
def _normal(x, inside, channels, eps, CENTRED: tl.constexpr):
    """x / sqrt(mean(x²) + eps), x (0 outside) centred first where CENTRED, and the factor 1 / sqrt(…), [ROWS, 1]."""
    if CENTRED:
        x = tl.where(inside, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    return x * rstd, rstd


@launch.kernel
def _norm_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, shift_s0: tl.int64, scale_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """A program: one block of rows."""
    channels = channels * VECTOR
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i0, i1 = line // n1, line % n1
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n2)[:, None] & (column < channels)[None, :]
    scale = _parameter(scale_ptr, i0, scale_s0, column, channels, VECTOR)
    if PER_SAMPLE:
        scale += 1.0

    x = tl.load(x_ptr + _strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR), inside, other=0.0).to(tl.float32)
    normal, _ = _normal(x, inside, channels, eps, CENTRED)
    out = normal * scale
    if CENTRED:
        out += _parameter(shift_ptr, i0, shift_s0, column, channels, VECTOR)
    tl.store(out_ptr + _contiguous(line, row, column, n2, channels), out, inside)


@launch.kernel
def _norm_backward_kernel(
    dout_ptr, x_ptr, scale_ptr, residual_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, scale_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, PER_SAMPLE: tl.constexpr, CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program: one run of blocks. With n the normalised x and g = dout · scale: dx = rstd · (g − n · mean(g · n)),
    less rstd · mean(g) where x is centred; dscale = Σ dout · n; dshift = Σ dout. A residual is added to dx."""
    channels = channels * VECTOR
    line, run = tl.program_id(0) // runs, tl.program_id(0) % runs
    i0, i1 = line // n1, line % n1
    column = tl.arange(0, BLOCK)
    scale = _parameter(scale_ptr, i0, scale_s0, column, channels, VECTOR)
    if PER_SAMPLE:
        scale += 1.0
    dscale = tl.zeros([ROWS, BLOCK], tl.float32)
    dshift = tl.zeros([ROWS, BLOCK], tl.float32)

    for block in range(run * length, min(run * length + length, blocks)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < n2)[:, None] & (column < channels)[None, :]
        x_at = _strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR)
        dout_at = _strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
        x = tl.load(x_ptr + x_at, inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
        normal, rstd = _normal(x, inside, channels, eps, CENTRED)
        normal = tl.where(inside, normal, 0.0)  # rows beyond the last are 0 · infinity where eps is 0
        dscale += dout * normal
        dnormal = dout * scale
        dx = dnormal - normal * (tl.sum(dnormal * normal, 1) / channels)[:, None]
        if CENTRED:
            dshift += dout
            dx -= (tl.sum(dnormal, 1) / channels)[:, None]
        dx *= rstd
        dx_at = _contiguous(line, row, column, n2, channels)
        if RESIDUAL:
            dx += tl.load(residual_ptr + dx_at, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dx_at, dx, inside)

    partial_at = tl.program_id(0).to(tl.int64) * channels + column
    tl.store(dscale_ptr + partial_at, tl.sum(dscale, 0), column < channels)
    if CENTRED:
        tl.store(dshift_ptr + partial_at, tl.sum(dshift, 0), column < channels)


@launch.kernel
def _gate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64, gate_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, channels: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program: one block of rows."""
    channels = channels * VECTOR
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i0, i1 = line // n1, line % n1
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n2)[:, None] & (column < channels)[None, :]
    gate = _parameter(gate_ptr, i0, gate_s0, column, channels, VECTOR)
    x = tl.load(x_ptr + _strided(i0, i1, row, column, x_s0, x_s1, x_s2, VECTOR), inside).to(tl.float32)
    y = tl.load(y_ptr + _strided(i0, i1, row, column, y_s0, y_s1, y_s2, VECTOR), inside).to(tl.float32)
    tl.store(out_ptr + _contiguous(line, row, column, n2, channels), x + gate * y, inside)


@launch.kernel
def _gate_backward_kernel(
    dout_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64, gate_s0: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, length: tl.int32, runs: tl.int32, channels: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program: one run of blocks. dy = dout · gate; dgate = Σ dout · y."""
    channels = channels * VECTOR
    line, run = tl.program_id(0) // runs, tl.program_id(0) % runs
    i0, i1 = line // n1, line % n1
    column = tl.arange(0, BLOCK)
    gate = _parameter(gate_ptr, i0, gate_s0, column, channels, VECTOR)
    dgate = tl.zeros([ROWS, BLOCK], tl.float32)

    for block in range(run * length, min(run * length + length, blocks)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < n2)[:, None] & (column < channels)[None, :]
        dout_at = _strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
        y_at = _strided(i0, i1, row, column, y_s0, y_s1, y_s2, VECTOR)
        dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + y_at, inside, other=0.0).to(tl.float32)
        dgate += dout * y
        tl.store(dy_ptr + _contiguous(line, row, column, n2, channels), dout * gate, inside)

    partial_at = tl.program_id(0).to(tl.int64) * channels + column
    tl.store(dgate_ptr + partial_at, tl.sum(dgate, 0), column < channels)
