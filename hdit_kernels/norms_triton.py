"""Kernels and launchers of the norms and gates.

All are bound by memory: a norm reads x and writes the output, its backward reads dout and x and writes dx; the gate
reads x and y and writes the output, its backward reads dout and y and writes dy. Each is touched once: for N elements
of b bytes 2·N·b forward (gate 3·N·b) and 3·N·b backward. Parameters and the float32 partial sums are small beside them.

A program holds whole rows, several where they are narrow, as blocks [ROWS, BLOCK] in registers. So backward recomputes
a row's statistics from the x that it reads anyway: saving them would add an output to every forward and spare no bytes.

The leading dimensions are seen as [n0, n1, n2], n0 being the batch where every sample has its own parameters. A line is
the n2 rows of one (i0, i1); blocks of ROWS rows never cross a line, so that only the line is found by division. In
backward a program adds up its parameter gradients over a run of blocks of one line, and `launch.sum_partials` adds a
sample's runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch

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


def ada_rms_norm_backward(dout: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, None, scale, eps)


def ada_layer_norm_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, shift, scale, eps)


def ada_layer_norm_backward(dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _norm_backward(dout, x, shift, scale, eps)


def _norm_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    """With a shift a layer norm. scale [C] multiplies as it is; scale [B, C], one per sample, as 1 + scale."""
    at = _layout([x], [shift, scale])
    out = x.new_empty(x.shape)
    _norm_forward_kernel[(at.n0 * at.n1 * at.blocks,)](
        *at.tensors,
        *at.parameters,
        out,
        *at.strides,
        *at.parameter_strides,
        at.n1,
        at.n2,
        at.blocks,
        at.channels,
        eps,
        PER_SAMPLE=scale.ndim == 2,
        ROWS=at.rows,
        BLOCK=at.block,
        VECTOR=at.vector,
        num_warps=at.num_warps,
    )
    return out


def _norm_backward(dout: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    """dx, then dshift if there is a shift, then dscale."""
    at = _layout([dout, x], [scale])
    dx = x.new_empty(x.shape)
    length, runs = _runs(at)
    dshift, dscale = None if shift is None else _partials(at, runs, scale), _partials(at, runs, scale)
    _norm_backward_kernel[(at.n0 * at.n1 * runs,)](
        *at.tensors,
        *at.parameters,
        dx,
        dshift,
        dscale,
        *at.strides,
        *at.parameter_strides,
        at.n1,
        at.n2,
        at.blocks,
        length,
        runs,
        at.channels,
        eps,
        PER_SAMPLE=scale.ndim == 2,
        ROWS=at.rows,
        BLOCK=at.block,
        VECTOR=at.vector,
        num_warps=at.num_warps,
    )
    if shift is None or dshift is None:
        return dx, _total(dscale, scale)
    return dx, _total(dshift, shift), _total(dscale, scale)


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    at = _layout([x, y], [gate])
    out = x.new_empty(x.shape)
    _gate_forward_kernel[(at.n0 * at.n1 * at.blocks,)](
        *at.tensors,
        *at.parameters,
        out,
        *at.strides,
        *at.parameter_strides,
        at.n1,
        at.n2,
        at.blocks,
        at.channels,
        ROWS=at.rows,
        BLOCK=at.block,
        VECTOR=at.vector,
        num_warps=at.num_warps,
    )
    return out


def gated_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    at = _layout([dout, y], [gate])
    dy = y.new_empty(y.shape)
    length, runs = _runs(at)
    dgate = _partials(at, runs, gate)
    _gate_backward_kernel[(at.n0 * at.n1 * runs,)](
        *at.tensors,
        *at.parameters,
        dy,
        dgate,
        *at.strides,
        *at.parameter_strides,
        at.n1,
        at.n2,
        at.blocks,
        length,
        runs,
        at.channels,
        ROWS=at.rows,
        BLOCK=at.block,
        VECTOR=at.vector,
        num_warps=at.num_warps,
    )
    return dy, _total(dgate, gate)


class _Layout(NamedTuple):
    """Tensors of one shape seen as [n0, n1, n2, C], their parameters, and the blocks of a line.

    C (`channels`) and all strides are in units of `vector` elements: kernels multiply them back, which tells the
    compiler that they are multiples of it, so that it moves 16 bytes at a time.
    """

    tensors: list[Tensor]
    parameters: list[Tensor | None]
    strides: list[int]  # three a tensor
    parameter_strides: list[int]  # one a parameter, of n0
    n0: int
    n1: int
    n2: int
    blocks: int
    channels: int
    rows: int
    block: int
    vector: int
    num_warps: int


def _layout(tensors: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> _Layout:
    """Parameters are all [C], or all [B, C] with one row for each index of the first dimension, which then is n0."""
    tensors = [_dense(t) for t in tensors]
    parameters = [None if p is None else _dense(p) for p in parameters]
    given = [p for p in parameters if p is not None]
    per_sample = given[0].ndim == 2
    parameter_strides = tuple(p.stride(0) if p is not None and per_sample else 0 for p in parameters)
    if len(_merged(tensors[0].shape, tuple(t.stride() for t in tensors), per_sample)[0]) > 3:
        tensors = [t.contiguous() for t in tensors]
    aligned = launch.aligned(*tensors, *given)
    strides = tuple(t.stride() for t in tensors)
    return _Layout(tensors, parameters, *_plan(tensors[0].shape, strides, parameter_strides, per_sample, aligned))


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(
    shape: Sequence[int],
    tensor_strides: tuple[Sequence[int], ...],
    parameter_strides: Sequence[int],
    per_sample: bool,
    aligned: bool,
) -> tuple[Any, ...]:
    """The numbers of a `_Layout`."""
    channels = shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x: expected at most {MAX_CHANNELS} channels on a GPU, got {channels}")
    (n0, n1, n2), strides = _merged(shape, tensor_strides, per_sample)
    vector = 8 if aligned and all(n % 8 == 0 for n in (channels, *strides, *parameter_strides)) else 1
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, BLOCK_ELEMENTS // block)
    return (
        [s // vector for s in strides],
        [s // vector for s in parameter_strides],
        n0,
        n1,
        n2,
        launch.cdiv(n2, rows),
        channels // vector,
        rows,
        block,
        vector,
        min(16, rows * block // 512),
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=4096)
def _merged(
    shape: Sequence[int], tensor_strides: tuple[Sequence[int], ...], keep_first: bool
) -> tuple[list[int], list[int]]:
    """Sizes (three or more) of the leading dimensions, neighbours merged where all tensors allow it and the first kept
    apart if asked; and the strides: those of the first tensor, then those of the second."""
    keep = int(keep_first)
    dims: list[tuple[int, list[int]]] = []
    for index, size in enumerate(shape[:-1]):
        strides = [s[index] for s in tensor_strides]
        if len(dims) > keep and dims[-1][1] == [s * size for s in strides]:
            dims[-1] = (dims[-1][0] * size, strides)
        elif size != 1 or index < keep:
            dims.append((size, strides))
    dims[keep:keep] = [(1, [0] * len(tensor_strides))] * (3 - len(dims))
    return [size for size, _ in dims], [dim[1][t] for t in range(len(tensor_strides)) for dim in dims]


def _runs(at: _Layout) -> tuple[int, int]:
    """Blocks of a backward program's run, and runs of a line."""
    length = max(launch.cdiv(at.n0 * at.n1 * at.blocks, RUNS), launch.cdiv(RUN_ROWS, at.rows))
    return length, launch.cdiv(at.blocks, length)


