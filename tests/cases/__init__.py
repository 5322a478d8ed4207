"""Random cases of every operator, for the GPU suite: tests/cases/<family>.py lists `OPERATORS`, name -> generator."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One call of an operator and what it must equal.

    tensors: the inputs by the public function's argument names, CPU float32 or narrower, some non-contiguous; call and
    reference take them as keywords (plus whatever settings they hold) and return a tensor or a tuple of tensors.
    frozen: inputs without a gradient. pooled: inputs whose gradient nearly cancels (a sum over tokens, the softmax of
        two keys), so its error is pooled over cases.
    """

    description: str
    tensors: dict[str, Tensor]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    frozen: frozenset[str] = frozenset()
    pooled: frozenset[str] = frozenset()


Generator = Callable[[random.Random, torch.Generator, torch.dtype, bool], Case]
"""(sizes, values, activation dtype, whether parameters are float32 beside it) -> Case."""


def turn(dtype: torch.dtype, mixed: bool = False) -> int:
    """Which share of a family's compile keys a kind of dtypes has in this run: one more each, and with each seed.

    Compiling is most of the GPU suite's time, so a kind has a half or a quarter of them; four seeds in a row have all.
    """
    kinds = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.bfloat16, True)]
    return int(os.environ["HDIT_TEST_SEED"]) + kinds.index((dtype, mixed))


def strided(tensor: Tensor, sizes: random.Random) -> Tensor:
    """The same values, at random in a layout with gaps or with two leading dimensions swapped; the last stride
    stays 1.
    """
    kind = sizes.randrange(3)
    if kind == 0 or tensor.ndim < 2:
        return tensor
    if kind == 1 or tensor.ndim < 3:
        wide = torch.full(
            (*tensor.shape[:-1], tensor.shape[-1] + 8 * sizes.randint(1, 3)), float("nan"), dtype=tensor.dtype
        )
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)
