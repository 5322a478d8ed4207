"""Input checks shared by the operators: each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def floating(**tensors: torch.Tensor | None) -> None:
    """Every given tensor is a bfloat16, float16, float32 or float64 tensor, and all lie on one device."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {_dtype(tensor)}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, got one on {tensor.device}"
            )


def same_dtype(**tensors: torch.Tensor | None) -> None:
    """All given tensors have the first one's dtype."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in given[1:]:
        if tensor.dtype != given[0][1].dtype:
            raise TypeError(f"{name}: expected {_dtype(given[0][1])} like {given[0][0]}, got {_dtype(tensor)}")


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


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