def _partials(at: _Layout, runs: int, parameter: Tensor) -> Tensor:
    """float32 [samples, programs of a sample, C], or one group of all programs where the parameter is [C]."""
    groups = (at.n0, at.n1 * runs) if parameter.ndim == 2 else (1, at.n0 * at.n1 * runs)
    return parameter.new_empty((*groups, parameter.shape[-1]), dtype=torch.float32)


def _total(partials: Tensor, parameter: Tensor) -> Tensor:
    return launch.sum_partials(partials, parameter.dtype).view(parameter.shape)


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
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    x_s0: tl.int64,
    x_s1: tl.int64,
    x_s2: tl.int64,
    shift_s0: tl.int64,
    scale_s0: tl.int64,
    n1: tl.int32,
    n2: tl.int64,
    blocks: tl.int32,
    channels: tl.int32,
    eps,
    PER_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
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
    normal, _ = _normal(x, inside, channels, eps, shift_ptr is not None)
    out = normal * scale
    if shift_ptr is not None:
        out += _parameter(shift_ptr, i0, shift_s0, column, channels, VECTOR)
    tl.store(out_ptr + _contiguous(line, row, column, n2, channels), out, inside)


@launch.kernel
def _norm_backward_kernel(
    dout_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    dshift_ptr,
    dscale_ptr,
    dout_s0: tl.int64,
    dout_s1: tl.int64,
    dout_s2: tl.int64,
    x_s0: tl.int64,
    x_s1: tl.int64,
    x_s2: tl.int64,
    scale_s0: tl.int64,
    n1: tl.int32,
    n2: tl.int64,
    blocks: tl.int32,
    length: tl.int32,
    runs: tl.int32,
    channels: tl.int32,
    eps,
    PER_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program: one run of blocks. With n the normalised x and g = dout · scale: dx = rstd · (g − n · mean(g · n)),
    less rstd · mean(g) where x is centred; dscale = Σ dout · n; dshift = Σ dout."""
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
        normal, rstd = _normal(x, inside, channels, eps, dshift_ptr is not None)
        normal = tl.where(inside, normal, 0.0)  # rows beyond the last are 0 · infinity where eps is 0
        dscale += dout * normal
        dnormal = dout * scale
        dx = dnormal - normal * (tl.sum(dnormal * normal, 1) / channels)[:, None]
        if dshift_ptr is not None:
            dshift += dout
            dx -= (tl.sum(dnormal, 1) / channels)[:, None]
        tl.store(dx_ptr + _contiguous(line, row, column, n2, channels), dx * rstd, inside)

    partial_at = tl.program_id(0).to(tl.int64) * channels + column
    tl.store(dscale_ptr + partial_at, tl.sum(dscale, 0), column < channels)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + partial_at, tl.sum(dshift, 0), column < channels)


@launch.kernel
def _gate_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    x_s0: tl.int64,
    x_s1: tl.int64,
    x_s2: tl.int64,
    y_s0: tl.int64,
    y_s1: tl.int64,
    y_s2: tl.int64,
    gate_s0: tl.int64,
    n1: tl.int32,
    n2: tl.int64,
    blocks: tl.int32,
    channels: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
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
    dout_ptr,
    y_ptr,
    gate_ptr,
    dy_ptr,
    dgate_ptr,
    dout_s0: tl.int64,
    dout_s1: tl.int64,
    dout_s2: tl.int64,
    y_s0: tl.int64,
    y_s1: tl.int64,
    y_s2: tl.int64,
    gate_s0: tl.int64,
    n1: tl.int32,
    n2: tl.int64,
    blocks: tl.int32,
    length: tl.int32,
    runs: tl.int32,
    channels: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
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
