"""Kernels and launchers of `geglu`.

Bound by memory: one pass each way. For N rows of elements of b bytes the forward reads both halves of x and writes one,
3·N·d_ff·b bytes; the backward reads dout and both halves of x and writes both halves of dx, 5·N·d_ff·b bytes.

A program handles a tile of ROWS x BLOCK elements of the output; the tiles of one row are neighbours in the grid.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.launch import Launch, Plan

TILE = 4096  # elements; with 4 warps 32 a thread: four 16-byte loads of bfloat16 from each half


def geglu_forward(x: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    launch.run(_launch(_geglu_forward_kernel, (x,), out))
    return out


def geglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = launch.empty_like(x)
    launch.run(_launch(_geglu_backward_kernel, (dout, x), dx))
    return dx


def _launch(function: Any, given: tuple[Tensor, ...], result: Tensor) -> Launch:
    """The last of what is given is x."""
    strides = tuple([tensor.stride() for tensor in given])
    if not launch.readable(strides):
        given = tuple([launch.rows(tensor)[0] for tensor in given])
        strides = tuple([tensor.stride() for tensor in given])
    grid, integers, constants = _plan(given[-1].shape, strides, launch.aligned(*given))
    return Launch(function, grid, (*given, result), integers, constants)


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(shape: Sequence[int], tensor_strides: tuple[Sequence[int], ...], aligned: bool) -> Plan:
    """shape: x's. Strides are of what is read, each tensor's merged by themselves, and in units of VECTOR elements.

    Widths of 128 · n, the usual ones, fill their tiles; narrow ones waste at most 3/4.
    """
    rows, d_ff = math.prod(shape[:-1]), shape[-1] // 2
    merged = [launch.merged(shape, (stride,)) for stride in tensor_strides]
    vector = launch.vector_width(aligned, d_ff, *[step for _, strides in merged for step in strides])
    layouts = [(*sizes[1:], *[step // vector for step in strides]) for sizes, strides in merged]
    block = 128 if d_ff > 32 else 32
    constants = {"ROWS": TILE // block, "BLOCK": block, "VECTOR": vector, "num_warps": 4}
    grid = (launch.cdiv(rows, TILE // block) * launch.cdiv(d_ff, block), 1, 1)
    return grid, (rows, d_ff // vector, *itertools.chain(*layouts)), constants


@triton.jit
def _tile(rows, d_ff, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row indices [ROWS], columns [BLOCK] and which of their elements exist [ROWS, BLOCK]."""
    blocks = tl.cdiv(d_ff, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < rows)[:, None] & (column < d_ff)[None, :]


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@launch.kernel
def _geglu_forward_kernel(
    x_ptr, out_ptr, rows: tl.int32, d_ff: tl.int32,
    n1: tl.int32, n2: tl.int32, s0: tl.int64, s1: tl.int64, s2: tl.int64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """x -> out = a · gelu(g)."""
    d_ff = d_ff * VECTOR
    row, column, inside = _tile(rows, d_ff, ROWS, BLOCK)
    at = launch.row_offset(row, n1, n2, s0, s1, s2, VECTOR)[:, None] + column[None, :]
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    out = a * (g * normal_cdf(g))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * d_ff + column[None, :], out, inside)


@launch.kernel
def _geglu_backward_kernel(
    dout_ptr, x_ptr, dx_ptr, rows: tl.int32, d_ff: tl.int32,
    dout_n1: tl.int32, dout_n2: tl.int32, dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64,
    n1: tl.int32, n2: tl.int32, s0: tl.int64, s1: tl.int64, s2: tl.int64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dout, x -> dx: da = dout · gelu(g), dg = dout · a · (cdf(g) + g · density(g)) of the normal distribution."""
    d_ff = d_ff * VECTOR
    row, column, inside = _tile(rows, d_ff, ROWS, BLOCK)
    dout_at = launch.row_offset(row, dout_n1, dout_n2, dout_s0, dout_s1, dout_s2, VECTOR)[:, None] + column[None, :]
    at = launch.row_offset(row, n1, n2, s0, s1, s2, VECTOR)[:, None] + column[None, :]
    dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    cdf = normal_cdf(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    dx_at = row.to(tl.int64)[:, None] * (2 * d_ff) + column[None, :]
    tl.store(dx_ptr + dx_at, dout * (g * cdf), inside)
    tl.store(dx_ptr + dx_at + d_ff, dout * a * (cdf + g * density), inside)
