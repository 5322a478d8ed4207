"""`python -m benchmarks list`: the kernel cases, and what the other commands that measure list of themselves."""

from __future__ import annotations

import argparse

from benchmarks import api, model, scaling, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="cases that match only")


def run(args: argparse.Namespace) -> int:
    lines = [line for module in (api, model, train, scaling) for line in module.listing(args.case)]
    if not lines:
        raise api.no_case(args.case)
    print("\n".join(lines))
    return 0
