"""`na2d`: the public function, its checks and its registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted
from hdit_kernels.neighborhood_attention.buffers import stats_shape

Settings = tuple[tuple[int, int], tuple[int, int] | None, tuple[int, int], tuple[bool, bool] | None, float, bool]


@overload
def na2d(
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
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def na2d(
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
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def na2d(
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
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def na2d(
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
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighborhood attention, as `natten.na2d`: each query attends to the kernel_size window of keys around it.

    Along an axis of length L with window K, the query at i sees exactly the K keys from clamp(i − K//2, 0, L − K) on,
    so windows at a border move inwards and keep their size; the 2-D window is the product of the two axes.

    Args:
        query: [B, H, W, heads, head_dim], bfloat16, float16 or float32 (float64 takes the reference); any strides whose
            last is 1 are read without a copy, as of key and value. On a GPU head_dim is a multiple of 8, at most 256.
        key, value: [B, H, W, heads_kv, head_dim] and [B, H, W, heads_kv, head_dim_v], the query's dtype. heads_kv
            divides heads: the first heads / heads_kv heads of queries share the first of keys and values, and so on
            (GQA; MQA with 1). On a GPU head_dim_v is a multiple of 8, at most 512.
        kernel_size: window, one number or (rows, columns), any parity; kernel_size · dilation ≤ (H, W).
        stride: queries that share the window of the middle one of them, its group's leader; at most kernel_size (1:
            each its own).
        dilation: the step between the keys of a window; the grid splits into dilation² interleaved ones.
        is_causal: per axis, whether a query sees the keys from i − K + 1 to i, its own, only: fewer than K at the
            first border. With a stride, from leader − K + 1 to i, the leader being the last of its group. None means
            False, as in NATTEN.
        scale: factor of the logits, positive, default head_dim ** -0.5.
        additional_keys, additional_values: [B, extra, heads_kv, head_dim] and [B, extra, heads_kv, head_dim_v], seen by
            every query.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out [B, H, W, heads, head_dim_v] in the query's dtype; with return_lse (out, lse), lse float32 (float64 for
        float64) [B, H, W, heads], natural logarithm. Both are differentiable, to any order; the gradients are
        deterministic. A batch of 0 gives empty results and zero gradients.

        NaN or infinity in a key or value spoils every query that sees it, and no other image or head. On a GPU it may
        spoil further queries around them, that share a tile: up to 48 rows and columns beyond (16 on Hopper), times the
        dilation. In plain PyTorch it spoils no others.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Source: Hassani et al. 2023, arXiv:2204.07143 and 2209.15001 (dilation); HDiT section 4.2. Under autocast it runs in
    the autocast dtype.
    """
    tensors: tuple[Any, ...] = (query, key, value, additional_keys, additional_values)
    autocast = registration.autocast_dtype(query)
    if isinstance(scale, Tensor):
        scale = checks.number("scale", scale.item() if scale.numel() == 1 else scale.tolist())
    settings = _checked_settings(*tensors, kernel_size, stride, dilation, is_causal, scale, return_lse, autocast)
    if autocast is not None:
        tensors = tuple([None if t is None else registration.cast(t, autocast) for t in tensors])
    return _na2d(*tensors, *settings)


@checks.remembered
def _checked_settings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool] | None,
    scale: float | None,
    return_lse: bool,
    autocast: torch.dtype | None,
) -> Settings:
    """Checks the arguments of `na2d`; returns those after the tensors as the operators take them."""
    checks.boolean("return_lse", return_lse)
    tensors = dict(query=query, key=key, value=value)
    if additional_keys is not None and additional_values is not None:
        tensors |= dict(additional_keys=additional_keys, additional_values=additional_values)
    elif additional_keys is not None or additional_values is not None:
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{missing}: expected additional_keys and additional_values or neither, got one")
    checks.floating(**tensors)
    checks.shape("query", query, ["B", "H", "W", "heads", "head_dim"])
    checks.shape("key", key, [*query.shape[:3], "heads_kv", query.shape[-1]])
    checks.shape("value", value, [*key.shape[:-1], "head_dim_v"])
    checks.nonempty("query", query)
    checks.nonempty("value", value)
    if query.shape[3] % key.shape[3]:
        raise ValueError(f"key: expected heads_kv that divide {query.shape[3]} heads, got {key.shape[3]}")
    window, strides = checks.pair("kernel_size", kernel_size), checks.pair("stride", stride)
    steps, causal = checks.pair("dilation", dilation), _causal(is_causal)
    check_window(query.shape[1:3], window, steps)
    if strides[0] > window[0] or strides[1] > window[1]:
        raise ValueError(f"stride: expected at most kernel_size {window}, got {strides}")
    if additional_keys is not None and additional_values is not None:
        expected = [query.shape[0], "extra", *key.shape[3:]]
        checks.shape("additional_keys", additional_keys, expected)
        checks.shape("additional_values", additional_values, [*additional_keys.shape[:-1], value.shape[-1]])
    if query.is_cuda:
        check_head_dims(query.shape[-1], value.shape[-1])
    checks.same_dtype(**{n: registration.cast_dtype(t.dtype, autocast) for n, t in tensors.items()})
    scale = query.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale, above=0)
    # two lists less to dispatch take a microsecond less
    return window, None if strides == (1, 1) else strides, steps, causal if any(causal) else None, scale, return_lse


