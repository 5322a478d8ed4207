"""Input checks shared by the operators: each error names the argument, what came and what was expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

T = TypeVar("T")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_REMEMBERED = 4096


def floating(**tensors: torch.Tensor | None) -> None:
    """Every given tensor is a bfloat16, float16, float32 or float64 tensor, and all lie on one device."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {_name(tensor.dtype)}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, got one on {tensor.device}"
            )


def same_dtype(**dtypes: torch.dtype | None) -> None:
    """All given dtypes are the first one."""
    given = [(name, dtype) for name, dtype in dtypes.items() if dtype is not None]
    for name, dtype in given[1:]:
        if dtype != given[0][1]:
            raise TypeError(f"{name}: expected {_name(given[0][1])} like {given[0][0]}, got {_name(dtype)}")


def shape(name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """`tensor` has the expected shape; a string stands for a size that is free, by its name.

    >>> shape("scale", torch.zeros(2, 3), ["B", 3])
    """
    sizes = tensor.shape
    if len(sizes) == len(expected):
        for size, wanted in zip(sizes, expected, strict=True):
            if size != wanted and not isinstance(wanted, str):
                break
        else:
            return
    raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(sizes)}")


def require(condition: bool, message: str) -> None:
    """ValueError(message) unless condition holds; message: "argument: expected …, got …"."""
    if not condition:
        raise ValueError(message)


def remembered(check: Callable[..., T]) -> Callable[..., T]:
    """`check`, run once for all calls that are alike, since checks cost more host time than the operator's dispatch.

    Of a tensor `check` may look at shape, dtype and device only. What it returns is kept, an error is not. 7, 7.0 and
    True are not alike, nor are tuples of them.
    """
    known: dict[Hashable, T] = {}

    @functools.wraps(check)
    def call(*arguments: Any) -> T:
        if is_dynamo_compiling():  # which would trace the dictionary
            return check(*arguments)
        key = _key(arguments)
        try:
            return known[key]
        except KeyError:
            has_hash = True
        except TypeError:  # a symbolic size, or an argument that could change
            has_hash = False
        result = check(*arguments)
        if has_hash:
            if len(known) >= MOST_REMEMBERED:
                known.clear()
            known[key] = result
        return result

    return call


def _key(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Equal only for arguments that are alike; without a hash where it can't tell."""
    return tuple([a if a is None or type(a) is int else _what_counts(a) for a in arguments])


def _what_counts(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype, argument.device
    if isinstance(argument, (int, float, torch.dtype)):
        return type(argument), argument
    return _key(argument) if isinstance(argument, (tuple, list)) else [argument]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
