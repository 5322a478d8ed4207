"""What a user waits for a pass that hdit.capture or hdit.capture_step made a CUDA graph of.

The network is built anew with the seed of the eager one, so that both begin alike: a graph counts only if its first
results are the eager ones, of a training step the loss and the gradient's norm of several steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Effort, Stats
from hdit_kernels import testing

FIRST = {"forward": 1, "step": 4}  # results that are compared; hdit.capture_step makes the first 2 steps eagerly
LONGEST = 1.0  # seconds of a pass beyond which Python's share of it is too small to look for
NOT = "not captured: "  # how the clause of a row's detail that says why begins
LEAST = 3  # samples of one that takes long


class Pass:
    """One pass of a network, ready: each call runs it. captured: what hdit.capture or capture_step returned for it."""

    def __init__(self, run: Callable[[], Any], captured: Any = None) -> None:
        self._run, self._captured = run, captured

    def __call__(self) -> Any:
        return self._run()

    @property
    def reason(self) -> str | None:
        """Why it runs eagerly though it was to be captured; None if it is a graph, or was not to be one."""
        return None if self._captured is None else self._captured.reason


class Watched:
    """A call whose first results are kept, on the CPU, each of random numbers of its own."""

    def __init__(self, call: Callable[[], Any], first: int) -> None:
        self.results: list[Tensor] = []
        self._call, self._first, self._made = call, first, 0

    def __call__(self) -> None:
        if self._made == self._first:
            self._call()
            return
        torch.manual_seed(self._made)
        self._made += 1
        found = self._call()
        self.results += [t.detach().cpu() for t in (found if isinstance(found, tuple) else (found,))]


def measure(
    prepare: Callable[[], Pass],
    direction: str,
    wanted: Sequence[Tensor],
    allowed: float,
    device: torch.device,
    seconds: float,
) -> Stats | str:
    """Wall time of the pass that `prepare` captures, or why it has none.

    direction: of FIRST. wanted: the first results of the eager pass, as Watched has them. allowed: the error that each
    pass may have, so that the two may differ by twice as much. seconds: for the samples.
    """
    call: Pass | None = None
    watched: Watched | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "hdit.capture: runs eagerly")  # the row tells why
            call = prepare()
            watched = Watched(call, FIRST[direction])
            for _ in range(FIRST[direction]):
                watched()
            if call.reason is not None:
                return _short(RuntimeError(call.reason), call.reason)
            worst = max(_difference(*pair) for pair in zip(watched.results, wanted, strict=True))
            if worst > 2 * allowed:
                return f"it differs from the eager one by {worst:.1e}, allowed {2 * allowed:.1e}"
            effort = Effort(width=0.03, fewest=5, most=50, seconds=seconds, least=LEAST)
            return timing.sample(lambda: timing.seconds_of(call, device) * 1e6, effort)
    except Exception as error:  # of what is told beside the eager time, which stays
        return _short(error, timing.one_line(error))
    finally:
        call = watched = None  # with its graphs, their memory


def _short(error: Exception, words: str) -> str:
    """Without torch's account of who holds how much memory, which differs each time."""
    return "out of memory" if timing.out_of_memory(error) else words


def _difference(found: Tensor, wanted: Tensor) -> float:
    return 0.0 if torch.equal(found, wanted) else testing.relative_error(found, wanted)
