"""Kernels and launchers of `geglu`.

Bound by memory: one pass each way. For N rows of elements of b bytes the forward reads both halves of x and writes one,
3·N·d_ff·b bytes; the backward reads dout and both halves of x and writes both halves of dx, 5·N·d_ff·b bytes.

A program handles a tile of ROWS x BLOCK elements of the output; the tiles of one row are neighbours in the grid.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch

TILE = 4096  # elements; with 4 warps 32 a thread: four 16-byte loads of bfloat16 from each half


def geglu_forward(x: Tensor) -> Tensor:
    d_ff = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], d_ff))
    if out.numel() == 0:
        return out
    source = launch.rows(x)
    vector = launch.vector_width(source.tensor, d_ff, *_strides(source))
    rows, block, grid = _tiles(out.numel() // d_ff, d_ff)
    _geglu_forward_kernel[grid](
        source.tensor,
        out,
        out.numel() // d_ff,
        d_ff // vector,
        source.n1,
        source.n2,
        *(s // vector for s in _strides(source)),
        ROWS=rows,
        BLOCK=block,
        VECTOR=vector,
        num_warps=4,
    )
    return out


def geglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    d_ff = x.shape[-1] // 2
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx
    gradient, source = launch.rows(dout), launch.rows(x)
    vector = min(
        launch.vector_width(source.tensor, d_ff, *_strides(source)),
        launch.vector_width(gradient.tensor, *_strides(gradient)),
    )
    rows, block, grid = _tiles(dout.numel() // d_ff, d_ff)
    _geglu_backward_kernel[grid](
        gradient.tensor,
        source.tensor,
        dx,
        dout.numel() // d_ff,
        d_ff // vector,
        gradient.n1,
        gradient.n2,
        *(s // vector for s in _strides(gradient)),
        source.n1,
        source.n2,
        *(s // vector for s in _strides(source)),
        ROWS=rows,
        BLOCK=block,
        VECTOR=vector,
        num_warps=4,
    )
    return dx


def _strides(rows: launch.Rows) -> tuple[int, int, int]:
    """In elements."""
    return rows.s0 * rows.vector, rows.s1 * rows.vector, rows.s2 * rows.vector


def _tiles(rows: int, d_ff: int) -> tuple[int, int, tuple[int]]:
    """ROWS, BLOCK and the grid. Widths of 128 · n, the usual ones, fill their tiles; narrow ones waste at most 3/4."""
    block = 128 if d_ff > 32 else 32
    return TILE // block, block, (launch.cdiv(rows, TILE // block) * launch.cdiv(d_ff, block),)


@triton.jit
def _tile(rows, d_ff, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row indices [ROWS], columns [BLOCK] and which of their elements exist [ROWS, BLOCK]."""
    blocks = tl.cdiv(d_ff, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < rows)[:, None] & (column < d_ff)[None, :]


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@launch.kernel
def _geglu_forward_kernel(
    x_ptr,
    out_ptr,
    rows: tl.int32,
    d_ff: tl.int32,
    n1: tl.int32,
    n2: tl.int32,
    s0: tl.int64,
    s1: tl.int64,
    s2: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """x -> out = a · gelu(g)."""
    d_ff = d_ff * VECTOR
    row, column, inside = _tile(rows, d_ff, ROWS, BLOCK)
    at = launch.row_offset(row, n1, n2, s0, s1, s2, VECTOR)[:, None] + column[None, :]
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    out = a * (g * _normal_cdf(g))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * d_ff + column[None, :], out, inside)


@launch.kernel
def _geglu_backward_kernel(
    dout_ptr,
    x_ptr,
    dx_ptr,
    rows: tl.int32,
    d_ff: tl.int32,
    dout_n1: tl.int32,
    dout_n2: tl.int32,
    dout_s0: tl.int64,
    dout_s1: tl.int64,
    dout_s2: tl.int64,
    n1: tl.int32,
    n2: tl.int32,
    s0: tl.int64,
    s1: tl.int64,
    s2: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dout, x -> dx: da = dout · gelu(g), dg = dout · a · (cdf(g) + g · density(g)) of the normal distribution."""
    d_ff = d_ff * VECTOR
    row, column, inside = _tile(rows, d_ff, ROWS, BLOCK)
    dout_at = launch.row_offset(row, dout_n1, dout_n2, dout_s0, dout_s1, dout_s2, VECTOR)[:, None] + column[None, :]
    at = launch.row_offset(row, n1, n2, s0, s1, s2, VECTOR)[:, None] + column[None, :]
    dout = tl.load(dout_ptr + dout_at, inside, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + d_ff, inside, other=0.0).to(tl.float32)
    cdf = _normal_cdf(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    dx_at = row.to(tl.int64)[:, None] * (2 * d_ff) + column[None, :]
    tl.store(dx_ptr + dx_at, dout * (g * cdf), inside)
    tl.store(dx_ptr + dx_at + d_ff, dout * a * (cdf + g * density), inside)
