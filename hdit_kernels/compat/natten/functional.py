"""`na1d`, `na2d`, `na3d`, `attention` and `merge_attentions` with the arguments of NATTEN 0.21.7, on na2d.

na1d is na2d on one row. na3d is na2d on planes: a call for each plane of the window, merged by their LSE. So all of it
runs wherever na2d does, and what na2d refuses on a GPU it refuses here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit_kernels import checks
from hdit_kernels import merge_attentions as hdit_merge_attentions
from hdit_kernels import na2d as hdit_na2d
from hdit_kernels.compat.natten import arguments
from hdit_kernels.compat.natten.context import without_effect
from hdit_kernels.compat.natten.unfused import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
)

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "neighborhood_attention_generic",
]

Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...], float]

BACKENDS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")
ATTENTION_BACKENDS = ("cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha")
ATTENTION_SPEED = (
    "backend",
    "q_tile_size",
    "kv_tile_size",
    "backward_q_tile_size",
    "backward_kv_tile_size",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
)


def _make(axes: int) -> Callable[..., Any]:
    name = f"na{axes}d"

    @arguments.outside_autocast
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        *,
        rpb: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        settings = _checked_settings(
            axes,
            query,
            key,
            value,
            additional_keys,
            additional_values,
            *(kernel_size, stride, dilation, is_causal, scale, return_lse, backend),
        )
        if xformers_kwargs:
            raise ValueError(f"xformers_kwargs: expected None, got {checks.shown(xformers_kwargs)}")
        if attention_kwargs:
            _check_attention_kwargs(attention_kwargs)
        _speed_only(
            name,
            backend=backend,
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape,
            backward_kv_splits=backward_kv_splits,
            backward_use_pt_reduction=backward_use_pt_reduction or None,
            run_persistent_kernel=None if run_persistent_kernel is True else run_persistent_kernel,
            kernel_schedule=kernel_schedule,
            torch_compile=torch_compile or None,
        )
        window, strides, steps, causal, scale = settings
        if rpb is not None:
            others = dict(stride=max(strides) > 1, is_causal=any(causal), additional_keys=additional_keys is not None)
            others |= dict(return_lse=return_lse, heads_kv=query.shape != value.shape)
            return _with_biases(name, query, key, value, window, steps, scale, rpb, others)
        return _WINDOWS[axes]((query, key, value, additional_keys, additional_values), settings, return_lse)

    return arguments.named(
        na,
        name,
        f"""{axes}-D neighborhood attention with the arguments of NATTEN 0.21.7.

        query [B, *grid, heads, head_dim], key [B, *grid, heads_kv, head_dim] and value [B, *grid, heads_kv,
        head_dim_v], heads last, heads a multiple of heads_kv; additional_keys and additional_values [B, extra,
        heads_kv, …], seen by every query. Returns out [B, *grid, heads, head_dim_v], and with return_lse lse
        [B, *grid, heads], too. All of it is differentiable. Windows are those of hdit_kernels.na2d.

        backend, tile shapes, backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule,
        torch_compile and what attention_kwargs holds choose among NATTEN's kernels: each is taken and says once, by a
        warning, that it has no effect. rpb, of NATTEN to 0.17, runs in plain PyTorch.

        Raises TypeError, ValueError or NotImplementedError, by the argument's name.""",
    )


@checks.remembered
def _checked_settings(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> Settings:
    """Checks the arguments of na1d, na2d or na3d; returns window, strides, steps, causal axes and scale."""
    window, strides = arguments.per_axis("kernel_size", kernel_size, axes), arguments.per_axis("stride", stride, axes)
    steps, causal = arguments.per_axis("dilation", dilation, axes), arguments.causal_axes(is_causal, axes)
    arguments.check_tensors(axes, query, key, value, additional_keys, additional_values)
    arguments.check_window(f"na{axes}d", query, window, steps)
    if any(s > w for s, w in zip(strides, window, strict=True)):
        raise ValueError(f"stride: expected at most kernel_size {window}, got {strides}")
    checks.boolean("return_lse", return_lse)
    if backend is not None:
        checks.choice("backend", backend, BACKENDS)
    scale = query.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale, above=0)
    return window, strides, steps, causal, scale


