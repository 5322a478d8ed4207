"""What the launchers of either backend allocate, and how inputs must lie for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def stats_shape(tokens: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Of the statistics of tokens [B, H, W, heads]."""
    return (2 if dtype == torch.float32 else 1, *tokens)


def empty_results(
    query: Tensor, return_lse: bool, save_stats: bool, value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and statistics, to be filled; what nobody asked for is something that a kernel can be given.

    value_dim: the head_dim of out, where it may differ from the query's.
    """
    tokens, nothing = query.shape[:-1], _nothing(query.device)
    lse = nothing.new_empty(tokens) if return_lse else nothing
    stats = nothing.new_empty(stats_shape(tokens, query.dtype)) if save_stats else nothing
    if value_dim is not None:
        return query.new_empty((*tokens, value_dim)), lse, stats
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse, stats


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)  # once, since even this takes microseconds


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
