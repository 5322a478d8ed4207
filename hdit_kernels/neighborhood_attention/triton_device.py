"""What the portable kernels of `na2d` call on the GPU: tiles, windows and their inverse, offsets, packed numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(images, height, width, heads, tiles_x, dilation_y, dilation_x):
    """batch, head, tile and dilation residue of this program, and the lengths of its sub-grid's axes."""
    pid = tl.program_id(0).to(tl.uint32)  # unsigned division is cheaper
    tile = pid // heads.to(tl.uint32)
    head = pid - tile * heads  # neighbours in memory run side by side
    tile_y = tile // tiles_x.to(tl.uint32)
    tile_x = tile - tile_y * tiles_x
    batch, residue_y, residue_x = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1), 0, 0
    length_y, length_x = tl.where(batch < images, height, 0), width
    if dilation_y * dilation_x > 1:
        residue_x = batch % dilation_x
        residue_y = batch // dilation_x % dilation_y
        batch = batch // dilation_x // dilation_y
        length_y = (length_y - residue_y + dilation_y - 1) // dilation_y
        length_x = (width - residue_x + dilation_x - 1) // dilation_x
    return (
        batch, head.to(tl.int32), tile_y.to(tl.int32), tile_x.to(tl.int32), residue_y, residue_x, length_y, length_x
    )  # fmt: skip


@triton.jit
def window_start(query, window, length):
    return tl.minimum(tl.maximum(query - (window >> 1), 0), length - window)


@triton.jit
def keys_seen(query, window, length, stride, causal):
    """The first key of each query's window, and how many there are (reference.windows). stride and causal: None in the
    plain binaries.
    """
    if stride is None:
        start, count = window_start(query, window, length), window
    else:
        leader = query // stride * stride + tl.where(causal > 0, stride - 1, stride >> 1)
        leader = tl.minimum(leader, length - 1)
        start = tl.where(causal > 0, tl.maximum(leader - window + 1, 0), window_start(leader, window, length))
        count = tl.where(causal > 0, query + 1 - start, window)
    return start, count


@triton.jit
def keys_end(query, window, length, stride, causal):
    """One past the last key of a query's window."""
    start, count = keys_seen(query, window, length, stride, causal)
    return start + count


@triton.jit
def mask_bias(offset, length):
    """0 where 0 <= offset < length, else -inf. One comparison: a negative offset is a large unsigned number."""
    return tl.where(offset.to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True), 0.0, float("-inf"))


@triton.jit
def unsigned(number):
    """A number that isn't negative in 64 bits, without the work that a sign makes in a product."""
    return number.to(tl.uint32).to(tl.int64)


@triton.jit
def token_at(pointer, batch, head, y, x, stride_b, stride_h, stride_w, stride_n, VECTOR: tl.constexpr):
    """Pointer to the first element of one token and head: scalars, 64 bits."""
    offset = unsigned(batch) * stride_b + unsigned(head) * stride_n + unsigned(y) * stride_h + unsigned(x) * stride_w
    return pointer + offset * VECTOR


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """x as a as_operand of a product: for tf32 rounded to it, where the product would cut the bits off."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN as it is
    return x


@triton.jit
def offsets(y, x, step_y, step_x, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the tokens (y, x) of a tile or block from its first one, in 32 bits unless the block spans more."""
    if WIDE:
        at = y.to(tl.int64) * step_y + x.to(tl.int64) * step_x
    else:
        at = y * step_y.to(tl.int32) + x * step_x.to(tl.int32)
    return at * VECTOR


@triton.jit
def additional_keys(pointer, batch, head, heads, first, extra, dim, in_dim, D: tl.constexpr, COUNT: tl.constexpr):
    """A block of the additional keys or values of one sample and head, from number `first` on; zeros behind the
    last.
    """
    number = first + tl.arange(0, COUNT)
    at = ((unsigned(batch) * extra + number) * heads + head) * D
    return tl.load(pointer + at[:, None] + dim[None, :], mask=(number < extra)[:, None] & in_dim, other=0.0)


