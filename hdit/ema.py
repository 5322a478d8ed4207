"""An exponential moving average of a model's weights, with a warm-up of its decay."""

from __future__ import annotations

import torch
from torch import nn


def ema_decay(step: int, power: float = 0.75, max_value: float = 0.9999) -> float:
    """The decay to use at update `step` (counted from 0): 1 - (1 + step)**-power, at most max_value.

    It starts at 0, so that the average forgets the untrained weights. 0.75 and 0.9999 are k-diffusion's for HDiT.
    """
    return min(max_value, 1 - (1 + step) ** -power)


@torch.no_grad()
def ema_update(model: nn.Module, averaged_model: nn.Module, decay: float) -> None:
    """averaged <- decay * averaged + (1 - decay) * model, in place, for every parameter; buffers are copied.

    Raises ValueError if the two models don't have the same parameters and buffers.
    """
    parameters, averaged = dict(model.named_parameters()), dict(averaged_model.named_parameters())
    buffers, averaged_buffers = dict(model.named_buffers()), dict(averaged_model.named_buffers())
    different = (parameters.keys() ^ averaged.keys()) | (buffers.keys() ^ averaged_buffers.keys())
    if different:
        raise ValueError(f"model and averaged_model must have the same parameters, but differ in {sorted(different)}")
    names = list(parameters)
    torch._foreach_lerp_([averaged[name] for name in names], [parameters[name] for name in names], 1 - decay)
    for name, buffer in buffers.items():
        averaged_buffers[name].copy_(buffer)
