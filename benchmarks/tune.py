"""The launch configurations of the portable neighborhood attention kernels, measured anew on a Hopper GPU.

    python -m benchmarks tune [--case "dq bfloat16"] [--budget SECONDS] [--output FILE] [--log FILE]

Nothing is tuned where the kernels are used: this writes triton_configs_hopper.py, which ships, and triton_configs.py
chooses from it.
For each entry of its tables, candidates are launched on random tensors, held against what the present configuration
gives, and timed. The fastest replaces the present one if it is faster beyond the spread of both, and is so again when
the two are timed once more. A backward kernel is judged by the whole backward pass: the other kernel stays as it is.

The files are written anew after each entry. An entry that was not measured keeps its value.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import api, command, results, runs, sources, timing
from benchmarks.command import say
from benchmarks.rows import Stats, verdict
from hdit_kernels.neighborhood_attention import triton_configs_hopper
from hdit_kernels.neighborhood_attention.triton_configs import Config, Table

TABLES: dict[str, Table] = {
    "forward": triton_configs_hopper.FORWARD,
    "dq": triton_configs_hopper.DQ,
    "dkdv": triton_configs_hopper.DKDV,
}
DTYPES = {16: torch.bfloat16, 32: torch.float32}
SHAPES = {64: (4, 256, 256, 2, 64), 128: (4, 128, 128, 4, 128)}  # by head_dim; smaller ones favour few programs
TOLERANCE = {16: 2e-2, 32: 1e-4}  # of the largest number of a result: some roundings to bfloat16, or sums of float32
NOISE = 0.01  # share of a median that is never called a difference; in one process medians are known to about this

# What candidates are made of, by bits where that matters. One stage would wait for every load; products of float32 take
# so long that two hide them.
TILES = {16: ((8, 8), (16, 4), (4, 16)), 32: ((4, 8), (8, 4))}
HEIGHTS, WIDTHS = (1, 2, 4), (16, 32)  # of blocks
STAGES = {16: (2, 3, 4), 32: (1, 2)}
LIMITS = {16: (128, 168, 255, None), 32: (None,)}
WARPS = 4
FEWEST_KEYS = {16: 64, 32: 16}  # in all stages' blocks: fewer don't hide what a load takes (float32: any block does)
FREE_REGISTERS = 96  # of a thread beside its accumulators: what the measured configurations leave it

# Of a multiprocessor: 32-bit registers, and bytes of shared memory, of which each program takes some for itself.
REGISTERS, SHARED_MEMORY, OWN_MEMORY = 65536, 228 * 1024, 1024

Row = dict[str, Any]  # what the log says of an entry
Call = Callable[[], Sequence[Tensor]]  # launches, and gives the results
Stopwatch = Callable[[Call], Stats]


class Entry(NamedTuple):
    """A line of a table."""

    kernel: str
    bits: int
    head_dim: int
    window: int

    @property
    def name(self) -> str:
        dtype = str(DTYPES[self.bits]).removeprefix("torch.")
        return f"{self.kernel} {dtype} head_dim {self.head_dim} window {self.window}"

    @property
    def present(self) -> Config:
        return Config(*TABLES[self.kernel][self.bits, self.head_dim][self.window])


Prepare = Callable[[Entry, Sequence[Config]], dict[Config, Call]]


def all_entries() -> list[Entry]:
    return [
        Entry(kernel, *key, window)
        for kernel, table in TABLES.items()
        for key, windows in table.items()
        for window in windows
    ]


def select_entries(patterns: Sequence[str]) -> list[Entry]:
    """Those that a pattern matches; all without patterns. Raises runs.RunError for a pattern that matches none."""
    every = all_entries()
    names = [entry.name for entry in every]
    if unknown := api.unmatched(patterns, names):
        raise runs.RunError(f"no entry matches {unknown[0]!r}; one of them is {names[0]!r}")
    chosen = api.chosen(patterns, names)
    return [entry for entry in every if entry.name in chosen]


# Candidates


def candidates(kernel: str, bits: int, head_dim: int, window: int) -> list[Config]:
    """The present configuration, then some 5 to 25 that may be faster:

    - a query is multiplied with at most a quarter more keys than it has to be, and blocks are narrow only where that
      saves some;
    - the blocks of all stages hold enough keys;
    - of the register limits, the two lowest that leave enough beside the accumulators;
    - shared memory holds as many programs as the registers do.
    """
    entry = Entry(kernel, bits, head_dim, window)
    every = [
        Config(*tile, block_y, block_x, WARPS, stages, limit)
        for tile, block_y, block_x, stages in itertools.product(TILES[bits], HEIGHTS, WIDTHS, STAGES[bits])
        for limit in limits(entry, tile)
    ]

    def products(config: Config) -> int:
        return config.products((window, window))

    least = min(map(products, every))
    found = [
        config
        for config in every
        if products(config) <= 1.25 * least
        and (config.block_x == WIDTHS[-1] or products(config) < products(config._replace(block_x=WIDTHS[-1])))
        and config.block_y * config.block_x * config.num_stages >= FEWEST_KEYS[bits]
        and programs(config) * (shared_bytes(entry, config) + OWN_MEMORY) <= SHARED_MEMORY
    ]
    return [entry.present, *(config for config in found if config != entry.present)]


def limits(entry: Entry, tile: tuple[int, int]) -> list[int | None]:
    outputs = 2 if entry.kernel == "dkdv" else 1
    accumulators = outputs * math.prod(tile) * entry.head_dim // (32 * WARPS)  # registers of a thread
    return [limit for limit in LIMITS[entry.bits] if (limit or 255) - accumulators >= FREE_REGISTERS][:2]


def programs(config: Config) -> int:
    """How many the registers of a multiprocessor hold."""
    return REGISTERS // (32 * config.num_warps * (config.max_registers or 255))


def shared_bytes(entry: Entry, config: Config) -> int:
    """About what a program keeps in shared memory: a block of two tensors for each stage, and the tile of one (forward)
    or two.
    """
    blocks = 2 * config.num_stages * config.block_y * config.block_x
    tiles = (1 if entry.kernel == "forward" else 2) * config.tile_y * config.tile_x
    return (blocks + tiles) * entry.head_dim * entry.bits // 8


# Measuring


def prepare(entry: Entry, configs: Sequence[Config], device: torch.device) -> dict[Config, Call]:
    """A call for each configuration, compiled as far as that succeeds. To be called inside timing.side_stream."""
    make = launcher(entry, device)
    calls = {config: make(config) for config in configs}
    calls[configs[0]]()  # what the calls share is compiled once
    timing.synchronize(device)
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for call in calls.values():  # compiling takes most of the time; what raises will do so again
            pool.submit(call)
    timing.synchronize(device)
    return calls


def launcher(entry: Entry, device: torch.device) -> Callable[[Config], Call]:
    """Makes the call of a configuration, on random tensors that all calls share."""
    from hdit_kernels import launch
    from hdit_kernels.neighborhood_attention.dispatch import LOG2_E
    from hdit_kernels.neighborhood_attention.triton_backward import dkdv_launch, dq_launch
    from hdit_kernels.neighborhood_attention.triton_forward import forward_launch

    shape, dtype = SHAPES[entry.head_dim], DTYPES[entry.bits]
    query, key, value, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    window, dilation, scale = (entry.window, entry.window), (1, 1), entry.head_dim**-0.5
    logit_scale = scale * LOG2_E
    arguments = query, key, value, window, dilation, logit_scale, False, True
    (out, stats), ahead = forward_launch(*arguments)
    launch.run(ahead)
    first, terms = dq_launch(
        torch.empty_like(query), dout, query, key, value, None, out, stats, window, dilation, scale, logit_scale
    )
    launch.run(first)

    def make(config: Config) -> Call:
        def configure(*_: Any) -> Config:  # a function for each configuration: launches are planned once for each
            return config

        def forward() -> Sequence[Tensor]:
            (found, statistics), call = forward_launch(*arguments, configure=configure)
            launch.run(call)
            return found, statistics[0]

        def dq() -> Sequence[Tensor]:
            found = torch.empty_like(query)
            arguments = dout, query, key, value, None, out, stats, window, dilation, scale, logit_scale
            launch.run(dq_launch(found, *arguments, configure=configure)[0])
            return (found,)

        def dkdv() -> Sequence[Tensor]:
            found = torch.empty_like(key), torch.empty_like(value)
            arguments = dout, query, key, value, terms, stats, window, dilation, scale, logit_scale
            launch.run(dkdv_launch(*found, *arguments, configure=configure))
            return found

        return {"forward": forward, "dq": dq, "dkdv": dkdv}[entry.kernel]

    return make


def measure_entry(entry: Entry, prepare: Prepare, stopwatch: Stopwatch) -> Row:
    """Tries the candidates of an entry, a printed line for each."""
    configs = candidates(*entry)
    calls = prepare(entry, configs)
    wanted = calls[entry.present]()
    trials = []
    for config in configs:
        trials.append(attempt(config, calls[config], wanted, TOLERANCE[entry.bits], stopwatch))
        mark = " (present)" if config == entry.present else ""
        say(f"{entry.name} · {describe(config)}{mark}: {outcome(trials[-1])}")
    row = {"entry": entry._asdict(), "present": list(entry.present), "chosen": list(entry.present), "trials": trials}
    best = min((t for t in trials if t["status"] == "ok"), key=lambda t: t["gpu_us"]["median"], default=trials[0])
    if is_faster(trials[0]["gpu_us"], best["gpu_us"]):
        again = [stopwatch(calls[Config(*trial["config"])]) for trial in (trials[0], best)]
        row["again"] = dict(zip(("present", "best"), again, strict=True))
        if is_faster(*again):
            row["chosen"] = best["config"]
    return row


def attempt(config: Config, call: Call, wanted: Sequence[Tensor], tolerance: float, stopwatch: Stopwatch) -> Row:
    """A trial: its status is "ok" with a time, or "wrong" or "failed" with a reason."""
    found: Row = {"config": list(config), "status": "ok", "reason": None, "gpu_us": None}
    try:
        errors = [off_by(*pair) for pair in zip(call(), wanted, strict=True)]
        if all(error <= tolerance for error in errors):
            return found | {"gpu_us": stopwatch(call)}
        reason = f"off by {', '.join(f'{error:.1e}' for error in errors)} of the largest, allowed {tolerance:.0e}"
        return found | {"status": "wrong", "reason": reason}
    except Exception as error:  # does not compile, or asks for more than the GPU has
        return found | {"status": "failed", "reason": timing.one_line(error)}


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted; NaN where there is one."""
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def is_faster(present: Stats, other: Stats) -> bool:
    return verdict(present, other, NOISE) == "faster"


