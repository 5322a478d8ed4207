"""FlexAttention with neighborhood attention's mask (Dong et al. 2024, arXiv:2412.05496), compiled.

Its blocks are 128 tokens, so the tokens are put in the order of tiles of 8x16, which makes a block's window compact; a
model could keep them so, and for na2d the reordering is not timed. For neighborhood_self_attention it is, as part of
one compiled function with normalisation and rotation, which may take it along. The block mask is derived from the two
axes: torch's own create_block_mask tries all pairs of tokens, which no memory holds at 1024x1024.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer, Tensors, compiled
from hdit_kernels import reference

TILE = (8, 16)
BLOCK = 128
PEER = Peer("FlexAttention", None, "comes with torch", needs_gpu=True, check=compiled.PEER.check)


def to_tiles(grid: Tensor) -> Tensor:
    """[B, H, W, heads, D] -> [B, heads, tiles · 128, D], padded to whole tiles."""
    height, width = grid.shape[1:3]
    padded = F.pad(grid, (0, 0, 0, 0, 0, -width % TILE[1], 0, -height % TILE[0]))
    split = padded.unflatten(2, (-1, TILE[1])).unflatten(1, (-1, TILE[0]))  # B, tiles, 8, tiles, 16, heads, D
    return split.permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 5)


def from_tiles(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back again, without the padding."""
    tiles = math.ceil(height / TILE[0]), math.ceil(width / TILE[1])
    split = tokens.unflatten(2, (*tiles, *TILE)).permute(0, 2, 4, 3, 5, 1, 6)
    return split.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def axis_mask(length: int, kernel_size: int, dilation: int, tile: int) -> Tensor:
    """[tiles, tiles], True where a query of the one tile sees a key of the other.

    Queries in the padding see what the last query sees; keys in the padding are not seen.
    """
    seen = torch.zeros(length, length, dtype=torch.bool)
    for residue in range(dilation):
        own = torch.arange(residue, length, dilation)
        start, end = reference.windows(len(own), kernel_size)
        index = torch.arange(len(own))
        seen[own[:, None], own[None]] = (index >= start[:, None]) & (index < end[:, None])
    padding = -length % tile
    seen = F.pad(torch.cat([seen, seen[-1:].expand(padding, length)]), (0, padding))
    return seen.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).any(3).any(1)


def mask_mod(height: int, width: int, kernel_size: int, dilation: int) -> Callable[..., Tensor]:
    """Which key a query sees, both given by their place in the order of tiles."""
    tiles_x = math.ceil(width / TILE[1])

    def place(token: Tensor) -> tuple[Tensor, Tensor]:
        tile, within = token // BLOCK, token % BLOCK
        return tile // tiles_x * TILE[0] + within // TILE[1], tile % tiles_x * TILE[1] + within % TILE[1]

    def sees(query: Tensor, key: Tensor, length: int) -> Tensor:
        query = query.clamp(max=length - 1)
        index, residue = query // dilation, query % dilation
        last = (length - 1 - residue) // dilation + 1 - kernel_size
        start = torch.minimum((index - kernel_size // 2).clamp(min=0), last)
        at = key // dilation
        return (key < length) & (key % dilation == residue) & (at >= start) & (at < start + kernel_size)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (query_y, query_x), (key_y, key_x) = place(query), place(key)
        return sees(query_y, key_y, height) & sees(query_x, key_x, width)

    return mask


def block_mask(height: int, width: int, kernel_size: int, dilation: int, device: torch.device) -> BlockMask:
    rows = axis_mask(height, kernel_size, dilation, TILE[0]).to(device)
    columns = axis_mask(width, kernel_size, dilation, TILE[1]).to(device)
    blocks = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    count = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        count[None, None].contiguous(),
        indices[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(height, width, kernel_size, dilation),
    )


def prepare(tensors: Tensors) -> Tensors:
    return {name: to_tiles(tensor) for name, tensor in tensors.items()}


def build(case: Case) -> Implementation:
    height, width = case.shapes["query"][1:3]
    kernel_size, dilation = case.settings["kernel_size"], case.settings["dilation"]
    mask = block_mask(height, width, kernel_size, dilation, torch.device("cuda"))
    return Implementation(
        functools.partial(compiled.compile(flex_attention), block_mask=mask),
        prepare=prepare,
        finish=functools.partial(from_tiles, height=height, width=width),
        detail="tokens in the order of 8x16 tiles, reordering not timed",
        compiles=True,
    )


def self_attention(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor, block_mask: BlockMask) -> Tensor:
    """neighborhood_self_attention, the tokens in rows."""
    ready = reference.qk_norm_rope(qkv, scale, theta_y, theta_x)
    query, key, value = (to_tiles(tensor) for tensor in ready.unbind(3))
    out = flex_attention(query, key, value, block_mask=block_mask, scale=1.0)
    return from_tiles(out, *qkv.shape[1:3])


def build_self_attention(case: Case) -> Implementation:
    height, width = case.shapes["qkv"][1:3]
    mask = block_mask(height, width, case.settings["kernel_size"], 1, torch.device("cuda"))
    return Implementation(
        functools.partial(compiled.compile(self_attention), block_mask=mask),
        detail="one function with qk_norm_rope's reference, into 8x16 tiles and back",
        compiles=True,
    )


CONTESTANTS = [Contestant("flex", PEER, {"na2d": build, "neighborhood_self_attention": build_self_attention})]
