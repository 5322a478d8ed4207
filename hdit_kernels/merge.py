"""`merge_attentions`: results over disjoint sets of keys, made one. Plain PyTorch on any device; no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hdit_kernels import checks


def merge_attentions(outputs: Sequence[Tensor], lse: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from several of the same queries over disjoint sets of keys: what their union would have given.

    A window's result beside that of text or register tokens, or the parts of a sequence that lies on several devices.
    Each output is weighted by exp(lse), its share of the softmax's denominator.

    Args:
        outputs: one or more, all [..., heads, head_dim] of one shape and dtype.
        lse: as many, [..., heads], float32 (float64 for float64): the natural logarithm of each softmax's denominator,
            as na2d(..., return_lse=True) gives it. −inf says that a query saw no key of this part, whose output is then
            not looked at.

    Returns:
        (out, lse) of all keys: out in the outputs' dtype, summed in float32 and rounded once, and lse as it came.
        Where all lse are −inf, out is 0 and lse −inf. Both are differentiable, to any order, in outputs and lse; for
        the gradients of query and key the lse must come from a function that has the gradient of it, too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or count.
    """
    outputs, lse = list(_sequence("outputs", outputs)), list(_sequence("lse", lse))
    _check(outputs, lse)
    stacked = torch.stack(lse)
    # The largest cancels from the results, so it takes no part in the gradient; 0 stands for −inf, which would be NaN.
    largest = stacked.detach().amax(0)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    weights = (stacked - largest).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    shares = weights / total
    merged = sum(
        share[..., None] * output.to(share.dtype).masked_fill((one == -math.inf)[..., None], 0)
        for share, output, one in zip(shares, outputs, lse, strict=True)
    )
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), torch.where(nothing, -math.inf, largest + total.log())


def _sequence(name: str, value: object) -> Sequence[Tensor]:
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name}: expected a list of one tensor or more, got {checks.shown(value)}")
    return value


def _check(outputs: list[Tensor], lse: list[Tensor]) -> None:
    if len(outputs) != len(lse):
        raise ValueError(f"lse: expected one for each of {len(outputs)} outputs, got {len(lse)}")
    named_outputs = {f"outputs[{i}]": t for i, t in enumerate(outputs)}
    named_lse = {f"lse[{i}]": t for i, t in enumerate(lse)}
    checks.floating(**named_outputs, **named_lse)
    checks.same_dtype(**{name: t.dtype for name, t in named_outputs.items()})
    first = outputs[0]
    if first.ndim < 2:
        raise ValueError(f"outputs[0]: expected shape [..., heads, head_dim], got {list(first.shape)}")
    for name, output in named_outputs.items():
        checks.shape(name, output, first.shape)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for name, one in named_lse.items():
        checks.shape(name, one, first.shape[:-1])
        if one.dtype != wide:
            dtype = str(wide).removeprefix("torch.")
            raise TypeError(f"{name}: expected {dtype}, got {str(one.dtype).removeprefix('torch.')}")