def tune(
    entries: Sequence[Entry],
    prepare: Prepare,
    stopwatch: Stopwatch,
    deadline: float,
    write: Callable[[Sequence[Row]], None],
) -> list[Row]:
    """A row for each entry that the deadline (by time.monotonic()) allows to begin.

    prepare: makes the calls of an entry's configurations. stopwatch: times one. write: is given the rows after each.
    """
    rows: list[Row] = []
    for entry in entries:
        if time.monotonic() >= deadline:
            say(f"The budget is spent: {len(entries) - len(rows)} entries are not measured, from {entry.name} on")
            break
        rows.append(measure_entry(entry, prepare, stopwatch))
        write(rows)
    return rows


def changed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["chosen"] != row["present"]]


def describe(config: Sequence[Any]) -> str:
    tile_y, tile_x, block_y, block_x, warps, stages, limit = config
    registers = "no limit" if limit is None else f"{limit} registers"
    return f"tile {tile_y}x{tile_x}, block {block_y}x{block_x}, {warps} warps, {stages} stages, {registers}"


def outcome(trial: Row) -> str:
    if trial["status"] != "ok":
        return f"{trial['status']}: {trial['reason']}"
    return "{median:.1f} µs [{p20:.1f}, {p80:.1f}]".format(**trial["gpu_us"])


