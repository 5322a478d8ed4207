"""One contestant on one case: is it right, how long does it take. Gives the rows of a run file, whatever happens."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import ceilings, correctness, runs, timing
from benchmarks.correctness import OUT, Error, Truth
from benchmarks.kernels import PASSES, Case
from benchmarks.peers import Contestant, Implementation, Tensors, Unsupported, compiled

CHECKED = 2**27  # elements of the largest input up to which the case itself is checked, not a smaller one
COMPILES = "left out: its first call compiles for long"
PATIENCE = 0.5  # seconds of one forward pass, by its FLOPs alone, beyond which it is not measured (see Session)


class DeviceLost(Exception):
    """The GPU no longer answers: nothing more can be measured in this process. rows: of what was under way."""

    def __init__(self, message: str, rows: Sequence[runs.Row] = ()) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass
class Session:
    """What the measurements of a run share. deadline: by time.monotonic(), None for none; compiling: whether those that
    compile for long are measured."""

    device: torch.device
    ceilings: dict[str, Any]
    deadline: float | None = None
    compiling: bool = True
    gpu: timing.Effort = timing.GPU
    wall: timing.Effort = timing.WALL
    patience: float = PATIENCE
    _truths: dict[Any, Truth] = field(default_factory=dict, repr=False)

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def truth(self, case: Case, function: Callable[..., Tensor] | None) -> Truth:
        """Kept until forget(): the contestants of a case are given the same inputs, drawn anew in every run."""
        key = case.name, function
        if key not in self._truths:
            self._truths[key] = correctness.truth(case, self.device, secrets.randbits(31), function)
        return self._truths[key]

    def forget(self) -> None:
        self._truths.clear()


def measure_case(
    case: Case, contestant: Contestant, session: Session, passes: Sequence[str] = PASSES
) -> list[runs.Row]:
    """A row for each pass; to be called inside timing.side_stream.

    Raises nothing but DeviceLost: every other failure is a row with its reason.
    """
    rows: dict[str, runs.Row] = {}

    def fill(status: str, reason: str, **fields: Any) -> None:
        for direction in passes:
            rows.setdefault(direction, _row(case, contestant, direction, status, session, reason=reason, **fields))

    if reason := contestant.peer.available():
        fill("unavailable", reason)
    else:
        failed = False
        try:
            with case.precision():
                _measure(case, contestant, session, passes, rows, fill)
        except Exception as error:
            fill(*_status(error))
            try:
                timing.synchronize(session.device)
            except RuntimeError as lost:
                message = f"{case.name}, {contestant.name}: the GPU no longer answers: {timing.one_line(lost)}"
                raise DeviceLost(message, [rows[direction] for direction in passes]) from error
            failed = True
        compiled.forget()
        if failed:
            gc.collect()  # what the error kept alive
        timing.release(session.device)
    return [rows[direction] for direction in passes]


def left_out(
    case: Case, contestant: Contestant, session: Session, passes: Sequence[str], reason: str
) -> list[runs.Row]:
    """The rows of what is not measured for want of time."""
    return [_row(case, contestant, direction, "not measured", session, reason=reason) for direction in passes]


def _status(error: Exception) -> tuple[str, str]:
    """The status of a row, and its reason."""
    if isinstance(error, Unsupported):
        return "unavailable", str(error)
    return ("out of memory" if timing.out_of_memory(error) else "failed"), timing.one_line(error)


def _measure(
    case: Case,
    contestant: Contestant,
    session: Session,
    passes: Sequence[str],
    rows: dict[str, runs.Row],
    fill: Callable[..., None],
) -> None:
    device, entry = session.device, Entry(case, contestant)
    implementation = entry.implementation
    if implementation.compiles and not session.compiling:
        return fill("not measured", COMPILES, detail=implementation.detail)
    work = implementation.work or case.flops["forward"]
    least = ceilings.floor_us(session.ceilings, 0, work, case.settings["dtype"]) / 1e6
    if least > session.patience:
        return fill("not measured", f"at least {least:.1f} s a forward pass", detail=implementation.detail)

    truth = session.truth(entry.checked, implementation.reference)
    calls = entry.calls(truth.tensors if entry.same else case.inputs(device, secrets.randbits(31)))
    # A small problem of its own is checked first, so that the first call at full size still compiles what it needs.
    errors = {} if entry.same else entry.check(truth)
    first = {p: timing.seconds_of(calls.prepared(p), device) for p in ("forward", "forward+backward") if p in passes}
    errors = errors or entry.check(truth)

    for direction in passes:
        detail = entry.detail()
        own = relevant(errors, direction)
        worst = max(own.values(), key=lambda error: error.found / error.allowed)
        fields: dict[str, Any] = {"error": _finite(worst.found), "allowed_error": worst.allowed}
        wrong = [f"{n}: error {e.found:.1e}, allowed {e.allowed:.1e}" for n, e in own.items() if not e.right]
        if wrong:
            fields |= {"detail": _joined(detail), "reason": ", ".join(wrong)}
            rows[direction] = _row(case, contestant, direction, "failed", session, **fields)
            continue
        if session.left() <= 0:
            rows[direction] = _row(case, contestant, direction, "not measured", session, reason="the budget is spent")
            continue
        call = calls.prepared(direction)
        waited, host = timing.wall_time(call, device, session.wall.within(session.left()), calls.restore)
        fields |= {"wall_us": waited.to_dict(), "host_us": host.to_dict(), "first_call_s": first.get(direction)}
        if device.type == "cuda":
            found, way = timing.gpu_time(call, device, session.gpu.within(session.left()), calls.restore)
            if way != timing.GRAPH:
                detail.append(way)
            fields["gpu_us"] = found.to_dict()
            fields["peak_bytes"] = timing.peak_bytes(call, device, list(calls.plain.values()))
        rows[direction] = _row(case, contestant, direction, "ok", session, detail=_joined(detail), **fields)


class Entry:
    """A contestant set up for a case. checked: the case that its results are checked on; same: whether that is the case
    itself. Raises Unsupported where the contestant can't take the case."""

    def __init__(self, case: Case, contestant: Contestant) -> None:
        self.case, self._build = case, contestant.operators[case.operator]
        self.implementation: Implementation = self._build(case)
        self.checked = self.implementation.check_on or case.smaller(CHECKED)
        self.same = self.checked.settings == case.settings

    def calls(self, inputs: Tensors) -> Calls:
        """What is timed, on its own tensors made of the case's; tuned to them first."""
        with torch.no_grad():
            own = self.implementation.prepare(inputs)
            own = {n: t.clone() if self.implementation.overwrites else t.detach() for n, t in own.items()}
        if self.implementation.tune is not None:
            self.implementation = self.implementation.tune(own)
        return Calls(self.case, self.implementation, own)

    def check(self, truth: Truth) -> dict[str, Error]:
        """Its errors by output and gradient on the checked case, of which truth is."""
        if self.same:
            return correctness.check(self.implementation, truth)
        at = self.implementation.at or self._build
        return correctness.check(at(self.checked), truth)

    def detail(self) -> list[str]:
        parts = [self.implementation.detail] if self.implementation.detail else []
        return parts if self.same else [*parts, f"checked on {self.checked.name}"]


