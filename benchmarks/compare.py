"""Is B faster than A? A verdict for each measurement of two run files, or of two git revisions measured here.

    python -m benchmarks compare A.json B.json
    python -m benchmarks compare main HEAD [--kind kernels] [--case PATTERN] [--quick]

A difference counts only where the p20..p80 intervals of A and B don't overlap and the medians differ by more than a
margin (see --noise). GPU time decides where both have it, else wall time. What was right in A and is wrong or out of
memory in B is a regression too; otherwise compare judges speed, and the tests judge whether results are right: on a CPU
each revision is its own reference. Exit status: 0, no regression of ours; 1, a regression; 2, nothing comparable.

Two files come from two processes, which may differ by more than either one's own spread. The margin is taken from the
files: from what contestants other than ours changed by, whose versions are equal in both (see margins). A change of all
of ours together shows in their median, which varies less (see shift).

Revisions are checked out into worktrees of their own, and ours of both measured by the benchmarks of the present tree,
in turns A B B A so that a drift of the machine meets both; what differs then is measured in up to five more turns of
each. Medians and intervals are the medians of the turns', and all turns have to agree, but for as many pairs of them as
one stray turn makes when there are seven: by chance they do so once in 38 times. With --quick, whose time may be up
before, fewer than four turns tell a difference beyond the margin of files only; a smaller one is "unconfirmed". So is
one of two files below a margin that they are too small to tell themselves.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results, runs
from benchmarks.rows import MEASURES, NOISE, SAME, Stats, is_ours, verdict
from benchmarks.runs import KINDS, UNFINISHED, Row, RunError, key
from hdit._extras import require

CONFIRMATIONS = 5  # more turns of each revision, for the cases that still differ
STRAY = 7  # turns of each from which on one may disagree with the others
CONFIRMED = 4  # turns of each that have to agree on a small difference
QUICK_SECONDS = 8  # of a turn, beside its start and what it is at by then
QUICK_TOTAL = 50  # seconds of all turns: one that is not done by then is ended, what it has measured so far counts
SHORTEST = 5  # seconds that a turn takes at least
FEWEST = 20  # measurements of others from which a margin is taken; from the largest of them where ours are more
STATED = {"gpu_us": 0.17, "wall_us": 1.5}  # the margin of two files without; same sources differ by up to about as much
TOGETHER = {"gpu_us": 0.03, "wall_us": 0.25}  # margin of the median change of ours, of two files
FEWEST_TOGETHER = 10
UNCONFIRMED = "unconfirmed"
LISTED = 10  # names, of what was not measured
OURS = {"kernels": ["ours"], "model": ["ours"], "train": ["ours"], "scaling": ["ours", "HDiT"]}  # contestants


@dataclass(frozen=True)
class Verdict:
    """One measurement in both runs. word: rows.verdict's; "unconfirmed": a difference in too few turns, or below a
    margin that is only stated; "broken" when B has no time any more and "new" when A had none. which: the time judged
    by."""

    case: str
    direction: str
    contestant: str
    word: str
    which: str | None
    a: Stats | None
    b: Stats | None
    reason: str | None = None

    @property
    def change(self) -> float | None:
        """B's median over A's, less one."""
        return self.b["median"] / self.a["median"] - 1 if self.a and self.b else None

    @property
    def regression(self) -> bool:
        """Whether ours became slower or broke; a peer's changes are shown only."""
        return is_ours(self.contestant) and self.word in ("slower", "broken")


@dataclass(frozen=True)
class Margin:
    """By which share more time has to be taken to count, or less the other way round. source: where it comes from.
    stated: it does not come from the files, so that a smaller difference may be one.
    """

    share: float
    source: str
    stated: bool = False


def margins(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Margin]:
    """What two files differ by though the code is the same, for each time that they are judged by.

    It is the largest change but one, so that no single stray decides (the largest where they are fewer than ours), of
    what was not changed: contestants other than ours, of equal versions, that would count without a margin. Where they
    are fewer than FEWEST, it is STATED at least.
    """
    ours, others = _changes(a, b)
    return {which: _margin(which, len(ours[which]), others[which]) for which in MEASURES if ours[which]}


