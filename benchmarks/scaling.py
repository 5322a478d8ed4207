"""What HDiT costs beside a DiT in pixel space as images grow, and neighborhood attention beside others as grids grow.

FLOPs are counted on the meta device (2 per multiply-accumulate), so every size has them. Latency, peak memory and
training steps are measured, cheapest points first, at batch 1 and at the largest batch that fits. A point that runs out
of memory, or would take longer than one is willing to wait, stays "not measured": pictures and tables mark what they
extrapolate.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import api, ceilings, command, networks, peers, plots, runs, timing
from benchmarks import measure as operators
from benchmarks import report as reports
from benchmarks.kernels import Case
from benchmarks.kernels.neighborhood_attention import na2d
from benchmarks.networks import Check, Network
from hdit import HDiTConfig, presets
from hdit._extras import require

SIZES = tuple(2**k for k in range(6, 15))  # pixels: 64 to 16384
PASSES = ("forward", "step")
PATIENCE = 10.0  # seconds of one pass
LARGEST = 4096  # images in the largest batch; more of them tell nothing new
LARGEST_SECONDS = 2.0  # of a pass over it
BUSY = 0.3  # share of the matmul rate that a GPU full of images is expected to reach at least
CHECKED = 512  # pixels: larger models repeat this one's levels, and float64 has no room for them
GRIDS = (32, 64, 128, 256, 512, 1024)  # tokens
HEADS, HEAD_DIM, KERNEL_SIZE = 2, 64, 7
MODELS = ("HDiT-B/4", "DiT-B/4")
ATTENTION = ("ours", "natten hopper-fna", "natten cutlass-fna", "flex", "sdpa")
ATTENTION_PASSES = ("forward", "forward+backward")

READING = (
    "HDiT-B/4 is our reading of one sentence of the paper (arXiv 2401.11605): each doubling of the image's side adds a "
    "neighborhood level, 384 wide and 2 deep, in front. 1 multiply-accumulate is 2 FLOPs."
)

Families = Callable[[int], Sequence[Network]]
OnStep = Callable[[str], None]


def hdit_b4(size: int) -> HDiTConfig:
    """HDiT-B/4 at any power of two from 64 pixels on: as in hdit.presets, each doubling of 128 adds a level in front.

    Raises ValueError on another size.
    """
    if size < 64 or size & (size - 1):
        raise ValueError(f"size must be a power of two from 64 on, got {size}")
    config = presets["hdit-b4-128"]
    added = max(0, (size // 128).bit_length() - 1)
    return replace(config, levels=config.levels[:1] * added + config.levels, image_size=(size, size))


def families(size: int) -> list[Network]:
    """The two that are compared, at a side in pixels."""
    config = hdit_b4(size)
    return [networks.hdit(config, MODELS[0]), networks.dit("B", config)]


# Models


def case_name(size: int, largest: bool) -> str:
    return f"image {size}x{size} {'largest batch' if largest else 'batch 1'}"


def blank(network: Network, size: int, batch: int, direction: str, largest: bool = False) -> runs.Row:
    """A row with what is known before measuring."""
    return runs.row(
        case_name(size, largest),
        network.name,
        direction,
        "not measured",
        family="model",
        operator="model",
        settings={"size": size, "batch": batch, "largest": largest},
        flops=networks.flops(network, batch, backward=direction != "forward"),
        parameters=networks.parameters(network),
    )


def measure_models(
    run: runs.Run,
    sizes: Sequence[int],
    passes: Sequence[str] = PASSES,
    contestants: Sequence[str] = (),
    *,
    device: torch.device,
    seconds: float = 1.5,
    patience: float = PATIENCE,
    budget_seconds: float = math.inf,
    at: Families = families,
    on_step: OnStep = lambda message: None,
) -> None:
    """Measures one image in every size, pass and family that the run has no row of yet; saves it after every row.

    sizes: sides of the images in pixels; the order within each but the smallest is random. contestants:
    patterns as in api.chosen; none means all. seconds: for measuring a pass. patience: seconds of one pass, as
    predicted from the same network's smaller images and the ratio of FLOPs, beyond which it is not tried; a network of
    which nothing is known is tried, and left after a first pass that takes longer. budget_seconds: for all of it,
    counting FLOPs aside; a point that would not fit is not tried. at: size -> the networks. on_step: called with a line
    of text before each piece of work.
    """
    points = []
    for size in sorted(sizes):
        on_step(f"counting FLOPs at {size}²")
        names = api.chosen(contestants, [network.name for network in at(size)])
        chosen = [network for network in at(size) if network.name in names]
        own = [(blank(network, size, 1, direction), network) for network in chosen for direction in passes]
        # Of the smallest size the cheapest comes first: nothing predicts yet what takes too long.
        points += random.sample(own, len(own)) if points else sorted(own, key=lambda point: point[0]["flops"])
    deadline = time.monotonic() + budget_seconds
    checks: dict[tuple[str, int], Check | str] = {}
    overhead = 0.0  # seconds of the last point beside its timed passes: construction, first call
    for row, network in points:
        if run.done(*runs.key(row)):
            continue
        expected, left = _expected(run, row), deadline - time.monotonic()
        needed = overhead + expected * networks.fewest_calls(device, expected) if expected else 0.0
        reason = None
        if _full(run, row):
            reason = "smaller images don't fit into memory"
        elif expected > patience:
            reason = f"about {expected:,.0f} s a pass expected, more than the {patience:g} s allowed"
        elif needed >= left:
            reason = f"about {needed:,.0f} s needed, {max(left, 0):.0f} s left"
        if reason is not None:
            run.put(row | {"reason": reason})
            run.save()
            continue
        size = row["settings"]["size"]
        model = min(sizes) if device.type == "cpu" else min(size, CHECKED)
        if (network.name, model) not in checks:
            on_step(f"checking {network.name} at {model}² against float64")
            same = [other for other in at(model) if other.name == network.name]
            checks[network.name, model] = networks.check(same, device, backward="step" in passes)[network.name]
        if model != size:
            row["detail"] = f"checked at {model}²"
        on_step(f"{row['pass']} of {network.name} at {size}²")
        began = time.monotonic()
        allowed = math.inf if expected else min(patience, left)
        row = networks.attempt(row, network, checks[network.name, model], run, device, seconds, allowed)
        if wall := row["wall_us"]:
            overhead = max(0.0, time.monotonic() - began - wall["median"] * wall["repeats"] / 1e6)


def _singles(run: runs.Run) -> list[runs.Row]:
    """The rows of models at batch 1."""
    return [row for row in run.own["rows"] if row["family"] == "model" and not row["settings"]["largest"]]


def _expected(run: runs.Run, row: runs.Row) -> float:
    """Seconds of a pass, from the contestant's largest measured one of that pass, or else of another, or else from the
    first call of one that took too long; 0 if nothing is known."""
    own = [found for found in _singles(run) if found["contestant"] == row["contestant"]]
    timed = [found for found in own if found["wall_us"]]
    given_up = [found for found in own if found["status"] == "not measured" and found.get("first_call_s")]
    known = [found for found in timed if found["pass"] == row["pass"]] or timed or given_up
    if not known:
        return 0.0
    nearest = max(known, key=lambda found: found["flops"])
    seconds = nearest["wall_us"]["median"] / 1e6 if nearest["wall_us"] else nearest["first_call_s"]
    return seconds * row["flops"] / nearest["flops"]


def _full(run: runs.Run, row: runs.Row) -> bool:
    """Whether smaller images were out of memory already."""
    return any(
        found["status"] == "out of memory"
        and (found["contestant"], found["pass"]) == (row["contestant"], row["pass"])
        and found["settings"]["size"] < row["settings"]["size"]
        for found in _singles(run)
    )


def measure_largest(
    run: runs.Run,
    sizes: Sequence[int],
    contestants: Sequence[str] = (),
    *,
    device: torch.device,
    seconds: float = 1.5,
    deadline: float = math.inf,
    at: Families = families,
    on_step: OnStep = lambda message: None,
) -> None:
    """Measures the largest batch that fits into a GPU's memory, for every point measured at batch 1.

    Batches are powers of two up to LARGEST, whose pass should take no longer than LARGEST_SECONDS; the row's detail
    says what ends them. Memory is predicted from what four images need more than one; where that is too hopeful, half
    of the batch is tried, and twice where the batch left room for it. deadline: by time.monotonic(). The rest is as in
    measure_models.
    """
    for single in _singles(run):
        size, direction = single["settings"]["size"], single["pass"]
        names = api.chosen(contestants, [network.name for network in at(size)])
        wanted = size in sizes and single["contestant"] in names
        known = run.done(case_name(size, largest=True), single["contestant"], direction)
        if not wanted or known or single["status"] != "ok":
            continue
        (network,) = (other for other in at(size) if other.name == single["contestant"])
        if time.monotonic() >= deadline:
            unknown = {"settings": {"size": size, "largest": True}, "flops": None, "reason": "the budget is spent"}
            run.put(blank(network, size, 1, direction, largest=True) | unknown)
            run.save()
            continue
        on_step(f"{direction} of {network.name} at {size}²: the largest batch that fits")
        checked = Check(single["error"], single["allowed_error"], single["error"], single["allowed_error"])
        batch, most, limit = _largest(single, network, device)
        fitted = None
        while batch > 1:
            reason = f"limited by {limit if batch == most else 'memory'}"
            tried = blank(network, size, batch, direction, largest=True) | {"detail": reason}
            tried = networks.attempt(tried, network, checked, run, device, seconds)
            if tried["status"] == "out of memory" and fitted is not None:
                run.put(fitted)
                run.save()
                break
            if tried["status"] == "out of memory":
                batch //= 2
                most, limit = batch, "memory"
            elif tried["status"] == "ok" and batch < most and 2 * tried["peak_bytes"] <= networks.room(device):
                fitted, batch = tried, 2 * batch
            else:
                break
        else:
            limit = limit if most == 1 else "memory"
            names = {"case": case_name(size, largest=True), "settings": single["settings"] | {"largest": True}}
            run.put(single | names | {"detail": f"limited by {limit}"})
            run.save()


def _largest(single: runs.Row, network: Network, device: torch.device) -> tuple[int, int, str]:
    """(the batch that memory is predicted to have room for, the most that is tried whatever the memory, why no more)"""
    one_us = min((single["gpu_us"] or single["wall_us"])["median"], (single["floor_us"] or math.inf) / BUSY)
    slow = f"{LARGEST_SECONDS:g} s a pass"
    limits = {f"the {LARGEST} images tried at most": float(LARGEST), slow: LARGEST_SECONDS / (one_us / 1e6)}
    limit, allowed = min(limits.items(), key=lambda item: item[1])
    most = 2 ** math.floor(math.log2(max(allowed, 1)))
    if most == 1:
        return 1, 1, limit
    try:
        four = networks.peak(network, single["pass"], 4, device)
    except Exception:  # most of all out of memory; anything else shows in the row of the batch that is tried
        four = None
    networks.release(device)  # or its cache would count as taken
    if four is None:
        fits = 2.0
    else:
        one = single["peak_bytes"]
        fits = 1 + (networks.room(device) - one) / max((four - one) / 3, 1)
    return min(most, 2 ** math.floor(math.log2(max(fits, 1)))), most, limit


# The attention operator alone


def grid_name(grid: int) -> str:
    return f"attention {grid}x{grid} tokens"


def grid_case(grid: int, device: torch.device) -> tuple[Case, list[peers.Contestant]]:
    """A square grid as an operator's case, and those of ATTENTION."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    case = na2d(1, grid, grid, HEADS, HEAD_DIM, KERNEL_SIZE, dtype)
    return case, [found for found in peers.case_contestants(case) if found.name in ATTENTION]


