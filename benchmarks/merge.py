"""`python -m benchmarks merge`: what was measured side by side, on several GPUs or in parts, as one run file."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import runs
from benchmarks.command import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="run files; of two rows of a case the later file's stays"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="run file (JSON) to write, a new one"
    )


def run(args: argparse.Namespace) -> int:
    if len(args.files) < 2:
        raise runs.RunError(f"merge: expected two run files or more, got {len(args.files)}")
    if args.output.exists():
        raise runs.RunError(f"merge: --output {args.output} exists, expected a new file")
    runs.check_writable(args.output)
    merged = runs.merge(*map(runs.read, args.files))
    runs.write(merged, args.output)
    say(f"{len(merged['rows'])} rows of {len(args.files)} files. Written: {args.output}")
    return 0
