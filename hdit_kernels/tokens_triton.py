"""Kernels and launchers of `token_merge` and `token_split`.

A tensor [B, H·h, W·w, C] of any strides is seen as a matrix of B·H·W rows, its h x w patches, and h·w·C
columns: the pixel-unshuffle is in the offsets of the loads, the pixel-shuffle in those of the stores, and no rearranged
copy is written. A plain matrix is the case of 1 x 1 patches. With G the matrix of a gradient, X of an input and W the
weight [out, in] there are

    merge: out = X·Wᵀ            dX = G·W            dW = Gᵀ·X
    split: Y = X·Wᵀ, shuffled    dX = fac·(G·W)      dW = fac·(Gᵀ·X)      dskip = (1 − fac)·G
           out = skip + fac·(Y − skip)               dfac = Σ G·(Y − skip) = Σ W·(Gᵀ·X) − Σ G·skip

Written so, fac scales products that are float32 still, and dfac needs Y neither stored nor computed again.

Bytes moved for N elements of the fine tensor and M of the coarse one, b bytes each, beside the weight: forward
(N + M)·b, with a skip N·b more; backward 2·(N + M)·b for dX and dW, with a skip 3·N·b more.
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
from hdit_kernels.launch import Launch, Plan

WEIGHT_GRADIENT_PROGRAMS = 256  # about: two for each multiprocessor of the largest GPUs
WEIGHT_BLOCK = 256  # elements of a weight's gradient that a program adds up
NO_PATCH = (1, 1)
Patch = tuple[int, ...]  # rows and columns
LERP_TILE = (32, 128)  # tokens and channels
LERP_PROGRAMS = 1024  # at most: each leaves one number of the sum that is dfac


def token_merge_forward(x: Tensor, weight: Tensor, patch_size: Sequence[int]) -> Tensor:
    return _project(x, tuple(patch_size), weight, NO_PATCH)


def token_merge_backward(
    dout: Tensor, x: Tensor, weight: Tensor, patch_size: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    patch = tuple(patch_size)
    dx, dweight = None, None
    launches: list[Launch] = []
    if needed[0]:
        dx = launch.empty_like(x)
        launches.append(_project_back(dout, NO_PATCH, weight, dx, patch))
    if needed[1]:
        dweight, more = _weight_gradient(dout, NO_PATCH, x, patch, weight)
        launches += more
    launch.run(*launches)
    return _tensors(dout, dx, dweight)


def token_split_forward(
    x: Tensor, weight: Tensor, patch_size: Sequence[int], skip: Tensor | None, fac: Tensor | None
) -> Tensor:
    return _project(x, NO_PATCH, weight, tuple(patch_size), skip, fac)


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
    launches: list[Launch] = []
    if needed[0]:
        dx = launch.empty_like(x)
        launches.append(_project_back(dout, patch, weight, dx, NO_PATCH, fac))
    if skip is None or fac is None:
        if needed[1]:
            dweight, more = _weight_gradient(dout, patch, x, NO_PATCH, weight)
            launches += more
        launch.run(*launches)
        return _tensors(dout, dx, dweight, None, None)
    # Σ G·(Y − skip): each of the two sums comes with one of the other gradients
    weight_sums, skip_sums = launch.cdiv(weight.numel(), WEIGHT_BLOCK), min(LERP_PROGRAMS, _lerp_tiles(skip))
    sums = dout.new_empty((1, weight_sums + skip_sums, 1), dtype=torch.float32)
    if needed[1] or needed[3]:
        found, more = _weight_gradient(dout, patch, x, NO_PATCH, weight, fac, sums)
        launches += more
        dweight = found if needed[1] else None
    if needed[2] or needed[3]:
        found = launch.empty_like(skip)
        launches.append(_lerp_skip(dout, skip, fac, found, sums, weight_sums, skip_sums))
        dskip = found if needed[2] else None
    if needed[3]:
        dfac, summing = launch.sum_launch(sums, fac)
        launches.append(summing)
    launch.run(*launches)
    return _tensors(dout, dx, dweight, dskip, dfac)


def _tensors(dout: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients, empty where not needed: an operator returns tensors, each its own."""
    return tuple([dout.new_empty(0) if gradient is None else gradient for gradient in gradients])


