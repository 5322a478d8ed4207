"""Gradients of the additional keys and values of `na2d`, which every query sees: deterministic, by partial sums.

A program takes a block of them, of one sample and head, and walks a part of the queries; then the parts are summed,
always in one order. Least traffic: q and dout read once for each block, each part's sums written and read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import launch
from hdit_kernels.neighborhood_attention.options import Options
from hdit_kernels.neighborhood_attention.triton_device import (
    add_dkdv,
    additional_keys,
    as_operand,
    unpack,
    unsigned,
)

KEYS = 16  # of a block
PROGRAMS = 512  # that fill a GPU


def launches(
    dout: Tensor, query: Tensor, terms: Tensor, stats: Tensor, scale: float, logit_scale: float, options: Options
) -> tuple[Tensor, Tensor, launch.Launch, launch.Launch, launch.Launch]:
    """The gradients of options.extra_k and extra_v, and the launches that fill them after `dq_launch`'s, whose terms
    they read; dout and query are dense.
    """
    batch, height, width, heads, head_dim = query.shape
    heads_kv = heads // options.group
    value_dim = dout.shape[-1]
    extra, tokens, blocks = options.extra, height * width, launch.cdiv(options.extra, KEYS)
    queries = 32 if max(head_dim, value_dim) * query.itemsize <= 512 else 16  # of a block: long rows need their space
    parts = min(launch.cdiv(PROGRAMS, blocks * heads_kv * batch), launch.cdiv(tokens, 4 * queries))
    length = launch.cdiv(launch.cdiv(tokens, parts), queries) * queries
    parts = launch.cdiv(tokens, length)
    sums = [torch.empty(1, parts, t.numel(), dtype=torch.float32, device=t.device) for t in _both(options)]
    strides = [*dout.stride()[:-1], *query.stride()[:-1]]
    vector = launch.vector_width(launch.aligned(dout, query), *strides)
    numbers = [scale, logit_scale, terms.numel(), tokens, length, width, heads, options.group, extra]
    numbers += [stride // vector for stride in strides]
    constants: dict[str, Any] = dict(
        D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        VALUE_D=value_dim, BLOCK_VALUE_D=max(16, triton.next_power_of_2(value_dim)),
        VECTOR=vector, KEYS=KEYS, QUERIES=queries, PRECISION=launch.input_precision(query.dtype),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    tensors = (dout, query, *_both(options), terms, stats, *sums)
    grid = (blocks * heads_kv * batch, parts, 1)
    adding = launch.Launch(_na2d_additional_kernel, grid, tensors, numbers, constants)
    (dk, sum_k), (dv, sum_v) = map(launch.sum_launch, sums, _both(options))
    return dk, dv, adding, sum_k, sum_v


def _both(options: Options) -> tuple[Tensor, Tensor]:
    return options.extra_k, options.extra_v


@launch.kernel
def _na2d_additional_kernel(
    dout_ptr, query_ptr, extra_k_ptr, extra_v_ptr, terms_ptr, stats_ptr, dk_ptr, dv_ptr,
    scale, logit_scale, rows: tl.int64,
    tokens: tl.int32, length: tl.int32, width: tl.int32, heads: tl.int32, group: tl.int32, extra: tl.int32,
    o_b: tl.int64, o_h: tl.int64, o_w: tl.int64, o_n: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_n: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_VALUE_D: tl.constexpr, VECTOR: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program: KEYS additional keys of one sample and head, with the queries of `length` tokens, QUERIES at a time.
    # Tensors and strides as of the other kernels; dk and dv: float32 [parts, B, extra, heads of keys, …].
    pid = tl.program_id(0)
    heads_kv = heads // group
    head, rest = pid % heads_kv, pid // heads_kv
    blocks = tl.cdiv(extra, KEYS)
    batch, first = rest // blocks, rest % blocks * KEYS
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE_D)
    in_dim, in_dim_v = (dim < D)[None, :], (dim_v < VALUE_D)[None, :]
    k = additional_keys(extra_k_ptr, batch, head, heads_kv, first, extra, dim, in_dim, D, KEYS)
    v = additional_keys(extra_v_ptr, batch, head, heads_kv, first, extra, dim_v, in_dim_v, VALUE_D, KEYS)
    k, v = as_operand(k, PRECISION), as_operand(v, PRECISION)

    query_ptr += (unsigned(batch) * q_b + unsigned(head * group) * q_n) * VECTOR
    dout_ptr += (unsigned(batch) * o_b + unsigned(head * group) * o_n) * VECTOR
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, tokens)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_D], tl.float32)
    no_bias = tl.zeros([KEYS, QUERIES], tl.float32)  # behind the last key nothing is stored; a query there is all zeros
    for member in range(0, group):  # of the heads that share these keys
        for block in range(begin, end, QUERIES):
            token = block + tl.arange(0, QUERIES)
            is_token = token < end
            y, x = (token // width).to(tl.int64), (token % width).to(tl.int64)
            at = ((y * q_h + x * q_w) * VECTOR)[:, None] + dim[None, :]
            q = tl.load(query_ptr + at, mask=is_token[:, None] & in_dim, other=0.0)
            at = ((y * o_h + x * o_w) * VECTOR)[:, None] + dim_v[None, :]
            dout = tl.load(dout_ptr + at, mask=is_token[:, None] & in_dim_v, other=0.0)
            q, dout = as_operand(q, PRECISION), as_operand(dout, PRECISION)
            at = (unsigned(batch) * tokens + token) * heads + (head * group + member)
            maximum, delta = unpack(tl.load(terms_ptr + at, mask=is_token, other=0))
            dk, dv = add_dkdv(
                dk, dv, k, v, q, dout, no_bias, logit_scale, maximum, delta, stats_ptr + rows, at, is_token, PRECISION
            )
        query_ptr += q_n * VECTOR
        dout_ptr += o_n * VECTOR

    number = first + tl.arange(0, KEYS)
    samples = tl.num_programs(0) // (heads_kv * blocks)
    at = ((unsigned(tl.program_id(1)) * samples + batch) * extra + number) * heads_kv + head
    is_extra = (number < extra)[:, None]
    tl.store(dk_ptr + at[:, None] * D + dim[None, :], dk * scale, mask=is_extra & in_dim)
    tl.store(dv_ptr + at[:, None] * VALUE_D + dim_v[None, :], dv, mask=is_extra & in_dim_v)
