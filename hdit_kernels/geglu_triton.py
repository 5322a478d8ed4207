"""Kernels and launchers of `geglu`.

Bound by memory: one pass each way. For N rows of elements of b bytes the forward reads both halves of x and writes one,
3·N·d_ff·b bytes; the backward reads dout and both halves of x and writes both halves of dx, 5·N·d_ff·b bytes. On an
H200 that leaves about 40 instructions an element forward and 70 backward in bfloat16, so that they count, too.

The leading dimensions are seen as [n0, n1, n2]. A line is the n2 rows of one (i0, i1). A program handles a tile of
ROWS x BLOCK elements of the output, in one line; the tiles of one row are neighbours in the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.launch import Launch, Plan

TILE = 2048  # elements; with 4 warps 16 a thread: two 16-byte loads of bfloat16 from each half


def geglu_forward(x: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    launch.run(_launch(_geglu_forward_kernel, (x,), out))
    return out


def geglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = launch.empty_like(x)
    launch.run(_launch(_geglu_backward_kernel, (dout, x), dx))
    return dx


def geglu_in_place(dout: Tensor, x: Tensor) -> None:
    """dout [N, d_ff] becomes the output and x [N, 2·d_ff] its gradient, both contiguous: for who has kept neither."""
    grid, integers, constants = _plan(x.shape, (dout.stride(), x.stride()), launch.aligned(dout, x))
    launch.run(Launch(_geglu_in_place_kernel, grid, (dout, x), integers, constants))


def _launch(function: Any, given: tuple[Tensor, ...], result: Tensor) -> Launch:
    """The last of what is given is x."""
    strides = tuple([tensor.stride() for tensor in given])
    if not launch.readable(strides):
        given = tuple(launch.rows(*given))
        strides = tuple([tensor.stride() for tensor in given])
    grid, integers, constants = _plan(given[-1].shape, strides, launch.aligned(*given))
    return Launch(function, grid, (*given, result), integers, constants)


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(shape: Sequence[int], tensor_strides: tuple[Sequence[int], ...], aligned: bool) -> Plan:
    """shape: x's. d_ff and strides are in units of VECTOR elements.

    Widths of 128 · n, the usual ones, fill their tiles; narrow ones waste at most 3/4.
    """
    d_ff = shape[-1] // 2
    (n0, n1, n2), strides = launch.merged(shape, tensor_strides)
    vector = launch.vector_width(aligned, d_ff, *strides)
    block = 128 if d_ff > 32 else 32
    blocks = launch.cdiv(n2, TILE // block)  # of a line
    constants = {"ROWS": TILE // block, "BLOCK": block, "VECTOR": vector, "num_warps": 4}
    grid = (n0 * n1 * blocks * launch.cdiv(d_ff, block), 1, 1)
    return grid, (*[step // vector for step in strides], n1, n2, blocks, d_ff // vector), constants


@triton.jit
def _tile(n1, n2, blocks, d_ff, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's i0, i1 and line, row indices [ROWS], columns [BLOCK] and which elements exist [ROWS, BLOCK]."""
    across = tl.cdiv(d_ff, BLOCK)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    line, block = tile // blocks, tile % blocks
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    return line // n1, line % n1, line, row, column, (row < n2)[:, None] & (column < d_ff)[None, :]


@triton.jit
def _normal(x):
    """The normal distribution's cdf and density, without its factor 1 / √(2π), at x in float32.

    cdf(−|x|) / exp(−x² / 2) is t · a polynomial in t = 1 / (1 + 0.26 · |x|): the form of Abramowitz and Stegun 26.2.17,
    with two terms more and coefficients of our own. They are a fit in float64 over |x| < 9 by reweighted least squares
    (Lawson) with the smallest largest relative error, which may grow with |x| beyond 1.5. In float32 the cdf's relative
    error is 8e-7 down to −3, 2.2e-6 to −6 and 5.2e-6 to −9, most of it from exp2's argument. 0.5 + 0.5 · erf cancels in
    the tail, and takes twice as many instructions, which took longer than the memory.
    """
    t = 1.0 + 0.26 * tl.abs(x)
    t = tl.rsqrt(t * t)  # a division takes eight instructions
    bell = tl.exp2(x * x * -0.7213475204444817)  # log2(e) / 2
    p = -0.0747159793972969 * t + 0.23547835648059845
    p = p * t - 0.1161050945520401
    p = p * t + 0.17373156547546387
    p = p * t + 0.07036392390727997
    p = p * t + 0.1077776849269867
    p = p * t + 0.1034694314002990
    tail = p * t * bell
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@launch.kernel
def _geglu_forward_kernel(
    x_ptr, out_ptr, s0: tl.int64, s1: tl.int64, s2: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, d_ff: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """x -> out = a · gelu(g)."""
    d_ff = d_ff * VECTOR
    i0, i1, line, row, column, inside = _tile(n1, n2, blocks, d_ff, ROWS, BLOCK)
    at = launch.strided(i0, i1, row, column, s0, s1, s2, VECTOR)
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    cdf, _ = _normal(g)
    tl.store(out_ptr + launch.contiguous(line, row, column, n2, d_ff), a * (g * cdf), inside)


@launch.kernel
def _geglu_backward_kernel(
    dout_ptr, x_ptr, dx_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, d_ff: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dout, x -> dx: da = dout · gelu(g), dg = dout · a · (cdf(g) + g · density(g)) of the normal distribution."""
    d_ff = d_ff * VECTOR
    i0, i1, line, row, column, inside = _tile(n1, n2, blocks, d_ff, ROWS, BLOCK)
    at = launch.strided(i0, i1, row, column, s0, s1, s2, VECTOR)
    dout_at = launch.strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
    dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    cdf, bell = _normal(g)
    dx_at = launch.contiguous(line, row, column, n2, 2 * d_ff)
    tl.store(dx_ptr + dx_at, dout * (g * cdf), inside)
    tl.store(dx_ptr + dx_at + d_ff, dout * a * (cdf + g * bell * 0.3989422804014327), inside)


@launch.kernel
def _geglu_in_place_kernel(
    dout_ptr, x_ptr,
    dout_s0: tl.int64, dout_s1: tl.int64, dout_s2: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64,
    n1: tl.int32, n2: tl.int64, blocks: tl.int32, d_ff: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dout, x -> out, dx in their places, as the two kernels above."""
    d_ff = d_ff * VECTOR
    i0, i1, line, row, column, inside = _tile(n1, n2, blocks, d_ff, ROWS, BLOCK)
    at = launch.strided(i0, i1, row, column, s0, s1, s2, VECTOR)
    dout_at = launch.strided(i0, i1, row, column, dout_s0, dout_s1, dout_s2, VECTOR)
    dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    cdf, bell = _normal(g)
    gelu = g * cdf
    tl.store(dout_ptr + dout_at, a * gelu, inside)
    tl.store(x_ptr + at, dout * gelu, inside)
    tl.store(x_ptr + at + d_ff, dout * a * (cdf + g * bell * 0.3989422804014327), inside)