class Layout(NamedTuple):
    """What a plan has to know of a tensor: [B, H·h, W·w, C] seen as a matrix by its patch, or a weight."""

    shape: Sequence[int]
    stride: Sequence[int]
    aligned: bool
    patch: Patch

    def strides(self) -> list[int]:
        """0 for a dimension of size 1, whose own stride, if odd, would keep loads narrow for nothing."""
        return [0 if size == 1 else stride for size, stride in zip(self.shape, self.stride, strict=True)]

    def vector(self) -> int:
        """8 where channels lie side by side and each run of them starts and ends at multiples of 8 elements; else 1."""
        *outer, s_c = self.strides()
        return launch.vector_width(self.aligned, self.shape[-1], *outer) if s_c == 1 else 1

    def row_vector(self) -> int:
        """Of a weight: 8 where every row starts at a multiple of 8 elements; else 1."""
        return launch.vector_width(self.aligned, self.stride[0])

    def grid(self) -> tuple[int, int, int]:
        """Rows of the matrix, and rows and columns of patches in the grid."""
        height, width = self.shape[1] // self.patch[0], self.shape[2] // self.patch[1]
        return self.shape[0] * height * width, height, width

    def in_units(self, vector: int) -> tuple[int, ...]:
        """s_b, s_y, s_x, s_c, h, w and C. Strides but the last, and C, are in units of a vector."""
        s_b, s_y, s_x, s_c = self.strides()
        return s_b // vector, s_y // vector, s_x // vector, s_c, *self.patch, self.shape[-1] // vector


def _layout(tensor: Tensor, patch: Patch = NO_PATCH) -> Layout:
    return Layout(tensor.shape, tensor.stride(), launch.aligned(tensor), patch)


def _contiguous(shape: Sequence[int], patch: Patch) -> Layout:
    """Of a tensor that a launcher allocates."""
    _, height, width, channels = shape
    return Layout(shape, (height * width * channels, width * channels, channels, 1), True, patch)


class Tile(NamedTuple):
    """A program computes rows x columns of a product, `depth` at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def programs(self, rows: int, columns: int) -> int:
        return launch.cdiv(rows, self.rows) * launch.cdiv(columns, self.columns)


def tile_for(family: str, dtype: torch.dtype) -> Tile:
    """For every product. The defaults stay within the 64 KB of shared memory of AMD GPUs, a float32 weight included."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    if family == "hopper":
        return Tile(128, 128, 64, 8, 3)
    return Tile(128, 64, 32, 4, 3)


def _tile_and_precision(x: Tensor) -> tuple[Tile, str]:
    """The tile of a product of x, and tl.dot's precision."""
    return tile_for(launch.gpu_family(x.device), x.dtype), launch.input_precision(x.dtype)


