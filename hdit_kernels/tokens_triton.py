"""Kernels and launchers of `token_merge` and `token_split`.

A fine tensor [B, H·h, W·w, C] of any strides is seen as a matrix of B·H·W rows, its h x w patches, and h·w·C columns; a
plain matrix has patches of 1 x 1. With P the matrix of merge's x, G that of split's gradient, W the weight [out, in]:

    merge: out = P·Wᵀ                   dP = dout·W        dW = doutᵀ·P
    split: Y = X·Wᵀ   D = Y − skip      dX = (fac·G)·W     dW = (fac·G)ᵀ·X
           out = skip + fac·D           dskip = (1 − fac)·G             dfac = Σ G·D

cuBLAS makes the products. `_copy_kernel` brings fine tensors into their matrices and back; `_blend_kernel` does so with
Y and G of a split with a skip. Y, fac·G and D are rounded to x's dtype, as in plain PyTorch. Forward products that gain
by it, copy included, are made by `_product_kernel`, without rounding Y. With gradients forward keeps P and D.

Bytes moved for N elements of the fine tensor and M of the coarse one, b bytes each, beside the weight: forward by
`_product_kernel` (N + M)·b, else (3·N + M)·b, with a skip N·b more, with D kept N·b more; backward (4·N + 2·M)·b, of a
split with a skip 2·N·b more.
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
from hdit_kernels.launch import Launch, Plan

# Sums of fewer terms are made by _product_kernel: what it saves, a copy, is then more than what cuBLAS is faster by.
# µs in one kernel / two on an H200 (docs/measured/h200-2026-12-01-tokens.json): merges of 512 terms 30 / 39, 1024
# 25 / 29 and 37 / 43, 1536 87 / 84 and 32 / 27; splits with a skip of 256 terms 45 / 50, 384 52 / 55, 512 33 / 33, 768
# 105 / 99 and 33 / 31. Pixels, merged, are none of them (45 / 33), nor channels that don't lie side by side (259 / 38).
MERGE_FUSED, SPLIT_FUSED = 1536, 768
SUM_PROGRAMS = 1056  # eight for each multiprocessor: each leaves one number of the sum that is dfac
NO_PATCH = (1, 1)
Patch = tuple[int, ...]  # rows and columns


def token_merge_forward(x: Tensor, weight: Tensor, patch_size: Sequence[int], save: bool) -> list[Tensor]:
    """out, and with `save` P, [B, H, W, h·w·C]."""
    (h, w), weight = patch_size, _weight(weight, x)
    grid = (x.shape[0], x.shape[1] // h, x.shape[2] // w)
    out = x.new_empty((*grid, weight.shape[0]))
    if not save and weight.shape[1] < MERGE_FUSED:
        fused = _product(x, (h, w), weight, out, NO_PATCH)
        if fused is not None:
            launch.run(fused)
            return [out]
    patches = x.new_empty((*grid, weight.shape[1]))
    launch.run(_copy(x, (h, w), patches))
    _multiply(_rows(patches), weight.t(), _rows(out))
    return [out, patches] if save else [out]


def token_merge_backward(
    dout: Tensor, patches: Tensor, weight: Tensor, patch_size: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    h, w = patch_size
    dx, dweight = None, None
    if needed[0]:
        batch, height, width, columns = patches.shape
        dx = patches.new_empty((batch, height * h, width * w, columns // (h * w)))
        dpatches = _multiply(_rows(dout), _weight(weight, dout), _rows(launch.empty_like(patches)))
        launch.run(_copy(dx, (h, w), dpatches, scatter=True))
    if needed[1]:
        dweight = _multiply(_rows(dout).t(), _rows(patches), launch.empty_like(weight))
    return _tensors(dout, dx, dweight)


def token_split_forward(
    x: Tensor, weight: Tensor, patch_size: Sequence[int], skip: Tensor | None, fac: Tensor | None, save: bool
) -> list[Tensor]:
    """out, and with `save` and a skip D, [B, H, W, h·w·C]."""
    (h, w), weight = patch_size, _weight(weight, x)
    columns, terms = weight.shape
    out = x.new_empty((x.shape[0], x.shape[1] * h, x.shape[2] * w, columns // (h * w)))
    way = "plain" if skip is None else "keep" if save else "blend"
    kept = x.new_empty((*x.shape[:3], columns)) if way == "keep" else None
    fused = _product(x, NO_PATCH, weight, out, (h, w), way, skip, fac, kept) if terms < SPLIT_FUSED else None
    if fused is not None:
        launch.run(fused)
    else:
        y = x.new_empty((*x.shape[:3], columns)) if kept is None else kept
        _multiply(_rows(x), weight.t(), _rows(y))
        if skip is None or fac is None:
            launch.run(_copy(out, (h, w), y, scatter=True))
        else:
            launch.run(_blend(way, out, (h, w), y, skip, fac))
    return [out] if kept is None else [out, kept]


def token_split_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    patch_size: Sequence[int],
    difference: Tensor | None,
    fac: Tensor | None,
    skip_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    patch = tuple(patch_size)
    dx, dweight, dskip, dfac = None, None, None, None
    gradient = x.new_empty((*x.shape[:3], weight.shape[0]))
    if difference is None or fac is None:
        launch.run(_copy(dout, patch, gradient))
    else:
        dskip = dout.new_empty(dout.shape, dtype=skip_dtype)
        sums = dout.new_empty((1, SUM_PROGRAMS, 1), dtype=torch.float32)
        dfac, summing = launch.sum_launch(sums, fac)
        launch.run(_blend("backward", dout, patch, gradient, dskip, fac, difference, sums), summing)
    if needed[0]:
        dx = launch.empty_like(x)
        _multiply(_rows(gradient), _weight(weight, x), _rows(dx))
    if needed[1]:
        dweight = _multiply(_rows(gradient).t(), _rows(x), launch.empty_like(weight))
    return _tensors(dout, dx, dweight, dskip if needed[2] else None, dfac if needed[3] else None)


def _tensors(dout: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients, empty where not needed: an operator returns tensors, each its own."""
    return tuple([dout.new_empty(0) if gradient is None else gradient for gradient in gradients])


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """As products with x take it: in its dtype, contiguous."""
    if weight.dtype == x.dtype and weight.is_contiguous():
        return weight.detach()
    rounded = x.new_empty(weight.shape)
    launch.run(_copy(weight[None, None], NO_PATCH, rounded))
    return rounded


