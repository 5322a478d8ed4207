"""The pictures of a run, as matplotlib figures in one style.

Colours are Okabe and Ito's, told apart in every colour vision; each contestant has a mark of its own.
Solid lines and filled marks are measured or counted; dashed lines with hollow marks are extrapolated and say so. Hollow
marks of the roofline are peers, measured too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import fits, runs, sources
from benchmarks import rows as reading
from benchmarks.fits import PowerLaw, largest_sizes
from benchmarks.rows import MEASURES, NOISE, Stats
from benchmarks.runs import Row
from hdit._extras import require

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
# By how a contestant's name begins, in lower case; one colour and mark throughout all pictures.
LOOKS = {
    "ours": (BLUE, "o"),
    "hdit": (BLUE, "o"),
    "natten hopper": (VERMILION, "s"),
    "dit": (VERMILION, "s"),
    "natten": (ORANGE, "D"),
    "k-diffusion": (ORANGE, "D"),
    "flex": (GREEN, "^"),
    "sdpa": (PURPLE, "v"),
    "liger": (SKY, "P"),
    "quack": (YELLOW, "X"),
    "compile": (BLACK, "*"),
    "torch.compile": (BLACK, "*"),
}
OTHERS = (GREY, "h")
FAMILIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, YELLOW)
FAMILY_MARKS = "osD^vPX*"
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.markersize": 5,
    "savefig.dpi": 120,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.fonttype": "none",  # text stays text, which takes half the space of its outlines
    "svg.hashsalt": "hdit-kernels",  # the same data make the same file
}
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # the box of a text over lines
ROOFS = {  # ceilings by the dtype of a case
    "bfloat16": "matmul_bf16_tflop_s",
    "float16": "matmul_bf16_tflop_s",
    "float32": "matmul_fp32_tflop_s",
    "float32 tf32": "matmul_tf32_tflop_s",
}
MOST_CASES = 10  # in one picture of bars
ANNOTATED = 1024  # the size, in pixels, of the paper's claim
FULL = "out of memory"  # the status of a row
COSTS = MEASURES | {"flops": "FLOPs", "peak_bytes": "peak memory"}
PASSES = {"forward": "forward pass", "step": "training step"}
WIDEST = 0.3  # interval of an exponent that counts as determined


def digest(run: dict[str, Any], name: str) -> str:
    """sha256 of the rows of the kind that one of pictures(run) shows, this file and what else it draws by: ties a
    picture to the JSON that it shows and to how."""
    shown = runs.of_kind(run, "scaling" if name in ("scaling", "time", "attention") else "kernels")
    drawing = sources.syntax(*(Path(module) for module in (__file__, fits.__file__, reading.__file__)))
    return hashlib.sha256(f"{json.dumps(shown, sort_keys=True)}{drawing}".encode()).hexdigest()


def save(
    run: dict[str, Any],
    stem: Path,
    suffixes: Sequence[str] = (".png", ".svg"),
    names: Collection[str] | None = None,
) -> list[Path]:
    """Writes the pictures of a run, `<stem>-<name><suffix>` for each name of pictures(run), or those of the names that
    it has; returns the files."""
    written = []
    for name in pictures(run):
        if names is not None and name not in names:
            continue
        paths = [stem.with_name(f"{stem.name}-{name}{suffix}") for suffix in suffixes]
        save_picture(run, name, *paths)
        written += paths
    return written


def save_picture(run: dict[str, Any], name: str, *paths: Path) -> None:
    """Writes one of pictures(run), as PNG or SVG by each path's suffix; their "Description" is its digest."""
    with require("matplotlib", "bench").rc_context(STYLE):
        figure = pictures(run)[name]()
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Description": digest(run, name)} | ({"Date": None} if path.suffix == ".svg" else {})
            figure.savefig(path, metadata=metadata)
            if path.suffix == ".svg":
                path.write_text(_compact(path.read_text(encoding="utf-8")), encoding="utf-8")


