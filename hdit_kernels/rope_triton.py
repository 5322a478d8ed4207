"""Kernels of `qk_norm_rope`: a program takes one head of a block of tokens.

Least traffic forward: qkv read and written once. Backward: q, k and the incoming gradient read, the gradient written;
the gradient of scale as one float32 partial a program and head, summed in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels.launch import Launch, aligned, cdiv, kernel, run, sum_launch

TOKENS = 32
MAX_PARTIALS = 512


def qk_norm_rope_forward(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float) -> Tensor:
    ready = qkv.new_empty(qkv.shape)
    run(qk_norm_rope_forward_launch(ready, qkv, scale, theta_y, theta_x, eps))
    return ready


def qk_norm_rope_forward_launch(
    ready: Tensor, qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float
) -> Launch:
    """Fills ready [B, H, W, 2 or 3, heads, D], contiguous: q and k, and v too when there is room for it."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    sizes, strides, constants = _plan(qkv.shape, qkv.stride(), aligned(qkv))
    grid = (cdiv(sizes[0], TOKENS) * sizes[3], 1, 1)
    tensors = (ready, qkv, scale.contiguous(), theta_y.contiguous(), theta_x.contiguous())
    constants = constants | {"PARTS": ready.shape[3]}
    return Launch(_qk_norm_rope_forward_kernel, grid, tensors, (eps, *sizes, *strides), constants)


