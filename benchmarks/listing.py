"""`python -m benchmarks list`: the kernel cases, and what the other commands that measure list of themselves, if their
module has a function listing() -> lines."""

from __future__ import annotations

import argparse
import importlib

from benchmarks import api

OTHERS = ("benchmarks.model", "benchmarks.train", "benchmarks.scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="kernel cases that match only")


def run(args: argparse.Namespace) -> int:
    lines = api.listing(args.case)
    if not args.case:
        for name in OTHERS:
            own = getattr(importlib.import_module(name), "listing", None)
            lines += own() if own else []
    print("\n".join(lines))
    return 0