@triton.jit
def additional_bias(first, extra, QUERIES: tl.constexpr, COUNT: tl.constexpr):
    """0 for such a block's keys, -inf behind the last."""
    return tl.zeros([QUERIES, COUNT], tl.float32) + mask_bias(first + tl.arange(0, COUNT), extra)[None, :]


@triton.jit
def attend(q, k_transposed, v, bias, logit_scale, maximum, total, acc, PRECISION: tl.constexpr):
    """A running softmax with a block of keys more."""
    products = tl.dot(q, k_transposed, bias, PRECISION)
    new_maximum = tl.maximum(maximum, tl.max(products, 1) * logit_scale)
    probability = tl.exp2(tl.math.fma(products, logit_scale, -new_maximum[:, None]))
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(probability, 1)
    acc = tl.dot(as_operand(probability.to(v.dtype), PRECISION), v, acc * decay[:, None], PRECISION)
    return new_maximum, total, acc


@triton.jit
def add_dq(dq, q, k, v, dout, bias, logit_scale, maximum, log_total, delta, PRECISION: tl.constexpr):
    """dq with what a block of keys adds. log_total: of float32; else the first statistic is the sum of both."""
    products = tl.dot(q, tl.trans(k), bias, PRECISION)
    exponent = tl.math.fma(products, logit_scale, -maximum[:, None])
    if q.dtype == tl.float32:
        exponent -= log_total[:, None]
    dprobability = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dlogits = tl.exp2(exponent) * (dprobability - delta[:, None])
    return tl.dot(as_operand(dlogits.to(k.dtype), PRECISION), k, dq, PRECISION)


@triton.jit
def add_dkdv(dk, dv, k, v, q, dout, bias, logit_scale, maximum, delta, stats_ptr, at, mask, PRECISION: tl.constexpr):
    """dk and dv with what a block of queries adds. stats_ptr, at and mask: of the second statistic, read in float32."""
    products = tl.dot(k, tl.trans(q), bias, PRECISION)
    exponent = tl.math.fma(products, logit_scale, -maximum[None, :])
    if q.dtype == tl.float32:
        exponent -= tl.load(stats_ptr + at, mask=mask, other=0.0)[None, :]
    probability = tl.exp2(exponent)
    dv = tl.dot(as_operand(probability.to(dout.dtype), PRECISION), dout, dv, PRECISION)
    dprobability = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dlogits = probability * (dprobability - delta[None, :])
    dk = tl.dot(as_operand(dlogits.to(q.dtype), PRECISION), q, dk, PRECISION)
    return dk, dv


@triton.jit
def pack(first, second):
    """Two float32 in one 64-bit integer."""
    low = first.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (second.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low


@triton.jit
def unpack(both):
    first, second = both.to(tl.uint32), (both >> 32).to(tl.uint32)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def first_query(key, window, stride, causal):
    """The first query whose window reaches the key, along one axis: with a stride, that of a group, whose leader is at
    least as far as such a query would be without. Causal: the key's own.
    """
    first = tl.where(key < window, 0, key - window + 1 + (window >> 1))
    if stride is not None:
        group = (tl.maximum(first - (stride >> 1), 0) + stride - 1) // stride
        first = tl.where(causal > 0, key, group * stride)
    return first


@triton.jit
def last_query(key, window, length, stride, causal):
    """The last query whose window reaches the key: everyone clamped at the end sees the last `window` keys. With a
    stride, that of the last group whose leader is no further than such a query would be without.
    """
    last = tl.where(key >= length - window, length - 1, key + (window >> 1))
    if stride is not None:
        group = (last - (stride >> 1)) // stride
        last = tl.where(key >= length - window, last, tl.minimum((group + 1) * stride, length) - 1)
        reach = tl.where(key + window >= length, length, (key + window) // stride * stride)
        last = tl.where(causal > 0, reach - 1, last)
    return last
