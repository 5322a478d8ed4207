"""Whole models: the presets beside the reference HDiT (k-diffusion) and a DiT of about as many parameters.

Forward pass, and forward and backward, at batch 1 and at a batch that fills a GPU. The reference HDiT gets our weights;
outputs and gradients of both are compared with float64 before their times count, as DiT's are. Models are built one
at a time, so that each one's peak memory is its own.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import api, command, networks, runs
from benchmarks.measure import COMPILES
from benchmarks.networks import Network
from benchmarks.peers import kdiffusion
from hdit import HDiTConfig, presets

BATCHES = {"flowers-256": (1, 32), "ffhq-1024": (1, 4), "imagenet-128": (1, 32), "imagenet-256": (1, 16)}
SMALLEST = {"flowers-256": (1,)}
"""Presets and batches: all of them, and what --quick, or a CPU that is not asked for more, measures."""
PASSES = ("forward", "forward+backward")

Batches = Mapping[str, Sequence[int]]


def measure_networks(
    run: runs.Run,
    batches: Batches,
    passes: Sequence[str] = PASSES,
    contestants: Sequence[str] = (),
    *,
    device: torch.device,
    k_diffusion: Path | None = None,
    seconds: float = 1.0,
    deadline: float = math.inf,
    compiling: bool = True,
    configs: Mapping[str, HDiTConfig] = presets,
    on_step: Callable[[str], None] = lambda message: None,
) -> None:
    """Measures what the run has no row of yet, and saves it after every row.

    batches: by the names of configs. passes: of runs.PASSES. contestants: patterns as in api.chosen; none means all.
    k_diffusion: a folder, see peers/kdiffusion.py. seconds: for measuring a pass. deadline: by time.monotonic(); what
    it leaves out, and passes of which the fewest that measuring takes would go beyond it, become rows "not measured".
    compiling: whether the reference HDiT, which compiles for long, is measured.
    on_step: called with a line of text before each piece of work.
    """
    absent = kdiffusion.available(k_diffusion)
    for name in batches:
        config = configs[name]
        own, reference, dit = (
            networks.hdit(config),
            networks.k_diffusion(config, k_diffusion),
            networks.dit_like(config),
        )
        names = api.chosen(contestants, [own.name, reference.name, dit.name])
        rivals = [network for network in (own, reference, dit) if network.name in names]
        missing = {
            (batch, direction): [n for n in rivals if not run.done(case_name(name, batch), n.name, direction)]
            for batch in batches[name]
            for direction in passes
        }
        wanted = {network.name for found in missing.values() for network in found}
        checks: dict[str, networks.Check | str] = {}
        for group in ([own, reference] if compiling and not absent else [own], [dit]):
            if any(network.name in wanted for network in group) and time.monotonic() < deadline:
                on_step(f"{name}: checking {' and '.join(network.name for network in group)} against float64")
                checks |= networks.check(group, device)
        for (batch, direction), found in missing.items():
            for network in random.sample(found, len(found)):
                row = blank(name, network, batch, direction, device)
                if network is reference and absent:
                    row |= {"status": "unavailable", "reason": f"{absent}: {kdiffusion.INSTALL}"}
                elif network is reference and not compiling:
                    row["reason"] = COMPILES
                elif network.name not in checks or time.monotonic() >= deadline:
                    row["reason"] = "the budget is spent"
                else:
                    on_step(f"{row['case']}, {direction}: {network.name}")
                    side = networks.checked_side(network, device)
                    if isinstance(checks[network.name], networks.Check) and side != network.side:
                        row["detail"] = f"checked at {side}²"
                    allowed = (deadline - time.monotonic()) / (1 + networks.fewest_calls(device))
                    networks.attempt(row, network, checks[network.name], run, device, seconds, allowed)
                    continue
                run.put(row)
                run.save()


def case_name(name: str, batch: int) -> str:
    return f"{name} batch {batch}"


def blank(name: str, network: Network, batch: int, direction: str, device: torch.device) -> runs.Row:
    """A row with what is known before measuring."""
    return runs.row(
        case_name(name, batch),
        network.name,
        direction,
        "not measured",
        family="model",
        operator=name,
        settings={"preset": name, "batch": batch, "precision": networks.precision(device)},
        flops=networks.flops(network, batch, backward=direction != "forward"),
        parameters=networks.parameters(network),
    )


def select(patterns: Sequence[str], every: Batches, default: Batches) -> Batches:
    """The presets and batches whose cases a pattern matches; the default without patterns.

    Raises runs.RunError for a pattern that matches none.
    """
    if not patterns:
        return default
    names = [case_name(name, batch) for name in every for batch in every[name]]
    if unknown := api.unmatched(patterns, names):
        raise runs.RunError(f"no case matches {', '.join(map(repr, unknown))}; they are: {', '.join(names)}")
    chosen = api.chosen(patterns, names)
    found = {name: [batch for batch in every[name] if case_name(name, batch) in chosen] for name in every}
    return {name: batches for name, batches in found.items() if batches}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    quick = f"{case_name('flowers-256', 1)} only, without what compiles for long, {api.QUICK_SECONDS} s"
    command.add_options(parser, quick)
    text = "a checkout of crowsonkb/k-diffusion, for the reference HDiT (default: the installed package)"
    parser.add_argument("--k-diffusion", type=Path, metavar="FOLDER", help=text)


def run(args: argparse.Namespace) -> int:
    return run_passes(args, "model", PASSES, BATCHES)


def run_passes(args: argparse.Namespace, kind: str, passes: Sequence[str], batches: Batches) -> int:
    """A command that measures these passes of these presets; shared with benchmarks/train.py."""
    device = api.device()
    chosen = select(args.case, BATCHES, SMALLEST if args.quick else _default(batches, device))
    rivals = [networks.dit_like(presets[name]).name for name in chosen]
    api.check_contestants(args.contestant, ["ours", "k-diffusion", *rivals])
    kdiffusion.check_folder(args.k_diffusion)
    found = command.open_run(args, kind)
    if version := kdiffusion.version(args.k_diffusion):
        found.name_peer("k-diffusion", version)
    measure_networks(
        found,
        chosen,
        passes,
        args.contestant,
        device=device,
        k_diffusion=args.k_diffusion,
        seconds=0.5 if args.quick else 1.0,
        deadline=command.deadline(args),
        compiling=not args.quick,
        on_step=api.clocked(command.say),
    )
    return command.finish(found, args)


def _default(batches: Batches, device: torch.device) -> Batches:
    """Of what a GPU measures unless other cases are asked for, what this machine does."""
    return SMALLEST if device.type == "cpu" else batches


def listing(patterns: Sequence[str] = ()) -> list[str]:
    """Lines for `python -m benchmarks list`, of cases that a pattern matches."""
    return list_passes("model", PASSES, patterns, BATCHES)


def list_passes(kind: str, passes: Sequence[str], patterns: Sequence[str], batches: Batches) -> list[str]:
    """batches: what a GPU measures unless other cases are asked for."""
    cases = {case_name(name, batch): name for name in BATCHES for batch in BATCHES[name]}
    found = api.chosen(patterns, list(cases))
    if not found:
        return []
    lines = [f"{kind}: {', '.join(passes)}"]
    batches = _default(batches, api.device())
    default = {case_name(name, batch) for name in batches for batch in batches[name]}
    for case in found:
        name = cases[case]
        remark = "" if case in default else f"  (only with --case '{case}')"
        lines.append(f"  {case}: ours, k-diffusion, {networks.dit_like(presets[name]).name}{remark}")
    absent = kdiffusion.available()
    reason = f"needs --k-diffusion FOLDER here ({absent}: {kdiffusion.INSTALL})" if absent else "runs here"
    return [*lines, f"  k-diffusion: {reason}"]
