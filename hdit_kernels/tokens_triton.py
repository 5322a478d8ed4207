"""Kernels and launchers of `token_merge` and `token_split`.

A tensor [B, H·h, W·w, C] of any strides is seen as a matrix of B·H·W rows, its h x w patches, and h·w·C columns. A
plain matrix is the case of 1 x 1 patches. With G the matrix of a gradient, X of an input and W the weight [out, in]:

    merge: out = X·Wᵀ            dX = G·W            dW = Gᵀ·X
    split: Y = X·Wᵀ, shuffled    dX = G·(fac·W)      dW = fac·(Gᵀ·X)      dskip = (1 − fac)·G
           out = skip + fac·(Y − skip)               dfac = Σ G·(Y − skip) = Σ W·(Gᵀ·X) − Σ G·skip

so that Y is neither stored nor computed again. A product is made in one of two ways:

- by `_product_kernel`, whose loads and stores have the pixel-unshuffle and -shuffle in their offsets; no copy;
- by cuBLAS, of a matrix that `_copy_kernel` has written, or writes back: twice its bytes more.

Weight gradients, and dX of a split, which shares its copy of G, go the second way: cuBLAS gains more than a copy takes.
The others go the first, but for the widest (`by_cublas`).

Bytes moved for N elements of the fine tensor and M of the coarse one, b bytes each, beside the weight: forward
(N + M)·b, with a skip N·b more; backward of a merge (4·N + 2·M)·b, of a split (4·N + 2·M)·b, with a skip 2·N·b more.
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

NO_PATCH = (1, 1)
Patch = tuple[int, ...]  # rows and columns
COPY_TILE = 4096  # elements; with 4 warps four 16-byte loads of bfloat16 a thread
LERP_PROGRAMS = 1056  # at most, eight for each multiprocessor: each leaves one number of the sum that is dfac
WEIGHT_BLOCK = 1024  # elements of a weight's gradient that a program finishes


def by_cublas(columns: int, inner: int) -> bool:
    """Whether a product of so many columns, sums of so many terms, gains more by cuBLAS than the copy takes."""
    return min(columns, inner) >= 1536


def token_merge_forward(x: Tensor, weight: Tensor, patch_size: Sequence[int]) -> Tensor:
    (h, w), weight = patch_size, _weight(weight, x)
    out = x.new_empty((x.shape[0], x.shape[1] // h, x.shape[2] // w, weight.shape[0]))
    if by_cublas(*weight.shape):
        copy, matrix = _gather(x, (h, w))
        launch.run(copy)
        _multiply(matrix, weight.t(), _rows(out))
    else:
        launch.run(_product(x, (h, w), weight, False, out, NO_PATCH))
    return out


def token_merge_backward(
    dout: Tensor, x: Tensor, weight: Tensor, patch_size: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    patch = tuple(patch_size)
    dx, dweight = None, None
    if needed[0]:
        dx, narrow = launch.empty_like(x), _weight(weight, x)
        if by_cublas(*weight.shape):
            launch.run(_scatter(_multiply(_rows(dout), narrow), dx, patch))
        else:
            launch.run(_product(dout, NO_PATCH, narrow, True, dx, patch))
    if needed[1]:
        copy, matrix = _gather(x, patch)
        launch.run(copy)
        dweight = _multiply(_rows(dout).t(), matrix, launch.empty_like(weight))
    return _tensors(dout, dx, dweight)


def token_split_forward(
    x: Tensor, weight: Tensor, patch_size: Sequence[int], skip: Tensor | None, fac: Tensor | None
) -> Tensor:
    h, w = patch_size
    out = x.new_empty((x.shape[0], x.shape[1] * h, x.shape[2] * w, weight.shape[0] // (h * w)))
    launch.run(_product(x, NO_PATCH, _weight(weight, x), False, out, (h, w), skip, fac))
    return out


def token_split_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    patch_size: Sequence[int],
    skip: Tensor | None,
    fac: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    patch = tuple(patch_size)
    dx, dweight, dskip, dfac = None, None, None, None
    if skip is None or fac is None:
        copy, matrix = _gather(dout, patch)
        launch.run(copy)
        if needed[0]:
            dx = _multiply(matrix, _weight(weight, x)).view(x.shape)
        if needed[1]:
            dweight = _multiply(matrix.t(), _rows(x), launch.empty_like(weight))
        return _tensors(dout, dx, dweight, None, None)
    # Σ G·(Y − skip): each of the two sums comes with one of the other gradients
    dskip = launch.empty_like(skip)
    copy, matrix = _gather(dout, patch, skip, fac, dskip)
    skip_sums, weight_sums = copy.grid[0], launch.cdiv(weight.numel(), WEIGHT_BLOCK)
    sums = dout.new_empty((1, skip_sums + weight_sums, 1), dtype=torch.float32)
    launch.run(copy._replace(tensors=(*copy.tensors, sums)))
    if needed[0]:
        scaled = torch.mul(weight.detach(), fac.detach().float(), out=x.new_empty(weight.shape))
        dx = _multiply(matrix, scaled).view(x.shape)
    if needed[1] or needed[3]:
        product = _multiply(matrix.t(), _rows(x), x.new_empty(weight.shape, dtype=torch.float32))
        dweight = launch.empty_like(weight)
        tensors = (product, weight.contiguous(), fac, dweight, sums)
        vector = _vector(True, weight.numel())
        numbers = (weight.numel() // vector, skip_sums)
        constants = {"VECTOR": vector, "BLOCK": WEIGHT_BLOCK, "num_warps": 4}
        finish = Launch(_finish_weight_kernel, (weight_sums, 1, 1), tensors, numbers, constants)
        dfac, summing = launch.sum_launch(sums, fac)
        launch.run(finish, summing)
    found = (dx, dweight, dskip, dfac)
    return _tensors(dout, *[gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)])


def _tensors(dout: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients, empty where not needed: an operator returns tensors, each its own."""
    return tuple([dout.new_empty(0) if gradient is None else gradient for gradient in gradients])


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """As products with x take it: in its dtype, contiguous."""
    return weight.detach().to(x.dtype).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """[B, H, W, C] as a plain matrix, copied only if its strides don't allow it."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a·b, by default in their dtype, rounded once. With `out` given torch.mm takes no notice of autocast."""
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]))
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.dtype == torch.float32 and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(_multiply(a.float(), b.float()))  # elsewhere results have the factors' dtype


