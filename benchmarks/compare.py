"""Is B faster than A? A verdict for each measurement of two run files, or of two git revisions measured here.

    python -m benchmarks compare A.json B.json
    python -m benchmarks compare main HEAD [--kind kernels] [--case PATTERN] [--quick]

A difference counts only where the p20..p80 intervals of A and B don't overlap and the medians differ by more than a
band: 3% of GPU time, 10% of wall time, by which two processes measuring the same sources differ (see --noise). GPU time
decides where both have it, else wall time. What was right in A and is wrong or out of memory in B is a regression too.
Exit status: 0, no regression of ours; 1, a regression; 2, nothing comparable.

Revisions are checked out into worktrees of their own, and ours of both measured by the benchmarks of the present tree,
in turns A B B A so that a drift of the machine meets both; what differs then is measured in three more turns of each,
and intervals span all turns. Of five turns each, all of A's fall on one side of all of B's by chance once in 126 times.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results, runs
from benchmarks.rows import MEASURES, NOISE, Stats, is_ours, verdict
from benchmarks.runs import KINDS, UNFINISHED, Row, RunError, key
from hdit._extras import require

CONFIRMATIONS = 3  # more turns of each revision, for the cases that still differ
QUICK_SECONDS = 9  # of a turn
OURS = {"kernels": ["ours"], "model": ["ours"], "train": ["ours"], "scaling": ["ours", "HDiT"]}  # contestants
STDERR = 2  # the file descriptor


@dataclass(frozen=True)
class Verdict:
    """One measurement in both runs. word: "faster", "slower" or "same within noise"; "broken" when B has no time any
    more and "new" when A had none. which: the time judged by."""

    case: str
    direction: str
    contestant: str
    word: str
    which: str | None
    a: Stats | None
    b: Stats | None
    reason: str | None = None

    @property
    def change(self) -> float | None:
        """B's median over A's, less one."""
        return self.b["median"] / self.a["median"] - 1 if self.a and self.b else None

    @property
    def regression(self) -> bool:
        """Whether ours became slower or broke; a peer's changes are shown only."""
        return is_ours(self.contestant) and self.word in ("slower", "broken")


def compare_runs(
    a: dict[str, Any], b: dict[str, Any], noise: dict[str, float] | None = None, allow_different: bool = False
) -> list[Verdict]:
    """Verdicts over the measurements that are in both runs and timed in one.

    noise: the share of a median, for "gpu_us" and "wall_us", that is never called a difference (default: rows.NOISE).
    allow_different: compare runs of different devices or versions. Raises ValueError when they may not be compared, or
    have no timed measurement in common.
    """
    if a["kind"] != b["kind"]:
        raise ValueError(f"A is a run of {a['kind']}, B of {b['kind']}: only runs of one kind compare")
    different = runs.machine_differences(a, b)
    if different and not allow_different:
        raise ValueError(
            f"A and B differ in {'; '.join(different)}: pass --allow-different to compare them all the same"
        )
    before, after = (_measurements(run) for run in (a, b))
    found = [_judge(row, after[name], noise or NOISE) for name, row in before.items() if name in after]
    verdicts = [judged for judged in found if judged]
    if not verdicts:
        left = [next((row for row in run["rows"] if row["status"] == "not measured"), None) for run in (a, b)]
        why = [
            f"; {name} did not measure {row['case']}: {row['reason']}"
            for name, row in (("A", left[0]), ("B", left[1]))
            if row
        ]
        raise ValueError(f"A and B have no timed measurement in common{''.join(why)}")
    return verdicts


def _measurements(run: dict[str, Any]) -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in run["rows"]}


