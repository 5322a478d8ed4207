"""What NATTEN's functions are given: checks of one to three axes, and what a window sees."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdit_kernels import checks, registration

AXES = {1: ("length",), 2: ("H", "W"), 3: ("depth", "H", "W")}


def named(function: Callable[..., Any], name: str, doc: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = textwrap.dedent(doc)
    return function


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The tensors in the autocast dtype if autocast is on, and autocast off inside, as for hdit_kernels' operators."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        first: Any = given[0] if given else next(iter(named.values()), None)
        dtype = registration.autocast_dtype(first)
        if dtype is None:
            return function(*given, **named)
        given = tuple([registration.cast(a, dtype) if _float(a) else a for a in given])
        named = {name: registration.cast(a, dtype) if _float(a) else a for name, a in named.items()}
        with torch.autocast(first.device.type, enabled=False):
            return function(*given, **named)

    return call


def _float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(axes: int, query: Any, key: Any, value: Any, additional_keys: Any, additional_values: Any) -> None:
    tensors = dict(query=query, key=key, value=value)
    additional = dict(additional_keys=additional_keys, additional_values=additional_values)
    missing = [name for name, given in additional.items() if given is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]}: expected additional_keys and additional_values or neither, got one")
    if not missing:
        tensors |= additional
    checks.floating(**tensors)
    checks.shape("query", query, ["B", *AXES[axes], "heads", "head_dim"])
    check_pair("key", "value", key, value, query, query.shape[:-2])
    if not missing:
        check_pair(
            "additional_keys", "additional_values", additional_keys, additional_values, query, [query.shape[0], "extra"]
        )
        for name, given, beside in (
            ("additional_keys", additional_keys, key),
            ("additional_values", additional_values, value),
        ):
            checks.shape(name, given, [*given.shape[:2], *beside.shape[-2:]])
    checks.nonempty("query", query)
    checks.same_dtype(**{name: t.dtype for name, t in tensors.items()})


def check_pair(
    key_name: str, value_name: str, key: Tensor, value: Tensor, query: Tensor, tokens: Sequence[int | str]
) -> None:
    """Keys and values: one number of tokens and of heads, which divides the queries'."""
    checks.shape(key_name, key, [*tokens, "heads_kv", query.shape[-1]])
    checks.shape(value_name, value, [*key.shape[:-1], "head_dim_v"])
    checks.nonempty(value_name, value, value.ndim - 2)
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"{key_name}: expected heads_kv that divide {query.shape[-2]} heads, got {key.shape[-2]}")


def per_axis(name: str, value: Any, axes: int) -> tuple[int, ...]:
    """One integer of at least 1 for all axes, or one for each."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name}: expected one integer or {axes}, one for each axis, got {checks.shown(value)}")
    return tuple([checks.integer(name, v) for v in values])


def causal_axes(value: Any, axes: int) -> tuple[bool, ...]:
    """One bool for all axes, or one for each; None means False."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (False if value is None else value,) * axes
    if len(values) != axes or not all(isinstance(v, bool) for v in values):
        expected = f"True or False, or {axes} of them, one for each axis"
        raise TypeError(f"is_causal: expected {expected}, got {checks.shown(value)}")
    return values


def check_window(
    name: str, tensor: Tensor, window: tuple[int, ...], dilation: tuple[int, ...], heads_first: bool = False
) -> None:
    """kernel_size · dilation fits into the grid; where it would in the other layout, the error says so."""
    axes = len(window)

    def fits(grid: Sequence[int]) -> bool:
        return all(w * d <= length for length, w, d in zip(grid, window, dilation, strict=True))

    heads_last_grid, heads_first_grid = tensor.shape[1 : 1 + axes], tensor.shape[2 : 2 + axes]
    grid, other = (heads_first_grid, heads_last_grid) if heads_first else (heads_last_grid, heads_first_grid)
    if fits(grid):
        return
    message = (
        f"kernel_size: expected kernel_size · dilation at most the grid {tuple(grid)}, "
        f"got kernel_size {window} with dilation {dilation}"
    )
    if fits(other):
        sizes = ", ".join(AXES[axes])
        first, last = f"[B, heads, {sizes}, head_dim]", f"[B, {sizes}, heads, head_dim]"
        came, wanted, move = (last, first, "(-2, 1)") if heads_first else (first, last, "(1, -2)")
        message += (
            f". {list(tensor.shape)} looks like {came}; {name} takes {wanted}: tensor.movedim{move} makes it that"
        )
    raise ValueError(message)


def window_keys(length: int, window: int, stride: int, dilation: int, causal: bool) -> list[list[int]]:
    """The keys that each query sees along one axis, as `reference.windows` has them, in Python's integers, which
    torch.compile takes for constants.
    """
    found = []
    for query in range(length):
        residue, place = query % dilation, query // dilation
        size, group = len(range(residue, length, dilation)), place // stride * stride
        if causal:
            leader = min(group + stride - 1, size - 1)
            keys = range(max(leader - window + 1, 0), place + 1)
        else:
            leader = min(group + stride // 2, size - 1)
            start = min(max(leader - window // 2, 0), size - window)
            keys = range(start, start + window)
        found.append([residue + key * dilation for key in keys])
    return found