def qk_norm_rope_backward(
    dready: Tensor, qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dqkv = qkv.new_empty(qkv.shape)
    dscale, launches = qk_norm_rope_backward_launches(dqkv, dready, qkv, scale, theta_y, theta_x, eps)
    run(*launches)
    return dqkv, dscale


def qk_norm_rope_backward_launches(
    dqkv: Tensor, dready: Tensor, qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float
) -> tuple[Tensor, tuple[Launch, Launch]]:
    """dscale, and the launches that fill it and dqkv, contiguous, from dready, which may be dqkv itself (its v then
    stays as it is).
    """
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    sizes, strides, constants = _plan(qkv.shape, qkv.stride(), aligned(qkv))
    in_place = dready is dqkv
    dready = dready if dready.stride(-1) == 1 else dready.contiguous()
    _, dready_strides, of_dready = _plan(dready.shape, dready.stride(), aligned(dready))
    blocks = cdiv(sizes[0], TOKENS)
    per_program = cdiv(blocks, MAX_PARTIALS)
    parts = cdiv(blocks, per_program)
    heads = sizes[3]
    partials = scale.new_empty((1, parts, heads), dtype=torch.float32)
    tensors = (dqkv, partials, dready, qkv, scale.contiguous(), theta_y.contiguous(), theta_x.contiguous())
    numbers = (eps, *sizes, per_program, *dready_strides, *strides)
    constants = constants | {"DREADY_VECTOR": of_dready["VECTOR"], "COPY_VALUE": not in_place}
    backward = Launch(_qk_norm_rope_backward_kernel, (parts * heads, 1, 1), tensors, numbers, constants)
    dscale, summing = sum_launch(partials, scale)
    return dscale, (backward, summing)


@functools.lru_cache(maxsize=4096)  # it costs as much host time as the launch itself
def _plan(
    shape: Sequence[int], stride: Sequence[int], is_aligned: bool
) -> tuple[tuple[int, int, int, int], tuple[int, ...], dict[str, int]]:
    """Sizes, strides in units of VECTOR elements, and constants, for a packed tensor [B, H, W, parts, heads, D]."""
    batch, height, width, _, heads, dim = shape
    vector = 8 if is_aligned and all(step % 8 == 0 for step in stride[:-1]) else 1
    constants = dict(
        TOKENS=TOKENS, HEAD_DIM=dim, BLOCK_QUARTER=triton.next_power_of_2(dim // 4), num_warps=4, VECTOR=vector
    )
    return (batch * height * width, height, width, heads), tuple([s // vector for s in stride[:-1]]), constants


@triton.jit
def _tokens(block, tokens, height, width, TOKENS: tl.constexpr):
    """Index, batch, row and column of each token of a block, and whether it exists."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    column, row = token % width, token // width % height
    return token.to(tl.int64), (token // width // height).to(tl.int64), row, column, token < tokens


@triton.jit
def _rotation(
    theta_y_ptr, theta_x_ptr, row, column, head, heads, exists, HEAD_DIM: tl.constexpr, BLOCK_QUARTER: tl.constexpr
):
    """cos and sin [tokens, quarter]: the row's angles, then the column's."""
    angles: tl.constexpr = HEAD_DIM // 8
    index = tl.arange(0, BLOCK_QUARTER)[None, :]
    at_y = (row[:, None].to(tl.int64) * heads + head) * angles + index
    at_x = (column[:, None].to(tl.int64) * heads + head) * angles + index - angles
    mask = exists[:, None] & (index < 2 * angles)
    theta = tl.load(theta_y_ptr + at_y, mask=mask & (index < angles), other=0.0).to(tl.float32)
    theta += tl.load(theta_x_ptr + at_x, mask=mask & (index >= angles), other=0.0).to(tl.float32)
    return tl.cos(theta), tl.sin(theta)


@triton.jit
def _load_quarters(pointer, mask, HEAD_DIM: tl.constexpr, BLOCK_QUARTER: tl.constexpr):
    """The four quarters of a head's dimensions in float32, [tokens, quarter] each; `pointer` [tokens, 1]."""
    pointer += tl.arange(0, BLOCK_QUARTER)[None, :]
    quarter: tl.constexpr = HEAD_DIM // 4
    a = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(pointer + quarter, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(pointer + 2 * quarter, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(pointer + 3 * quarter, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def _store_quarters(pointer, a, b, c, d, mask, HEAD_DIM: tl.constexpr, BLOCK_QUARTER: tl.constexpr):
    pointer += tl.arange(0, BLOCK_QUARTER)[None, :]
    quarter: tl.constexpr = HEAD_DIM // 4
    dtype = pointer.dtype.element_ty
    tl.store(pointer, a.to(dtype), mask=mask)
    tl.store(pointer + quarter, b.to(dtype), mask=mask)
    tl.store(pointer + 2 * quarter, c.to(dtype), mask=mask)
    tl.store(pointer + 3 * quarter, d.to(dtype), mask=mask)


@triton.jit
def _dot4(a, b, c, d, e, f, g, h):
    return tl.sum(a * e + b * f + c * g + d * h, 1)[:, None]


@kernel
def _qk_norm_rope_forward_kernel(
    ready_ptr, qkv_ptr, scale_ptr, theta_y_ptr, theta_x_ptr, eps,
    tokens: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32,
    s_b: tl.int64, s_h: tl.int64, s_w: tl.int64, s_p: tl.int64, s_n: tl.int64,
    VECTOR: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_QUARTER: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    token, batch, row, column, exists = _tokens(tl.program_id(0) // heads, tokens, height, width, TOKENS)
    mask = exists[:, None] & (tl.arange(0, BLOCK_QUARTER) < HEAD_DIM // 4)[None, :]
    cos, sin = _rotation(theta_y_ptr, theta_x_ptr, row, column, head, heads, exists, HEAD_DIM, BLOCK_QUARTER)
    root = tl.sqrt(tl.load(scale_ptr + head).to(tl.float32))
    read = qkv_ptr + (batch * s_b + row.to(tl.int64) * s_h + column.to(tl.int64) * s_w + head * s_n)[:, None] * VECTOR
    write = ready_ptr + (token * PARTS * heads + head)[:, None] * HEAD_DIM
    for part in tl.static_range(PARTS):
        a, b, c, d = _load_quarters(read + part * s_p * VECTOR, mask, HEAD_DIM, BLOCK_QUARTER)
        if part < 2:
            factor = root * tl.rsqrt(_dot4(a, b, c, d, a, b, c, d) + eps)
            a, b, c, d = a * factor, b * factor, c * factor, d * factor
            a, b = a * cos - b * sin, b * cos + a * sin
        _store_quarters(write + part * heads * HEAD_DIM, a, b, c, d, mask, HEAD_DIM, BLOCK_QUARTER)


@kernel
def _qk_norm_rope_backward_kernel(
    dqkv_ptr, partials_ptr, dready_ptr, qkv_ptr, scale_ptr, theta_y_ptr, theta_x_ptr, eps,
    tokens: tl.int32, height: tl.int32, width: tl.int32, heads: tl.int32, per_program: tl.int32,
    g_b: tl.int64, g_h: tl.int64, g_w: tl.int64, g_p: tl.int64, g_n: tl.int64,
    s_b: tl.int64, s_h: tl.int64, s_w: tl.int64, s_p: tl.int64, s_n: tl.int64,
    DREADY_VECTOR: tl.constexpr, VECTOR: tl.constexpr, COPY_VALUE: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_QUARTER: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    program = tl.program_id(0) // heads
    root = tl.sqrt(tl.load(scale_ptr + head).to(tl.float32))
    droot = tl.zeros([TOKENS, 1], tl.float32)
    for block in range(program * per_program, (program + 1) * per_program):
        token, batch, row, column, exists = _tokens(block, tokens, height, width, TOKENS)
        mask = exists[:, None] & (tl.arange(0, BLOCK_QUARTER) < HEAD_DIM // 4)[None, :]
        cos, sin = _rotation(theta_y_ptr, theta_x_ptr, row, column, head, heads, exists, HEAD_DIM, BLOCK_QUARTER)
        y, x = row.to(tl.int64), column.to(tl.int64)
        read = qkv_ptr + (batch * s_b + y * s_h + x * s_w + head * s_n)[:, None] * VECTOR
        incoming = dready_ptr + (batch * g_b + y * g_h + x * g_w + head * g_n)[:, None] * DREADY_VECTOR
        write = dqkv_ptr + (token * 3 * heads + head)[:, None] * HEAD_DIM
        for part in tl.static_range(3):
            if part < 2 or COPY_VALUE:
                da, db, dc, dd = _load_quarters(incoming + part * g_p * DREADY_VECTOR, mask, HEAD_DIM, BLOCK_QUARTER)
                if part < 2:
                    da, db = da * cos + db * sin, db * cos - da * sin  # the inverse rotation
                    a, b, c, d = _load_quarters(read + part * s_p * VECTOR, mask, HEAD_DIM, BLOCK_QUARTER)
                    inverse = tl.rsqrt(_dot4(a, b, c, d, a, b, c, d) + eps)
                    along = _dot4(a, b, c, d, da, db, dc, dd) * inverse
                    droot += along
                    factor, shrink = root * inverse, along * inverse  # y = x·root/n: dx = root/n · (dy − x·⟨x, dy⟩/n²)
                    da, db = factor * (da - a * shrink), factor * (db - b * shrink)
                    dc, dd = factor * (dc - c * shrink), factor * (dd - d * shrink)
                _store_quarters(write + part * heads * HEAD_DIM, da, db, dc, dd, mask, HEAD_DIM, BLOCK_QUARTER)
    tl.store(partials_ptr + program * heads + head, tl.sum(droot) * 0.5 / root)
