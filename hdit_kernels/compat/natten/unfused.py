"""The two halves of neighborhood attention as NATTEN had them to 0.17, in plain PyTorch: logits, and weights · values.

Heads first, [B, heads, *grid, head_dim], as theirs. Each gathers every window, K values for each token and axis, so
memory is O(tokens · window · head_dim): right for old code and for relative position biases, not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdit_kernels import checks
from hdit_kernels.compat.natten import arguments


def _make_qk(axes: int) -> Callable[..., Tensor]:
    name = f"na{axes}d_qk"

    @arguments.outside_autocast
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        additional_keys: Tensor | None = None,
        is_causal: bool | Sequence[bool] | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        checks.floating(query=query, key=key)
        checks.shape("query", query, ["B", "heads", *arguments.AXES[axes], "head_dim"])
        checks.shape("key", key, query.shape)
        checks.same_dtype(query=query.dtype, key=key.dtype)
        window, steps = _window(name, query, axes, kernel_size, dilation, is_causal, additional_keys=additional_keys)
        wide = arguments.wide_dtype(query.dtype)
        logits = torch.einsum("b...d,b...kd->b...k", query.to(wide), _gather(key.to(wide), window, steps))
        if rpb is not None:
            checks.floating(query=query, rpb=rpb)
            checks.shape("rpb", rpb, [query.shape[1], *(2 * w - 1 for w in window)])
            logits = logits + _biases(rpb.to(wide), query.shape[2:-1], window, steps)
        return logits.to(query.dtype)

    return arguments.named(
        qk,
        name,
        f"""The logits of {axes}-D neighborhood attention, unscaled: query and key [B, heads, *grid, head_dim] ->
        [B, heads, *grid, window], the window's keys in order, columns fastest. rpb [heads, 2·K − 1 for each axis]: a
        bias by where the key lies beside the query. is_causal and additional_keys are refused.""",
    )


def _make_av(axes: int) -> Callable[..., Tensor]:
    name = f"na{axes}d_av"

    @arguments.outside_autocast
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        additional_values: Tensor | None = None,
        is_causal: bool | Sequence[bool] | None = False,
    ) -> Tensor:
        checks.floating(attn=attn, value=value)
        checks.shape("value", value, ["B", "heads", *arguments.AXES[axes], "head_dim"])
        checks.same_dtype(attn=attn.dtype, value=value.dtype)
        window, steps = _window(
            name, value, axes, kernel_size, dilation, is_causal, additional_values=additional_values
        )
        keys = 1
        for size in window:
            keys *= size
        checks.shape("attn", attn, [*value.shape[:-1], keys])
        wide = arguments.wide_dtype(value.dtype)
        out = torch.einsum("b...k,b...kd->b...d", attn.to(wide), _gather(value.to(wide), window, steps))
        return out.to(value.dtype)

    return arguments.named(
        av,
        name,
        f"""Values of {axes}-D windows, weighted: attn [B, heads, *grid, window] and value [B, heads, *grid, head_dim]
        -> [B, heads, *grid, head_dim]. is_causal and additional_values are refused.""",
    )


def _window(
    name: str, tensor: Tensor, axes: int, kernel_size: Any, dilation: Any, is_causal: Any, **additional: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    window = arguments.per_axis("kernel_size", kernel_size, axes)
    steps = arguments.per_axis("dilation", dilation, axes)
    arguments.check_window(name, tensor, window, steps, heads_first=True)
    refused = [n for n, value in additional.items() if value is not None]
    if any(arguments.causal_axes(is_causal, axes)):
        refused.append("is_causal")
    if refused:
        raise NotImplementedError(f"{name}: {refused[0]} is not taken; natten.na{axes}d takes it (heads last)")
    return window, steps


def _gather(tensor: Tensor, window: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """[B, heads, *grid, C] -> [B, heads, *grid, window, C]."""
    axes = len(window)
    index: list[Any] = []
    for axis, (size, step) in enumerate(zip(window, dilation, strict=True)):
        keys = torch.tensor(arguments.window_keys(tensor.shape[2 + axis], size, 1, step, False), device=tensor.device)
        index.append(_along(keys, axis, axes))
    return tensor[(slice(None), slice(None), *index)].flatten(2 + axes, 1 + 2 * axes)


def _biases(rpb: Tensor, grid: Sequence[int], window: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """[heads, *grid, window]: of each axis, the entry K − 1 + (key − query) / dilation."""
    index: list[Any] = []
    for axis, (length, size, step) in enumerate(zip(grid, window, dilation, strict=True)):
        keys = torch.tensor(arguments.window_keys(length, size, 1, step, False), device=rpb.device)
        places = (keys - torch.arange(length, device=rpb.device)[:, None]) // step + size - 1
        index.append(_along(places, axis, len(window)))
    return rpb[(slice(None), *index)].flatten(1 + len(window))


def _along(table: Tensor, axis: int, axes: int) -> Tensor:
    """[length, K] as dimensions `axis` and `axes + axis` of 2 · axes."""
    shape = [1] * (2 * axes)
    shape[axis], shape[axes + axis] = table.shape
    return table.view(shape)


na1d_qk, na1d_av = _make_qk(1), _make_av(1)
na2d_qk, na2d_av = _make_qk(2), _make_av(2)
na3d_qk, na3d_av = _make_qk(3), _make_av(3)


# Names of 0.14


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk(query, key, kernel_size, dilation)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


natten1dav, natten2dav = na1d_av, na2d_av
