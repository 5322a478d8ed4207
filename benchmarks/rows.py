"""Questions about the rows of a run: what plots, reports and comparisons share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.runs import Row

Stats = dict[str, Any]  # median, p20, p80 in microseconds, repeats

MEASURES = {"gpu_us": "GPU time", "wall_us": "wall time"}
# What medians of one session may differ by beside their intervals; those of two files differ by more, see compare.
NOISE = {"gpu_us": 0.03, "wall_us": 0.10}
SAME, TOO_FEW = "same within noise", "too few samples"
UNDECIDED = SAME, TOO_FEW  # verdicts beside which no ratio is told
FEW = 5  # samples
FULL_ATTENTION = "sdpa"  # the contestant that neighborhood attention replaces


def is_ours(contestant: str) -> bool:
    return contestant.startswith(("ours", "HDiT"))


def label(row: Row) -> str:
    """The contestant, with a mark if it computes another function than the case's."""
    other = (row["detail"] or "").startswith("another function")
    return row["contestant"] + (" (another function)" if other else "")


def distinct(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[Any]:
    """The values of key(row), each once, in order of appearance."""
    return list(dict.fromkeys(map(key, rows)))


def contestants(rows: Iterable[Row]) -> list[str]:
    """Their names, ours first: in an order that doesn't depend on that of measuring, which is random."""
    return sorted({row["contestant"] for row in rows}, key=lambda name: (not is_ours(name), name))


def judged_by(rows: Iterable[Row]) -> str:
    """The time that all timed rows can be judged by: "gpu_us" where every one has it, else "wall_us"."""
    timed = [row for row in rows if row["status"] == "ok"]
    return "gpu_us" if timed and all(row["gpu_us"] for row in timed) else "wall_us"


def ratio_to_floor(row: Row, which: str, quantile: str = "median") -> float | None:
    """Time over the least time that its session's ceilings allow; None without either."""
    if row["status"] != "ok" or not row[which] or not row["floor_us"]:
        return None
    return row[which][quantile] / row["floor_us"]


def verdict(a: Stats, b: Stats, noise: float) -> str:
    """What b is beside a: "faster", "slower", "same within noise" or "too few samples".

    A difference counts only where the p20..p80 intervals don't overlap and the medians differ by more than noise · a's.
    A single sample has no interval, so it tells neither a difference nor that there is none. Few samples lie apart by
    chance (three and three once in ten times), so intervals of fewer than FEW have to be as far apart as they are wide.
    """
    if min(a["repeats"], b["repeats"]) < 2:
        return TOO_FEW
    few = min(a["repeats"], b["repeats"]) < FEW
    between = max(a["p80"] - a["p20"], b["p80"] - b["p20"]) if few else 0.0
    apart = a["p20"] - b["p80"] > between or b["p20"] - a["p80"] > between
    if not apart or abs(b["median"] - a["median"]) <= noise * a["median"]:
        return SAME
    return "faster" if b["median"] < a["median"] else "slower"


def best(rows: Sequence[Row], which: str) -> Row | None:
    """The fastest timed row."""
    return min(
        (row for row in rows if row["status"] == "ok" and row[which]), key=lambda r: r[which]["median"], default=None
    )