def _to_all_tokens(row: dict[str, Any], grid: int, session: operators.Session) -> dict[str, Any]:
    """The row with FLOPs and floor of attention to all of a grid's tokens, which is another function than na2d."""
    flops = row["flops"] // KERNEL_SIZE**2 * grid**2
    floor = ceilings.floor_us(session.ceilings, row["bytes"], flops, row["settings"]["dtype"])
    ratio = row["ratio_to_floor"] and row["ratio_to_floor"] * row["floor_us"] / floor
    return row | {"flops": flops, "floor_us": floor, "ratio_to_floor": ratio}


def measure_attention(
    run: runs.Run,
    grids: Sequence[int],
    contestants: Sequence[str] = (),
    *,
    device: torch.device,
    patience: float = PATIENCE,
    deadline: float = math.inf,
    compiling: bool = True,
    on_step: OnStep = lambda message: None,
) -> None:
    """Measures attention on square grids by all of ATTENTION where the run has no row yet; saves it after each of them.

    The run's ceilings must have been measured. FLOPs and floor of a row are those of its own function: for sdpa, of
    attention to all tokens. patience: seconds of a pass. deadline: by time.monotonic(). compiling: whether those that
    compile for long are measured, too.
    """
    session = operators.Session(device, run.session["ceilings"], deadline, compiling, patience=patience)
    for grid in grids:
        case, rivals = grid_case(grid, device)
        settings = {name: case.settings[name] for name in ("batch", "heads", "head_dim", "kernel_size", "dtype")}
        chosen = api.chosen(contestants, [rival.name for rival in rivals])
        for rival in random.sample(rivals, len(rivals)):
            passes = [
                direction for direction in ATTENTION_PASSES if not run.done(grid_name(grid), rival.name, direction)
            ]
            if not passes or rival.name not in chosen:
                continue
            if session.left() > 0 or rival.peer.available():  # why a peer can't run is told at no cost
                on_step(f"{grid_name(grid)}: {rival.name}")
                with timing.side_stream(device):
                    rows = operators.measure_case(case, rival, session, passes)
            else:
                rows = operators.left_out(case, rival, session, passes, "the budget is spent")
            names = {"case": grid_name(grid), "family": "attention", "settings": settings | {"grid": grid}}
            if rival.name == "sdpa":
                rows = [_to_all_tokens(row, grid, session) for row in rows]
            run.put(*(row | names for row in rows))
            run.save()
        session.forget()


