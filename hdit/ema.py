"""An exponential moving average of a model's weights, with a warm-up of its decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hdit_kernels import checks


def ema_decay(step: int, power: float = 0.75, max_value: float = 0.9999) -> float:
    """The decay to use at update `step` (counted from 0): 1 - (1 + step)**-power, at most max_value.

    It starts at 0, so that the average forgets the untrained weights. 0.75 and 0.9999 are k-diffusion's for HDiT.
    Raises TypeError or ValueError if step or power is below 0, or max_value is outside [0, 1].
    """
    checks.integer("step", step, 0, 2**63 - 1)
    checks.number("power", power, at_least=0)
    checks.number("max_value", max_value, at_least=0, at_most=1)
    return min(max_value, 1 - (1 + step) ** -power)


@torch.no_grad()
def ema_update(model: nn.Module, averaged_model: nn.Module, decay: float | Tensor) -> None:
    """averaged <- decay * averaged + (1 - decay) * model, in place, for every parameter; buffers are copied, and so are
    parameters of integers, as quantized layers have.

    decay: from 0 to 1; or a float64 tensor of one number, whose value is not looked at (for a captured
    step). Raises ValueError if the two models don't have the same parameters and buffers, of the same shapes, dtypes
    and devices; TypeError or ValueError on a decay outside [0, 1].
    """
    if isinstance(decay, Tensor):
        checks.shape("decay", decay, [])
    else:
        checks.number("decay", decay, at_least=0, at_most=1)
    parameters, buffers = _tensors("model", model)
    averaged, averaged_buffers = _tensors("averaged_model", averaged_model)
    _check_alike(parameters | buffers, averaged | averaged_buffers)
    names = [name for name, tensor in averaged.items() if tensor.is_floating_point() or tensor.is_complex()]
    if names:
        weight: Any = [(1 - decay).float()] * len(names) if isinstance(decay, Tensor) else 1 - decay
        torch._foreach_lerp_([averaged[name] for name in names], [parameters[name] for name in names], weight)
    copied, sources = averaged | averaged_buffers, parameters | buffers
    for name in copied.keys() - names:
        copied[name].copy_(sources[name])


def _tensors(argument: str, model: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {checks.shown(model)}")
    return dict(model.named_parameters()), dict(model.named_buffers())


def _check_alike(tensors: dict[str, Tensor], averaged: dict[str, Tensor]) -> None:
    names = sorted(tensors.keys() ^ averaged.keys())
    if names:
        raise ValueError(f"averaged_model: expected the same parameters and buffers as model has, differs in {names}")
    for name, tensor in tensors.items():
        other = averaged[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype or other.device != tensor.device:
            what = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (tensor, other)]
            raise ValueError(f"averaged_model: expected {name} to be as in model, {what[0]}, got {what[1]}")