def _causal(value: object) -> tuple[bool, bool]:
    """One bool for both axes or one for each; None, as NATTEN takes it, means False."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (False if value is None else value,) * 2
    if len(both) != 2 or not all(isinstance(v, bool) for v in both):
        raise TypeError(f"is_causal: expected True or False or two of them (rows, columns), got {checks.shown(value)}")
    return both


def check_window(grid: Sequence[int], window: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> None:
    """kernel_size · dilation fits into the grid (H, W)."""
    if window[0] * dilation[0] > grid[0] or window[1] * dilation[1] > grid[1]:
        raise ValueError(
            f"kernel_size: expected kernel_size · dilation at most the grid {tuple(grid)}, "
            f"got kernel_size {window} with dilation {dilation}"
        )


def check_head_dims(head_dim: int, head_dim_v: int) -> None:
    """What the kernels take."""
    if head_dim % 8 != 0 or head_dim > 256:
        raise ValueError(f"head_dim: expected a multiple of 8, at most 256, on a GPU, got {head_dim}")
    if head_dim_v % 8 != 0 or head_dim_v > 512:
        raise ValueError(
            f"value: expected a head_dim that is a multiple of 8, at most 512, on a GPU, got {head_dim_v}. Pad it with "
            "zeros, or split it and call na2d for each part"
        )


def _reference_forward(
    query, key, value, add_k, add_v, window, stride, dilation, causal, scale, return_lse, save_stats
):
    out, lse = reference.na2d(
        query, key, value, window, stride or (1, 1), dilation, causal or (False, False), scale, add_k, add_v
    )
    return [out] + return_lse * [lse] + save_stats * [softmax_stats(lse, query.dtype)]


def softmax_stats(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernels keep of the softmax (see dispatch.forward_launch); the reference keeps it in one number."""
    stats = lse.new_zeros(stats_shape(lse.shape, dtype))
    stats[0] = lse / math.log(2)
    return stats


def _reference_backward(
    dout, dlse, query, key, value, add_k, add_v, out, stats, window, stride, dilation, causal, scale
):
    gradients = reference.na2d_backward(
        dout, dlse, query, key, value, window, stride or (1, 1), dilation, causal or (False, False), scale, add_k, add_v
    )
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


def _fake_forward(query, key, value, add_k, add_v, window, stride, dilation, causal, scale, return_lse, save_stats):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    results = [query.new_empty((*query.shape[:-1], value.shape[-1]))]
    if return_lse:
        results.append(query.new_empty(query.shape[:-1], dtype=wide))
    if save_stats:
        results.append(query.new_empty(stats_shape(query.shape[:-1], query.dtype), dtype=wide))
    return results


def _fake_backward(dout, dlse, query, key, value, add_k, add_v, out, stats, window, stride, dilation, causal, scale):
    return tuple(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in (query, key, value, add_k, add_v))


def flops_forward(query: Any, key: Any, value: Any, add_k: Any, add_v: Any, window: Sequence[int], *_: Any) -> int:
    """Of q·k and p·v: 2 · (head_dim + head_dim_v) a query and key that it sees; windows count whole if causal, too."""
    return 2 * _pairs(query, add_k, window) * (query[-1] + value[-1])


def _pairs(query: Any, add_k: Any, window: Sequence[int]) -> int:
    """Of queries and keys: B·H·W·heads · (Kh·Kw + extra)."""
    return math.prod(query[:-1]) * (window[0] * window[1] + (add_k[1] if add_k else 0))


def _flops_backward(dout, dlse, query, key, value, add_k, add_v, out, stats, window, *_):
    """Of q·k, dq and dk; dout·v and dv."""
    return 2 * _pairs(query, add_k, window) * (3 * query[-1] + 2 * value[-1])


def kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels.neighborhood_attention import dispatch

    return dispatch


_forward = registration.define(
    "na2d_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, int[] kernel_size, "
    "int[]? stride, int[] dilation, bool[]? is_causal, float scale, bool return_lse, "
    "bool save_stats) -> Tensor[]",
    reference=_reference_forward,
    launcher=lambda: kernels().na2d_forward,
    fake=_fake_forward,
    flops=flops_forward,
)
_backward = registration.define(
    "na2d_backward",
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor out, Tensor softmax_stats, "
    "int[] kernel_size, int[]? stride, int[] dilation, bool[]? is_causal, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    launcher=lambda: kernels().na2d_backward,
    fake=_fake_backward,
    flops=_flops_backward,
)


def _gradients(cotangents: Any, tensors: Any, saved: Any, settings: Any, needed: tuple[bool, ...]) -> Any:
    dout, dlse = cotangents if len(cotangents) == 2 else (*cotangents, None)
    out, stats = saved
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = wanted(_backward(dout, dlse, *tensors, out, stats, *settings[:-1]), needed)
    return gradients if tensors[3] is not None else (*gradients[:3], None, None)


def _plain(query, key, value, add_k, add_v, window, stride, dilation, causal, scale, return_lse):
    out, lse = reference.na2d(
        query, key, value, window, stride or (1, 1), dilation, causal or (False, False), scale, add_k, add_v
    )
    return (out, lse) if return_lse else out


_na2d = differentiable(_plain, forward=_forward, backward=_gradients, inputs=5, extras=1)