# The demonstration's report


def report(directory: Path | str, budget_seconds: float = 60) -> dict[str, Any]:
    """Latency of one image at 64² to 4096², measured within so many seconds.

    Writes scaling.png and scaling.json into the directory, prints the table, and returns the run's data.
    """
    progress = require("rich.progress", "bench")
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    run = runs.Run.open(None, "scaling", ["benchmarks.scaling.report"])
    with progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task("scaling report", total=None)
        measure_models(
            run,
            [size for size in SIZES if size <= 4096],
            ["forward"],
            device=api.device(),
            seconds=budget_seconds / 40,
            patience=budget_seconds,
            budget_seconds=budget_seconds,
            on_step=lambda message: bar.update(task, description=message),
        )
    run.path = Path(directory) / "scaling.json"
    run.save()
    plots.save_picture(run.data, "scaling", Path(directory) / "scaling.png")
    print_summary(run.data)
    return run.data


def print_summary(run: dict[str, Any]) -> None:
    """A scaling run's models as tables, and in words the paper's claim and the exponents."""
    rows = [row for row in run["rows"] if row["family"] == "model"]
    tables = {f"Forward pass, batch 1, on {run['environment']['device']}": reports.scaling_table(run)}
    tables |= reports.resource_tables(rows) | reports.largest_table(rows)
    console = require("rich.console", "bench").Console(width=None if sys.stdout.isatty() else 160)
    for title, (head, *body) in tables.items():
        table = require("rich.table", "bench").Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for line in body:
            table.add_row(*map(require("rich.markup", "bench").escape, line))
        console.print(table)
    print(READING)
    if claim := reports.claim(reports.forward_rows(run)):
        print(claim)
    for title, (_, curves) in plots.scaling_panels(rows).items():
        for curve in curves:
            if curve.determined:
                growth = f"grows as pixels to the power of {curve.law} (95% interval) {curve.fitted}"
                print(f"{title}: {curve.contestant} {growth}; {curve.last}")
            elif curve.law:
                unknown = f"exponent is not determined, {curve.law.interval} {curve.fitted}; between two alone it is"
                print(f"{title}: {curve.contestant}'s {unknown} {curve.last}")


