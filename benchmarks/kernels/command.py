"""`python -m benchmarks kernels`."""

from __future__ import annotations

import argparse

from benchmarks import api, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, f"one case an operator, without what compiles for long, {api.QUICK_SECONDS} s")


def run(args: argparse.Namespace) -> int:
    cases, contestants = api.select_cases(args.case, args.quick), api.select_contestants(args.contestant)
    found = command.open_run(args, "kernels")
    options = {"deadline": command.deadline(args), "compiling": not args.quick}
    api.measure_cases(found, cases, contestants, **options, on_step=api.clocked(command.say))
    return command.finish(found, args)
