"""How far a result is from the float64 reference, and how far it may be (DESIGN: Numerics)."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import torch

from hdit_kernels import reference

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-12}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; NaN or infinity in `found` gives infinity."""
    found, wanted = found.detach().double(), wanted.detach().double()
    norm = wanted.norm().item()
    error = (found - wanted).norm().item() / norm if norm else (found - wanted).norm().item()
    return error if math.isfinite(error) else math.inf


@contextmanager
def plain():
    """Inside, hdit_kernels.reference computes in its inputs' own dtype: the error that plain PyTorch makes."""
    with mock.patch.object(reference, "_widen", lambda tensor: tensor):
        yield


def allowed(dtype: torch.dtype, plain_error: float) -> float:
    return max(2 * plain_error, FLOOR[dtype])


class Pool:
    """Errors of gradients that nearly cancel, pooled over cases: sqrt(Σ‖err‖² / Σ‖ref‖²)."""

    def __init__(self) -> None:
        self.error = self.reference = 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        self.error += (found.detach().double() - wanted.detach().double()).square().sum().item()
        self.reference += wanted.detach().double().square().sum().item()

    @property
    def relative(self) -> float:
        ratio = math.sqrt(self.error / self.reference) if self.reference else math.sqrt(self.error)
        return ratio if math.isfinite(ratio) else math.inf