# The command


@dataclass(frozen=True)
class Selection:
    """What a command line asks for: sides of images at batch 1 and at the largest batch, and of grids."""

    sizes: list[int]
    largest: list[int]
    grids: list[int]


def select(patterns: Sequence[str], quick: bool, on_gpu: bool) -> Selection:
    """Cases that a pattern matches; without patterns all that make sense on this machine. quick: a few of them.

    Raises runs.RunError for a pattern that matches none.
    """
    if quick and not patterns:
        return Selection([128, 256, 512], [], [32, 64, 128]) if on_gpu else Selection([64, 128, 256], [], [32])
    if not patterns:
        return Selection(list(SIZES), list(SIZES) if on_gpu else [], list(GRIDS if on_gpu else GRIDS[:3]))
    if unknown := api.unmatched(patterns, list(_cases())):
        raise api.no_case(unknown)
    chosen = api.chosen(patterns, list(_cases()))
    found = Selection(
        [size for size in SIZES if any(case_name(size, largest) in chosen for largest in (False, True))],
        [size for size in SIZES if case_name(size, largest=True) in chosen],
        [grid for grid in GRIDS if grid_name(grid) in chosen],
    )
    if found.largest and not on_gpu:
        raise runs.RunError(f"{case_name(found.largest[0], largest=True)} needs a GPU, and torch finds none here")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, f"a few small images and grids, batch 1, {api.QUICK_SECONDS} s")
    text = f"of one pass, beyond which a size is not measured (default: {PATIENCE:g})"
    parser.add_argument("--patience", type=command.seconds, default=PATIENCE, metavar="SECONDS", help=text)


