"""Recorded runs as Markdown with tables and pictures.

    python -m benchmarks report FOLDER [--output DIR]   a folder of run JSON (SCHEMA.md) becomes DIR/report.md
    python -m benchmarks report                         the measured parts of README.md and docs/ anew
    python -m benchmarks report --check                 whether they are due, and which rows are of other sources

The first draws pictures as PNG and SVG. The second, due after a new measurement, writes everything between
`<!-- generated: NAME -->` and its end mark anew, and docs/pictures (SVG, which a repository stores small). Nothing in
them depends on the present sources: a page says at which commit it was measured, --check whether that has changed.
Where `<!-- built: NAME -->` stands, the tables are long, and in the site only: docs/site_hooks.py puts them there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import plots, results, runs, sources
from benchmarks import rows as reading
from benchmarks.captured import NOT
from benchmarks.fits import PowerLaw
from benchmarks.rows import MEASURES, NOISE, UNDECIDED
from benchmarks.runs import Row

NOTHING = "No run is recorded yet."
PICTURES = Path("docs") / "pictures"
SHOWN = ("scaling", "time", "attention", "na2d", "roofline")  # of each record's pictures, those that the documents show
PAGE = "report.md"
TITLES = {
    "machines": "Machines",
    "scaling-details": "Scaling with the size of the image",
    "attention": "Attention alone",
    "kernels": "Kernels",
    "models": "Models",
    "training": "Training",
    "gpu-tests": "Correctness on a GPU",
    "measurements": "Every measurement",
}
FRONT = [  # of the README: (case, pass); two of na2d's windows, the rest at shapes of the presets
    ("na2d 4x256x256x2x64 k7 bfloat16", "forward+backward"),
    ("na2d 4x256x256x2x64 k7 bfloat16", "forward"),
    ("na2d 1x256x256x2x64 k13 bfloat16", "forward+backward"),
    ("na2d 4x128x128x4x96 k7 bfloat16", "forward"),
    ("qk_norm_rope 4x256x256x2x64 bfloat16", "forward+backward"),
    ("ada_rms_norm 32x256x512 bfloat16", "forward+backward"),
    ("rms_norm 32768x512 bfloat16", "forward+backward"),
    ("geglu 32768x2x768 bfloat16", "forward+backward"),
    ("token_merge 32x256x256x3 p4 to 128 bfloat16", "forward+backward"),
    ("token_split 4x64x64x384 p2 to 256 skip bfloat16", "forward+backward"),
]
CAPTURED = "captured_us"  # of rows on a GPU, and not of all of these: see benchmarks/captured.py
TIMES = MEASURES | {CAPTURED: "captured"}
GRID = ("batch", "height", "width", "heads", "head_dim")
_BLOCK = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end of \1 -->\n", re.DOTALL)
_BUILT = re.compile(r"<!-- built: ([\w-]+) -->")


@dataclass(frozen=True)
class Column:
    """number: row -> what the first contestant's share of the second is told of, None where that says nothing.

    beside: what the first row is beside the second, as rows.verdict says; None where numbers are exact.
    """

    label: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None] | None = None
    beside: Callable[[Row, Row], str | None] = lambda first, second: None


@dataclass(frozen=True)
class Records:
    """What was recorded, seen from a document.

    runs: run files by path, those of a GPU first, of them the newest. pictures: the folder that holds the runs'
    pictures. root: the clone that they are told of in. shown: the names of the pictures that there are, None for all.
    """

    runs: dict[Path, dict[str, Any]]
    pictures: Path
    document: Path
    root: Path
    shown: Sequence[str] | None = None

    def of(self, kind: str, family: str | None = None) -> list[tuple[Path, dict[str, Any]]]:
        """What runs have of a kind, those with rows of a family if one is given."""
        found = [(path, runs.of_kind(run, kind)) for path, run in self.runs.items()]
        return [(path, run) for path, run in found if any(family in (None, row["family"]) for row in run["rows"])]

    def link(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.document.parent)).as_posix()


def load(
    folder: Path, pictures: Path, document: Path, root: Path = results.ROOT, shown: Sequence[str] | None = None
) -> Records:
    """Reads a folder's JSON files; those that are no runs are left out.

    Raises OSError when the folder can't be read, ValueError on a file that is no JSON or no run of this schema.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    found = {path: runs.read(path) for path in paths if "schema" in _json(path)}
    newest = sorted(found, key=lambda path: runs.date(found[path]), reverse=True)
    ordered = sorted(newest, key=lambda path: found[path]["environment"]["device_type"] == "cpu")
    return Records({path: found[path] for path in ordered}, pictures, document, root, shown)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def render(text: str, records: Records) -> str:
    """The Markdown text of records.document with its generated blocks written anew.

    Raises ValueError on a block that has no end mark or an unknown name.
    """
    opened = re.findall(r"<!-- generated: ([\w-]+) -->", text)
    closed = [match["name"] for match in _BLOCK.finditer(text)]
    if opened != closed:
        raise ValueError(f"{records.document}: blocks {opened} are opened, but {closed} have an end mark")

    def body(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{_written(name, records)}\n<!-- end of {name} -->\n"

    return _BLOCK.sub(body, text)


def built(text: str, document: Path, root: Path = results.ROOT) -> str:
    """The Markdown text of one of the clone's documents with what only the site shows.

    Raises ValueError on an unknown name.
    """
    if not _BUILT.search(text):
        return text
    records = recorded(document, root)
    return _BUILT.sub(lambda match: _written(match[1], records), text)


def _written(name: str, records: Records) -> str:
    if name not in BLOCKS:
        raise ValueError(f"{records.document}: no block is called {name!r}, only {sorted(BLOCKS)}")
    return BLOCKS[name](records)


def documents(root: Path = results.ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def recorded(document: Path, root: Path = results.ROOT) -> Records:
    """The clone's own records, seen from one of its documents."""
    return load(root / "benchmarks" / "results", root / PICTURES, document, root, SHOWN)


def write_documents(root: Path = results.ROOT) -> list[Path]:
    """Writes the generated blocks of README.md and docs/ anew, and docs/pictures; returns the files written."""
    records = recorded(root / "README.md", root)
    due = _due_documents(records)
    for document, text in due.items():
        document.write_text(text, encoding="utf-8")
    pictures = save_pictures(records, [".svg"])
    for stale in set((root / PICTURES).glob("*")) - set(pictures):
        stale.unlink()
    return [*due, *pictures]


def _due_documents(records: Records) -> dict[Path, str]:
    """The documents that are to be written anew, with what they are to become."""
    due = {}
    for document in documents(records.root):
        old = document.read_text(encoding="utf-8")
        new = render(old, replace(records, document=document))
        due |= {document: new} if new != old else {}
    return due


def differences(root: Path = results.ROOT) -> list[str]:
    """The documents and pictures of the clone that are not what write_documents would make of its records."""
    records = recorded(root / "README.md", root)
    digests = {
        records.pictures / f"{path.stem}-{name}.svg": plots.digest(run, name)
        for path, run in records.runs.items()
        for name in plots.pictures(run)
        if name in SHOWN
    }
    there = set(records.pictures.glob("*"))
    wrong = [path for path in there | digests.keys() if path not in there or path not in digests]
    wrong += [path for path in there & digests.keys() if digests[path] not in path.read_text(encoding="utf-8")]
    wrong += _due_documents(records)
    return sorted(path.relative_to(root).as_posix() for path in wrong)


def old_rows(root: Path = results.ROOT) -> list[str]:
    """A line for each operator or network of a record, of which rows, or the GPU tests, ran other sources than the
    present."""
    present, found = sources.present(root), Counter[tuple[str, str]]()
    for path, run in recorded(root / "README.md", root).runs.items():
        ran = [(row["kind"], runs.subject(row), row["session"]) for row in run["rows"]]
        if tests := run.get("gpu_tests"):
            ran += [("GPU tests", name, tests["session"]) for name in tests.get("operators", {}) if name in present]
        for kind, name, place in ran:
            session = run["sessions"][place]
            if (then := session["sources"].get(name)) != (now := present.get(name)):
                when = f"{session['date']}, commit {_commit(session['commit'])}"
                found[f"{path.name}, {kind}, {name}", f"sources {then} of {when}, now {now}"] += 1
    return [f"{where}: {count} rows are old: {why}" for (where, why), count in found.items()]


def write_page(folder: Path, output: Path) -> list[Path]:
    """Writes output/report.md and its pictures from the JSON files in a folder; returns the files written.

    Raises OSError or ValueError as load does, and ValueError when the folder holds no run.
    """
    records = load(folder, output, output / PAGE)
    if not records.runs:
        raise ValueError(
            f"{folder} holds no run: a run is a JSON file that `python -m benchmarks kernels` or the like wrote"
        )
    kinds = {row["kind"] for run in records.runs.values() for row in run["rows"]}
    needs = {"scaling-details": "scaling", "attention": "scaling", "models": "model", "training": "train"}
    names = [name for name in TITLES if needs.get(name, name) in kinds or name in ("machines", "measurements")]
    names += ["gpu-tests"] if any("gpu_tests" in run for run in records.runs.values()) else []
    parts = [f"## {TITLES[name]}\n\n{BLOCKS[name](records)}\n" for name in names]
    output.mkdir(parents=True, exist_ok=True)
    records.document.write_text("\n".join(["# Benchmarks\n", *parts]), encoding="utf-8")
    return [records.document, *save_pictures(records, [".png", ".svg"])]


def save_pictures(records: Records, suffixes: Sequence[str]) -> list[Path]:
    saved = [
        plots.save(run, records.pictures / path.stem, suffixes, records.shown) for path, run in records.runs.items()
    ]
    return [path for paths in saved for path in paths]


# Blocks: one function each, Records -> Markdown


def _machines(records: Records) -> str:
    """A line for each kind of each run, with what its sessions measured as ranges."""
    head = ["run", "of", "device", "versions", "ceilings", "clocks before timing", "measured"]
    body = []
    parts = [(path, kind, runs.of_kind(run, kind)) for path, run in records.runs.items() for kind in runs.KINDS]
    for path, kind, run in parts:
        if not run["rows"]:
            continue
        environment, sessions = run["environment"], run["sessions"]
        ceilings = [session["ceilings"] for session in sessions]
        rates = [_range("copy", ceilings, "copy_tb_s", ".2f", "TB/s")]
        rates += [_range("bf16", ceilings, "matmul_bf16_tflop_s", ".3g", "TFLOP/s")]
        clocks = [session["clocks"] or {} for session in sessions]
        seen = "; after it ".join(filter(None, (_clocks(clocks), _clocks(clocks, "_end"))))
        cards = {session.get("gpu_uuid") for session in sessions} - {None}
        device = environment["device"] + (f" ({len(cards)} cards)" if len(cards) > 1 else "")
        row = [f"[{path.name}]({records.link(path)})", kind, device, ", ".join(_versions(environment))]
        body.append([*row, ", ".join(filter(None, rates)), seen, _measured(run)])
    return _table(head, body, left=len(head)) if body else NOTHING


def _measured(run: dict[str, Any]) -> str:
    commits = dict.fromkeys(_commit(session["commit"]) for session in run["sessions"])
    return f"{runs.date(run)}, commit {', '.join(commits)}"


def _commit(commit: str | None) -> str:
    found, dash, state = (commit or "").partition("-")
    return found[:12] + dash + state


def _clocks(clocks: Sequence[dict[str, Any]], when: str = "") -> str:
    names = (("SM", f"sm_mhz{when}"), ("memory", f"memory_mhz{when}"))
    return ", ".join(filter(None, (_range(name, clocks, key, "", "MHz") for name, key in names)))


def _range(name: str, sessions: Sequence[dict[str, Any]], key: str, digits: str, unit: str) -> str:
    """What sessions have under a key, from the least to the greatest; empty if none has it."""
    values = [session[key] for session in sessions if session.get(key)]
    ends = [format(value, digits) for value in (min(values), max(values))] if values else []
    return f"{name} {'–'.join(dict.fromkeys(ends))} {unit}" if ends else ""


def _front_case(records: Records) -> tuple[Path, dict[str, Any], list[tuple[Row, Row]]]:
    """The first run of operators that has cases of FRONT, and these: ours beside the fastest other."""
    for path, run in records.of("kernels"):
        pairs = []
        for case, direction in FRONT:
            rows = [row for row in run["rows"] if (row["case"], row["pass"]) == (case, direction)]
            ours = next((row for row in rows if row["contestant"] == "ours" and row["status"] == "ok"), None)
            if ours and (rival := _rival(rows, ours, reading.judged_by(rows))):
                pairs.append((ours, rival))
        if pairs:
            return path, run, pairs
    return Path(), {}, []


def _front_sentence(records: Records) -> str:
    """One number and its conditions: the first case's."""
    _, run, pairs = _front_case(records)
    if not pairs:
        return NOTHING
    ours, rival = pairs[0]
    which = reading.judged_by(pairs[0])
    batch, height, width, heads, dim = (ours["settings"][name] for name in GRID)
    window, dtype = ours["settings"]["kernel_size"], ours["settings"]["dtype"]
    gain = rival[which]["median"] / ours[which]["median"]
    return (
        f"On an {run['environment']['device']}, in {dtype}, its `na2d` takes {_time(ours, which)} forward and backward "
        f"for {batch} grids of {height}x{width} tokens with {heads} heads of {dim} and windows of {window}x{window}: "
        f"**{gain:.1f} times as fast as the fastest other** ({rival['contestant']}, {_time(rival, which)})."
    )


def _front_table(records: Records) -> str:
    """The cases of FRONT, those that lose, too."""
    path, run, pairs = _front_case(records)
    if not pairs:
        return NOTHING
    body = []
    for ours, rival in pairs:
        which = reading.judged_by([ours, rival])
        word = _beside(ours, rival, which)
        gain = word if word in UNDECIDED else f"{rival[which]['median'] / ours[which]['median']:.2f}x"
        times = [_time(ours, which), f"{_time(rival, which)} ({rival['contestant']})"]
        body.append([f"`{ours['operator']}` {_short(ours)}", ours["pass"], *times, gain])
    head = ["operator and case", "pass", "ours", "fastest other", "times as fast"]
    return _joined([_table(head, body, left=2), _source(records, path, run)])


def _front_picture(records: Records) -> str:
    found = [(path, run) for path, run in records.of("scaling", "model") if "time" in plots.pictures(run)]
    return (
        _picture(records, *found[0], "time", "Measured time of HDiT-B/4 and DiT-B/4 as images grow")
        if found
        else NOTHING
    )


def _scaling_picture(records: Records) -> str:
    """The first machine's."""
    found = records.of("scaling", "model")
    return _picture(records, *found[0], "scaling", "Cost of HDiT-B/4 and DiT-B/4 as images grow") if found else NOTHING


def _scaling(records: Records) -> str:
    """What a newcomer wants to know: FLOPs and times on the first machine."""
    return _joined([_scaling_cost(records, *found) for found in records.of("scaling", "model")[:1]])


def _scaling_details(records: Records) -> str:
    parts = []
    for path, run in records.of("scaling", "model"):
        rows = [row for row in run["rows"] if row["family"] == "model"]
        parts.append(_device_line(run))
        parts.append(_picture(records, path, run, "scaling", "Cost of HDiT-B/4 and DiT-B/4 as images grow"))
        parts.append(_scaling_cost(records, path, run))
        parts.append(sdpa_line(rows))
        parts += [f"{title}:\n\n{_lines(table)}" for title, table in resource_tables(rows).items()]
        parts.append(_exponents(rows, plots.scaling_panels(rows), "pixels"))
        parts += [f"{title}:\n\n{_table(head, body, left=3)}" for title, (head, *body) in largest_table(rows).items()]
        parts += [_lost(rows), _uncaptured(rows)]
    return _joined(parts)


def sdpa_line(rows: Sequence[Row]) -> str:
    """Whose kernels torch's scaled_dot_product_attention ran in each network, as far as the rows tell."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for clause in (row["detail"] or "").split("; "):
            whose = clause.removeprefix("SDPA by ")
            if whose != clause and whose not in found.setdefault(row["contestant"], []):
                found[row["contestant"]].append(whose)
    each = [f"in {name} by {' and '.join(sorted(whose))}" for name, whose in sorted(found.items())]
    return f"torch's scaled_dot_product_attention is done {', '.join(each)}." if each else ""


def forward_rows(run: dict[str, Any]) -> list[Row]:
    """The rows of a scaling run's forward passes at batch 1."""
    rows = [row for row in run["rows"] if row["family"] == "model" and row["pass"] == "forward"]
    return [row for row in rows if not row["settings"]["largest"]]


def scaling_table(run: dict[str, Any]) -> list[list[str]]:
    """A scaling run's forward passes at batch 1 as a table, its head first: FLOPs and times by size, and what the first
    contestant takes of the second's."""
    rows = forward_rows(run)
    columns = [
        Column("GFLOP", lambda row: f"{row['flops'] / 1e9:,.0f}" if row["flops"] else "", lambda row: row["flops"]),
        *_time_columns(rows),
    ]
    return _by_size(rows, reading.contestants(rows), columns)


def _scaling_cost(records: Records, path: Path, run: dict[str, Any]) -> str:
    rows = forward_rows(run)
    names, source = reading.contestants(rows), _source(records, path, runs.part(run, rows))
    intro = "A forward pass, batch 1" + (f" (share: of {names[1]}'s, what {names[0]} takes)" if len(names) == 2 else "")
    return _joined([f"{intro}:", _lines(scaling_table(run)), claim(rows), source])


def resource_tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Parameters, memory and training steps of models at batch 1: tables, their heads first, by title."""
    single = [row for row in rows if not row["settings"]["largest"]]
    names = reading.contestants(single)
    memory = [Column("peak memory", _memory, lambda row: row["peak_bytes"])]
    found = {}
    for direction, intro in (("forward", "Parameters and memory of a forward pass"), ("step", "A training step")):
        own = [row for row in single if row["pass"] == direction]
        columns = _time_columns(own) if direction == "step" else [Column("parameters", _parameters)]
        columns += memory if any(row["peak_bytes"] for row in own) else []
        if own:
            found[f"{intro}, batch 1"] = _by_size(own, names, columns)
    return found


def _by_size(rows: Sequence[Row], names: Sequence[str], columns: Sequence[Column]) -> list[list[str]]:
    """A table, its head first, with a line for each size and the columns of each contestant."""
    at = {(row["contestant"], row["settings"]["size"]): row for row in rows}
    shared = len(names) == 2
    head, body = ["image"], []
    for column in columns:
        head += [f"{name} {column.label}" for name in names]
        head += ["share"] if shared and column.number else []
    for size in sorted({row["settings"]["size"] for row in rows}):
        line, found = [f"{size}²"], [at.get((name, size)) for name in names]
        for column in columns:
            line += [column.text(row) if row else "" for row in found]
            if shared and column.number:
                line.append(_share(column, *found))
        body.append(line)
    return [head, *body]


def _share(column: Column, first: Row | None, second: Row | None) -> str:
    if first is None or second is None or column.number is None:
        return ""
    one, other = column.number(first), column.number(second)
    if not one or not other:
        return ""
    word = column.beside(first, second)
    return word if word in UNDECIDED else plots.share(one / other)


def claim(rows: Sequence[Row]) -> str:
    """What the first contestant costs of the second at 1024², and whether that is measured; empty if it isn't known.

    Of times that can't be told apart there is no share, but the verdict. rows: as forward_rows gives them.
    """
    names, which = reading.contestants(rows), reading.judged_by(rows)
    if len(names) != 2:
        return ""
    facts, undecided = [], []
    costs = {"flops": "the FLOPs"} | {name: f"the {MEASURES[name]}" for name in (which, "wall_us")}
    for cost, label in costs.items():
        first, second = (plots.curve(name, rows, cost) for name in names)
        own, other, word = first.at(plots.ANNOTATED), second.at(plots.ANNOTATED), first.beside(second, plots.ANNOTATED)
        if word in UNDECIDED:
            undecided.append(f"{MEASURES[cost]}: {word}")
        elif own and other:
            how = ("extrapolated" if own[1] or other[1] else "measured") if cost != "flops" else "counted"
            facts.append(f"{plots.share(own[0] / other[0])} of {label} ({how})")
    at = {row["contestant"]: row for row in rows if row["settings"]["size"] == plots.ANNOTATED}
    if share := _share(_time_column(CAPTURED), *map(at.get, names)):
        if share in UNDECIDED:
            undecided.append(f"wall time, captured: {share}")
        else:
            facts.append(f"{share} of the wall time where both are captured (measured)")
    if not facts:
        return ""
    *others, last = facts
    listed = f"{', '.join(others)} and {last}" if others else last
    return "; ".join([f"At {plots.ANNOTATED}² {names[0]} takes {listed} that {names[1]} takes", *undecided]) + "."


def _exponents(rows: Sequence[Row], panels: dict[str, tuple[str, list[plots.Curve]]], what: str) -> str:
    """what: what cost is a power of. panels: as plots.scaling_panels gives them."""
    names, body = reading.contestants(rows), []
    for title, (_, curves) in panels.items():
        found = {curve.contestant: _law(curve, curve.law) for curve in curves if curve.law}
        body.append([title, *(found.get(name, "too few points") for name in names)])
    intro = (
        f"Cost grows as the number of {what} to the power of (95% interval over those of the largest sizes, three or "
        f"more, that determine it best; not determined where it is wider than {plots.WIDEST} or holds 0; then between "
        "the two largest alone, where small sizes' fixed costs weigh least):"
    )
    return _joined([intro, _table(["cost", *names], body)]) if body else ""


def _law(curve: plots.Curve, law: PowerLaw) -> str:
    interval = str(law) if curve.determined else f"not determined {law.interval}"
    return f"{interval} {curve.fitted}; {curve.last}"


def largest_table(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """As resource_tables, the largest batches that fit; empty if none was measured."""
    names, body = reading.contestants(rows), []

    def rank(row: Row) -> tuple[int, int, int]:
        return row["settings"]["size"], names.index(row["contestant"]), runs.PASSES.index(row["pass"])

    largest = sorted((row for row in rows if row["settings"]["largest"] and row["status"] == "ok"), key=rank)
    waits = {"wall_us": "wall"} | ({CAPTURED: TIMES[CAPTURED]} if any(row.get(CAPTURED) for row in largest) else {})
    for row in largest:
        size, batch = (row["settings"][name] for name in ("size", "batch"))
        rates = [_digits(batch / (row[which]["median"] / 1e6)) if row.get(which) else "–" for which in waits]
        line = [f"{size}²", row["contestant"], row["pass"], str(batch), *rates, _memory(row), row["detail"] or ""]
        body.append(line)
    head = ["image", "model", "pass", "batch", *(f"images/s ({name})" for name in waits.values()), "peak memory", ""]
    return {"The largest batch that fits, of powers of two": [head, *body]} if body else {}


def _attention(records: Records) -> str:
    parts = []
    for path, run in records.of("scaling", "attention"):
        rows = [row for row in run["rows"] if row["family"] == "attention"]
        names = reading.contestants(rows)
        parts.append(_device_line(run))
        parts.append(_picture(records, path, run, "attention", "Time of attention alone as the grid grows"))
        for direction in reading.distinct(rows, lambda row: row["pass"]):
            own = [row for row in rows if row["pass"] == direction]
            which = reading.judged_by(own)
            if reading.best(own, which) is None:
                continue
            at = {(row["settings"]["grid"], row["contestant"]): row for row in own}
            body = []
            for grid in sorted({row["settings"]["grid"] for row in own}):
                found = [at.get((grid, name)) for name in names]
                floor = next((row["floor_us"] for row in found if row and row["floor_us"]), None)
                body.append([f"{grid}²", _microseconds(floor), *(_time(row, which) if row else "" for row in found)])
            parts += [f"{MEASURES[which]}, {direction}:", _table(["tokens", "floor", *names], body)]
        parts.append(_exponents(rows, plots.attention_panels(rows), "tokens"))
        parts += [_lost(rows), _source(records, path, runs.part(run, rows))]
    return _joined(parts)


def _kernels_summary(records: Records) -> str:
    """A line for each operator and pass, from the first run that timed the operator; how many times as fast ours are
    of those cases where that can be told."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path, run in records.of("kernels"):
        for row in run["rows"]:
            if reading.is_ours(row["contestant"]) and row["status"] == "ok":
                found.setdefault(row["operator"], (path, run))
    if not found:
        return NOTHING
    several = len(dict(found.values())) > 1
    body = []
    for operator, (_, run) in found.items():
        every = [row for row in run["rows"] if row["operator"] == operator]
        for direction in reading.distinct(every, lambda row: row["pass"]):
            own = [row for row in every if row["pass"] == direction]
            which = reading.judged_by(own)
            timed = [row for row in own if reading.is_ours(row["contestant"]) and row["status"] == "ok"]
            ratios = [ratio for row in timed if (ratio := reading.ratio_to_floor(row, which))]
            rivals = [(row, rival) for row in timed if (rival := _rival(own, row, which))]
            words = [_beside(row, rival, which) for row, rival in rivals]
            told = [pair for pair, word in zip(rivals, words, strict=True) if word not in UNDECIDED]
            gains = [rival[which]["median"] / row[which]["median"] for row, rival in told]
            parts = [f"{_span(gains, 'x')} as fast"] if gains else []
            parts += [f"{words.count(word)} {word}" for word in UNDECIDED if word in words]
            span, gain = _span(ratios, ""), ", ".join(parts)
            device = [run["environment"]["device"]] if several else []
            body.append([f"`{operator}`", direction, *device, str(len(timed)), span, gain])
    head = ["operator", "pass", *(["device"] if several else []), "cases", "time / floor", "beside the fastest other"]
    sources = [_source(records, path, run) for path, run in dict(found.values()).items()]
    return _joined([_table(head, body, left=3 if several else 2), *sources])


def _span(values: Sequence[float], unit: str) -> str:
    """The least and the greatest, one of them where they look the same; nothing of nothing."""
    ends = [f"{value:.2f}{unit}" for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))


def _kernels(records: Records) -> str:
    parts, found = [], records.of("kernels")
    several = len({run["environment"]["device"] for _, run in found}) > 1
    for path, run in found:
        rows = run["rows"]
        where = f", {run['environment']['device']}" if several else ""
        parts.append(_device_line(run))
        parts.append(_picture(records, path, run, "roofline", "Roofline of the operators that multiply"))
        for operator in reading.distinct(rows, lambda row: row["operator"]):
            own = [row for row in rows if row["operator"] == operator]
            parts.append(f"### `{operator}`{where}")
            parts.append(_picture(records, path, run, operator.replace("_", "-"), f"Time of {operator} over its floor"))
            parts += [_kernel_table(own), *_others(own), "\n".join(filter(None, (_notes(own), _lost(own))))]
            parts.append(f"Measured: {_measured(runs.part(run, own))}.")
        parts.append(_source(records, path, run))
    return _joined(parts)


def _kernel_table(rows: Sequence[Row]) -> str:
    """A line for each case and pass: ours beside the fastest other."""
    which, body = reading.judged_by(rows), []
    for case, direction in reading.distinct(rows, lambda row: (row["case"], row["pass"])):
        own = [row for row in rows if (row["case"], row["pass"]) == (case, direction)]
        ours = next((row for row in own if reading.is_ours(row["contestant"])), None)
        line = [_short(own[0]), direction, _microseconds((ours or own[0])["floor_us"])]
        if ours is None or ours["status"] != "ok":
            body.append([*line, "" if ours is None else ours["status"], "", "", "", "", "", ""])
            continue
        ratio, rival = reading.ratio_to_floor(ours, which), _rival(own, ours, which)
        line += [_time(ours, which), f"{ratio:.2f}" if ratio else "", _time(ours, "wall_us")]
        if rival:
            line += [reading.label(rival), _time(rival, which), _time(rival, "wall_us"), _beside(ours, rival, which)]
        body.append([*line, *[""] * (10 - len(line))])
    time = MEASURES[which]
    head = [
        "case",
        "pass",
        "floor",
        f"ours, {time}",
        "/ floor",
        "wall",
        "fastest other",
        f"its {time}",
        "wall",
        "ours is",
    ]
    return _table(head, body, left=2)


def _others(rows: Sequence[Row]) -> list[str]:
    """Every other contestant's time as a multiple of ours, where that can be told: a heading and a table. Empty where
    there is one other alone."""
    which = reading.judged_by(rows)
    timed = {(r["case"], r["pass"], r["contestant"]): r for r in rows if r["status"] == "ok" and r[which]}
    names = [n for n in reading.contestants(rows) if not reading.is_ours(n) and any(key[2] == n for key in timed)]
    ours = next((name for name in reading.contestants(rows) if reading.is_ours(name)), "")
    body = []
    for case, direction in reading.distinct(rows, lambda row: (row["case"], row["pass"])):
        own = timed.get((case, direction, ours))
        others = [timed.get((case, direction, name)) for name in names]
        if own and any(others):
            short = case.removeprefix(rows[0]["operator"]).strip() or case
            body.append([short, direction, *(_multiple(own, other, which) if other else "" for other in others)])
    if len(names) < 2 or not body:
        return []
    return [f"{MEASURES[which]} of the others, as a multiple of ours:", _table(["case", "pass", *names], body, left=2)]


def _multiple(ours: Row, other: Row, which: str) -> str:
    word = reading.verdict(other[which], ours[which], NOISE[which])
    return word if word in UNDECIDED else f"{other[which]['median'] / ours[which]['median']:.2f}x"


def _notes(rows: Sequence[Row]) -> str:
    """What one has to know of the others that were timed: a line for each contestant with its different details."""
    timed = [row for row in rows if row["status"] == "ok" and row["detail"] and not reading.is_ours(row["contestant"])]
    lines = []
    for name in reading.contestants(timed):
        details = reading.distinct((r for r in timed if r["contestant"] == name), lambda row: row["detail"])
        lines.append(f"- {name}: {_collapsed(details)}.")
    return "\n".join(lines)


def _collapsed(details: Sequence[str], separators: Sequence[str] = ("; ", ", ")) -> str:
    """Details clause by clause, each with its different values, words that all of them share written once."""
    if not separators:
        return _collapsed_words(list(dict.fromkeys(details)))
    clauses = [detail.split(separators[0]) for detail in details]
    found = []
    for i in range(max(map(len, clauses))):
        own = [parts[i] for parts in clauses if i < len(parts)]
        found.append(("" if len(own) == len(clauses) else "in some cases ") + _collapsed(own, separators[1:]))
    return separators[0].join(found)


def _collapsed_words(phrases: Sequence[str]) -> str:
    """Different phrases side by side, the words that all begin and end with written once."""
    words = [phrase.split(" ") for phrase in phrases]
    most = min(map(len, words)) - 1  # each keeps a word of its own
    first = next((i for i in range(most) if len({found[i] for found in words}) > 1), most)
    last = next((i for i in range(most - first) if len({found[-1 - i] for found in words}) > 1), most - first)
    own = " · ".join(" ".join(found[first : len(found) - last]) for found in words)
    return " ".join([*words[0][:first], own, *words[0][len(words[0]) - last :]])


def _short(row: Row) -> str:
    """A case's name without its operator's."""
    return row["case"].removeprefix(row["operator"]).strip() or row["case"]


def _rival(rows: Sequence[Row], ours: Row, which: str) -> Row | None:
    """The fastest timed contestant of ours' case that is not ours, nor attends to all tokens: another model."""
    same = [row for row in rows if row["case"] == ours["case"] and not reading.is_ours(row["contestant"])]
    return reading.best([row for row in same if row["contestant"] != reading.FULL_ATTENTION], which)


def _verdict(first: Row, second: Row, which: str) -> str:
    return reading.verdict(second[which], first[which], NOISE["wall_us" if which == CAPTURED else which])


def _beside(ours: Row, rival: Row, which: str) -> str:
    word = _verdict(ours, rival, which)
    if word in UNDECIDED:
        return word
    quick, slow = sorted((ours[which]["median"], rival[which]["median"]))
    return f"{slow / quick:.2f}x {word}"


def _models(records: Records) -> str:
    return _joined([part for found in records.of("model") for part in _model_run(records, *found)])


def _training(records: Records) -> str:
    return _joined([part for found in records.of("train") for part in _model_run(records, *found)])


def _model_run(records: Records, path: Path, run: dict[str, Any]) -> list[str]:
    rows, body = run["rows"], []
    graphs = any(row.get(CAPTURED) for row in rows)
    for case, direction in reading.distinct(rows, lambda row: (row["case"], row["pass"])):
        own = [row for row in rows if (row["case"], row["pass"]) == (case, direction)]
        ours = next((row for row in own if reading.is_ours(row["contestant"]) and row["status"] == "ok"), None)
        for row in sorted(own, key=lambda row: not reading.is_ours(row["contestant"])):
            beside = []
            if ours and row is not ours and row["status"] == "ok":
                shared = [which for which in TIMES if ours.get(which) and row.get(which)]
                beside = [f"{_beside(ours, row, which)} ({TIMES[which]})" for which in shared]
            wall = _time(row, "wall_us") if row["status"] == "ok" else row["status"]
            gpu = _time(row, "gpu_us") if row["status"] == "ok" else ""
            launches = str(row["kernels"]) if row.get("kernels") else ""
            times = [gpu, wall, *([_time(row, CAPTURED)] if graphs else [])]
            body.append([case, direction, row["contestant"], *times, launches, _memory(row), ", ".join(beside)])
    times = ["GPU time", "wall time", *([TIMES[CAPTURED]] if graphs else [])]
    head = ["model", "pass", "contestant", *times, "kernels", "peak memory", "ours is"]
    lines = [_lost(rows), _uncaptured(rows)]
    return [_device_line(run), _table(head, body, left=3), *lines, _source(records, path, run)]


def _measurements(records: Records) -> str:
    """Every row of every run, folded away."""
    parts = []
    for path, run in records.runs.items():
        body = [[text(row) for text in MEASUREMENT.values()] for row in run["rows"]]
        summary = f"<details><summary>{path.name}: {len(body)} measurements</summary>"
        parts += [summary, _table(list(MEASUREMENT), body, left=3), "</details>"]
    return _joined(parts)


def _gpu_tests(records: Records) -> str:
    found = [(path, run) for path, run in records.runs.items() if "gpu_tests" in run]
    return "\n\n".join(_gpu_test(records, *each) for each in found) or "No run on a GPU is recorded yet."


def _gpu_test(records: Records, path: Path, run: dict[str, Any]) -> str:
    """What `pytest -m gpu --record` kept, sections of {operator: {dtype: value}}; a section may be missing."""
    data = run["gpu_tests"]
    operators = data.get("operators", {})
    dtypes = sorted({dtype for found in operators.values() for dtype in found})  # workers finish in any order
    body = [[f"`{name}`", *(_worst(found.get(dtype)) for dtype in dtypes)] for name, found in sorted(operators.items())]
    cases = sum(found["cases"] for found in _values(operators))
    intro = (
        f"Kernels against the float64 reference on {run['environment']['device']}, {cases:,} random cases: the worst "
        "error of an output or gradient, as a share of what is allowed (more than 1 fails), and where it was."
    )
    facts = [f"- GPU tests: {data['tests']['passed']} passed, {data['tests']['failed']} failed."]
    if large := _values(data.get("large_offsets", {})):
        worst = max(found["worst_error"] for found in large)
        facts.append(
            f"- Tensors of more than 2³¹ elements: worst relative error {worst:.2g} over {len(large)} operators."
        )
    if equal := _values(data.get("deterministic", {})):
        facts.append(f"- Operators bitwise equal over {equal[0]['runs']} runs, forward and backward: {len(equal)}.")
    for tool, found in data.get("sanitizer", {}).items():
        (seen,) = found.values()
        facts.append(f"- compute-sanitizer, {tool}: {seen['errors']} errors over {len(seen['operators'])} operators.")
    parts = [intro, _table(["operator", *dtypes], body), "\n".join(facts)]
    if parity := data.get("model_parity"):
        heads = list(dict.fromkeys(head for values in _values(parity) for head in values))
        lines = [
            [model, where, *(f"{values[head]:.2g}" if head in values else "" for head in heads)]
            for model, found in sorted(parity.items())
            for where, values in found.items()
        ]
        said = "The model's error beside the recorded one of the reference implementation, in some of its networks:"
        parts += [said, _table(["network", "computed in", *heads], lines, left=2)]
    tested = run | {"sessions": [run["sessions"][data["session"]]]}
    return _joined([*parts, f"Recorded: {_source(records, path, tested)}"])


def _values(section: dict[str, dict[str, Any]]) -> list[Any]:
    return [value for found in section.values() for value in found.values()]


def _worst(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['worst_ratio']:.2f} ({found['worst_tensor']})"


BLOCKS: dict[str, Callable[[Records], str]] = {
    "front-sentence": _front_sentence,
    "front-table": _front_table,
    "front-picture": _front_picture,
    "machines": _machines,
    "scaling-picture": _scaling_picture,
    "scaling": _scaling,
    "scaling-details": _scaling_details,
    "attention": _attention,
    "kernels-summary": _kernels_summary,
    "kernels": _kernels,
    "models": _models,
    "training": _training,
    "measurements": _measurements,
    "gpu-tests": _gpu_tests,
}


# Cells and lines


def _joined(parts: Sequence[str]) -> str:
    """Markdown paragraphs; NOTHING without any."""
    return "\n\n".join(part for part in parts if part) or NOTHING


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """left: how many columns are words, not figures."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    lines = (head, rule, *([cell.replace("|", "\\|") for cell in row] for row in body))
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _lines(table: Sequence[Sequence[str]]) -> str:
    return _table(table[0], table[1:])


def _microseconds(value: float | None) -> str:
    """Three digits and the unit that suits."""
    if value is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value)} µs"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _time(row: Row, which: str) -> str:
    """The median, or why there is none."""
    if row["status"] == "ok" and row.get(which):
        return _microseconds(row[which]["median"])
    return _absent(row) or ("–" if which == CAPTURED else "")


def _time_columns(rows: Sequence[Row]) -> list[Column]:
    """What rows are judged by and what a user waits, also captured if any is."""
    graphs = [CAPTURED] if any(row.get(CAPTURED) for row in rows) else []
    return [_time_column(which) for which in dict.fromkeys((reading.judged_by(rows), "wall_us", *graphs))]


def _time_column(which: str) -> Column:
    return Column(
        TIMES[which],
        lambda row: _time(row, which),
        lambda row: row[which]["median"] if row.get(which) else None,
        lambda first, second: _verdict(first, second, which),
    )


def _absent(row: Row) -> str:
    return "" if row["status"] == "ok" else row["status"]


def _interval(stats: dict[str, Any] | None) -> str:
    return (
        ""
        if not stats
        else " ".join(
            (_microseconds(stats["median"]), f"[{_microseconds(stats['p20'])},", f"{_microseconds(stats['p80'])}]")
        )
    )


def _memory(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else _absent(row)


def _parameters(row: Row) -> str:
    return f"{row['parameters'] / 1e6:.1f}M" if row.get("parameters") else ""


def _count(value: int | None) -> str:
    if value is None:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_digits(value / size)}{unit}"
    return str(value)


def _lost(rows: Sequence[Row]) -> str:
    """Who wasn't timed and why, a line for each reason."""
    lost = [row for row in rows if row["status"] != "ok"]
    return _grouped((row, row["status"] + (f" ({row['reason']})" if row["reason"] else "")) for row in lost)


def _uncaptured(rows: Sequence[Row]) -> str:
    """Of what no CUDA graph was timed and why, as the rows' details tell it, a line for each reason."""
    clauses = [(row, clause) for row in rows for clause in (row["detail"] or "").split("; ")]
    return _grouped((row, clause) for row, clause in clauses if clause.startswith(NOT))


def _grouped(rows: Iterable[tuple[Row, str]]) -> str:
    """A line for each contestant and what is said of its rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row, words in rows:
        found.setdefault((row["contestant"], words), []).append(row)
    lines = []
    for (contestant, words), lost in found.items():
        where = f"{lost[0]['case']}, {lost[0]['pass']}" if len(lost) == 1 else f"{len(lost)} measurements"
        lines.append(f"- {contestant}: {words}: {where}.")
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    ratio = reading.ratio_to_floor(row, "gpu_us" if row["gpu_us"] else "wall_us")
    return f"{ratio:.2f}" if ratio else ""


def _error(row: Row) -> str:
    return "" if row["error"] is None else f"{row['error']:.1e}"


MEASUREMENT: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "pass": lambda row: row["pass"],
    "contestant": lambda row: row["contestant"],
    "GPU time [p20, p80]": lambda row: _interval(row["gpu_us"]) or _absent(row),
    "wall time [p20, p80]": lambda row: _interval(row["wall_us"]),
    "captured [p20, p80]": lambda row: _interval(row.get(CAPTURED)),
    "bytes": lambda row: _count(row["bytes"]),
    "FLOPs": lambda row: _count(row["flops"]),
    "floor": lambda row: _microseconds(row["floor_us"]),
    "/ floor": _ratio,
    "error": _error,
    "peak memory": lambda row: _memory(row) if row["status"] == "ok" else "",
    "detail": lambda row: row["reason"] or row["detail"] or "",
}


def _device_line(run: dict[str, Any]) -> str:
    """What a run's part of a block starts with."""
    return f"**{run['environment']['device']}**"


def _picture(records: Records, path: Path, run: dict[str, Any], name: str, words: str) -> str:
    """Empty where there is none."""
    if name not in plots.pictures(run) or records.shown is not None and name not in records.shown:
        return ""
    return f"![{words}, {run['environment']['device']}]({records.link(records.pictures / f'{path.stem}-{name}.svg')})"


def _versions(environment: dict[str, Any]) -> list[str]:
    named = {key: environment.get(key) for key in ("torch", "triton", "cuda", "hip", "driver")} | environment.get(
        "peers", {}
    )
    return [f"{key} {version}" for key, version in named.items() if version]


def _source(records: Records, path: Path, run: dict[str, Any]) -> str:
    """Which file and machine a figure comes from, and when and at which commit it was measured."""
    inside = path.is_relative_to(records.root)
    name = path.relative_to(records.root).as_posix() if inside else path.name
    words = [f"[{name}]({records.link(path)})", run["environment"]["device"], *_versions(run["environment"])]
    return f"{', '.join([*words, _measured(run)])}."


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_folder = "folder of run JSON; without it README.md and docs/ of this clone are written from benchmarks/results"
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help=help_folder)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"where {PAGE} and its pictures go (default: FOLDER)"
    )
    help_check = "write nothing: exit status 1 if those are not what the records make; and name rows of other sources"
    parser.add_argument("--check", action="store_true", help=help_check)


def run(args: argparse.Namespace) -> int:
    try:
        if args.folder is None and args.output is not None:
            raise ValueError("--output needs a FOLDER: without one the clone's own documents are written")
        if args.check:
            return _check(args)
        written = write_documents() if args.folder is None else write_page(args.folder, args.output or args.folder)
    except OSError as error:
        raise runs.RunError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except ValueError as error:
        raise runs.RunError(" ".join(str(error).split())) from error
    for path in written:
        print(f"Written: {path}")
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.folder is not None:
        raise ValueError(f"--check is of the clone's own documents, got the folder {args.folder}")
    for line in old_rows() or ["every row is of the present sources"]:
        print(line)
    wrong = differences()
    for path in wrong:
        print(f"{path} is not what the records make of it: run python -m benchmarks report")
    return 1 if wrong else 0