# What each number of axes computes: (tensors, settings, return_lse) -> out or (out, lse)


def _row(tensors: Sequence[Any], settings: Settings, return_lse: bool) -> Any:
    query, key, value, *additional = tensors
    (window,), (stride,), (dilation,), (causal,), scale = settings
    rows = (query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
    axes: Any = ((1, window), (1, stride), (1, dilation), (False, causal), scale)
    found: Any = hdit_na2d(*rows, *axes, *additional, return_lse=return_lse)
    return (found[0].squeeze(1), found[1].squeeze(1)) if return_lse else found.squeeze(1)


def _plane(tensors: Sequence[Any], settings: Settings, return_lse: bool) -> Any:
    query, key, value, *additional = tensors
    return hdit_na2d(query, key, value, *settings, *additional, return_lse=return_lse)


def _planes(tensors: Sequence[Any], settings: Settings, return_lse: bool) -> Any:
    """For each place in the window's depth, every plane of queries with the plane of keys that it sees there; with the
    first of them, which each sees, the additional keys.
    """
    query, key, value, *additional = tensors
    (window, *windows), (stride, *strides), (dilation, *steps), (causal, *others), scale = settings
    depth = query.shape[1]
    seen = arguments.window_keys(depth, window, stride, dilation, causal)
    key_planes, value_planes, queries = key.unbind(1), value.unbind(1), query.flatten(0, 1)
    additional = [None if t is None else t.unsqueeze(1).expand(-1, depth, -1, -1, -1).flatten(0, 1) for t in additional]
    outputs, lses = [], []
    for place in range(window):
        there = [place < len(keys) for keys in seen]  # causal windows are cut short at the start
        chosen = [keys[min(place, len(keys) - 1)] for keys in seen]
        # unbind and stack, not an index: its gradient would be summed in no fixed order on a GPU
        keys, values = (
            torch.stack([planes[i] for i in chosen], 1).flatten(0, 1) for planes in (key_planes, value_planes)
        )
        axes: Any = (windows, strides, steps, others, scale)
        out, lse = hdit_na2d(queries, keys, values, *axes, *additional, return_lse=True)
        additional = [None, None]
        out, lse = out.view(*query.shape[:-1], -1), lse.view(query.shape[:-1])
        if not all(there):
            unseen = torch.tensor([not one for one in there], device=lse.device)[:, None, None, None]
            lse = lse.masked_fill(unseen, -math.inf)
        outputs.append(out)
        lses.append(lse)
    merged = hdit_merge_attentions(outputs, lses)
    return merged if return_lse else merged[0]


_WINDOWS = {1: _row, 2: _plane, 3: _planes}


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of query [B, tokens, heads, head_dim] to all keys, in plain PyTorch, for its LSE."""
    wide = arguments.wide_dtype(query.dtype)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.to(wide) * scale, key.to(wide))
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    lse = logits.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", (logits - lse[..., None]).exp(), value.to(wide))
    return out.to(query.dtype), lse.transpose(1, 2)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """Each head `times` times, beside each other."""
    if times == 1:
        return tensor
    sizes = [-1] * tensor.ndim
    return tensor.unsqueeze(-2).expand(*sizes[:-1], times, -1).flatten(-3, -2)


def _with_biases(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    scale: float,
    rpb: Tensor,
    others: dict[str, bool],
) -> Tensor:
    """Relative position biases, which na2d has not: by the two halves."""
    for other, given in others.items():
        if given:
            raise NotImplementedError(f"{name}: rpb is not taken together with {other}")
    qk, av = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}[len(window)]
    wide = arguments.wide_dtype(query.dtype)
    q, k, v = (t.to(wide).movedim(-2, 1) for t in (query, key, value))
    weights = qk(q * scale, k, window, dilation, rpb=rpb).softmax(-1)
    return av(weights, v, window, dilation).movedim(1, -2).to(query.dtype)


# Checks


def _check_attention_kwargs(given: dict[str, Any]) -> None:
    for name in given:
        if name not in ATTENTION_SPEED:
            raise ValueError(f"attention_kwargs: expected some of {', '.join(ATTENTION_SPEED)}, got {name}")
    _speed_only("attention_kwargs", **given)


def _speed_only(where: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            without_effect(f"natten.{where}: {name}")


# Functions


na1d: Callable[..., Any] = _make(1)
na2d: Callable[..., Any] = _make(2)
na3d: Callable[..., Any] = _make(3)


def neighborhood_attention_generic(query: Tensor, *arguments: Any, **options: Any) -> Any:
    """na1d, na2d or na3d, by query's dimensions: 4, 5 or 6."""
    checks.tensor("query", query)
    functions = {4: na1d, 5: na2d, 6: na3d}
    if query.ndim not in functions:
        raise ValueError(f"query: expected 4, 5 or 6 dimensions, got shape {list(query.shape)}")
    return functions[query.ndim](query, *arguments, **options)


@arguments.outside_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to all keys, with the arguments of NATTEN 0.21.7: PyTorch's scaled_dot_product_attention.

    query [B, tokens, heads, head_dim], key [B, keys, heads_kv, head_dim], value [B, keys, heads_kv, head_dim_v].
    return_lse: computed in plain PyTorch, O(tokens · keys) memory. is_causal: as many keys as tokens. Sequences of
    several lengths (seqlens_…) are refused; what steers speed is taken without effect.
    """
    varlen: dict[str, Any] = dict(seqlens_Q=seqlens_Q, seqlens_KV=seqlens_KV, cumulative_seqlen_Q=cumulative_seqlen_Q)
    varlen |= dict(cumulative_seqlen_KV=cumulative_seqlen_KV, max_seqlen_Q=max_seqlen_Q, max_seqlen_KV=max_seqlen_KV)
    for name, given in varlen.items():
        if given is not None:
            raise NotImplementedError(
                f"attention: {name} is not taken: call it for each sequence, or use torch.nn.attention.varlen"
            )
    checks.floating(query=query, key=key, value=value)
    checks.shape("query", query, ["B", "tokens", "heads", "head_dim"])
    arguments.check_pair("key", "value", key, value, query, [query.shape[0], "keys"])
    checks.nonempty("query", query)
    checks.same_dtype(query=query.dtype, key=key.dtype, value=value.dtype)
    checks.boolean("is_causal", is_causal)
    checks.boolean("return_lse", return_lse)
    if is_causal and key.shape[1] != query.shape[1]:
        raise ValueError(f"is_causal: expected as many keys as queries, {query.shape[1]}, got {key.shape[1]}")
    if backend is not None:
        checks.choice("backend", backend, ATTENTION_BACKENDS)
    _speed_only(
        "attention",
        backend=backend,
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction or None,
        run_persistent_kernel=None if run_persistent_kernel is True else run_persistent_kernel,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile or None,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale, above=0)
    times = query.shape[-2] // key.shape[-2]
    key, value = _repeated(key, times), _repeated(value, times)
    if return_lse:
        return _dense(query, key, value, scale, is_causal)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)


def merge_attentions(
    outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """hdit_kernels.merge_attentions with NATTEN's names. torch_compile has no effect.

    NATTEN's use_autograd_fix writes the merged results into the parts, for attention whose LSE has no gradient. Here
    the gradient is the true one, through outputs and LSE; where only the outputs have one it would lack a part, so with
    use_autograd_fix (the default) those are refused.
    """
    out, lse = hdit_merge_attentions(outputs, lse_tensors)
    if use_autograd_fix and torch.is_grad_enabled():
        for i, (output, one) in enumerate(zip(outputs, lse_tensors, strict=True)):
            if output.requires_grad and not one.requires_grad:
                raise ValueError(
                    f"lse_tensors[{i}]: expected a gradient like outputs[{i}]'s, got none. Take it from a function "
                    "that has the gradient of its LSE, such as na2d and attention with return_lse=True"
                )
    return out, lse