def _timed(run: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {key(row) for row in run["rows"] if row["status"] == "ok"}


def _judge(a: Row, b: Row, noise: dict[str, float]) -> Verdict | None:
    """None where neither was timed, or one was left out for want of time or of a package."""
    names = (b["case"], b["pass"], b["contestant"])
    if a["status"] == b["status"] == "ok":
        which = next((name for name in MEASURES if a[name] and b[name]), None)
        if which is None:
            return None
        return Verdict(*names, verdict(a[which], b[which], noise[which]), which, a[which], b[which])
    for word, timed, other in (("broken", a, b), ("new", b, a)):
        if timed["status"] == "ok" and other["status"] in ("failed", "out of memory"):
            return Verdict(*names, word, None, None, None, " ".join(filter(None, (other["status"], other["reason"]))))
    return None


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = {word: sum(v.word == word for v in verdicts) for word in dict.fromkeys(v.word for v in verdicts)}
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def table(verdicts: Sequence[Verdict], a: str, b: str) -> Any:
    """A rich.table.Table, the largest changes first."""
    escape = require("rich.markup", "bench").escape
    found = require("rich.table", "bench").Table(title=escape(f"A: {a}\nB: {b}"))
    for head in ("case", "pass", "contestant", "time", "A [p20, p80] µs", "B [p20, p80] µs", "change", "verdict"):
        found.add_column(escape(head), justify="right" if "A" in head or "B" in head or head == "change" else "left")
    styles = {"faster": "green", "new": "green", "slower": "red", "broken": "red", "same within noise": "dim"}
    for v in sorted(verdicts, key=lambda v: -abs(v.change if v.change is not None else float("inf"))):
        change = "" if v.change is None else f"{v.change:+.1%}"
        word = v.word + (f" ({v.reason})" if v.reason else "")
        row = [v.case, v.direction, v.contestant, MEASURES[v.which] if v.which else "", _interval(v.a), _interval(v.b)]
        found.add_row(*map(escape, [*row, change, word]), style=styles[v.word])
    return found


def _interval(stats: Stats | None) -> str:
    return "" if stats is None else f"{stats['median']:.1f} [{stats['p20']:.1f}, {stats['p80']:.1f}]"


# Git revisions


def measure_revisions(
    a: str,
    b: str,
    kind: str = "kernels",
    cases: Sequence[str] = (),
    *,
    quick: bool = False,
    noise: dict[str, float] | None = None,
    root: Path = results.ROOT,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs `python -m benchmarks <kind>` on two git revisions, ours only; returns the run of each, its turns joined.

    cases: patterns of cases, none means all. quick: a few cases, in about a minute. noise: as in compare_runs.
    root: the clone. Raises ValueError for a revision that git doesn't know or that can't be measured.
    """
    options = [f"--contestant={name}" for name in OURS[kind]]
    options += ["--quick", f"--budget={QUICK_SECONDS}"] if quick else []
    with tempfile.TemporaryDirectory(prefix="benchmarks-compare-") as name:
        folder = Path(name)
        with _worktree(root, a, folder / "a") as tree_a, _worktree(root, b, folder / "b") as tree_b:
            measured: dict[Path, list[dict[str, Any]]] = {tree_a: [], tree_b: []}

            def measure(trees: Sequence[Path], cases: Sequence[str]) -> None:
                asked = [*options, *(f"--case={pattern}" for pattern in cases)]
                for tree in trees:
                    output = folder / f"{tree.name}-{len(measured[tree])}.json"
                    measured[tree].append(_measure(tree, kind, output, asked))

            measure((tree_a, tree_b, tree_b, tree_a), cases)
            for trees in CONFIRMATIONS * ((tree_b, tree_a),):
                verdicts = compare_runs(joined(measured[tree_a]), joined(measured[tree_b]), noise)
                changed = list(dict.fromkeys(v.case for v in verdicts if v.word in ("faster", "slower")))
                if not changed:
                    break
                measure(trees, changed)
        return joined(measured[tree_a]), joined(measured[tree_b])


@contextmanager
def _worktree(root: Path, revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of the revision whose benchmarks/ is the present one."""
    _git(root, "worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        shutil.copytree(
            root / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        yield folder
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *arguments: str) -> None:
    found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(found.stderr.split())}")


def _measure(tree: Path, kind: str, output: Path, options: Sequence[str]) -> dict[str, Any]:
    # The working directory comes first on the module path: the worktree's packages are measured, not installed ones.
    command = [sys.executable, "-m", "benchmarks", kind, "--output", str(output), *options]
    found = subprocess.run(command, cwd=tree, stdout=STDERR)  # its table is not this command's result
    if not output.exists():
        raise ValueError(f"{' '.join(command[1:])} ended with exit status {found.returncode} and wrote nothing")
    return runs.read(output)


def joined(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the same sources as one: medians of the medians, and intervals that span all of them.

    A measurement that failed in one of those that tried it keeps what that one says; one whose time was up in a turn,
    as in the first, which may compile everything, is that of the others.
    """
    rows = []
    measured = [_measurements(turn) for turn in turns]
    for name in measured[0]:
        own = [found[name] for found in measured if name in found]
        tried = [found for found in own if found["status"] not in UNFINISHED] or own
        lost = next((found for found in tried if found["status"] != "ok"), None)
        spans = {which: _span([found[which] for found in tried]) for which in MEASURES if all(f[which] for f in tried)}
        rows.append(lost or tried[0] | spans)
    return turns[0] | {"rows": rows}


def _span(stats: Sequence[Stats]) -> Stats:
    return {
        "median": statistics.median(found["median"] for found in stats),
        "p20": min(found["p20"] for found in stats),
        "p80": max(found["p80"] for found in stats),
        "repeats": sum(found["repeats"] for found in stats),
    }


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a run's JSON file, or a git revision: what B is compared with")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--kind", choices=KINDS, default="kernels", help="revisions: what to run (default: kernels)")
    text = "revisions: cases whose name contains PATTERN, or is matched by it if it has *, ? or ["
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument("--quick", action="store_true", help="revisions: a few cases, in about a minute")
    for which, name in (("gpu_us", "--noise"), ("wall_us", "--wall-noise")):
        text = f"share of a {MEASURES[which]} that is never called a difference (default: {NOISE[which]})"
        parser.add_argument(name, type=_share, default=NOISE[which], metavar="SHARE", help=text)
    parser.add_argument("--allow-different", action="store_true", help="compare runs of different devices or versions")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


_share.__name__ = "number"  # argparse names it when float() fails


def run(args: argparse.Namespace) -> int:
    try:
        a, b = _runs(args)
        verdicts = compare_runs(a, b, _noise(args), args.allow_different)
    except (OSError, ValueError) as error:
        raise RunError(" ".join(str(error).split())) from error
    width = None if sys.stdout.isatty() else 160
    require("rich.console", "bench").Console(width=width).print(table(verdicts, args.a, args.b))
    print(summary(verdicts))
    for name, one, other in (("A", a, b), ("B", b, a)):
        if only := _timed(one) - {k for k, row in _measurements(other).items() if row["status"] not in UNFINISHED}:
            print(f"measured in {name} only: {len(only)}")
    regressions = sum(found.regression for found in verdicts)
    print(f"{regressions} regressions of ours" if regressions else "no regression of ours")
    return 1 if regressions else 0


def _noise(args: argparse.Namespace) -> dict[str, float]:
    return {"gpu_us": args.noise, "wall_us": args.wall_noise}


def _runs(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    files = [Path(name) for name in (args.a, args.b) if Path(name).suffix == ".json"]
    if len(files) == 1:
        raise ValueError(f"{files[0]} is a file and the other is none: give two JSON files or two git revisions")
    if files:
        if args.quick or args.case:
            raise ValueError("--quick and --case are for revisions: files are measured already")
        a, b = (runs.read(path) for path in files)
        return a, b
    options = {"quick": args.quick, "noise": _noise(args), "root": results.ROOT}
    return measure_revisions(args.a, args.b, args.kind, args.case, **options)
