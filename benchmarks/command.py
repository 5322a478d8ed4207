"""What the measuring commands have in common: their options, the run that they open and what they print at the end."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from benchmarks import api, runs
from hdit._extras import require


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """quick: what --quick measures, for its help."""
    matching = "is or contains PATTERN, or is matched by it if it has *, ? or [; can be given more than once"
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help=f"cases whose name {matching}")
    parser.add_argument(
        "--contestant", action="append", default=[], metavar="NAME", help=f"contestants whose name {matching}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="run file (JSON) to write, or to continue")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="for all cases together (default: no limit)")
    parser.add_argument("--quick", action="store_true", help=quick)


def seconds(text: str) -> float:
    """An argparse type: a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


seconds.__name__ = "number of seconds"  # argparse names it when it fails


def deadline(args: argparse.Namespace) -> float:
    """By time.monotonic(). To be called when the ceilings are known: a budget counts from then on, --quick without one
    from the start of the command."""
    if args.budget:
        return time.monotonic() + float(args.budget)
    return float(args.began) + api.QUICK_SECONDS if args.quick else math.inf


def check(args: argparse.Namespace) -> None:
    """Ahead of measuring: that finish() will find what it needs. Raises ModuleNotFoundError or runs.RunError."""
    for module in ("rich.table", "rich.console"):
        require(module, "bench")
    if args.csv is not None:
        if args.output is not None and args.csv.resolve() == args.output.resolve():
            raise runs.RunError(f"--csv and --output: expected two files, got {args.csv} twice")
        runs.check_writable(args.csv)


def open_run(args: argparse.Namespace, kind: str) -> runs.Run:
    """The run to add rows to, its ceilings measured. Raises runs.RunError for what the user has to change."""
    check(args)
    return api.open_run(kind, args.output, ["python", "-m", "benchmarks", *sys.argv[1:]], say)


def finish(run: runs.Run, args: argparse.Namespace) -> int:
    """Reads the clocks again, prints the rows, writes the files; 0, or 1 if a contestant failed or ran out of memory.

    Also 1 if the run has no time at all. Raises runs.RunError if it has no row.
    """
    data = run.own
    if not data["rows"]:
        raise runs.RunError("nothing to measure: none of the chosen contestants takes part in the chosen cases")
    run.save()
    api.close_run(run)
    api.print_table(data)
    if args.csv is not None:
        runs.write_csv(data, args.csv)
    if data["environment"]["device_type"] == "cpu":
        say("On a CPU: wall time only; GPU times, memory, and peers that need a GPU are left out.")
    counts = {status: sum(row["status"] == status for row in data["rows"]) for status in runs.STATUSES}
    say(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    for path in (args.output, args.csv):
        if path is not None:
            say(f"Written: {path}")
    if args.output is not None:
        say(f"With pictures: python -m benchmarks report {args.output.parent}")
    if not counts["ok"]:
        say("Nothing was measured.")
    return 1 if counts["failed"] or counts["out of memory"] or not counts["ok"] else 0


def say(line: str) -> None:
    print(line, flush=True)
