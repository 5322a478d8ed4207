"""The benchmark suite as functions, for a notebook; the commands call the same ones.

    from benchmarks import api

    data = api.run_cases(cases=["na2d 4x256*"], contestants=["ours", "natten"], budget_seconds=120)
    api.print_table(data)
    for row in data["rows"]:
        print(row["case"], row["contestant"], row["pass"], row["status"], row["gpu_us"] or row["wall_us"])

    from benchmarks import model, scaling

    run = api.open_run("scaling", output="scaling.json")
    scaling.measure_models(run, sizes=[256, 512], device=api.device())
    scaling.measure_attention(run, grids=[64, 128], device=api.device())
    api.close_run(run)
    scaling.print_summary(run.data)
    run = api.open_run("model")
    model.measure_networks(run, {"flowers-256": (1,)}, device=api.device())
    api.close_run(run)
    api.print_table(run.data)

A run's data is what SCHEMA.md describes; benchmarks.runs reads, merges and writes such data.
"""

from __future__ import annotations

import fnmatch
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, results, runs, timing
from benchmarks import rows as reading
from benchmarks.kernels import PASSES, Case, all_cases
from benchmarks.measure import DeviceLost, Session, left_out, measure_case
from benchmarks.peers import Contestant, all_contestants, case_contestants
from hdit._extras import require

QUICK_SECONDS = 50  # what has begun by then is finished


def device() -> torch.device:
    """What is measured on: the current GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chosen(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that a pattern chooses, in their order; all without patterns.

    A pattern that is one of the names chooses that one alone, one with *, ? or [ those that it matches as a whole, in
    the shell's manner, any other one those that contain it.
    """

    def fits(name: str, pattern: str) -> bool:
        if pattern in names:
            return name == pattern
        return fnmatch.fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name

    return [name for name in names if not patterns or any(fits(name, pattern) for pattern in patterns)]


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The patterns that match none of the names."""
    return [pattern for pattern in patterns if not chosen([pattern], names)]


def select_cases(patterns: Sequence[str] = (), quick: bool = False) -> list[Case]:
    """The cases that a pattern matches: those of real use on a GPU, the small ones on a CPU (a GPU runs them too, where
    nothing else matches). quick: the first of each operator.

    Raises runs.RunError for a pattern that matches none, or if none is left.
    """
    on_gpu = torch.cuda.is_available()
    every = [case.name for case in all_cases()]
    if unknown := unmatched(patterns, every):
        raise no_case(unknown)
    names = chosen(patterns, every)
    found = [case for case in all_cases() if case.name in names]
    usable = [case for case in found if case.full_size == on_gpu] or [case for case in found if on_gpu]
    if not usable:
        raise runs.RunError(f"{found[0].name} and the others that match need a GPU, and torch finds none here")
    if quick:
        usable = list({case.operator: case for case in reversed(usable)}.values())[::-1]
    return usable


def select_contestants(patterns: Sequence[str] = ()) -> list[Contestant]:
    """Those that a pattern matches; all without patterns. Raises runs.RunError for a pattern that matches none."""
    every = all_contestants()
    names = [contestant.name for contestant in every]
    check_contestants(patterns, names)
    return [contestant for contestant in every if contestant.name in chosen(patterns, names)]


def check_contestants(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises runs.RunError for a pattern that matches none of the names."""
    if unknown := unmatched(patterns, names):
        raise runs.RunError(f"no contestant matches {unknown[0]!r}; they are: {', '.join(dict.fromkeys(names))}")