class Calls:
    """Calls without arguments, ready to be timed. restore: to be done before each, None where there is no need."""

    def __init__(self, case: Case, implementation: Implementation, own: Tensors) -> None:
        self.function = implementation.function
        self.plain = own
        self.leaves = {name: t.detach().requires_grad_(name not in case.frozen) for name, t in own.items()}
        self.learned = [t for name, t in self.leaves.items() if name not in case.frozen]
        pristine = {name: t.clone() for name, t in own.items()} if implementation.overwrites else {}

        def restore() -> None:
            for name, values in pristine.items():
                own[name].data.copy_(values)  # .data: autograd's version counter stays as it is

        self.restore = restore if pristine else None
        self.dout: Tensor | None = None

    def prepared(self, direction: str) -> timing.Call:
        """Of a pass; that of a backward alone keeps the forward pass that it belongs to."""
        if self.restore is not None:
            self.restore()
        if direction == "forward":
            return self._forward
        if self.dout is None:
            # Of the layout that the check has, see correctness.truth.
            self.dout = torch.randn_like(self._forward(), memory_format=torch.contiguous_format)
        dout = self.dout
        if direction == "forward+backward":
            return lambda: torch.autograd.grad(self.function(**self.leaves), self.learned, dout)
        out = self.function(**self.leaves)
        return lambda: torch.autograd.grad(out, self.learned, dout, retain_graph=True)

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(**self.plain)


def relevant(errors: dict[str, Error], direction: str) -> dict[str, Error]:
    """What must be right for a pass to be timed: the output, and with a backward every gradient."""
    return {name: error for name, error in errors.items() if name == OUT or direction != "forward"}


def _finite(error: float) -> float | None:
    return error if error != float("inf") else None


def _joined(detail: list[str]) -> str | None:
    return "; ".join(detail) or None


def _row(case: Case, contestant: Contestant, direction: str, status: str, session: Session, **fields: Any) -> runs.Row:
    nbytes, flops = case.bytes[direction], case.flops[direction]
    floor = ceilings.floor_us(session.ceilings, nbytes, flops, case.settings["dtype"])
    found = runs.row(
        case.name,
        contestant.name,
        direction,
        status,
        family=case.family,
        operator=case.operator,
        settings=case.settings,
        bytes=nbytes,
        flops=flops,
        floor_us=floor,
        **fields,
    )
    if time := found["wall_us" if session.device.type == "cpu" else "gpu_us"]:
        found["ratio_to_floor"] = time["median"] / floor
    return found