# The module


def updated(rows: Sequence[Row]) -> dict[str, Table]:
    """The present tables with what was chosen."""
    tables = copy.deepcopy(TABLES)
    for row in rows:
        entry = Entry(**row["entry"])
        tables[entry.kernel][entry.bits, entry.head_dim][entry.window] = tuple(row["chosen"])
    return tables


def last_run(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the module says of the run that wrote it."""
    versions = [f"{key} {environment[key]}" for key in ("torch", "triton", "cuda", "driver")]
    where = ", ".join([environment["device"], *versions, environment["date"]])
    return f"Last run: {where}: {len(rows)} of {len(all_entries())} entries measured, {len(changed(rows))} changed."


TYPE = "dict[tuple[int, int], dict[int, tuple[int, int, int, int, int, int, int | None]]]"


def source(tables: dict[str, Table], history: str) -> str:
    """The module's text, as ruff formats it. history: last_run()."""
    lines = [
        '"""Launch configurations of the portable neighborhood attention kernels on Hopper: written by',
        "`python -m benchmarks tune`, chosen from by triton_configs.py.",
        "",
        *textwrap.wrap(history, 120),
        "",
        "{(bits, head_dim): {window: (tile_y, tile_x, block_y, block_x, num_warps, num_stages, max_registers)}}",
        '"""',
    ]
    for kernel, table in tables.items():
        lines += ["", f"{kernel.upper()}: {TYPE} = {{"]
        for key, windows in table.items():
            fields = [f"        {window}: {own}," for window, own in windows.items()]
            lines += [f"    {key}: {{", *fields, "    },"]
        lines.append("}")
    return "\n".join(lines) + "\n"


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "entries whose name contains PATTERN, or is matched by it if it has *, ? or [; can be given more than once"
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument("--output", type=Path, metavar="FILE", help="module to write (default: the package's own)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="every measurement, as JSON")
    parser.add_argument("--budget", type=command.seconds, metavar="SECONDS", help="begin no entry after these")


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    device, entries = hopper_gpu(), select_entries(args.case)
    output = args.output or Path(triton_configs_hopper.__file__)
    for path in (output, args.log):
        if path is not None:
            runs.check_writable(path)
    header: dict[str, Any] = {
        "environment": results.environment() | results.origin(),
        "sources": sources.present()["na2d"],
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
    }

    def write(rows: Sequence[Row]) -> None:
        results.write_text(output, source(updated(rows), last_run(header["environment"], rows)))
        if args.log is not None:
            results.write(args.log, header | {"entries": rows})

    def stopwatch(call: Call) -> Stats:
        return timing.queued_time(call, device).to_dict()

    with timing.side_stream(device):
        deadline = began + (args.budget or math.inf)
        rows = tune(entries, functools.partial(prepare, device=device), stopwatch, deadline, write)
    for row in changed(rows):
        say(f"changed: {Entry(**row['entry']).name}: {describe(row['present'])} -> {describe(row['chosen'])}")
    say(f"{len(rows)} of {len(all_entries())} entries measured, {len(changed(rows))} changed")
    for path in (output, args.log):
        if path is not None and rows:
            say(f"Written: {path}")
    return 0


def hopper_gpu() -> torch.device:
    """Raises runs.RunError if there is none."""
    found = "no GPU"
    if torch.cuda.is_available():
        from hdit_kernels import launch

        device = api.device()
        if launch.gpu_family(device) == "hopper":
            return device
        found = torch.cuda.get_device_name(device)
    raise runs.RunError(f"tune needs a Hopper GPU (H100, H200), whose table it writes; torch finds {found} here")