def _rows(tensor: Tensor) -> Tensor:
    """[B, H, W, C] as a plain matrix, copied only if its strides don't allow it."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a·b, by cuBLAS, rounded once. Given `out` torch.mm takes no notice of autocast."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.dtype == torch.float32 and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    # elsewhere results have the factors' dtype
    return out.copy_(torch.mm(a.float(), b.float(), out=out.new_empty(out.shape, dtype=torch.float32)))


class Layout(NamedTuple):
    """A tensor [B, H·h, W·w, C] as a matrix of its patches, each of `positions` runs of elements that lie side by side.

    strides: of batches, rows and columns of patches, rows and columns of positions in a patch, and elements.
    """

    strides: Sequence[int]
    across: int  # positions in a row of a patch
    positions: int
    run: int
    grid: tuple[int, int, int]  # batches, rows and columns of patches
    aligned: int  # as many elements as all strides but the last and the run are multiples of: 8, 4 or 1

    @property
    def short(self) -> bool:
        """Whether a block of 16 elements holds a run."""
        return self.run <= 16

    def in_units(self, vector: int) -> tuple[int, ...]:
        """Strides but the last, and the run, are in units of a vector."""
        *outer, s_c = self.strides
        return (*[stride // vector for stride in outer], s_c, self.across, self.positions, self.run // vector)


def _layouts(patch: Patch, *tensors: Tensor) -> list[Layout]:
    """Of tensors of one shape, with the same runs."""
    given = [(tensor.shape, tensor.stride(), launch.aligned(tensor)) for tensor in tensors]
    merged = all([stride[2] == shape[3] * stride[3] or patch[1] == 1 for shape, stride, _ in given])
    return [_layout(*each, patch, merged) for each in given]


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _layout(shape: Sequence[int], stride: Sequence[int], aligned: bool, patch: Patch, merged: bool) -> Layout:
    """merged: a row of a patch is one run."""
    (batch, height, width, run), (h, w) = shape, patch
    # 0 for a dimension of size 1, whose own stride, if odd, would keep loads narrow for nothing
    s_b, s_y, s_x, s_c = [0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]
    grid, across = (batch, height // h, width // w), w
    if merged:
        s_c = s_x if run == 1 else s_c
        run, across = run * w, 1
    strides = (s_b, s_y * h, s_x * w, s_y, 0 if merged else s_x, s_c)
    return Layout(strides, across, h * across, run, grid, _aligned(aligned and s_c == 1, *strides[:-1], run))


def _aligned(whole: bool, *strides: int) -> int:
    """The most elements, 8, 4 or 1, of which all strides are multiples; 1 where not `whole`."""
    return next((size for size in (8, 4) if whole and all(stride % size == 0 for stride in strides)), 1)


def _vector(*layouts: Layout) -> int:
    """Elements that a thread loads at once: of short runs, 12 values of 4 pixels, 4, else 8; or 1. Each is a binary."""
    most = 4 if layouts[0].short else 8
    return most if min([layout.aligned for layout in layouts]) >= most else 1


def _copy(fine: Tensor, patch: Patch, matrix: Tensor, scatter: bool = False) -> Launch:
    """Fills matrix; or fine, where scatter."""
    grid, numbers, constants = _copy_plan(0, *_layouts(patch, fine))
    return Launch(_copy_kernel, grid, (fine, matrix), numbers, constants | {"SCATTER": scatter})


def _blend(
    way: str,
    fine: Tensor,
    patch: Patch,
    matrix: Tensor,
    other: Tensor,
    fac: Tensor,
    kept: Tensor | None = None,
    sums: Tensor | None = None,
) -> Launch:
    """Of _blend_kernel, which tells the ways."""
    grid, numbers, constants = _copy_plan(0 if sums is None else sums.numel(), *_layouts(patch, fine, other))
    tensors = [fac if tensor is None else tensor for tensor in (fine, matrix, other, fac, kept, sums)]
    return Launch(_blend_kernel, grid, tensors, numbers, constants | {"WAY": way})


@functools.lru_cache(maxsize=4096)
def _copy_plan(programs: int, *layouts: Layout) -> Plan:
    """programs: that walk over all tiles; 0 for one a tile."""
    fine = layouts[0]
    # 4096 elements of patches beside each other, 2048 of each tensor of a blend; with 4 warps four 16-byte loads of
    # bfloat16 a thread, where runs are long. Runs of 3 are pixels, channels first, whose elements are loaded singly.
    patches, positions, block = (16, 1, 256) if not fine.short else (64, 4, 16) if fine.run > 4 else (16, 16, 4)
    patches //= len(layouts)
    vector = 1 if block == 4 else _vector(*layouts)
    batch, height, width = fine.grid
    tiles = batch * height * launch.cdiv(width, patches)
    tiles *= launch.cdiv(fine.positions, positions) * launch.cdiv(fine.run, block)
    numbers = [height, width, *fine.in_units(vector)]
    if len(layouts) == 2:
        numbers = [tiles, programs or tiles, *numbers, *layouts[1].in_units(vector)[:6]]
    constants = {"VECTOR": vector, "PATCHES": patches, "POSITIONS": positions, "BLOCK": block, "num_warps": 4}
    return (programs or tiles, 1, 1), numbers, constants


class Tile(NamedTuple):
    """A program computes rows x columns of a product, `depth` at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile_for(family: str, short: bool) -> Tile:
    """short: runs of the output. The default stays within the 64 KB of shared memory of AMD GPUs."""
    if short or family != "hopper":
        return Tile(128, 64, 32, 4, 3)
    return Tile(128, 128, 64, 8, 3)