def _margin(which: str, ours: int, others: Sequence[tuple[Stats, Stats]]) -> Margin:
    apart = [math.exp(abs(_log(*pair))) - 1 for pair in others if verdict(*pair, 0) in ("faster", "slower")]
    largest, but_one = sorted([0.0, 0.0, *apart])[:-3:-1]
    if len(others) < FEWEST:
        few = f"stated, for want of {FEWEST} measurements of unchanged others, of which there are {len(others)}"
        return Margin(max(STATED[which], but_one), few, stated=True)
    source = f"{len(others)} measurements of unchanged others differ by "
    if len(others) < ours:
        return Margin(max(NOISE[which], largest), source + "no more")
    return Margin(max(NOISE[which], but_one), source + "less, but for one")


def shift(a: dict[str, Any], b: dict[str, Any], noise: dict[str, float]) -> str | None:
    """In words, that ours together became slower from one file to the other; None if they didn't.

    Their median change, over that of unchanged others where there are enough, has to be beyond TOGETHER and noise.
    """
    ours, others = _changes(a, b)
    for which, pairs in ours.items():
        if len(pairs) < FEWEST_TOGETHER:
            continue
        middle = statistics.median(_log(*pair) for pair in pairs)
        if len(others[which]) >= FEWEST_TOGETHER:
            middle -= statistics.median(_log(*pair) for pair in others[which])
        if (change := math.exp(middle) - 1) > max(TOGETHER[which], noise[which]):
            return f"ours together: the median of {len(pairs)} changes of {MEASURES[which]} is {change:+.1%}"
    return None


def _log(a: Stats, b: Stats) -> float:
    return math.log(b["median"] / a["median"])


Changes = dict[str, list[tuple[Stats, Stats]]]  # by the time judged by


def _changes(a: dict[str, Any], b: dict[str, Any]) -> tuple[Changes, Changes]:
    """Those of ours, and those of contestants that did not change."""
    ours: Changes = {which: [] for which in MEASURES}
    others: Changes = {which: [] for which in MEASURES}
    after = _measurements(b)
    for name, row in _measurements(a).items():
        which = _which(row, after[name]) if name in after else None
        if which is None:
            continue
        if is_ours(row["contestant"]):
            ours[which].append((row[which], after[name][which]))
        elif _unchanged(row["contestant"], a["environment"], b["environment"]):
            others[which].append((row[which], after[name][which]))
    return ours, others


