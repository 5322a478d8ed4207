"""`python -m benchmarks kernels`."""

from __future__ import annotations

import argparse
import sys

from benchmarks import api, command, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, f"one case an operator, without what compiles for long, {api.QUICK_SECONDS} s")


def run(args: argparse.Namespace) -> int:
    command.check(args)
    data = api.run_cases(
        args.case,
        args.contestant,
        output=args.output,
        budget_seconds=args.budget,
        quick=args.quick,
        command=["python", "-m", "benchmarks", *sys.argv[1:]],
        on_line=command.say,
    )
    return command.finish(runs.Run(data, args.output), args)
