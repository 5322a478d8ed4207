"""How right a kernel is: its error beside the float64 reference and plain PyTorch's, and memory that shows what a
kernel left unwritten. For tests and benchmarks, ours and those of whoever builds on the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hdit_kernels import reference

# The error that any result may have, relative to the norm of what is right.
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-12}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; NaN or infinity in `found` gives infinity."""
    found, wanted = found.detach().double(), wanted.detach().double()
    norm, error = wanted.norm().item(), (found - wanted).norm().item()
    ratio = error / norm if norm else error
    return ratio if math.isfinite(ratio) else math.inf


def allowed(dtype: torch.dtype, plain_error: float) -> float:
    """The error bar of a result in `dtype`: twice the error of plain PyTorch in that dtype, and at least FLOOR."""
    return max(2 * plain_error, FLOOR[dtype])


class Pool:
    """Errors of gradients that nearly cancel, pooled over cases: sqrt(Σ‖error‖² / Σ‖wanted‖²)."""

    def __init__(self) -> None:
        self.error = self.wanted = 0.0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        self.error += (found.detach().double() - wanted.detach().double()).square().sum().item()
        self.wanted += wanted.detach().double().square().sum().item()

    @property
    def relative(self) -> float:
        ratio = math.sqrt(self.error / self.wanted) if self.wanted else math.sqrt(self.error)
        return ratio if math.isfinite(ratio) else math.inf


@contextmanager
def plain() -> Iterator[None]:
    """Inside, hdit_kernels.reference computes in its inputs' own dtype: the error that plain PyTorch makes."""
    with mock.patch.object(reference, "_widen", lambda tensor: tensor):
        yield


@contextmanager
def large_tiles(device: torch.device) -> Iterator[None]:
    """na2d's reference is a Python loop over tiles of queries: fewer and larger ones cost less time on a GPU."""
    with mock.patch.object(reference, "TILE", 32 if device.type == "cuda" else reference.TILE):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, floating-point buffers that are allocated empty start as NaN: an element that no kernel wrote is seen."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned_buffer(*args: Any, **kwargs: Any) -> Tensor:
            buffer = allocate(*args, **kwargs)
            return buffer.fill_(math.nan) if buffer.is_floating_point() else buffer

        return poisoned_buffer

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def poison_freed_memory(like: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Frees buffers of these shapes full of NaN, which the caching allocator hands out next: for code that allocates
    out of `poisoned`'s sight.
    """
    buffers = [torch.full(t.shape, math.nan, dtype=dtype, device=t.device) for t in like]
    if buffers and buffers[0].is_cuda:
        torch.cuda.synchronize(buffers[0].device)
