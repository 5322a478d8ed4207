"""Every operator in plain PyTorch: the specification that the kernels are tested against.

Runs on any device in any float dtype. bfloat16 and float16 are computed in float32 and rounded once, at the end;
float64 is exact float64 throughout. The functions take what the public ones take, do no checking, and are
differentiable by autograd. Source, where nothing else is said: HDiT, Crowson et al. 2024, arXiv:2401.11605, sections
4.1 to 4.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _per_sample(tensor: Tensor, x: Tensor) -> Tensor:
    """[B, C] -> [B, 1, …, 1, C] with as many dimensions as x."""
    return _widen(tensor).view(tensor.shape[0], *(1,) * (x.ndim - 2), tensor.shape[-1])


# Norms and gates


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., C], weight [C]: x / sqrt(mean(x²) + eps) · weight."""
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _widen(weight)).to(x.dtype)


def ada_rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, ..., C], scale [B, C]: x / sqrt(mean(x²) + eps) · (1 + scale)."""
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + _per_sample(scale, x))).to(x.dtype)


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, ..., C], shift and scale [B, C]: layer_norm(x) · (1 + scale) + shift (adaLN of DiT, Peebles & Xie 2023)."""
    wide = _widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normal * (1 + _per_sample(scale, x)) + _per_sample(shift, x)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x and y [B, ..., C], gate [B, C]: x + gate · y (adaLN-Zero of DiT, Peebles & Xie 2023)."""
    return (_widen(x) + _per_sample(gate, x) * _widen(y)).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """x [..., 2·d_ff] -> [..., d_ff]: a · gelu(g) with a, g = x.chunk(2, -1) and the exact (erf) GELU (Shazeer
    2020).
    """
    value, gate = _widen(x).chunk(2, -1)
    return (value * F.gelu(gate)).to(x.dtype)


def feed_forward(x: Tensor, scale: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, ..., C], scale [B, C], up_weight [2·d_ff, C], down_weight [C, d_ff]: the whole feed-forward block,
    x + down(geglu(up(ada_rms_norm(x, scale)))).
    """
    wide = _widen(x)
    hidden = geglu(F.linear(ada_rms_norm(wide, scale, eps), _widen(up_weight)))
    return (wide + F.linear(hidden, _widen(down_weight))).to(x.dtype)


# Tokens between levels