class Layout(NamedTuple):
    """A tensor [B, H·h, W·w, C] as a matrix of its patches, each of `positions` runs of elements that lie side by side.

    strides: of batches, rows and columns of patches, rows and columns of positions in a patch, and elements.
    """

    strides: Sequence[int]
    width: int  # positions in a row of a patch
    positions: int
    run: int
    grid: tuple[int, int, int]  # rows of the matrix, rows and columns of patches
    vector: int  # elements that a load may take at once

    def in_units(self, vector: int) -> tuple[int, ...]:
        """Strides but the last, and the run, are in units of a vector."""
        *outer, s_c = self.strides
        return (*[stride // vector for stride in outer], s_c, self.width, self.positions, self.run // vector)

    def padded(self, size: int) -> int:
        """Of a block of `size` columns those that a run takes, or a part of it. Few values: each is a binary."""
        if self.positions == 1 or self.run > 16:
            return size
        return 4 if self.run <= 4 else 16

    def blocks(self, size: int) -> int:
        """How many blocks of so many columns the matrix has."""
        padded = self.padded(size)
        return launch.cdiv(self.run, padded) * launch.cdiv(self.positions, size // padded)

    def fills(self, size: int) -> bool:
        """Whether every column of those blocks exists."""
        padded = self.padded(size)
        return self.run % padded == 0 and self.positions % (size // padded) == 0


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
    height, columns = height // h, width // w
    across = w
    if merged:
        s_c = s_x if run == 1 else s_c
        run, across = run * w, 1
    strides = (s_b, s_y * h, s_x * w, s_y, 0 if merged else s_x, s_c)
    vector = _vector(aligned and s_c == 1, *strides[:-1], run)
    return Layout(strides, across, h * across, run, (batch * height * columns, height, columns), vector)


def _vector(whole: bool, *strides: int) -> int:
    """The most elements, 8, 4 or 1, of which all strides are multiples; 1 where not `whole`."""
    return next((size for size in (8, 4) if whole and all(stride % size == 0 for stride in strides)), 1)


class Tile(NamedTuple):
    """A program computes rows x columns of a product, `depth` at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile_for(family: str, dtype: torch.dtype, narrow: bool) -> Tile:
    """narrow: a product of at most 64 columns. The defaults stay within the 64 KB of shared memory of AMD GPUs."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    if narrow or family != "hopper":
        return Tile(128, 64, 32, 4, 3)
    return Tile(128, 128, 64, 8, 3)


def _product(
    x: Tensor,
    x_patch: Patch,
    weight: Tensor,
    transposed: bool,
    out: Tensor,
    patch: Patch,
    skip: Tensor | None = None,
    fac: Tensor | None = None,
) -> Launch:
    """Fills out = x·weightᵀ, or x·weight where transposed; with a skip skip + fac · (x·weightᵀ − skip)."""
    layouts = *_layouts(x_patch, x), *_layouts(patch, *[out] if skip is None else [out, skip])
    of_weight = weight.shape[1], launch.aligned(weight)
    narrow = layouts[1].positions * layouts[1].padded(64) <= 64 and layouts[1].blocks(64) == 1
    tile = tile_for(launch.gpu_family(x.device), x.dtype, narrow)
    plan = _product_plan(tile, launch.input_precision(x.dtype), transposed, of_weight, skip is not None, *layouts)
    tensors = (x, weight, out if skip is None else skip, weight if fac is None else fac, out)
    return Launch(_product_kernel, plan[0], tensors, *plan[1:])


@functools.lru_cache(maxsize=4096)
def _product_plan(
    tile: Tile, precision: str, transposed: bool, weight: tuple[int, bool], has_skip: bool, *layouts: Layout
) -> Plan:
    """weight: its row's length, and whether it starts at a multiple of 16 bytes. layouts: of x, out, and the skip."""
    x, out, skip = *layouts[:2], layouts[-1]
    length, aligned = weight
    vector = min(*[layout.vector for layout in layouts], _vector(aligned, length))
    numbers = (*x.grid, length // vector, *x.in_units(vector), *out.in_units(vector), *skip.in_units(vector)[:6])
    constants = {
        "TRANSPOSED": transposed, "HAS_SKIP": has_skip, "VECTOR": vector,
        "WHOLE": x.fills(tile.depth) and (not transposed or out.fills(tile.columns)),
        "X_PADDED": x.padded(tile.depth), "PADDED": out.padded(tile.columns),
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PRECISION": precision,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    return (launch.cdiv(x.grid[0], tile.rows) * out.blocks(tile.columns), 1, 1), numbers, constants


def _gather(
    x: Tensor, patch: Patch, skip: Tensor | None = None, fac: Tensor | None = None, dskip: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """x's matrix, and the launch that fills it; of a gradient with a skip it also fills dskip, and awaits one tensor
    more: for parts of −Σ x·skip, one of each program.
    """
    layouts = _layouts(patch, x) if skip is None or dskip is None else _layouts(patch, x, skip, dskip)
    matrix = x.new_empty((layouts[0].grid[0], layouts[0].positions * layouts[0].run))
    plan = _copy_plan("gather" if skip is None else "lerp", *layouts)
    tensors = (x, matrix, *(t for t in (skip, fac, dskip) if t is not None))
    return Launch(_copy_kernel, plan[0], tensors if skip is not None else (*tensors, *[matrix] * 4), *plan[1:]), matrix


def _scatter(matrix: Tensor, out: Tensor, patch: Patch) -> Launch:
    """Fills out, whose matrix is given."""
    plan = _copy_plan("scatter", *_layouts(patch, out))
    return Launch(_copy_kernel, plan[0], (out, matrix, *[matrix] * 4), *plan[1:])


@functools.lru_cache(maxsize=4096)
def _copy_plan(way: str, *layouts: Layout) -> Plan:
    """layouts: of the tensor that is copied, the skip and its gradient."""
    x, skip, dskip = layouts[0], layouts[len(layouts) // 2], layouts[-1]
    vector = min([layout.vector for layout in layouts])
    block = next(size for size in (4, 16, 64, 256) if x.run <= size or size == 256)
    tiles = launch.cdiv(x.grid[0] * x.positions, COPY_TILE // block) * launch.cdiv(x.run, block)
    programs = min(LERP_PROGRAMS, tiles) if way == "lerp" else tiles
    of_grid = (x.grid[0] * x.positions, *x.grid[1:], programs)
    numbers = (*of_grid, *x.in_units(vector), *skip.in_units(vector)[:6], *dskip.in_units(vector)[:6])
    constants = {"WAY": way, "VECTOR": vector, "UNITS": COPY_TILE // block, "BLOCK": block, "num_warps": 4}
    return (programs, 1, 1), numbers, constants


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
def _add_dot(total, a, b, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """total + a·b. In float32 a·b is summed by itself first: shorter chains of additions, less rounding."""
    if a.dtype == tl.float32:
        # without this limit Triton would fold the addition into the product's own chain
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=DEPTH)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _store(
    y, row, rows, height, width, out_ptr, out, across, skip_ptr, skip, fac_ptr, position, within, exists,
    HAS_SKIP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Stores y, or its interpolation with the skip."""
    inside = (row < rows)[:, None] & exists[None, :]
    if HAS_SKIP:
        skip_row = _row_offset(row, height, width, skip, VECTOR)
        skip_column = _column_offset(position, within, across, skip, VECTOR)
        before = tl.load(skip_ptr + skip_row[:, None] + skip_column[None, :], inside, other=0.0).to(tl.float32)
        y = before + tl.load(fac_ptr).to(tl.float32) * (y - before)
    out_row = _row_offset(row, height, width, out, VECTOR)
    out_column = _column_offset(position, within, across, out, VECTOR)
    tl.store(out_ptr + out_row[:, None] + out_column[None, :], y, inside)


@launch.kernel
def _product_kernel(
    x_ptr, weight_ptr, skip_ptr, fac_ptr, out_ptr,
    rows: tl.int32, height: tl.int32, width: tl.int32, weight_s: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, x_s3: tl.int64, x_s4: tl.int64, x_s5: tl.int64,
    x_across: tl.int32, x_positions: tl.int32, x_run: tl.int32,
    out_s0: tl.int64, out_s1: tl.int64, out_s2: tl.int64, out_s3: tl.int64, out_s4: tl.int64, out_s5: tl.int64,
    across: tl.int32, positions: tl.int32, run: tl.int32,
    skip_s0: tl.int64, skip_s1: tl.int64, skip_s2: tl.int64, skip_s3: tl.int64, skip_s4: tl.int64, skip_s5: tl.int64,
    TRANSPOSED: tl.constexpr, HAS_SKIP: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
    X_PADDED: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out = y, or of skip + fac · (y − skip), with y = x · weightᵀ, or x · weight where TRANSPOSED.

    WHOLE: what a step of the sum reads exists, rows apart.
    """
    x_strides = (x_s0, x_s1, x_s2, x_s3, x_s4, x_s5)
    out_strides = (out_s0, out_s1, out_s2, out_s3, out_s4, out_s5)
    skip_strides = (skip_s0, skip_s1, skip_s2, skip_s3, skip_s4, skip_s5)
    x_run *= VECTOR
    run *= VECTOR
    weight_s *= VECTOR
    blocks = tl.cdiv(run, PADDED) * tl.cdiv(positions, COLUMNS // PADDED)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    _, _, column, exists = _columns(block, positions, run, COLUMNS, PADDED, 0, COLUMNS)
    # rows and columns beyond the last are computed of the last's values, and not stored
    x_at = x_ptr + _row_offset(tl.minimum(row, rows - 1), height, width, x_strides, VECTOR)[:, None]
    if TRANSPOSED:
        weight_at = weight_ptr + column[None, :]
    else:
        weight_at = weight_ptr + (tl.where(exists, column, 0).to(tl.int64) * weight_s)[None, :]
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(tl.cdiv(x_run, X_PADDED) * tl.cdiv(x_positions, DEPTH // X_PADDED)):
        x_position, x_within, k, k_exists = _columns(step, x_positions, x_run, DEPTH, X_PADDED, 0, DEPTH)
        x_column = _column_offset(x_position, x_within, x_across, x_strides, VECTOR)
        weight_k = (k.to(tl.int64) * weight_s)[:, None] if TRANSPOSED else k[:, None]
        if WHOLE:
            x = tl.load(x_at + x_column[None, :])
            weight = tl.load(weight_at + weight_k)
        else:
            x = tl.load(x_at + x_column[None, :], k_exists[None, :], other=0.0)
            weight = tl.load(weight_at + weight_k, k_exists[:, None] & exists[None, :], other=0.0)
        y = _add_dot(y, x, weight, DEPTH, PRECISION)
    HALF: tl.constexpr = COLUMNS // 2
    # in two halves: with a skip that saves registers, so that two programs fit a multiprocessor
    first, second = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, HALF)), (0, 2, 1)))
    position, within, _, exists = _columns(block, positions, run, COLUMNS, PADDED, 0, HALF)
    _store(
        first, row, rows, height, width, out_ptr, out_strides, across, skip_ptr, skip_strides, fac_ptr,
        position, within, exists, HAS_SKIP, VECTOR,
    )  # fmt: skip
    position, within, _, exists = _columns(block, positions, run, COLUMNS, PADDED, HALF, HALF)
    _store(
        second, row, rows, height, width, out_ptr, out_strides, across, skip_ptr, skip_strides, fac_ptr,
        position, within, exists, HAS_SKIP, VECTOR,
    )  # fmt: skip


@launch.kernel
def _copy_kernel(
    x_ptr, matrix_ptr, skip_ptr, fac_ptr, dskip_ptr, sums_ptr,
    units: tl.int32, height: tl.int32, width: tl.int32, programs: tl.int32,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64, x_s3: tl.int64, x_s4: tl.int64, x_s5: tl.int64,
    across: tl.int32, positions: tl.int32, run: tl.int32,
    skip_s0: tl.int64, skip_s1: tl.int64, skip_s2: tl.int64, skip_s3: tl.int64, skip_s4: tl.int64, skip_s5: tl.int64,
    dskip_s0: tl.int64, dskip_s1: tl.int64, dskip_s2: tl.int64, dskip_s3: tl.int64, dskip_s4: tl.int64,
    dskip_s5: tl.int64,
    WAY: tl.constexpr, VECTOR: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WAY "gather": matrix = x; "scatter": x = matrix; "lerp": matrix = x, a gradient, dskip = (1 − fac) · x, and this
    program's part of −Σ x · skip. A unit is a row's position; every `programs`-th tile is the program's.
    """
    x_strides = (x_s0, x_s1, x_s2, x_s3, x_s4, x_s5)
    skip_strides = (skip_s0, skip_s1, skip_s2, skip_s3, skip_s4, skip_s5)
    dskip_strides = (dskip_s0, dskip_s1, dskip_s2, dskip_s3, dskip_s4, dskip_s5)
    run *= VECTOR
    blocks = tl.cdiv(run, BLOCK)
    total = tl.zeros([UNITS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(units, UNITS) * blocks, programs):
        unit = tile // blocks * UNITS + tl.arange(0, UNITS)
        within = (tile % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
        row, position = (unit // positions)[:, None], (unit % positions)[:, None]
        inside = (unit < units)[:, None] & (within < run)
        matrix_at = matrix_ptr + (unit.to(tl.int64) * run)[:, None] + within
        x_at = _row_offset(row, height, width, x_strides, VECTOR)
        x_at = x_ptr + x_at + _column_offset(position, within, across, x_strides, VECTOR)
        if WAY == "scatter":
            tl.store(x_at, tl.load(matrix_at, inside), inside)
        else:
            x = tl.load(x_at, inside, other=0.0)
            tl.store(matrix_at, x, inside)
        if WAY == "lerp":
            skip_at = _row_offset(row, height, width, skip_strides, VECTOR)
            skip_at = skip_ptr + skip_at + _column_offset(position, within, across, skip_strides, VECTOR)
            dskip_at = _row_offset(row, height, width, dskip_strides, VECTOR)
            dskip_at = dskip_ptr + dskip_at + _column_offset(position, within, across, dskip_strides, VECTOR)
            gradient = x.to(tl.float32)
            tl.store(dskip_at, (1 - tl.load(fac_ptr).to(tl.float32)) * gradient, inside)
            total += gradient * tl.load(skip_at, inside, other=0.0).to(tl.float32)
    if WAY == "lerp":
        tl.store(sums_ptr + tl.program_id(0), -tl.sum(tl.sum(total, 1), 0))


@launch.kernel
def _finish_weight_kernel(
    product_ptr, weight_ptr, fac_ptr, dweight_ptr, sums_ptr, elements: tl.int32, first_sum: tl.int32,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight = fac · product, and this block's Σ weight · product."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements * VECTOR
    product = tl.load(product_ptr + at, inside, other=0.0)
    weight = tl.load(weight_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + first_sum + tl.program_id(0), tl.sum(weight * product, 0))
    tl.store(dweight_ptr + at, tl.load(fac_ptr).to(tl.float32) * product, inside)