def run_cases(
    cases: Sequence[str | Case] = (),
    contestants: Sequence[str | Contestant] = (),
    *,
    output: Path | str | None = None,
    budget_seconds: float | None = None,
    quick: bool = False,
    command: Sequence[str] = (),
    on_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures cases and returns the run's data; with output, also writes it there after every contestant of a case.

    cases, contestants: themselves, or patterns as in chosen(); none means all that make sense here. output: a run
    file; if it exists, it must be of the same device and versions, and what it holds already is left out, unless what
    it ran has changed since.
    budget_seconds: for all together, beside the ceilings; what it doesn't suffice for becomes rows "not measured".
    quick: one case an operator, without what compiles for long, in QUICK_SECONDS. command: recorded in the data.
    on_line: called with each line of progress.

    Raises runs.RunError for what the caller has to change. What fails in a case is a row of the data, not an exception,
    except measure.DeviceLost, when the GPU no longer answers.
    """
    chosen = [c for c in cases if isinstance(c, Case)]
    patterns = [c for c in cases if isinstance(c, str)]
    if patterns or not chosen:
        chosen += select_cases(patterns, quick)
    rivals = [c for c in contestants if isinstance(c, Contestant)]
    patterns = [c for c in contestants if isinstance(c, str)]
    if patterns or not rivals:
        rivals += select_contestants(patterns)
    if quick and budget_seconds is None:
        budget_seconds = QUICK_SECONDS

    run = open_run("kernels", output, command or ["benchmarks.api.run_cases"], on_line)
    deadline = math.inf if budget_seconds is None else time.monotonic() + budget_seconds
    measure_cases(run, chosen, rivals, deadline=deadline, compiling=not quick, on_step=clocked(on_line))
    close_run(run)
    return run.data


def measure_cases(
    run: runs.Run,
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    *,
    deadline: float = math.inf,
    compiling: bool = True,
    on_step: Callable[[str], None] = lambda message: None,
) -> None:
    """Measures what the run has no row of yet, and saves it after every contestant of a case.

    deadline: by time.monotonic(). compiling: whether those that compile for long are measured. on_step: called with
    each line of progress. Raises measure.DeviceLost.
    """
    with timing.side_stream(device()):
        session = Session(device(), run.session["ceilings"], deadline, compiling)
        for case in cases:
            own = case_contestants(case, contestants)
            for contestant in random.sample(own, len(own)):
                missing = [p for p in PASSES if not run.done(case.name, contestant.name, p)]
                if not missing:
                    continue
                try:
                    rows = _measured(case, contestant, session, missing)
                except DeviceLost as error:  # what was under way is the culprit: a run that goes on leaves it out
                    run.put(*error.rows)
                    run.save()
                    raise
                run.put(*rows)
                run.save()
                for line in describe(rows):
                    on_step(line)
            session.forget()


def clocked(on_line: Callable[[str], None]) -> Callable[[str], None]:
    """on_line with the seconds since now ahead of each line."""
    began = time.monotonic()
    return lambda line: on_line(f"[{time.monotonic() - began:6.1f} s] {line}")


def open_run(
    kind: str,
    output: Path | str | None = None,
    command: Sequence[str] = ("benchmarks.api.open_run",),
    on_line: Callable[[str], None] = lambda line: None,
) -> runs.Run:
    """A run to add rows to, this session's ceilings measured; the one that output holds already, if it does.

    kind: of runs.KINDS. command: recorded in its data. on_line: called with each line of progress. close_run() ends it.
    Raises runs.RunError for what the caller has to change.
    """
    run = runs.Run.open(output, kind, command)
    if rows := run.own["rows"]:
        on_line(f"{run.path} holds {len(rows)} rows: what is missing, or of other sources, is measured")
    with timing.side_stream(device()):
        try:
            run.session["ceilings"] = ceilings.measure_ceilings(device(), on_line)
        except (MemoryError, RuntimeError) as error:
            if not timing.out_of_memory(error):
                raise
            raise runs.RunError(f"there is no memory to measure the ceilings in: {timing.one_line(error)}") from error
    run.session["clocks"] = ceilings.clocks(device())
    run.save()
    return run


def close_run(run: runs.Run) -> None:
    """Reads the clocks once more and saves them, if something was timed: what heat and power limits took shows."""
    if run.timed:
        timing.release(device())
        found = ceilings.clocks(device())
        run.session["clocks"] |= {f"{name}_end": found[name] for name in ("sm_mhz", "memory_mhz")}
        run.save()


def _measured(case: Case, contestant: Contestant, session: Session, passes: Sequence[str]) -> list[runs.Row]:
    if session.left() > 0 or contestant.peer.available():  # why a peer can't run is told at no cost
        return measure_case(case, contestant, session, passes)
    return left_out(case, contestant, session, passes, "the budget is spent")


def describe(rows: Sequence[runs.Row]) -> list[str]:
    """The rows of a case and contestant in a line each, or in one if nothing was measured for one reason."""
    outcomes = {(row["status"], row["reason"]) for row in rows}
    if len(outcomes) == 1 and rows[0]["status"] != "ok":
        return [f"{rows[0]['case']} · {rows[0]['contestant']}: {_outcome(rows[0])}"]
    return [f"{row['case']} · {row['contestant']} · {row['pass']}: {_outcome(row)}" for row in rows]


def _outcome(row: runs.Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    words = []
    if row["gpu_us"]:
        words.append(f"GPU {duration(row['gpu_us']['median'])} ({row['ratio_to_floor']:.2f}x floor)")
    words.append(f"wall {duration(row['wall_us']['median'])}")
    if row.get("captured_us"):
        words.append(f"captured {duration(row['captured_us']['median'])}")
    if row["first_call_s"] is not None:
        words.append(f"first call {row['first_call_s']:.2f} s")
    if row["detail"]:
        words.append(row["detail"])
    return ", ".join(words)


def duration(microseconds: float) -> str:
    for unit, factor in (("µs", 1.0), ("ms", 1e3)):
        if microseconds < 1000 * factor:
            return f"{_three_digits(microseconds / factor)} {unit}"
    return f"{_three_digits(microseconds / 1e6)} s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def print_table(data: dict[str, Any]) -> None:
    """The rows of a run as a table in the terminal; beneath it, what could not be measured, grouped by its reason."""
    on_gpu = data["environment"]["device_type"] == "cuda"
    kinds = reading.distinct(data["rows"], lambda row: row["kind"])
    table = require("rich.table", "bench").Table(title=f"{', '.join(kinds)} on {data['environment']['device']}")
    table.add_column("case", overflow="fold")
    for name in ("contestant", "pass"):
        table.add_column(name, no_wrap=True)
    operators = kinds == ["kernels"]
    memory = on_gpu and not operators
    graphs = any(row.get("captured_us") for row in data["rows"])
    for name in [
        *(("GPU", "p20 … p80", "x floor", "wall") if on_gpu else ("wall", "p20 … p80", "x floor")),
        *(("captured",) if graphs else ()),
        *(("bytes", "FLOPs") if operators else ()),
        *(("memory",) if memory else ()),
        "error",
    ]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    escape = require("rich.markup", "bench").escape  # a reason may have brackets
    before = ""
    tried = [row for row in data["rows"] if row["status"] not in runs.UNFINISHED]
    for row in sorted(tried, key=_order(tried)):
        cells = [row["case"] if row["case"] != before else "", row["contestant"], row["pass"]]
        before = row["case"]
        cells += _time_cells(row, "gpu_us" if on_gpu else "wall_us")
        if on_gpu:
            cells.append(duration(row["wall_us"]["median"]) if row["wall_us"] else "")
        if graphs:
            cells.append(duration(row["captured_us"]["median"]) if row.get("captured_us") else "")
        if operators:
            cells += [amount(row["bytes"], "B"), amount(row["flops"], "FLOP")]
        if memory:
            cells.append(f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else "")
        cells.append("" if row["error"] is None else f"{row['error']:.1e}")
        remark = row["detail"] or ""
        cells.append(remark if row["status"] == "ok" else f"{row['status']}: {row['reason']}")
        table.add_row(*map(escape, cells), style=None if row["status"] == "ok" else "red")
    console = require("rich.console", "bench").Console(file=sys.stdout, width=None if sys.stdout.isatty() else 190)
    if tried:
        console.print(table)
    absent: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in data["rows"]:
        if row["status"] in runs.UNFINISHED:
            absent.setdefault((row["contestant"], row["status"], row["reason"]), {})[row["case"]] = None
    for (contestant, status, reason), cases in absent.items():
        where = next(iter(cases)) if len(cases) == 1 else f"{len(cases)} cases"
        print(f"{contestant}, {where}: {status}: {reason}")


def _order(rows: Sequence[runs.Row]) -> Callable[[runs.Row], tuple[int, int, int]]:
    """By case, in the order of appearance, then pass, then contestant."""
    cases = {name: i for i, name in enumerate(dict.fromkeys(row["case"] for row in rows))}
    names = {c.name: i for i, c in enumerate(all_contestants())}
    return lambda row: (cases[row["case"]], runs.PASSES.index(row["pass"]), names.get(row["contestant"], len(names)))


def _time_cells(row: runs.Row, which: str) -> list[str]:
    found = row[which]
    if not found:
        return ["", "", ""]
    ratio = reading.ratio_to_floor(row, which)
    floor = f"{ratio:.2f} x {duration(row['floor_us'])}" if ratio else ""
    return [duration(found["median"]), f"{duration(found['p20'])} … {duration(found['p80'])}", floor]


def amount(number: int | None, unit: str) -> str:
    """In thousands, millions or billions; empty for what is not known or not counted (0)."""
    if not number:
        return ""
    prefix, factor = next((p, f) for p, f in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if number >= f)
    return f"{_three_digits(number / factor)} {prefix}{unit}"


def listing(patterns: Sequence[str] = ()) -> list[str]:
    """What could be measured, in lines: every kernel case under its operator, the contestants of each, and which of
    them can run here or why not. Empty if a pattern matches no case."""
    names = chosen(patterns, [case.name for case in all_cases()])
    every = [case for case in all_cases() if case.name in names]
    if not every:
        return []
    lines = [f"kernels, on {results.environment()['device']}"]
    involved: dict[str, Contestant] = {}
    for operator in dict.fromkeys(case.operator for case in every):
        own = [case for case in every if case.operator == operator]
        rivals = case_contestants(own[0])
        involved |= {contestant.name: contestant for contestant in rivals}
        lines.append(f"  {operator}: {', '.join(contestant.name for contestant in rivals)}")
        lines += [f"    {case.name}{_where(case)}" for case in own]
    lines.append("contestants")
    for contestant in involved.values():
        lines.append(f"  {contestant.name}: {can_run(contestant.peer.available())}")
    return lines


def no_case(patterns: Sequence[str]) -> runs.RunError:
    return runs.RunError(
        f"no case matches {', '.join(map(repr, patterns))}: `python -m benchmarks list` shows them all"
    )


def _where(case: Case) -> str:
    if case.full_size:
        return "" if torch.cuda.is_available() else "  (needs a GPU)"
    return "  (small: what a CPU runs)"


def can_run(reason: str | None) -> str:
    return "runs here" if reason is None else f"can't run here: {reason}"