def token_merge(x: Tensor, weight: Tensor, patch_size: Sequence[int] = (2, 2)) -> Tensor:
    """x [B, H·h, W·w, C], weight [out, h·w·C] -> [B, H, W, out]: pixel-unshuffle (order h, w, C), then projection."""
    h, w = patch_size
    batch, height, width, channels = x.shape
    patches = _widen(x).reshape(batch, height // h, h, width // w, w, channels).transpose(2, 3)
    return F.linear(patches.flatten(3), _widen(weight)).to(x.dtype)


def token_split(
    x: Tensor, weight: Tensor, patch_size: Sequence[int] = (2, 2), skip: Tensor | None = None, fac: Tensor | None = None
) -> Tensor:
    """x [B, H, W, in], weight [h·w·C, in] -> [B, H·h, W·w, C]: projection, pixel-shuffle, and skip + fac · (y −
    skip).
    """
    h, w = patch_size
    batch, height, width, _ = x.shape
    channels = weight.shape[0] // (h * w)
    patches = F.linear(_widen(x), _widen(weight)).view(batch, height, width, h, w, channels)
    y = patches.transpose(2, 3).reshape(batch, height * h, width * w, channels)
    if skip is not None and fac is not None:
        y = torch.lerp(_widen(skip).to(y.dtype), y, _widen(fac).to(y.dtype))
    return y.to(x.dtype)


# Attention


def qk_norm_rope(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, eps: float = 1e-6) -> Tensor:
    """Packed qkv [B, H, W, 3, heads, D] with q and k cosine-normalised and rotated, v as it was.

    scale [heads]; theta_y [H, heads, D/8] and theta_x [W, heads, D/8]: the axial angles. q and k are each multiplied by
    sqrt(scale) / sqrt(sum(q²) + eps); then dims [0, D/4) and [D/4, D/2) are rotated as pairs by the D/4 angles
    concat(theta_y[row], theta_x[column]), and dims from D/2 on pass through.
    """
    height, width, heads, dim = qkv.shape[1], qkv.shape[2], qkv.shape[-2], qkv.shape[-1]
    qk, value = _widen(qkv[:, :, :, :2]), qkv[:, :, :, 2:]
    qk = qk * (_widen(scale).sqrt()[:, None] * torch.rsqrt(qk.square().sum(-1, keepdim=True) + eps))
    theta = torch.cat(
        [theta_y[:, None].expand(height, width, heads, dim // 8), theta_x[None].expand(height, width, heads, dim // 8)],
        -1,
    )
    theta = _widen(theta)[:, :, None]  # the same for q and k
    a, b, rest = qk.split([dim // 4, dim // 4, dim // 2], -1)
    cos, sin = theta.cos(), theta.sin()
    ready = torch.cat([a * cos - b * sin, b * cos + a * sin, rest.to(cos.dtype)], -1)
    return torch.cat([ready.to(qkv.dtype), value], 3)


def neighborhood_self_attention(
    qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, kernel_size: Sequence[int], eps: float = 1e-6
) -> Tensor:
    """Packed qkv [B, H, W, 3, heads, D] -> [B, H, W, heads, D]: qk_norm_rope, then na2d with scale 1."""
    query, key, value = qk_norm_rope(_widen(qkv), scale, theta_y, theta_x, eps).unbind(3)  # no rounding between the two
    out, _ = na2d(query, key, value, kernel_size, scale=1.0)
    return out.to(qkv.dtype)


class _Tile(NamedTuple):
    """Queries of one dilation sub-grid that attend to one box of keys; the slices step by the dilation."""

    queries: tuple[slice, slice, slice]  # batch, rows, columns
    keys: tuple[slice, slice, slice]
    mask: Tensor  # [query rows · query columns, key rows · key columns], True where the query sees the key


TILE = 8  # queries a side: their key box is then at most (TILE + K − 1)² of the K² that each needs


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    is_causal: Sequence[bool] = (False, False),
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """2-D neighborhood attention (Hassani et al. 2023; strides as in NATTEN 0.21): out [B, H, W, heads, D] and lse.

    Along an axis of length L with window K the query at i sees the K keys from clamp(i − K//2, 0, L − K) on; the 2-D
    window is the product of the axes. Dilation d splits an axis into d interleaved ones. With stride s, queries share
    the window of their group's leader, the one in the middle of each s. Causal: the keys from leader − K + 1 to i, the
    leader being the last of its group. Additional keys [B, extra, heads, D] are seen by every query. Values, and so
    out, may have another D. Keys and values may have fewer heads, each for as many heads of queries beside each other.
    lse [B, H, W, heads] in float32 (float64 for float64): the natural logarithm of the softmax's denominator. Memory is
    O(queries in one tile), not O(H·W·K²).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = [None if t is None else _widen(t) for t in (query, key, value, additional_keys, additional_values)]
    q, k, v, extra_k, extra_v = wide
    assert q is not None and k is not None and v is not None
    pieces, where = [], []
    for tile in _tiles(query, kernel_size, stride, dilation, is_causal, _side(wide)):
        pieces.append(_attend(q[tile.queries], k[tile.keys], v[tile.keys], extra_k, extra_v, tile.mask, scale))
        where.append(tile.queries)
    # of a piece's kind, whichever of the inputs torch.func differentiates
    out, lse = pieces[0][0].new_empty((*q.shape[:-1], v.shape[-1])), pieces[0][1].new_empty(q.shape[:-1])
    for (piece_out, piece_lse), queries in zip(pieces, where, strict=True):
        out[queries], lse[queries] = piece_out, piece_lse
    return out.to(query.dtype), lse


def na2d_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    is_causal: Sequence[bool] = (False, False),
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of sum(out · dout) + sum(lse · dlse) for query, key, value, additional_keys, additional_values.

    Autograd tile by tile, so that memory stays O(queries in one tile).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = [
        None if t is None else _widen(t).detach() for t in (query, key, value, additional_keys, additional_values)
    ]
    gradients = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
    for tile in _tiles(query, kernel_size, stride, dilation, is_causal, _side([*inputs, dout, dlse])):
        regions: list[Any] = [tile.queries, tile.keys, tile.keys, ..., ...]
        with torch.enable_grad():
            leaves = [None if t is None else t[at].requires_grad_() for t, at in zip(inputs, regions, strict=True)]
            q, k, v, extra_k, extra_v = leaves
            assert q is not None and k is not None and v is not None
            out, lse = _attend(q, k, v, extra_k, extra_v, tile.mask, scale)
            loss = (out * _widen(dout[tile.queries])).sum()
            if dlse is not None:
                loss = loss + (lse * dlse[tile.queries]).sum()
        found = iter(torch.autograd.grad(loss, [t for t in leaves if t is not None]))
        for gradient, at in zip(gradients, regions, strict=True):
            if gradient is not None:
                gradient[at] += next(found)
    given = (query, key, value, additional_keys, additional_values)
    dq, dk, dv, dextra_k, dextra_v = (
        None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, given, strict=True)
    )
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv, dextra_k, dextra_v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention of a tile of queries [B, h, w, heads, D] to a box of keys under a mask: out and lse, [B, h, w,
    heads] first.
    """
    keys, values = k.flatten(1, 2), v.flatten(1, 2)
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], 1), torch.cat([values, extra_v], 1)
        mask = F.pad(mask, (0, extra_k.shape[1]), value=True)
    grouped = (q.flatten(1, 2) * scale).unflatten(2, (k.shape[-2], -1))  # g: heads that share keys
    logits = torch.einsum("bqhgd,bkhd->bhgqk", grouped, keys).masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", (logits - lse[..., None]).exp(), values)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.flatten(1, 2).transpose(1, 2).reshape(q.shape[:-1])


def _side(tensors: Sequence[Tensor | None]) -> int:
    """Queries a side of a tile: 1 where a number is NaN or infinite, which then reaches only the queries that see it
    (in a larger tile, those that don't would take 0 · NaN from it). torch.func can't branch on values.
    """
    if torch._C._are_functorch_transforms_active():
        return TILE
    return TILE if all(t is None or bool(t.isfinite().all()) for t in tensors) else 1


def _tiles(
    query: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    side: int,
) -> Iterator[_Tile]:
    axes = [
        list(_axis_tiles(query.shape[1 + a], kernel_size[a], stride[a], dilation[a], is_causal[a], side))
        for a in (0, 1)
    ]
    for rows in axes[0]:
        for columns in axes[1]:
            mask = (rows[2][:, None, :, None] & columns[2][None, :, None, :]).to(query.device)
            queries, keys = (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])
            yield _Tile(queries, keys, mask.flatten(2).flatten(0, 1))


def _axis_tiles(
    length: int, window: int, stride: int, dilation: int, causal: bool, side: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys, mask [queries, keys]) of each tile along one axis, all residues of the dilation in turn."""
    for residue in range(dilation):
        start, end = windows((length - residue + dilation - 1) // dilation, window, stride, causal)
        for first in range(0, len(start), side):
            lo, hi = int(start[first : first + side].min()), int(end[first : first + side].max())
            keys = torch.arange(lo, hi, device="cpu")
            mask = (keys >= start[first : first + side, None]) & (keys < end[first : first + side, None])
            last = min(first + side, len(start)) - 1
            yield _strided(first, last, residue, dilation), _strided(lo, hi - 1, residue, dilation), mask


def _strided(first: int, last: int, residue: int, dilation: int) -> slice:
    return slice(residue + first * dilation, residue + last * dilation + 1, dilation)


def windows(length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[Tensor, Tensor]:
    """First key and one past the last key of every query along one axis, int64 [length] each."""
    query = torch.arange(length, device="cpu")
    if causal:
        leader = (query // stride * stride + stride - 1).clamp(max=length - 1)
        return (leader - window + 1).clamp(min=0), query + 1
    leader = (query // stride * stride + stride // 2).clamp(max=length - 1)
    start = (leader - window // 2).clamp(0, length - window)
    return start, start + window