def _options(tile: Tile, precision: str) -> dict[str, Any]:
    return dict(
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _project(
    x: Tensor, x_patch: Patch, weight: Tensor, out_patch: Patch, skip: Tensor | None = None, fac: Tensor | None = None
) -> Tensor:
    """X·Wᵀ; with a skip skip + fac · (X·Wᵀ − skip)."""
    weight = launch.dense(weight)
    layouts = _layout(x, x_patch), _layout(weight), None if skip is None else _layout(skip, out_patch)
    (grid, numbers, constants), shape = _project_plan(*_tile_and_precision(x), *layouts, out_patch)
    out = x.new_empty(shape)
    tensors = (x, weight, out if skip is None else skip, weight if fac is None else fac, out)
    launch.run(Launch(_project_kernel, grid, tensors, numbers, constants))
    return out


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _project_plan(
    tile: Tile, precision: str, x: Layout, weight: Layout, skip: Layout | None, out_patch: Patch
) -> tuple[Plan, Sequence[int]]:
    """Also the output's shape."""
    rows, height, width = x.grid()
    h, w = out_patch
    out = _contiguous((x.shape[0], height * h, width * w, weight.shape[0] // (h * w)), out_patch)
    # the weight's rows run along x's columns
    whole = x.shape[-1] % tile.depth == 0 and min(x.vector(), weight.row_vector()) == 8
    x_vector, vector = 8 if whole else 1, min(out.vector(), 8 if skip is None else skip.vector())
    skip_strides = (0, 0, 0, 0) if skip is None else skip.in_units(vector)[:4]
    x_matrix, out_matrix = x.in_units(x_vector), out.in_units(vector)
    numbers = (rows, height, width, *x_matrix, weight.stride[0] // x_vector, *skip_strides, *out_matrix)
    constants = {"WHOLE": whole, "VECTOR": vector, "HAS_SKIP": skip is not None, **_options(tile, precision)}
    return ((tile.programs(rows, weight.shape[0]), 1, 1), numbers, constants), out.shape


def _project_back(
    dout: Tensor, dout_patch: Patch, weight: Tensor, dx: Tensor, dx_patch: Patch, fac: Tensor | None = None
) -> Launch:
    """Fills dx = G·W, with fac times fac."""
    weight = launch.dense(weight)
    layouts = _layout(dout, dout_patch), _layout(weight)
    of_dx = dx.shape, dx_patch
    grid, numbers, constants = _project_back_plan(*_tile_and_precision(dout), *layouts, *of_dx, fac is not None)
    tensors = (dout, weight, weight if fac is None else fac, dx)
    return Launch(_project_back_kernel, grid, tensors, numbers, constants)


@functools.lru_cache(maxsize=4096)
def _project_back_plan(
    tile: Tile, precision: str, dout: Layout, weight: Layout, shape: Sequence[int], patch: Patch, has_fac: bool
) -> Plan:
    """shape, patch: dx's."""
    dx = _contiguous(shape, patch)
    whole = dout.shape[-1] % tile.depth == 0 and dout.vector() == 8
    # the weight's rows run along dx's columns
    dout_vector, vector = 8 if whole else 1, min(dx.vector(), weight.row_vector())
    rows, height, width = dout.grid()
    matrices = (*dout.in_units(dout_vector), weight.stride[0] // vector, *dx.in_units(vector))
    constants = {"WHOLE": whole, "VECTOR": vector, "HAS_FAC": has_fac, **_options(tile, precision)}
    return (tile.programs(rows, weight.shape[1]), 1, 1), (rows, height, width, *matrices), constants


def _weight_gradient(
    dout: Tensor,
    dout_patch: Patch,
    x: Tensor,
    x_patch: Patch,
    weight: Tensor,
    fac: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, tuple[Launch, Launch]]:
    """Gᵀ·X in the weight's shape and dtype, and the launches that fill it; with fac times fac, and parts of
    Σ W·(Gᵀ·X) go to the first of the sums.
    """
    layouts = _layout(dout, dout_patch), _layout(x, x_patch)
    (grid, numbers, constants), parts = _weight_gradient_plan(*_tile_and_precision(x), *layouts, weight.shape)
    elements = weight.numel()
    partials = x.new_empty((parts, elements), dtype=torch.float32)
    product = Launch(_weight_gradient_kernel, grid, (dout, x, partials), numbers, constants)
    dweight = launch.empty_like(weight)
    tensors = (partials, weight, weight if fac is None else fac, dweight, partials if sums is None else sums)
    grid, numbers = (launch.cdiv(elements, WEIGHT_BLOCK), 1, 1), (parts, elements, weight.shape[1], *weight.stride())
    constants = {"PARTS": 8, "BLOCK": WEIGHT_BLOCK, "HAS_FAC": fac is not None, "num_warps": 4}
    return dweight, (product, Launch(_sum_parts_kernel, grid, tensors, numbers, constants))


@functools.lru_cache(maxsize=4096)
def _weight_gradient_plan(
    tile: Tile, precision: str, dout: Layout, x: Layout, weight: Sequence[int]
) -> tuple[Plan, int]:
    """Also into how many parts the rows are cut. weight: its shape."""
    dout_vector, x_vector = dout.vector(), x.vector()
    rows, height, width = x.grid()
    tiles = tile.programs(*weight)
    parts = max(1, min(WEIGHT_GRADIENT_PROGRAMS // tiles, rows // (4 * tile.depth)))
    length = launch.cdiv(launch.cdiv(rows, parts), tile.depth) * tile.depth
    parts = launch.cdiv(rows, length)
    numbers = (rows, length, height, width, *dout.in_units(dout_vector), *x.in_units(x_vector))
    constants = {"DOUT_VECTOR": dout_vector, "X_VECTOR": x_vector, **_options(tile, precision)}
    return ((tiles * parts, 1, 1), numbers, constants), parts


def _lerp_skip(
    dout: Tensor, skip: Tensor, fac: Tensor, dskip: Tensor, sums: Tensor, first_sum: int, programs: int
) -> Launch:
    """Fills dskip; the parts of −Σ G·skip go to the sums from first_sum on."""
    grid, numbers, constants = _lerp_plan(_layout(dout), _layout(skip), first_sum, programs)
    return Launch(_lerp_skip_kernel, grid, (dout, skip, fac, dskip, sums), numbers, constants)


@functools.lru_cache(maxsize=4096)
def _lerp_plan(dout: Layout, skip: Layout, first_sum: int, programs: int) -> Plan:
    vector = min(dout.vector(), skip.vector())
    strides = (*dout.in_units(vector)[:4], *skip.in_units(vector)[:4])
    numbers = (first_sum, *skip.grid(), *strides, skip.shape[-1] // vector, programs)
    constants = {"ROWS": LERP_TILE[0], "BLOCK": LERP_TILE[1], "VECTOR": vector, "num_warps": 4}
    return (programs, 1, 1), numbers, constants


def _lerp_tiles(skip: Tensor) -> int:
    channels = skip.shape[-1]
    return launch.cdiv(skip.numel() // channels, LERP_TILE[0]) * launch.cdiv(channels, LERP_TILE[1])


@triton.jit
def _column_offset(column, w, channels, s_y, s_x, s_c, VECTOR: tl.constexpr):
    """Where a column (row of the patch, column of the patch, channel) lies after the patch's first element, int64."""
    unit = column // VECTOR
    position = unit // channels
    return ((position // w) * s_y + (position % w) * s_x + unit % channels * s_c) * VECTOR + column % VECTOR


@triton.jit
def _add_dot(total, a, b, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """total + a·b. In float32 a·b is summed by itself first: shorter chains of additions, less rounding."""
    if a.dtype == tl.float32:
        # without this limit Triton would fold the addition into the product's own chain
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=DEPTH)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _product(
    x_ptr, weight_ptr, row, rows, height, width, s_b, s_y, s_x, s_c, h, w, channels, column, columns, weight_s,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, WEIGHT_VECTOR: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The given rows and columns of x · weightᵀ, or of x · weight where TRANSPOSED, in float32.

    WHOLE: x's channels are a multiple of DEPTH, so that a block of them stays within one position of the patch.
    """
    X_VECTOR: tl.constexpr = 8 if WHOLE else 1
    inner = h * w * channels * X_VECTOR
    lane = tl.arange(0, DEPTH)
    x_row = launch.row_offset(row, height, width, s_b, s_y * h, s_x * w, X_VECTOR)
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in range(0, inner, DEPTH):
        k = first + lane
        x_mask, weight_mask = (row < rows)[:, None], (column < columns)[None, :]
        if WHOLE:
            position = first // (channels * X_VECTOR)
            start = ((position // w) * s_y + (position % w) * s_x) * X_VECTOR
            x_column = tl.multiple_of(start + first % (channels * X_VECTOR), X_VECTOR) + lane
        else:
            x_column = _column_offset(k, w, channels, s_y, s_x, s_c, X_VECTOR)
            x_mask, weight_mask = x_mask & (k < inner)[None, :], weight_mask & (k < inner)[:, None]
        if TRANSPOSED:
            weight_at = (k * weight_s * WEIGHT_VECTOR)[:, None] + column[None, :]
        else:
            weight_at = (column * weight_s * WEIGHT_VECTOR)[None, :] + k[:, None]
        x = tl.load(x_ptr + x_row[:, None] + x_column[None, :], x_mask, other=0.0)
        weight = tl.load(weight_ptr + weight_at, weight_mask, other=0.0).to(x.dtype)
        total = _add_dot(total, x, weight, DEPTH, PRECISION)
    return total


@launch.kernel
def _project_kernel(
    x_ptr, weight_ptr, skip_ptr, fac_ptr, out_ptr, rows: tl.int32, height: tl.int32, width: tl.int32,
    x_s_b: tl.int64, x_s_y: tl.int64, x_s_x: tl.int64, x_s_c: tl.int64,
    x_h: tl.int32, x_w: tl.int32, x_channels: tl.int32, weight_s: tl.int64,
    skip_s_b: tl.int64, skip_s_y: tl.int64, skip_s_x: tl.int64, skip_s_c: tl.int64,
    out_s_b: tl.int64, out_s_y: tl.int64, out_s_x: tl.int64, out_s_c: tl.int64,
    h: tl.int32, w: tl.int32, channels: tl.int32,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, HAS_SKIP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out = y, or of skip + fac · (y − skip), with y = x · weightᵀ."""
    columns = h * w * channels * VECTOR
    blocks = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    y = _product(
        x_ptr, weight_ptr, row, rows, height, width,
        x_s_b, x_s_y, x_s_x, x_s_c, x_h, x_w, x_channels, column, columns, weight_s,
        TRANSPOSED=False, WHOLE=WHOLE, WEIGHT_VECTOR=8 if WHOLE else 1, DEPTH=DEPTH, PRECISION=PRECISION,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if HAS_SKIP:
        skip_row = launch.row_offset(row, height, width, skip_s_b, skip_s_y * h, skip_s_x * w, VECTOR)
        skip_column = _column_offset(column, w, channels, skip_s_y, skip_s_x, skip_s_c, VECTOR)
        skip = tl.load(skip_ptr + skip_row[:, None] + skip_column[None, :], inside, other=0.0).to(tl.float32)
        y = skip + tl.load(fac_ptr).to(tl.float32) * (y - skip)
    out_row = launch.row_offset(row, height, width, out_s_b, out_s_y * h, out_s_x * w, VECTOR)
    out_column = _column_offset(column, w, channels, out_s_y, out_s_x, out_s_c, VECTOR)
    tl.store(out_ptr + out_row[:, None] + out_column[None, :], y, inside)


@launch.kernel
def _project_back_kernel(
    dout_ptr, weight_ptr, fac_ptr, dx_ptr, rows: tl.int32, height: tl.int32, width: tl.int32,
    dout_s_b: tl.int64, dout_s_y: tl.int64, dout_s_x: tl.int64, dout_s_c: tl.int64,
    dout_h: tl.int32, dout_w: tl.int32, dout_channels: tl.int32, weight_s: tl.int64,
    dx_s_b: tl.int64, dx_s_y: tl.int64, dx_s_x: tl.int64, dx_s_c: tl.int64,
    h: tl.int32, w: tl.int32, channels: tl.int32,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, HAS_FAC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dx = dout · weight, times fac where it is given."""
    columns = h * w * channels * VECTOR
    blocks = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    dx = _product(
        dout_ptr, weight_ptr, row, rows, height, width,
        dout_s_b, dout_s_y, dout_s_x, dout_s_c, dout_h, dout_w, dout_channels, column, columns, weight_s,
        TRANSPOSED=True, WHOLE=WHOLE, WEIGHT_VECTOR=VECTOR, DEPTH=DEPTH, PRECISION=PRECISION,
    )  # fmt: skip
    if HAS_FAC:
        dx = tl.load(fac_ptr).to(tl.float32) * dx
    dx_row = launch.row_offset(row, height, width, dx_s_b, dx_s_y * h, dx_s_x * w, VECTOR)
    dx_column = _column_offset(column, w, channels, dx_s_y, dx_s_x, dx_s_c, VECTOR)
    tl.store(dx_ptr + dx_row[:, None] + dx_column[None, :], dx, (row < rows)[:, None] & (column < columns)[None, :])


@launch.kernel
def _weight_gradient_kernel(
    dout_ptr, x_ptr, partials_ptr, rows: tl.int32, length: tl.int32, height: tl.int32, width: tl.int32,
    dout_s_b: tl.int64, dout_s_y: tl.int64, dout_s_x: tl.int64, dout_s_c: tl.int64,
    dout_h: tl.int32, dout_w: tl.int32, dout_channels: tl.int32,
    x_s_b: tl.int64, x_s_y: tl.int64, x_s_x: tl.int64, x_s_c: tl.int64,
    x_h: tl.int32, x_w: tl.int32, x_channels: tl.int32,
    DOUT_VECTOR: tl.constexpr, X_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of doutᵀ · x, summed over `length` of the rows."""
    out_columns = dout_h * dout_w * dout_channels * DOUT_VECTOR
    in_columns = x_h * x_w * x_channels * X_VECTOR
    blocks = tl.cdiv(in_columns, COLUMNS)
    tiles = tl.cdiv(out_columns, ROWS) * blocks
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o = tile // blocks * ROWS + tl.arange(0, ROWS)
    i = tile % blocks * COLUMNS + tl.arange(0, COLUMNS)
    dout_column = _column_offset(o, dout_w, dout_channels, dout_s_y, dout_s_x, dout_s_c, DOUT_VECTOR)
    x_column = _column_offset(i, x_w, x_channels, x_s_y, x_s_x, x_s_c, X_VECTOR)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(part * length, tl.minimum((part + 1) * length, rows), DEPTH):
        row = first + tl.arange(0, DEPTH)
        dout_row = launch.row_offset(row, height, width, dout_s_b, dout_s_y * dout_h, dout_s_x * dout_w, DOUT_VECTOR)
        x_row = launch.row_offset(row, height, width, x_s_b, x_s_y * x_h, x_s_x * x_w, X_VECTOR)
        dout_mask = (row < rows)[:, None] & (o < out_columns)[None, :]
        x_mask = (row < rows)[:, None] & (i < in_columns)[None, :]
        dout = tl.load(dout_ptr + dout_row[:, None] + dout_column[None, :], dout_mask, other=0.0)
        x = tl.load(x_ptr + x_row[:, None] + x_column[None, :], x_mask, other=0.0)
        total = _add_dot(total, tl.trans(dout), x, DEPTH, PRECISION)
    at = (part.to(tl.int64) * out_columns + o)[:, None] * in_columns + i[None, :]
    tl.store(partials_ptr + at, total, (o < out_columns)[:, None] & (i < in_columns)[None, :])


@launch.kernel
def _sum_parts_kernel(
    partials_ptr, weight_ptr, fac_ptr, dweight_ptr, sums_ptr,
    parts: tl.int32, elements: tl.int32, columns: tl.int32, weight_s0: tl.int64, weight_s1: tl.int64,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, HAS_FAC: tl.constexpr,
):  # fmt: skip
    """dweight = the sum of the partials, in a fixed order; with fac times fac, and this block's Σ weight · sum."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        partials_at = part.to(tl.int64)[:, None] * elements + at[None, :]
        total += tl.load(partials_ptr + partials_at, (part < parts)[:, None] & (at < elements)[None, :], other=0.0)
    dweight = tl.sum(total, 0)
    if HAS_FAC:
        weight_at = at // columns * weight_s0 + at % columns * weight_s1
        weight = tl.load(weight_ptr + weight_at, at < elements, other=0.0).to(tl.float32)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(weight * dweight, 0))
        dweight = tl.load(fac_ptr).to(tl.float32) * dweight
    tl.store(dweight_ptr + at, dweight, at < elements)


@launch.kernel
def _lerp_skip_kernel(
    dout_ptr, skip_ptr, fac_ptr, dskip_ptr, sums_ptr,
    first_sum: tl.int32, rows: tl.int32, height: tl.int32, width: tl.int32,
    dout_s_b: tl.int64, dout_s_y: tl.int64, dout_s_x: tl.int64, dout_s_c: tl.int64,
    skip_s_b: tl.int64, skip_s_y: tl.int64, skip_s_x: tl.int64, skip_s_c: tl.int64,
    channels: tl.int32, programs: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dskip = (1 − fac) · dout, and this program's part of −Σ dout · skip: every `programs`-th tile."""
    fac = tl.load(fac_ptr).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    blocks = tl.cdiv(channels * VECTOR, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * blocks, programs):
        row = tile // blocks * ROWS + tl.arange(0, ROWS)
        column = tile % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < channels * VECTOR)[None, :]
        dout_row = launch.row_offset(row, height, width, dout_s_b, dout_s_y, dout_s_x, VECTOR)
        skip_row = launch.row_offset(row, height, width, skip_s_b, skip_s_y, skip_s_x, VECTOR)
        dout_column = _column_offset(column, 1, channels, dout_s_y, dout_s_x, dout_s_c, VECTOR)
        skip_column = _column_offset(column, 1, channels, skip_s_y, skip_s_x, skip_s_c, VECTOR)
        dout = tl.load(dout_ptr + dout_row[:, None] + dout_column[None, :], inside, other=0.0).to(tl.float32)
        skip = tl.load(skip_ptr + skip_row[:, None] + skip_column[None, :], inside, other=0.0).to(tl.float32)
        at = row.to(tl.int64)[:, None] * (channels * VECTOR) + column[None, :]
        tl.store(dskip_ptr + at, (1 - fac) * dout, inside)
        total += dout * skip
    tl.store(sums_ptr + first_sum + tl.program_id(0), -tl.sum(tl.sum(total, 1), 0))
