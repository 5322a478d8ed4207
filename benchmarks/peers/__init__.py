"""What we compare with: other models, and other implementations of the same operators behind one small interface.

A contestant is one way to compute operators: ours, a library's, a compiler's. peers/<name>.py lists its CONTESTANTS;
each builds, for a case, an Implementation: a function of tensors. Which of them can run here, Peer.available() says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.timing import one_line

if TYPE_CHECKING:
    from benchmarks.kernels import Case

Tensors = dict[str, Tensor]

MODULES = ("ours", "natten", "flex", "sdpa", "liger", "quack", "compiled", "eager")


class Unsupported(Exception):
    """A contestant can't run this case; the message says why, in a few words."""


@dataclass(frozen=True)
class Peer:
    """Something that may be missing.

    module: what is imported, None if nothing is needed beside torch. install: how to get it. check: a further reason
    against it on this machine, None for none.
    """

    name: str
    module: str | None
    install: str
    needs_gpu: bool = False
    check: Callable[[], str | None] = lambda: None

    def available(self) -> str | None:
        """Why it can't run here, in one line; None if it can."""
        return _available(self)


@functools.cache
def _available(peer: Peer) -> str | None:
    reasons = []
    if peer.needs_gpu and not torch.cuda.is_available():
        reasons.append("it needs a GPU")
    if peer.module is not None and importlib.util.find_spec(peer.module) is None:
        reasons.append(f"{peer.name} is not installed: {peer.install}")
    if reasons:
        return "; ".join(reasons)
    try:
        if peer.module is not None:
            importlib.import_module(peer.module)
        return peer.check()
    except Exception as error:  # a broken installation can raise anything, and must not end the run
        return f"{peer.name} can't be imported ({one_line(error, 120)}): {peer.install}"


@dataclass(frozen=True)
class Implementation:
    """How a contestant computes a case.

    function: the timed one; takes its own tensors by name and returns the output.
    prepare: from the case's tensors to its own (another layout, say), differentiable; finish: back from its output to
        the case's. Neither is timed.
    reference: where it computes another function than the case's reference does; takes the case's tensors. check_on:
        the case that it is checked on, where the case itself would be too large for that.
    tune: gives its fastest variant for its own tensors. at: itself for another grid; without it, the contestant builds
        it anew.
    overwrites: its backward writes over its own tensors, so they are restored before each sample.
    work: FLOPs of a forward pass where they are more than the case's. compiles: its first call takes many seconds.
    """

    function: Callable[..., Tensor]
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors
    finish: Callable[[Tensor], Tensor] = lambda out: out
    detail: str | None = None
    reference: Callable[..., Tensor] | None = None
    check_on: Case | None = None
    tune: Callable[[Tensors], Implementation] | None = None
    at: Callable[[Case], Implementation] | None = None
    overwrites: bool = False
    work: int | None = None
    compiles: bool = False


@dataclass(frozen=True)
class Contestant:
    """operators: by operator, what makes the Implementation of a case; raises Unsupported where it can't."""

    name: str
    peer: Peer
    operators: Mapping[str, Callable[[Case], Implementation]]


def all_contestants() -> list[Contestant]:
    modules = [importlib.import_module(f"{__name__}.{name}") for name in MODULES]
    return [contestant for module in modules for contestant in module.CONTESTANTS]


def case_contestants(case: Case, contestants: list[Contestant] | None = None) -> list[Contestant]:
    """Those that have an implementation of the case's operator."""
    return [c for c in (all_contestants() if contestants is None else contestants) if case.operator in c.operators]


def settings_of(case: Case, *names: str) -> list[Any]:
    return [case.settings[name] for name in names]