def run(args: argparse.Namespace) -> int:
    device = api.device()
    chosen = select(args.case, args.quick, device.type == "cuda")
    api.check_contestants(args.contestant, [*MODELS, *ATTENTION])
    found = command.open_run(args, "scaling")
    deadline = command.deadline(args)
    common: dict[str, Any] = {"device": device, "on_step": api.clocked(command.say)}
    models = common | {"seconds": 0.3 if args.quick else 1.5}
    patient = {"patience": args.patience}
    attention = common | patient | {"deadline": deadline, "compiling": not args.quick}

    def measure_grids() -> None:
        measure_attention(found, chosen.grids, args.contestant, **attention)

    if not args.quick:
        measure_grids()  # first, since models take what time there is
    left = deadline - time.monotonic()
    measure_models(found, chosen.sizes, PASSES, args.contestant, budget_seconds=left, **patient, **models)
    measure_largest(found, chosen.largest, args.contestant, deadline=deadline, **models)
    if args.quick:
        measure_grids()  # last, since a model's first call can take half of the time
    status = command.finish(found, args)
    if any(row["family"] == "model" for row in found.own["rows"]):
        print_summary(found.own)
    return status


def listing(patterns: Sequence[str] = ()) -> list[str]:
    """Lines for `python -m benchmarks list`, of cases that a pattern matches."""
    on_gpu = torch.cuda.is_available()
    cases, chosen = _cases(), api.chosen(patterns, list(_cases()))
    default = {grid_name(grid) for grid in select([], quick=False, on_gpu=on_gpu).grids}
    lines: list[str] = []
    involved: list[peers.Contestant] = []
    for case in chosen:
        remark = ""
        if cases[case] == "grid":
            involved = grid_case(GRIDS[0], api.device())[1] if patterns else []  # else they stand with the kernels
            remark = f": {', '.join(ATTENTION)}" + ("" if case in default else f"  (only with --case '{case}')")
        elif cases[case] == "largest" and not on_gpu:
            remark = "  (needs a GPU)"
        lines.append(f"  {case}{remark}")
    lines += [f"  {rival.name}: {api.can_run(rival.peer.available())}" for rival in involved]
    return [f"scaling: {', '.join(PASSES)} of {' and '.join(MODELS)}", *lines] if lines else []


def _cases() -> dict[str, str]:
    """Every case by its name, with what it is: a point, the largest batch at one, or a grid."""
    cases = {case_name(size, largest=False): "point" for size in SIZES}
    cases |= {case_name(size, largest=True): "largest" for size in SIZES}
    return cases | {grid_name(grid): "grid" for grid in GRIDS}