def _product(
    x: Tensor,
    x_patch: Patch,
    weight: Tensor,
    out: Tensor,
    patch: Patch,
    way: str = "plain",
    skip: Tensor | None = None,
    fac: Tensor | None = None,
    kept: Tensor | None = None,
) -> Launch | None:
    """Of _product_kernel, which tells the ways; None where x is float32, or not of whole steps and 16-byte words."""
    layouts = *_layouts(x_patch, x), *_layouts(patch, *[out] if skip is None else [out, skip])
    tile = tile_for(launch.gpu_family(x.device), layouts[1].short)
    whole = layouts[0].aligned == 8 and layouts[0].run % tile.depth == 0 and launch.aligned(weight)
    if x.dtype == torch.float32 or not whole:
        return None
    plan = _product_plan(tile, way, *layouts)
    tensors = [weight if tensor is None else tensor for tensor in (x, weight, skip, fac, out, kept)]
    return Launch(_product_kernel, plan[0], tensors, *plan[1:])


@functools.lru_cache(maxsize=4096)
def _product_plan(tile: Tile, way: str, *layouts: Layout) -> Plan:
    """layouts: of x, out, and the skip."""
    x, out, skip = *layouts[:2], layouts[-1]
    vector, padded = _vector(*layouts[1:]), min(16, tile.columns) if out.short else tile.columns
    blocks = launch.cdiv(out.run, padded) * launch.cdiv(out.positions, tile.columns // padded)
    batch, height, width = x.grid
    rows = batch * height * width
    numbers = (rows, height, width, *x.in_units(8), *out.in_units(vector), *skip.in_units(vector)[:6])
    constants = {
        "WAY": way, "VECTOR": vector, "PADDED": padded,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    if way == "keep" and tile.num_warps == 8:
        constants["maxnreg"] = 128  # else 162, and one program a multiprocessor in place of two
    return (launch.cdiv(rows, tile.rows) * blocks, 1, 1), numbers, constants


# What kernels are handed of a Layout: its strides s0 to s5, across, positions and run; and the rows and columns of
# patches, height and width. Strides but the last, and runs, are in units of VECTOR, which divides them.


@triton.jit
def _row_offset(row, height, width, strides, VECTOR: tl.constexpr):
    """Where a patch starts."""
    return launch.row_offset(row, height, width, strides[0], strides[1], strides[2], VECTOR)


@triton.jit
def _column_offset(position, within, across, strides, VECTOR: tl.constexpr):
    """Where an element of a position of the patch lies after the patch's start, int64."""
    start = ((position // across).to(tl.int64) * strides[3] + (position % across).to(tl.int64) * strides[4]) * VECTOR
    if VECTOR == 1:
        return start + within.to(tl.int64) * strides[5]
    else:
        return start + within


@triton.jit
def _tile(
    tile, height, width, positions, run, PATCHES: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of neighbours in a row of patches: batch and row, scalars; column, position and element of it; whether they
    exist; where they lie in the matrix, int64.
    """
    blocks, position_blocks, column_blocks = tl.cdiv(run, BLOCK), tl.cdiv(positions, POSITIONS), tl.cdiv(width, PATCHES)
    within = (tile % blocks * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    position = (tile // blocks % position_blocks * POSITIONS + tl.arange(0, POSITIONS))[None, :, None]
    tile = tile // (blocks * position_blocks)
    column = (tile % column_blocks * PATCHES + tl.arange(0, PATCHES))[:, None, None]
    row = tile // column_blocks
    inside = (column < width) & (position < positions) & (within < run)
    at = (row.to(tl.int64) * width + column) * (positions * run) + position * run + within
    return row // height, row % height, column, position, within, inside, at


@triton.jit
def _offset(batch, row, column, position, within, across, strides, VECTOR: tl.constexpr):
    """Where an element of a position of a patch lies, int64."""
    start = batch.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    return start * VECTOR + _column_offset(position, within, across, strides, VECTOR)


@launch.kernel
def _copy_kernel(
    fine_ptr, matrix_ptr, height: tl.int32, width: tl.int32,
    s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64,
    across: tl.int32, positions: tl.int32, run: tl.int32,
    VECTOR: tl.constexpr, PATCHES: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """A tile of matrix = fine, or of fine = matrix where SCATTER, of PATCHES x POSITIONS x BLOCK elements."""
    batch, row, column, position, within, inside, at = _tile(
        tl.program_id(0), height, width, positions, run * VECTOR, PATCHES, POSITIONS, BLOCK
    )
    fine_at = fine_ptr + _offset(batch, row, column, position, within, across, (s0, s1, s2, s3, s4, s5), VECTOR)
    if SCATTER:
        tl.store(fine_at, tl.load(matrix_ptr + at, inside), inside)
    else:
        tl.store(matrix_ptr + at, tl.load(fine_at, inside), inside)


@launch.kernel
def _blend_kernel(
    fine_ptr, matrix_ptr, other_ptr, fac_ptr, kept_ptr, sums_ptr,
    tiles: tl.int32, programs: tl.int32, height: tl.int32, width: tl.int32,
    s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64,
    across: tl.int32, positions: tl.int32, run: tl.int32,
    other_s0: tl.int64, other_s1: tl.int64, other_s2: tl.int64, other_s3: tl.int64, other_s4: tl.int64,
    other_s5: tl.int64,
    VECTOR: tl.constexpr, PATCHES: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile. WAY "blend": fine = other + fac · (matrix − other), with the skip as other; "keep":
    matrix −= other, too. "backward", with fine a gradient: matrix = fac · fine, other = (1 − fac) · fine, and this
    program's part of Σ fine · kept.
    """
    strides, other_strides = (s0, s1, s2, s3, s4, s5), (other_s0, other_s1, other_s2, other_s3, other_s4, other_s5)
    fac = tl.load(fac_ptr).to(tl.float32)
    total = tl.zeros([PATCHES, POSITIONS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        batch, row, column, position, within, inside, at = _tile(
            tile, height, width, positions, run * VECTOR, PATCHES, POSITIONS, BLOCK
        )
        fine_at = fine_ptr + _offset(batch, row, column, position, within, across, strides, VECTOR)
        other_at = other_ptr + _offset(batch, row, column, position, within, across, other_strides, VECTOR)
        if WAY == "backward":
            gradient = tl.load(fine_at, inside, other=0.0).to(tl.float32)
            total += gradient * tl.load(kept_ptr + at, inside, other=0.0).to(tl.float32)
            tl.store(matrix_ptr + at, fac * gradient, inside)
            tl.store(other_at, (1 - fac) * gradient, inside)
        else:
            skip = tl.load(other_at, inside).to(tl.float32)
            difference = tl.load(matrix_ptr + at, inside).to(tl.float32) - skip
            tl.store(fine_at, skip + fac * difference, inside)
            if WAY == "keep":
                tl.store(matrix_ptr + at, difference, inside)
    if WAY == "backward":
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(tl.sum(total, 2), 1), 0))


@triton.jit
def _columns(block, positions, run, SIZE: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT columns of the block-th SIZE ones: position and element of it, number in the matrix, whether they exist.

    A block has SIZE / PADDED positions, or PADDED = SIZE elements of one, a scalar.
    """
    blocks = tl.cdiv(run, PADDED)
    position = block // blocks * (SIZE // PADDED)
    lane = FIRST + tl.arange(0, COUNT)
    if PADDED < SIZE:
        position += lane // PADDED
        lane = lane % PADDED
    within = block % blocks * PADDED + lane
    return position, within, position * run + within, (within < run) & (position < positions)


@triton.jit
def _store(
    y, row, rows, height, width, block, out_ptr, strides, across, positions, run, skip_ptr, skip_strides, fac_ptr,
    kept_ptr, WAY: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Stores half of a tile, the columns from FIRST."""
    position, within, column, exists = _columns(block, positions, run, COLUMNS, PADDED, FIRST, COLUMNS // 2)
    inside = (row < rows)[:, None] & exists[None, :]
    if WAY != "plain":
        skip_row = _row_offset(row, height, width, skip_strides, VECTOR)
        skip_column = _column_offset(position, within, across, skip_strides, VECTOR)
        skip = tl.load(skip_ptr + skip_row[:, None] + skip_column[None, :], inside, other=0.0).to(tl.float32)
        difference = y - skip
        if WAY == "keep":
            at = row.to(tl.int64)[:, None] * (positions * run) + column[None, :]
            tl.store(kept_ptr + at, difference, inside)
        y = skip + tl.load(fac_ptr).to(tl.float32) * difference
    out_row = _row_offset(row, height, width, strides, VECTOR)
    out_column = _column_offset(position, within, across, strides, VECTOR)
    tl.store(out_ptr + out_row[:, None] + out_column[None, :], y, inside)


@launch.kernel
def _product_kernel(
    x_ptr, weight_ptr, skip_ptr, fac_ptr, out_ptr, kept_ptr,
    rows: tl.int32, height: tl.int32, width: tl.int32,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, x_s3: tl.int64, x_s4: tl.int64, x_s5: tl.int64,
    x_across: tl.int32, x_positions: tl.int32, x_run: tl.int32,
    s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64,
    across: tl.int32, positions: tl.int32, run: tl.int32,
    skip_s0: tl.int64, skip_s1: tl.int64, skip_s2: tl.int64, skip_s3: tl.int64, skip_s4: tl.int64, skip_s5: tl.int64,
    WAY: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of out, of y = x · weightᵀ. WAY "plain": out = y; "blend": out = skip + fac · (y − skip); "keep":
    kept = y − skip, too.

    x's strides and runs are in units of 8 elements, its runs multiples of DEPTH.
    """
    x_strides, strides = (x_s0, x_s1, x_s2, x_s3, x_s4, x_s5), (s0, s1, s2, s3, s4, s5)
    skip_strides = (skip_s0, skip_s1, skip_s2, skip_s3, skip_s4, skip_s5)
    x_run *= 8
    run *= VECTOR
    blocks = tl.cdiv(run, PADDED) * tl.cdiv(positions, COLUMNS // PADDED)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    _, _, column, exists = _columns(block, positions, run, COLUMNS, PADDED, 0, COLUMNS)
    # rows and columns beyond the last are computed of the last's values, or the first's, and not stored
    x_at = x_ptr + _row_offset(tl.minimum(row, rows - 1), height, width, x_strides, 8)[:, None]
    weight_at = weight_ptr + (tl.where(exists, column, 0).to(tl.int64) * (x_positions * x_run))[None, :]
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_blocks = x_run // DEPTH
    for step in range(x_blocks * x_positions):
        position, within = step // x_blocks, step % x_blocks * DEPTH + tl.arange(0, DEPTH)
        x = tl.load(x_at + _column_offset(position, within, x_across, x_strides, 8)[None, :])
        weight = tl.load(weight_at + (position * x_run + within)[:, None])
        y = tl.dot(x, weight, y)
    # in two halves: with a skip that saves registers, so that two programs fit a multiprocessor
    first, second = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    _store(
        first, row, rows, height, width, block, out_ptr, strides, across, positions, run, skip_ptr, skip_strides,
        fac_ptr, kept_ptr, WAY, VECTOR, PADDED, COLUMNS, 0,
    )  # fmt: skip
    _store(
        second, row, rows, height, width, block, out_ptr, strides, across, positions, run, skip_ptr, skip_strides,
        fac_ptr, kept_ptr, WAY, VECTOR, PADDED, COLUMNS, COLUMNS // 2,
    )  # fmt: skip