def _unchanged(contestant: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether its code is the same in both environments, as far as versions tell."""
    if contestant.startswith("DiT"):  # has our norms and gates
        return False
    if any(a.get(name) != b.get(name) for name in runs.SAME):
        return False
    own = contestant.split()[0].rstrip(",")
    peers, others = a.get("peers", {}), b.get("peers", {})
    return all(peers.get(name) == others.get(name) for name in {*peers, *others} if name.startswith(own))


def compare_runs(
    a: dict[str, Any],
    b: dict[str, Any],
    noise: dict[str, float] | None = None,
    allow_different: bool = False,
    unsure: Collection[str] = (),
) -> list[Verdict]:
    """Verdicts over the measurements that are in both runs and timed in one.

    noise: for "gpu_us" and "wall_us", the share by which one has to take longer than the other (default: rows.NOISE).
    unsure: those of them below which a difference beyond rows.NOISE is "unconfirmed" instead of noise.
    allow_different: compare runs of different devices or versions. Raises ValueError when they may not be compared, or
    have no timed measurement in common.
    """
    different = runs.differences(a, b)
    if different and not allow_different:
        raise ValueError(
            f"A and B differ in {'; '.join(different)}: pass --allow-different to compare them all the same"
        )
    verdicts = _verdicts(a, b, noise or NOISE, unsure=unsure)
    if not verdicts:
        left = [next((row for row in run["rows"] if row["status"] == "not measured"), None) for run in (a, b)]
        why = [
            f"; {name} did not measure {row['case']}: {row['reason']}"
            for name, row in (("A", left[0]), ("B", left[1]))
            if row
        ]
        raise ValueError(f"A and B have no timed measurement in common{''.join(why)}")
    return verdicts


def _verdicts(
    a: dict[str, Any], b: dict[str, Any], noise: dict[str, float], agree: bool = True, unsure: Collection[str] = ()
) -> list[Verdict]:
    """agree: whether the turns have to, of runs that were joined. unsure: as in compare_runs."""
    before, after = (_measurements(run) for run in (a, b))
    found = [_judge(row, after[name], noise, agree, unsure) for name, row in before.items() if name in after]
    return [judged for judged in found if judged]


def _measurements(run: dict[str, Any]) -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in run["rows"]}


def _which(a: Row, b: Row) -> str | None:
    """The time that two rows are judged by."""
    if not a["status"] == b["status"] == "ok":
        return None
    return next((name for name in MEASURES if a[name] and b[name]), None)


def _judge(a: Row, b: Row, noise: dict[str, float], agree: bool, unsure: Collection[str]) -> Verdict | None:
    """None where neither was timed, or one was left out for want of time or of a package."""
    names = (b["case"], b["pass"], b["contestant"])
    if which := _which(a, b):
        one, other = a[which], b[which]
        word = _word(one, other, noise[which])
        if word == SAME and which in unsure and _word(one, other, NOISE[which]) != SAME:
            word = UNCONFIRMED
        if agree and word in ("faster", "slower"):
            if not _turns_agree(one, other):
                word = SAME
            elif _few_turns(one, other) and abs(_log(one, other)) <= math.log1p(STATED[which]):
                word = UNCONFIRMED
        return Verdict(*names, word, which, one, other)
    lost = ["failed", "out of memory"]
    lost += ["unavailable"] if is_ours(b["contestant"]) else []
    for word, timed, other in (("broken", a, b), ("new", b, a)):
        if timed["status"] == "ok" and other["status"] in lost:
            return Verdict(*names, word, None, None, None, " ".join(filter(None, (other["status"], other["reason"]))))
    return None


def _word(a: Stats, b: Stats, share: float) -> str:
    """share: more of a's time, or less the other way round."""
    return verdict(a, b, share if b["median"] > a["median"] else share / (1 + share))


def _few_turns(a: Stats, b: Stats) -> bool:
    return "turns" in a and "turns" in b and min(len(a["turns"]), len(b["turns"])) < CONFIRMED


def _turns_agree(a: Stats, b: Stats) -> bool:
    """Whether each turn of A is on the same side of each of B as their medians are; see STRAY."""
    one, other = a.get("turns", []), b.get("turns", [])
    slower = b["median"] > a["median"]
    against = sum((y <= x) if slower else (y >= x) for x in one for y in other)
    return against <= (max(len(one), len(other)) if min(len(one), len(other)) >= STRAY else 0)


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = {word: sum(v.word == word for v in verdicts) for word in dict.fromkeys(v.word for v in verdicts)}
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def table(verdicts: Sequence[Verdict], a: str, b: str) -> Any:
    """A rich.table.Table, the largest changes first."""
    escape = require("rich.markup", "bench").escape
    found = require("rich.table", "bench").Table(title=escape(f"A: {a}\nB: {b}"))
    for head in ("case", "pass", "contestant", "time", "A [p20, p80] µs", "B [p20, p80] µs", "change", "verdict"):
        found.add_column(escape(head), justify="right" if "A" in head or "B" in head or head == "change" else "left")
    styles = {"faster": "green", "new": "green", "slower": "red", "broken": "red"}
    for v in sorted(verdicts, key=lambda v: -abs(v.change if v.change is not None else float("inf"))):
        change = "" if v.change is None else f"{v.change:+.1%}"
        word = v.word + (f" ({v.reason})" if v.reason else "")
        row = [v.case, v.direction, v.contestant, MEASURES[v.which] if v.which else "", _interval(v.a), _interval(v.b)]
        found.add_row(*map(escape, [*row, change, word]), style=styles.get(v.word, "dim"))
    return found


def _interval(stats: Stats | None) -> str:
    return "" if stats is None else f"{stats['median']:.1f} [{stats['p20']:.1f}, {stats['p80']:.1f}]"


# Git revisions


def measure_revisions(
    a: str,
    b: str,
    kind: str = "kernels",
    cases: Sequence[str] = (),
    *,
    quick: bool = False,
    noise: dict[str, float] | None = None,
    root: Path = results.ROOT,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs `python -m benchmarks <kind>` on two git revisions, ours only; returns the run of each, its turns joined.

    cases: patterns of cases, none means all. quick: a few cases, in less than a minute. noise: as in compare_runs.
    root: the clone. Raises ValueError for a revision that git doesn't know or that can't be measured.
    """
    options = [f"--contestant={name}" for name in OURS[kind]]
    options += ["--quick", f"--budget={QUICK_SECONDS}"] if quick else []
    deadline = time.monotonic() + QUICK_TOTAL if quick else math.inf
    with tempfile.TemporaryDirectory(prefix="benchmarks-compare-") as name:
        folder = Path(name)
        with _worktree(root, a, folder / "a") as tree_a, _worktree(root, b, folder / "b") as tree_b:
            measured: dict[Path, list[dict[str, Any]]] = {tree_a: [], tree_b: []}
            revisions = {tree_a: a, tree_b: b}

            def take_turn(trees: Sequence[Path], cases: Sequence[str], turn: int) -> None:
                asked = [*options, *(f"--case={pattern}" for pattern in cases)]
                for i, tree in enumerate(trees):
                    seconds = (deadline - time.monotonic()) / (len(trees) - i)
                    output = folder / f"{tree.name}-{turn + i}.json"
                    found = _measure(tree, kind, output, asked, revisions[tree], seconds)
                    if found is not None:
                        measured[tree].append(found)

            take_turn((tree_a, tree_b), cases, 0)
            if deadline - time.monotonic() >= 2 * SHORTEST:
                take_turn((tree_b, tree_a), cases, 2)
            for tree, revision in revisions.items():
                if not any(turn["rows"] for turn in measured[tree]):
                    raise ValueError(f"{revision}: no turn of it measured anything in the time that there is")
            for more in range(CONFIRMATIONS):
                changed = _differing(measured[tree_a], measured[tree_b], noise or NOISE)
                if not changed or deadline - time.monotonic() < 2 * SHORTEST:
                    break
                take_turn((tree_b, tree_a), changed, 4 + 2 * more)
        return joined(measured[tree_a]), joined(measured[tree_b])


def _differing(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], noise: dict[str, float]) -> list[str]:
    """The cases to be measured again: those whose turns differ, of the first ones any with the one beside it."""
    verdicts = _verdicts(joined(a), joined(b), noise, agree=False)
    if max(len(a), len(b)) <= 2:
        verdicts += [v for one, other in zip(a, b, strict=False) for v in _verdicts(one, other, noise)]
    return list(dict.fromkeys(v.case for v in verdicts if v.word in ("faster", "slower")))


@contextmanager
def _worktree(root: Path, revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of the revision whose benchmarks/ is the present one."""
    _git(root, "worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        shutil.copytree(
            root / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        yield folder
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *arguments: str) -> None:
    found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(found.stderr.split())}")


def _measure(
    tree: Path, kind: str, output: Path, options: Sequence[str], revision: str, seconds: float = math.inf
) -> dict[str, Any] | None:
    """The run of one turn, or what it has measured after these seconds; None if that is nothing."""
    # The working directory comes first on the module path: the worktree's packages are measured, not installed ones.
    command = [sys.executable, "-m", "benchmarks", kind, "--output", str(output), *options]
    ended = False
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
        progress = threading.Thread(target=_say, args=(child.stdout,), daemon=True)
        progress.start()
        try:
            status = child.wait(None if seconds == math.inf else max(seconds, 0))
        except subprocess.TimeoutExpired:
            ended = True
        finally:
            if child.poll() is None:
                child.kill()
                status = child.wait()
            progress.join(1)  # a process that it left behind may hold the pipe
        errors.seek(0)
        last = errors.read().strip().rpartition("\n")[2]
    if output.exists():
        if status and last and not ended:
            print(last, file=sys.stderr)
        return runs.read(output)
    if ended:
        return None
    why = f": {last}" if last else ""
    asked = f"benchmarks {kind} on {revision}"
    raise ValueError(f"{asked} ended with exit status {status} and wrote nothing{why}")


def _say(lines: Iterable[str]) -> None:
    """Progress; on stderr, since a turn's table is not this command's result. Its files don't stay."""
    for line in lines:
        if not line.startswith(("Written: ", "With pictures: ")):
            sys.stderr.write(line)


def joined(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the same sources as one: medians of the turns' medians and intervals, so that a stray turn counts
    for nothing, and beside them each turn's median, "turns".

    A measurement that failed in one of those that tried it keeps what that one says; one whose time was up in a turn,
    as in the first, which may compile everything, is that of the others.
    """
    rows = []
    measured = [_measurements(turn) for turn in turns]
    for name in dict.fromkeys(name for found in measured for name in found):
        own = [found[name] for found in measured if name in found]
        tried = [found for found in own if found["status"] not in UNFINISHED] or own
        lost = next((found for found in tried if found["status"] != "ok"), None)
        middle = {
            which: _middle([found[which] for found in tried]) for which in MEASURES if all(f[which] for f in tried)
        }
        rows.append(lost or tried[0] | middle)
    return turns[0] | {"rows": rows}


def _middle(stats: Sequence[Stats]) -> Stats:
    return {
        **{name: statistics.median(found[name] for found in stats) for name in ("median", "p20", "p80")},
        "repeats": sum(found["repeats"] for found in stats),
        "turns": [found["median"] for found in stats],
    }


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a run's JSON file, or a git revision: what B is compared with")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--kind", choices=KINDS, default="kernels", help="revisions: what to run (default: kernels)")
    text = "revisions: cases whose name is or contains PATTERN, or is matched by it if it has *, ? or ["
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument("--quick", action="store_true", help="revisions: a few cases, in less than a minute")
    for which, name in (("gpu_us", "--noise"), ("wall_us", "--wall-noise")):
        text = (
            f"share more of {MEASURES[which]} that is never called a difference (default: of revisions {NOISE[which]}, "
        )
        text += "of files what others in them differ by)"
        parser.add_argument(name, type=_share, metavar="SHARE", help=text)
    parser.add_argument("--allow-different", action="store_true", help="compare runs of different devices or versions")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


_share.__name__ = "number"  # argparse names it when float() fails


def run(args: argparse.Namespace) -> int:
    try:
        files = _files(args)
        if files:
            a, b = (runs.read(path) for path in files)
            verdicts, together = _of_files(args, a, b)
        else:
            noise = _noise(args)
            options = {"quick": args.quick, "noise": noise, "root": results.ROOT}
            a, b = measure_revisions(args.a, args.b, args.kind, args.case, **options)
            verdicts, together = compare_runs(a, b, noise, args.allow_different), None
    except (OSError, ValueError) as error:
        raise RunError(" ".join(str(error).split())) from error
    width = None if sys.stdout.isatty() else 160
    require("rich.console", "bench").Console(width=width).print(table(verdicts, args.a, args.b))
    print(summary(verdicts))
    for line in [*_unmeasured(a, b), *(_margin_lines(args, a, b) if files else _turn_lines(verdicts))]:
        print(line)
    if together:
        print(together)
    lost = [v for v in verdicts if v.regression]
    regressions = len(lost)
    if regressions or not together:
        print(f"{regressions} regressions of ours" if regressions else "no regression of ours")
    doubtful = lost + [v for v in verdicts if v.word == UNCONFIRMED and is_ours(v.contestant)]
    if files and (doubtful or together):
        print(_confirm(a, b, doubtful))
    return 1 if regressions or together else 0


def _of_files(args: argparse.Namespace, a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Verdict], str | None]:
    given = {name: share for name, share in (("gpu_us", args.noise), ("wall_us", args.wall_noise)) if share is not None}
    noise = _noise(args)
    found = margins(a, b)
    noise = noise | {which: margin.share for which, margin in found.items()} | given
    unsure = {which for which, margin in found.items() if margin.stated} - given.keys()
    verdicts = compare_runs(a, b, noise, args.allow_different, unsure)
    return verdicts, shift(a, b, NOISE | given)


def _margin_lines(args: argparse.Namespace, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    given = {"gpu_us": args.noise, "wall_us": args.wall_noise}
    return [
        f"margin of {MEASURES[which]}: "
        + (f"{found.share:.1%} ({found.source})" if given[which] is None else f"{given[which]:.1%} (given)")
        for which, found in margins(a, b).items()
    ]


def _turn_lines(verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["This is about speed: whether results are right is for the tests, on a CPU each is its own reference."]
    if any(v.word == UNCONFIRMED for v in verdicts):
        lines.append(
            f"unconfirmed: in fewer than {CONFIRMED} turns of each; give it longer without --quick, or a --case"
        )
    return lines


def _confirm(a: dict[str, Any], b: dict[str, Any], doubtful: Sequence[Verdict]) -> str:
    """How to make sure of what two files say."""
    commits = [run["sessions"][-1]["commit"] for run in (a, b)]
    named = [c[:12] for c in commits] if all(commits) and commits[0] != commits[1] else ["REVISION_A", "REVISION_B"]
    kinds = {row["case"]: row["kind"] for row in a["rows"]}
    cases = list(dict.fromkeys(v.case for v in doubtful))
    kind = kinds[cases[0]] if cases else a["rows"][0]["kind"]
    asked = ["python", "-m", "benchmarks", "compare", *named, "--kind", kind]
    asked += [f"--case={case}" for case in cases if kinds[case] == kind][:LISTED]
    return f"Two files may differ by more than the code does. By turns, here: {shlex.join(asked)}"


def _unmeasured(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Lines that name what only one has a time of, and what neither has for want of time."""
    before, after = _measurements(a), _measurements(b)
    groups: dict[str, list[str]] = {"measured in A only": [], "measured in B only": [], "measured in neither": []}
    for name in dict.fromkeys([*before, *after]):
        rows = {"A": before.get(name), "B": after.get(name)}
        left = {one: row for one, row in rows.items() if row is None or row["status"] in UNFINISHED}
        timed = [one for one, row in rows.items() if row and row["status"] == "ok"]
        group = f"measured in {timed[0]} only" if timed else "measured in neither"
        wanted = timed or any(row and row["status"] == "not measured" for row in left.values())
        if left and wanted:
            why = {one: row["reason"] if row else "no row" for one, row in left.items()}
            reasons = [f"{' and '.join(n for n in why if why[n] == reason)}: {reason}" for reason in why.values()]
            case, contestant, direction = name
            groups[group].append(f"  {case}, {direction}, {contestant} ({'; '.join(dict.fromkeys(reasons))})")
    lines = []
    for group, found in groups.items():
        lines += [f"{group}: {len(found)}", *found[:LISTED]] if found else []
        lines += [f"  and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return lines


def _noise(args: argparse.Namespace) -> dict[str, float]:
    given = {"gpu_us": args.noise, "wall_us": args.wall_noise}
    return {which: NOISE[which] if share is None else share for which, share in given.items()}


def _files(args: argparse.Namespace) -> list[Path]:
    """Both, or none if they are revisions."""
    files = [Path(name) for name in (args.a, args.b) if Path(name).suffix == ".json" or Path(name).is_file()]
    if len(files) == 1:
        raise ValueError(f"{files[0]} is a file and the other is none: give two JSON files or two git revisions")
    if files and (args.quick or args.case):
        raise ValueError("--quick and --case are for revisions: files are measured already")
    return files