def _compact(svg: str) -> str:
    """Without indentation, and what is drawn, not what is written, to hundredths of a point."""

    def rounded(tag: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0])

    return re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]+>", rounded, svg))


def pictures(run: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The pictures that a run has data for, by name: functions that draw a matplotlib Figure."""
    found: dict[str, Callable[[], Any]] = {}
    run, growth = runs.of_kind(run, "kernels"), runs.of_kind(run, "scaling")
    models, attention = ([row for row in growth["rows"] if row["family"] == name] for name in ("model", "attention"))
    if models:
        found["scaling"] = partial(scaling, growth, models)
        if time_panel(models):
            found["time"] = partial(time, growth, models)
    if reading.best(attention, reading.judged_by(attention)):
        found["attention"] = partial(attention_grids, growth, attention)
    for operator in reading.distinct(run["rows"], lambda row: row["operator"]):
        own = [row for row in run["rows"] if row["operator"] == operator]
        if any(reading.ratio_to_floor(row, reading.judged_by(own)) for row in own):
            found[operator.replace("_", "-")] = partial(ratios, run, own)
    if _on_roofline(run):
        found["roofline"] = partial(roofline, run)
    return found


# Lines: models and attention as sizes grow


@dataclass(frozen=True)
class Curve:
    """One contestant's cost at sizes in ascending order. extrapolated: beyond the last measured one, never measured.

    cost: what COSTS calls it. full: the sizes at which memory did not suffice. law: of cost against the square of size
    (pixels, tokens), as fits.largest_sizes has it. samples: of measured times, by size. noise: of rows.NOISE.
    """

    contestant: str
    cost: str
    measured: list[tuple[float, float]]
    extrapolated: list[tuple[float, float]]
    full: tuple[int, ...]
    law: PowerLaw | None
    samples: dict[float, Stats] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def determined(self) -> bool:
        """Whether the fit determines the exponent: its interval is narrow and tells growth from none."""
        return self.law is not None and self.law.low > 0 and self.law.high - self.law.low <= WIDEST

    @property
    def fitted(self) -> str:
        """The sizes that the law was fitted to."""
        if self.law is None:
            return ""
        sizes = [size for size, _ in self.measured[-self.law.points :]]
        return f"from {sizes[0]:g}² to {sizes[-1]:g}²"

    @property
    def last(self) -> str:
        """The exponent between the two largest sizes measured, which tells where a curve that bends is heading."""
        (small, low), (large, high) = self.measured[-2:]
        return f"{math.log(high / low) / (2 * math.log(large / small)):.2f} from {small:g}² to {large:g}²"

    @property
    def legend(self) -> str:
        """Its name, and the exponent where the fit determines one."""
        return f"{self.contestant}: exponent {self.law}" if self.determined else self.contestant

    def at(self, size: float) -> tuple[float, bool] | None:
        """(cost, whether it was extrapolated) at a size, None where the curve has no such point."""
        for points, guessed in ((self.measured, False), (self.extrapolated, True)):
            for x, y in points:
                if x == size:
                    return y, guessed
        return None

    def beside(self, other: Curve, size: float) -> str | None:
        """What it is beside another at a size, as rows.verdict says; None unless both are times measured there."""
        own, theirs = self.samples.get(size), other.samples.get(size)
        return reading.verdict(theirs, own, self.noise) if own and theirs else None


def curve(contestant: str, rows: Sequence[Row], cost: str, size: str = "size") -> Curve:
    """cost: of COSTS (peak_bytes in GiB then, times in seconds); size: the name of the setting.

    Times are extrapolated to larger sizes whose FLOPs are counted, at the FLOP rate of the largest measured size, where
    two or more were measured.
    """
    own = sorted((row for row in rows if row["contestant"] == contestant), key=lambda row: row["settings"][size])
    if cost in MEASURES:
        measured = [(row, row[cost]["median"] / 1e6) for row in own if row["status"] == "ok" and row[cost]]
    else:
        unit = 1 if cost == "flops" else 2**30
        measured = [(row, row[cost] / unit) for row in own if row[cost] and (cost == "flops" or row["status"] == "ok")]
    points = [(row["settings"][size], value) for row, value in measured]
    extrapolated = []
    if cost in MEASURES and len(measured) >= 2 and measured[-1][0]["flops"]:
        last, seconds = measured[-1]
        beyond = [row for row in own if row["settings"][size] > points[-1][0] and row["flops"]]
        extrapolated = [(row["settings"][size], seconds * row["flops"] / last["flops"]) for row in beyond]
    law = largest_sizes([x**2 for x, _ in points], [y for _, y in points])
    full = tuple(row["settings"][size] for row in own if row["status"] == FULL)
    samples = {row["settings"][size]: row[cost] for row, _ in measured} if cost in MEASURES else {}
    return Curve(contestant, COSTS[cost], points, extrapolated, full, law, samples, NOISE.get(cost, 0.0))


def scaling_panels(rows: Sequence[Row]) -> dict[str, tuple[str, list[Curve]]]:
    """{panel: (the cost's axis label, a curve for each contestant)} at batch 1, for what the rows have data on."""
    rows = [row for row in rows if not row["settings"]["largest"]]
    names = reading.contestants(rows)
    forward = [row for row in rows if row["pass"] == "forward"]
    panels = {"FLOPs of a forward pass (counted)": ("FLOPs", [curve(name, forward, "flops") for name in names])}
    memory = {}
    for key, direction in PASSES.items():
        own = [row for row in rows if row["pass"] == key]
        which = reading.judged_by(own)
        if reading.best(own, which):
            title = f"{MEASURES[which]}, {direction}"
            panels[title[0].upper() + title[1:]] = "seconds", [curve(name, own, which) for name in names]
        if any(row["peak_bytes"] for row in own if row["status"] == "ok"):
            memory = {f"Peak memory, {direction}": ("GiB", [curve(name, own, "peak_bytes") for name in names])}
    return panels | memory  # a training step's memory where that is measured, else a forward pass's


def scaling(run: dict[str, Any], rows: Sequence[Row]) -> Any:
    """HDiT and DiT against the image's size, log-log: FLOPs, time, memory; the ratio is noted at 1024²."""
    panels = scaling_panels(rows)
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    figure = _figure(11, 4.2 * lines + 0.8)
    sizes = sorted({row["settings"]["size"] for row in rows if not row["settings"]["largest"]})
    for axes, (title, (label, curves)) in zip(
        figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False
    ):
        _lines(axes, curves, sizes, "image, pixels")
        axes.set(title=title, ylabel=label)
        _annotate(axes, curves)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.suptitle(f"Cost of one image as it grows: HDiT and DiT at batch 1\n{_machine(run)}")
    figure.supxlabel(
        "1 multiply-accumulate = 2 FLOPs; patches of 4x4 pixels. Exponents: cost ∝ pixels^exponent, with 95% "
        "intervals, over those of the largest\nsizes (three or more) that determine it best. The HDiT-B/4 family is "
        "our reading of a sentence of the paper (arXiv 2401.11605):\neach doubling adds a neighborhood level, 384 wide "
        "and 2 deep, in front.",
        fontsize="small",
    )
    return figure


def time_panel(rows: Sequence[Row]) -> tuple[str, list[Curve]] | None:
    """Of scaling_panels the forward pass's time, as (title, curves)."""
    panels = scaling_panels(rows).items()
    return next(((title, curves) for title, (_, curves) in panels if title.endswith("time, forward pass")), None)


def time(run: dict[str, Any], rows: Sequence[Row]) -> Any:
    """What a newcomer sees: the measured time of a forward pass against the image's size, and nothing extrapolated."""
    found = time_panel(rows)
    assert found is not None
    title, curves = found
    figure = _figure(7, 4)
    (axes,) = figure.subplots(1, 1, squeeze=False).flat
    sizes = sorted({size for one in curves for size, _ in one.measured})
    _lines(axes, [replace(one, extrapolated=[], law=None) for one in curves], sizes, "image, pixels")
    axes.set(title=f"{title} of one image\n{_machine(run)}", ylabel="seconds")
    _annotate(axes, curves)
    return figure


def attention_panels(rows: Sequence[Row]) -> dict[str, tuple[str, list[Curve]]]:
    """As scaling_panels, for the attention operator alone: a panel for each pass that was timed."""
    panels = {}
    for name in reading.distinct(rows, lambda row: row["pass"]):
        own = [row for row in rows if row["pass"] == name]
        which = reading.judged_by(own)
        if reading.best(own, which):
            curves = [curve(contestant, own, which, "grid") for contestant in reading.contestants(own)]
            panels[f"{MEASURES[which]}, {name}"] = "seconds", curves
    return panels


def attention_grids(run: dict[str, Any], rows: Sequence[Row]) -> Any:
    """The attention operator alone against the grid's side, log-log, a panel for each pass."""
    panels = attention_panels(rows)
    figure = _figure(6 * len(panels), 5)
    sizes = sorted({row["settings"]["grid"] for row in rows})
    for axes, (title, (label, curves)) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        _lines(axes, curves, sizes, "grid, tokens")
        axes.set(title=title, ylabel=label)
    figure.suptitle(f"Attention alone as the grid grows\n{_machine(run)}")
    return figure


def _lines(axes: Any, curves: Sequence[Curve], sizes: Sequence[int], label: str) -> None:
    for found in curves:
        color, mark = look(found.contestant)
        if found.measured:
            known = dict(found.measured)
            # Not a number breaks the line: no stroke passes over a size that was not measured.
            costs = [known.get(size, math.nan) for size in sizes]
            axes.plot(sizes, costs, color=color, marker=mark, label=found.legend)
        if found.extrapolated:
            points = [found.measured[-1], *found.extrapolated]
            options = {"color": color, "marker": mark, "linestyle": "--", "markerfacecolor": "white", "zorder": 1.5}
            axes.plot(*zip(*points, strict=True), label=f"{found.contestant}: extrapolated, not measured", **options)
            place = next((point for point in found.extrapolated if point[0] in found.full), None)
            if place:
                offset = {"xytext": (-8, 2), "textcoords": "offset points", "ha": "right"}
                axes.annotate(FULL, place, fontsize="small", color=color, **offset)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.17)  # room for what is written
    if high < 100 * low:  # powers of ten alone would leave an axis of one or two numbers
        ticks = _round_numbers(low, high)
        if len(ticks) < 2:
            ticks = [t for t in require("matplotlib.ticker", "bench").MaxNLocator(4).tick_values(low, high) if t > 0]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(sizes, [f"{size}²" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xlabel(label)
    axes.legend(loc="upper left")


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, on less than a decade also 1.5, 3, 4 and 7; those from low to high."""
    digits = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]


def _annotate(axes: Any, curves: Sequence[Curve]) -> None:
    """An arrow from the first curve to the second at ANNOTATED and what one is of the other, if that can be told."""
    if len(curves) != 2:
        return
    ends = [end for found in curves if (end := found.at(ANNOTATED))]
    if len(ends) != 2:
        return
    (own, own_guessed), (other, other_guessed) = ends
    arrow = {"arrowstyle": "<->", "color": "0.3", "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", (ANNOTATED, own), (ANNOTATED, other), arrowprops=arrow)
    text = f"{share(own / other)} of {curves[1].contestant}'s\n{curves[1].cost} at {ANNOTATED}²"
    text += " (extrapolated)" if own_guessed or other_guessed else ""
    word = curves[0].beside(curves[1], ANNOTATED)
    if word in reading.UNDECIDED:
        text = f"{curves[1].cost} at {ANNOTATED}²:\n{word}"
    # Costs rise with the size: below the lower curve, to the right, there is none that the text could hide.
    place = {"xytext": (8, -6), "textcoords": "offset points", "va": "top", "fontsize": "small", "bbox": LABEL}
    axes.annotate(text, (ANNOTATED, min(own, other)), **place)


def share(ratio: float) -> str:
    if ratio < 0.001:
        return f"{100 * ratio:.2g}%"
    return f"{ratio:.2%}" if ratio < 0.1 else f"{ratio:.0%}"


# Bars: kernels


def ratios(run: dict[str, Any], rows: Sequence[Row]) -> Any:
    """One operator's time over its floor: a group of bars for each case, a panel for each pass, whiskers p20 to p80.

    Of many cases the first are shown, and of passes those that are not the sum of others.
    """
    which = reading.judged_by(rows)
    timed = [row for row in rows if reading.ratio_to_floor(row, which)]
    every = reading.distinct(timed, lambda row: row["case"])
    cases = every[:MOST_CASES]
    passes = reading.distinct(timed, lambda row: row["pass"])
    if {"forward", "backward"} <= set(passes):
        passes = ["forward", "backward"]
    shown = [row for row in rows if row["case"] in cases and row["pass"] in passes]
    names = reading.contestants(row for row in shown if row["status"] in ("ok", "failed"))
    spans = [reading.ratio_to_floor(row, which) or 1 for row in shown]

    figure = _figure(3.4 + 4.2 * len(passes), max(2.8, 1.6 + len(cases) * (0.14 * len(names) + 0.12)))
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True, sharex=True)[0]
    for axes, name in zip(panels, passes, strict=True):
        _bars(axes, [row for row in shown if row["pass"] == name], names, cases, which)
        axes.set(xscale="log", xlabel=f"{MEASURES[which]} / floor", title=name)
        axes.grid(axis="y", visible=False)
        _plain_ticks(axes.xaxis)
    operator = rows[0]["operator"]
    panels[0].set_xlim(min(0.95, 0.95 * min(spans)), max(2.2, 1.6 * max(spans)))
    panels[0].set_yticks(range(len(cases)), [case.removeprefix(operator).strip() or case for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    patch = require("matplotlib.patches", "bench").Patch
    labels = {row["contestant"]: reading.label(row) for row in timed}
    handles = [patch(facecolor=look(name)[0], edgecolor="0.2", label=labels.get(name, name)) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 3 * len(passes)))
    some = f" ({len(cases)} of {len(every)} cases)" if len(cases) < len(every) else ""
    figure.suptitle(f"{operator}: time over its floor, whiskers p20 to p80{some}\n{_machine(run)}")
    return figure


def _bars(axes: Any, rows: Sequence[Row], names: Sequence[str], cases: Sequence[str], which: str) -> None:
    """A bar begins at the floor, 1x: on a logarithmic axis its length is the distance from it."""
    height = 0.8 / len(names)
    axes.axvline(1, color="0.2", linewidth=1)
    for row in rows:
        if row["contestant"] not in names:
            continue
        y = cases.index(row["case"]) + (names.index(row["contestant"]) - (len(names) - 1) / 2) * height
        low, ratio, high = (reading.ratio_to_floor(row, which, name) for name in ("p20", "median", "p80"))
        if low and ratio and high:
            color, _ = look(row["contestant"])
            axes.barh(y, ratio - 1, height * 0.92, 1, color=color, edgecolor="0.2", linewidth=0.3)
            axes.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], color="0.4", elinewidth=0.8, fmt="none")
            axes.text(
                max(high, 1), y, f" {ratio:.3g}" if ratio < 999.5 else f" {ratio:,.0f}", va="center", fontsize="x-small"
            )
        elif row["status"] == "failed":
            axes.text(1, y, f" {row['contestant']}: failed", va="center", fontsize="x-small")


# Roofline


def _on_roofline(run: dict[str, Any]) -> list[tuple[Row, float, float]]:
    """(row, FLOPs a byte, FLOPs a second) of the timed rows that have FLOPs, bytes and a measured ceiling; without full
    attention, which does more work than its row's FLOPs.
    """
    which, ceilings = reading.judged_by(run["rows"]), _ceilings(run)
    timed = [row for row in run["rows"] if row["status"] == "ok" and row[which] and row["flops"] and row["bytes"]]
    timed = [row for row in timed if row["contestant"] != reading.FULL_ATTENTION]
    under = [row for row in timed if ceilings.get("copy_tb_s") and ceilings.get(_roof(row))]
    return [(row, row["flops"] / row["bytes"], row["flops"] / (row[which]["median"] / 1e6)) for row in under]


def _ceilings(run: dict[str, Any]) -> dict[str, float]:
    """The highest of each rate that the run's sessions measured."""
    found: dict[str, float] = {}
    for session in run["sessions"]:
        rates = {name: rate for name, rate in session["ceilings"].items() if isinstance(rate, (int, float))}
        found |= {name: max(rate, found.get(name, 0.0)) for name, rate in rates.items()}
    return found


def _roof(row: Row) -> str:
    """The name of the ceiling that a row's products are under."""
    return ROOFS.get(row["settings"].get("dtype"), ROOFS["bfloat16"])


def roofline(run: dict[str, Any]) -> Any:
    """Arithmetic intensity against the rate reached, under the copy and matmul rates that the run measured."""
    points = _on_roofline(run)
    ceilings = _ceilings(run)
    bandwidth = ceilings["copy_tb_s"] * 1e12
    peaks = {name: ceilings[name] * 1e12 for name in reading.distinct((row for row, _, _ in points), _roof)}
    figure = _figure(8.5, 6)
    axes = figure.subplots()
    intensities = [x for _, x, _ in points]
    knees = [peak / bandwidth for peak in peaks.values()]
    low, high = min(*intensities, *knees) / 2, 2 * max(*intensities, *(2 * knee for knee in knees))
    small = {"textcoords": "offset points", "fontsize": "small", "annotation_clip": False}
    for name, peak in peaks.items():
        knee = peak / bandwidth
        axes.plot([low, knee, high], [low * bandwidth, peak, peak], color="0.2", linewidth=1.2)
        kind = name.split("_")[1]
        # Right of the axes, where no point is.
        axes.annotate(f"{peak / 1e12:.3g} TFLOP/s,\n{kind} matmul", (high, peak), (4, 0), va="center", **small)
    top = max(peaks.values())  # above it, no point is either
    side = "left" if (top / bandwidth) ** 2 < low * high else "right"  # where there is more room
    axes.annotate(f"{bandwidth / 1e12:.3g} TB/s, copy", (top / bandwidth, top), (0, 4), ha=side, **small)
    for i, family in enumerate(reading.distinct((row for row, _, _ in points), lambda row: row["family"])):
        color, mark = FAMILIES[i % len(FAMILIES)], FAMILY_MARKS[i % len(FAMILY_MARKS)]
        for ours, fill, size in ((False, "none", 14), (True, color, 26)):
            own = [point for point in points if point[0]["family"] == family]
            places = [(x, y) for row, x, y in own if reading.is_ours(row["contestant"]) == ours]
            if places:
                options = {"marker": mark, "facecolors": fill, "edgecolors": color, "linewidths": 0.8, "s": size}
                label = f"{family}, {'ours' if ours else 'peers'}"
                axes.scatter(*zip(*places, strict=True), label=label, alpha=0.9, **options)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs / byte", ylabel="FLOPs / second")
    _plain_ticks(axes.xaxis)
    figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(f"Roofline: every operator that multiplies\n{_machine(run)}")
    return figure


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    ticker = require("matplotlib.ticker", "bench")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def look(contestant: str) -> tuple[str, str]:
    """(colour, mark) of a contestant."""
    name = contestant.lower()
    return next((found for start, found in LOOKS.items() if name.startswith(start)), OTHERS)


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "bench").Figure(figsize=(width, height), layout="constrained")


def _machine(run: dict[str, Any]) -> str:
    environment = run["environment"]
    return f"{environment['device']}, torch {environment['torch']}, {runs.date(run)}"
