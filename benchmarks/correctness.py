"""Whether a contestant computes what it should: its output and every gradient beside the reference in float64.

The error is ‖found − wanted‖ / ‖wanted‖. It may be twice the error that the reference makes as plain PyTorch in the
case's own dtype, and FLOOR in any case. Rounding is not judged more finely than that: the tests do, for our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Implementation, Tensors
from hdit_kernels import testing

# That of float32 is ten times DESIGN's 1e-6, room for peers that make float32 products of three tf32 ones.
FLOOR = testing.FLOOR | {torch.float32: 1e-5}
OUT = "out"


class Error(NamedTuple):
    found: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.found <= self.allowed


@dataclass(frozen=True)
class Truth:
    """A case's inputs and what comes of them.

    wanted: the output (OUT) and the gradients ("query.grad", …) in float64. allowed: the error that each may have.
    """

    case: Case
    tensors: Tensors
    dout: Tensor
    wanted: Tensors
    allowed: dict[str, float]


def truth(case: Case, device: torch.device, seed: int, function: Callable[..., Tensor] | None = None) -> Truth:
    """Draws a case's inputs and computes what its reference, or another function of them, gives.

    The output's gradient is random plus the output itself, so that gradients summed over tokens don't cancel. It is
    contiguous, as the one that is timed: torch 2.11's cuDNN attention takes it as laid out in memory like that of the
    shape's first backward pass, and gave wrong gradients for another layout (seen on an H100).
    """
    function = function or case.reference
    tensors = case.inputs(device, seed)
    exact = {name: t.double() for name, t in tensors.items()}
    with testing.large_tiles(device):
        with torch.no_grad():
            out = function(**exact)
        dout = (torch.randn_like(out) + out).to(case.dtype).contiguous()
        wanted = _both_ways(case, function, exact, dout)
        del exact, out
        narrow = {name: t if name in case.frozen else t.to(case.dtype) for name, t in tensors.items()}
        try:
            with testing.plain():
                found = _both_ways(case, function, narrow, dout)
            errors = {name: testing.relative_error(t, wanted[name]) for name, t in found.items()}
        except torch.OutOfMemoryError:
            errors = dict.fromkeys(wanted, 0.0)
    allowed = {name: max(2 * error, FLOOR[case.dtype]) for name, error in errors.items()}
    return Truth(case, tensors, dout, wanted, allowed)


def check(implementation: Implementation, truth: Truth) -> dict[str, Error]:
    """By output and gradient, of a forward and backward pass; the output also of a forward pass without autograd."""
    case, tensors = truth.case, truth.tensors

    def function(**inputs: Tensor) -> Tensor:
        return implementation.finish(implementation.function(**implementation.prepare(inputs)))

    testing.poison_freed_memory(truth.wanted.values(), case.dtype)
    found = _both_ways(case, function, tensors, truth.dout)
    errors = {
        name: Error(testing.relative_error(t, truth.wanted[name]), truth.allowed[name]) for name, t in found.items()
    }
    del found
    testing.poison_freed_memory([truth.wanted[OUT]], case.dtype)
    with torch.no_grad():
        alone = testing.relative_error(function(**tensors), truth.wanted[OUT])
    errors[OUT] = Error(max(errors[OUT].found, alone), errors[OUT].allowed)
    return errors


def _both_ways(case: Case, function: Callable[..., Tensor], tensors: Tensors, dout: Tensor) -> Tensors:
    """The output and the gradients, by name."""
    leaves = {name: t.detach().requires_grad_(name not in case.frozen) for name, t in tensors.items()}
    out = function(**leaves)
    learned = [name for name in leaves if name not in case.frozen]
    gradients = torch.autograd.grad(out, [leaves[name] for name in learned], dout.to(out.dtype))
    found = {f"{name}.grad": t for name, t in zip(learned, gradients, strict=True)}
    return {OUT: out.detach()} | found
