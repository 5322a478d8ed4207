"""benchmarks.compare: verdicts of made-up runs, and revisions of a made-up repository."""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, results, rows, runs
from benchmarks.__main__ import main
from tests import made_up_runs
from tests.made_up_runs import stats


def command(*arguments: str) -> int:
    return main(["compare", *arguments])


def faster(run: dict[str, Any], factor: float, contestant: str = "ours", which: str = "gpu_us") -> dict[str, Any]:
    """The same run with one contestant's times divided by a factor."""
    found = copy.deepcopy(run)
    for row in found["rows"]:
        if row["contestant"] == contestant and row[which]:
            row[which] = {k: v if k == "repeats" else v / factor for k, v in row[which].items()}
    return found


def spread(median: float, p20: float, p80: float, repeats: int = 5) -> rows.Stats:
    return {"median": median, "p20": p20, "p80": p80, "repeats": repeats}


def words(verdicts: list[compare.Verdict], contestant: str = "ours") -> set[str]:
    return {v.word for v in verdicts if v.contestant == contestant}


@pytest.mark.parametrize(
    ("a", "b", "noise", "word"),
    [
        (stats(100, 0.01), stats(80, 0.01), 0.03, "faster"),
        (stats(80, 0.01), stats(100, 0.01), 0.03, "slower"),
        (stats(100, 0.0), stats(100, 0.0), 0.0, "same within noise"),
        (stats(100, 0.15), stats(80, 0.15), 0.03, "same within noise"),  # the intervals overlap
        (stats(100, 0.001), stats(98, 0.001), 0.03, "same within noise"),  # apart, but inside the band
        (stats(100, 0.001), stats(98, 0.001), 0.01, "faster"),
        (stats(100, 0.001), stats(102, 0.001), 0.01, "slower"),
        (spread(100, 90, 101), spread(120, 101, 130), 0.03, "same within noise"),
        (spread(100, 90, 101), spread(120, 102, 130), 0.03, "slower"),
        (spread(1.15e6, 1e6, 1.3e6), spread(8.02e6, 8.02e6, 8.02e6, repeats=1), 0.03, "too few samples"),
        (spread(100, 100, 100, repeats=1), spread(100, 99, 101), 0.03, "too few samples"),
        (spread(100, 99, 101, repeats=2), spread(120, 119, 121, repeats=2), 0.03, "slower"),
        (spread(100, 90, 110, repeats=3), spread(140, 131, 150, repeats=3), 0.03, "slower"),
        (spread(100, 90, 110, repeats=3), spread(140, 129, 150, repeats=3), 0.03, "same within noise"),
        (spread(140, 130, 150), spread(100, 90, 110, repeats=4), 0.03, "same within noise"),
        (spread(140, 111, 150), spread(100, 90, 110), 0.03, "faster"),
    ],
)
def test_a_difference_counts_beyond_the_spread_only(a: rows.Stats, b: rows.Stats, noise: float, word: str) -> None:
    assert rows.verdict(a, b, noise) == word


def test_a_run_is_the_same_as_itself() -> None:
    run = made_up_runs.kernels()
    verdicts = compare.compare_runs(run, copy.deepcopy(run))
    timed = [row for row in run["rows"] if row["status"] == "ok"]
    assert len(verdicts) == len(timed) and {v.word for v in verdicts} == {"same within noise"}
    assert not any(v.regression for v in verdicts) and {v.which for v in verdicts} == {"gpu_us"}


def test_only_ours_regresses() -> None:
    run = made_up_runs.kernels()
    slower = compare.compare_runs(run, faster(run, 0.8))
    assert words(slower) == {"slower"} and all(v.regression == (v.contestant == "ours") for v in slower)
    assert all(v.change == pytest.approx(0.25) for v in slower if v.contestant == "ours")
    peer = compare.compare_runs(run, faster(run, 0.8, "flex"))
    assert words(peer, "flex") == {"slower"} and not any(v.regression for v in peer)
    hdit = made_up_runs.scaling()
    assert any(v.regression for v in compare.compare_runs(hdit, faster(hdit, 0.8, "HDiT-B/4")))


def test_the_band_is_the_caller_s() -> None:
    run = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", stats(100, 0.001), 120)])
    slow = faster(run, 1 / 1.02)
    assert words(compare.compare_runs(run, slow)) == {"same within noise"}
    assert words(compare.compare_runs(run, slow, {"gpu_us": 0.01, "wall_us": 0.1})) == {"slower"}


def test_wall_time_decides_where_there_is_no_gpu_time() -> None:
    run = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", None, stats(100, 0.01))])
    (found,) = compare.compare_runs(run, faster(run, 0.5, which="wall_us"))
    assert (found.word, found.which) == ("slower", "wall_us")
    (found,) = compare.compare_runs(run, faster(run, 0.93, which="wall_us"))
    assert found.word == "same within noise"  # 7.5%, inside wall time's wider band


def test_what_breaks_is_a_regression() -> None:
    run = made_up_runs.kernels()
    broken = copy.deepcopy(run)
    for row in broken["rows"]:
        if row["contestant"] == "ours":
            row.update(status="failed", reason="out: error 1e-1", gpu_us=None, wall_us=None)
    found = compare.compare_runs(run, broken)
    assert words(found) == {"broken"} and all(v.regression for v in found if v.contestant == "ours")
    assert {v.reason for v in found if v.word == "broken"} == {"failed out: error 1e-1"}
    mended = compare.compare_runs(broken, run)
    assert words(mended) == {"new"} and not any(v.regression for v in mended)


@pytest.mark.parametrize("name", ["device", "torch", "triton", "cuda", "driver", "python"])
def test_other_machines_are_refused_unless_said(name: str) -> None:
    a, b = made_up_runs.kernels(), made_up_runs.kernels()
    b["environment"][name] = "another"
    with pytest.raises(ValueError, match=f"{name} .* and another.*--allow-different"):
        compare.compare_runs(a, b)
    assert compare.compare_runs(a, b, allow_different=True)


def test_other_kinds_and_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match="no timed measurement in common$"):
        compare.compare_runs(made_up_runs.kernels(), made_up_runs.models(), allow_different=True)
    a, b = made_up_runs.kernels(), made_up_runs.kernels()
    b["rows"] = [row | {"case": f"other {row['case']}"} for row in b["rows"]]
    with pytest.raises(ValueError, match="no timed measurement in common$"):
        compare.compare_runs(a, b)
    b = made_up_runs.kernels()
    for row in b["rows"]:
        row.update(status="not measured", reason="the budget is spent", gpu_us=None, wall_us=None, host_us=None)
    with pytest.raises(ValueError, match="in common; B did not measure .*: the budget is spent"):
        compare.compare_runs(made_up_runs.kernels(), b)
    a, b = made_up_runs.kernels(), made_up_runs.kernels()
    a["environment"]["peers"], b["environment"]["peers"] = {"natten": "1", "quack-kernels": "1"}, {"natten": "2"}
    with pytest.raises(ValueError, match="differ in natten 1 and 2: pass --allow-different"):
        compare.compare_runs(a, b)


# The command


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, dict[str, Any]], str]:
    def write(name: str, run: dict[str, Any]) -> str:
        results.write(tmp_path / name, run)
        return str(tmp_path / name)

    return write


def test_exit_status_and_words(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up_runs.kernels()
    a, same, better, worse = file("a.json", run), file("b.json", run), faster(run, 1.5), faster(run, 0.5)
    assert command(a, same) == 0
    printed = capsys.readouterr().out
    assert "22 same within noise" in printed and "no regression of ours" in printed
    assert command(a, file("c.json", better)) == 0
    assert "5 faster" in capsys.readouterr().out
    assert command(a, file("d.json", worse)) == 1
    printed = capsys.readouterr().out
    assert "+100.0%" in printed and "5 slower" in printed and "5 regressions of ours" in printed
    peer = file("e.json", faster(run, 0.5, "flex"))
    assert command(a, peer) == 0


def test_says_what_only_one_run_measured(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up_runs.kernels()
    less = run | {"rows": [row for row in run["rows"] if row["operator"] == "na2d"]}
    assert command(file("a.json", run), file("b.json", less)) == 0
    assert "measured in A only: 2" in capsys.readouterr().out
    assert command(file("b.json", less), file("a.json", run)) == 0
    assert "measured in B only: 2" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    good, other = file("a.json", made_up_runs.kernels()), made_up_runs.kernels()
    other["environment"]["torch"] = "2.9"
    bad = file("bad.json", made_up_runs.kernels() | {"schema": 99})
    Path(bad).with_name("text.json").write_text("{")
    for arguments, words in [
        ((good, file("b.json", other)), "--allow-different"),
        ((good, bad), "schema 99"),
        ((good, str(Path(bad).with_name("text.json"))), "text.json"),
        ((good, str(Path(bad).with_name("absent.json"))), "absent.json"),
        ((good, "HEAD"), "two JSON files or two git revisions"),
        ((good, good, "--quick"), "revisions"),
        ((good, good, "--case", "na2d"), "revisions"),
        (("no-such-revision", "no-such-revision"), "no-such-revision"),
    ]:
        assert command(*arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert err.startswith("python -m benchmarks: ") and err.count("\n") == 1 and words in err, err
        assert not out
    assert command(good, file("b.json", other), "--allow-different") == 0


@pytest.mark.parametrize("noise", ["-0.1", "1", "much"])
def test_the_band_is_a_share(noise: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("a.json", "b.json", "--noise", noise)
    assert stopped.value.code == 2 and "--noise" in capsys.readouterr().err


# Two files


def others(count: int, changes: list[float], **environment: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs of one row of ours and of a peer's in many cases; those of the second take 1 + change times as long."""
    before = [made_up_runs.row("rms_norm 0", "ours", stats(100, 0.001), 120)]
    before += [made_up_runs.row(f"rms_norm {i}", "liger", stats(100, 0.001), 120) for i in range(count)]
    after = [before[0]] + [
        made_up_runs.row(f"rms_norm {i}", "liger", stats(100 * (1 + change), 0.001), 120)
        for i, change in enumerate([*changes, *[0.0] * (count - len(changes))])
    ]
    peers = {"liger-kernel": "1"}
    return made_up_runs.run("kernels", before, peers=peers), made_up_runs.run("kernels", after, peers=peers)


def test_the_margin_of_files_is_what_unchanged_others_differ_by() -> None:
    a, b = others(30, [0.4, 0.16, 0.12])
    assert compare.margins(a, b)["gpu_us"].share == pytest.approx(0.16)  # the largest but one
    assert "30 measurements" in compare.margins(a, b)["gpu_us"].source
    a, b = others(30, [0.02, 0.01])
    assert compare.margins(a, b)["gpu_us"].share == rows.NOISE["gpu_us"]
    assert "wall_us" not in compare.margins(a, b)  # nothing is judged by it
    a, b = others(19, [0.02])
    found = compare.margins(a, b)["gpu_us"]
    assert found.share == compare.STATED["gpu_us"] and "stated" in found.source and "19" in found.source
    a, b = others(19, [0.5, 0.4])
    assert compare.margins(a, b)["gpu_us"].share == pytest.approx(0.4)
    a, b = others(25, [0.3, 0.2])  # fewer than ours: the largest
    for run in (a, b):
        run["rows"] += [made_up_runs.row(f"geglu {i}", "ours", stats(100, 0.001), 120) for i in range(30)]
    found = compare.margins(a, b)["gpu_us"]
    assert found.share == pytest.approx(0.3) and not found.stated and "25 measurements" in found.source


def test_a_change_below_a_stated_margin_is_unconfirmed(
    file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = others(5, [])
    names = file("a.json", a), file("b.json", faster(b, 1 / 1.15))
    assert command(*names) == 0
    printed = capsys.readouterr().out
    assert "1 unconfirmed" in printed and "margin of GPU time: 17.0% (stated" in printed
    assert "By turns, here: python -m benchmarks compare" in printed and "'--case=rms_norm 0'" in printed
    assert command(names[0], file("c.json", faster(b, 1 / 1.02))) == 0
    assert "unconfirmed" not in capsys.readouterr().out
    assert command(*names, "--noise", "0.17") == 0
    assert "unconfirmed" not in capsys.readouterr().out
    assert command(names[0], file("d.json", faster(b, 1 / 1.2))) == 1


def test_others_of_another_version_tell_no_margin() -> None:
    a, b = others(30, [0.4, 0.16])
    b["environment"]["peers"] = {"liger-kernel": "2"}
    found = compare.margins(a, b)["gpu_us"]
    assert found.share == compare.STATED["gpu_us"] and "there are 0" in found.source
    a, b = others(30, [])
    b["environment"]["triton"] = "4"
    assert compare.margins(a, b)["gpu_us"].share == compare.STATED["gpu_us"]
    a, b = others(30, [])
    for run in (a, b):
        for row in run["rows"][1:]:
            row["contestant"] = "DiT-S/4"  # has our norms
    assert "there are 0" in compare.margins(a, b)["gpu_us"].source


def test_files_are_judged_by_their_margin(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = others(30, [0.16, 0.16])
    names = file("a.json", a), file("b.json", faster(b, 1 / 1.1))
    assert command(*names) == 0
    printed = capsys.readouterr().out
    assert "margin of GPU time: 16.0% (30 measurements of unchanged others differ by less, but for one)" in printed
    assert command(*names, "--noise", "0.05") == 1
    printed = capsys.readouterr().out
    assert "margin of GPU time: 5.0% (given)" in printed
    b["sessions"][0]["commit"] = "1" * 40
    assert command(names[0], file("c.json", faster(b, 1 / 1.2))) == 1
    asked = f"python -m benchmarks compare {'0' * 12} {'1' * 12} --kind kernels '--case=rms_norm 0'"
    assert asked in capsys.readouterr().out


def cpu(factor: float = 1.0, count: int = 30) -> dict[str, Any]:
    """ours alone, as on a CPU; every other row is noisy."""
    found = [
        made_up_runs.row(f"rms_norm {i}", "ours", None, stats(100 * factor * (1.6 if i % 7 == 3 else 1.0), 0.01))
        for i in range(count)
    ]
    return made_up_runs.run("kernels", found)


def test_a_change_of_all_of_ours_shows_in_their_median(
    file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = made_up_runs.run("kernels", [row | {"wall_us": stats(100, 0.01)} for row in cpu()["rows"]])
    a = file("a.json", quiet)
    assert command(a, file("b.json", cpu())) == 0  # a few differ by 60%: two processes on a CPU do so
    assert "stated" in capsys.readouterr().out
    assert command(a, file("c.json", cpu(1.5))) == 1
    printed = capsys.readouterr().out
    assert "ours together: the median of 30 changes of wall time is +50.0%" in printed and "regression" not in printed
    assert command(a, file("d.json", cpu(1.5)), "--wall-noise", "0.9") == 1  # those of 60% on top of it
    printed = capsys.readouterr().out
    assert "ours together" not in printed and "4 regressions of ours" in printed
    assert command(a, file("e.json", cpu(0.6))) == 0
    few = (file(f"{factor}.json", cpu(factor, 5)) for factor in (1.0, 1.5))
    assert command(*few) == 0


def test_a_machine_slower_for_all_is_not_ours(file: Callable[..., str]) -> None:
    a, b = others(30, [0.5] * 30)
    ours = [made_up_runs.row(f"geglu {i}", "ours", stats(100, 0.001), 120) for i in range(15)]
    extra = made_up_runs.run("kernels", ours)
    a["rows"], b["rows"] = a["rows"] + extra["rows"], b["rows"] + faster(extra, 1 / 1.45)["rows"]
    assert command(file("a.json", a), file("b.json", b)) == 0
    alone = [made_up_runs.run("kernels", [r for r in run["rows"] if r["operator"] == "geglu"]) for run in (a, b)]
    assert compare.shift(*alone, rows.NOISE) and not compare.shift(a, b, rows.NOISE)


def test_too_few_samples_count_apart(
    file: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "verdict", lambda *_: "too few samples")
    run = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", 100, 120)])
    assert command(file("a.json", run), file("b.json", faster(run, 0.5))) == 0
    printed = capsys.readouterr().out
    assert printed.count("too few samples") == 2 and "1 too few samples" in printed


def test_names_what_was_not_measured(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    late = {"status": "not measured", "reason": "about 5 s needed, 2 s left", "gpu_us": None, "wall_us": None}
    a = made_up_runs.run("kernels", [made_up_runs.row(f"geglu {i}", "ours", 100, 120) for i in range(4)])
    b = copy.deepcopy(a)
    b["rows"][1].update(late)
    a["rows"][2].update(late)
    b["rows"][2].update(late)
    del b["rows"][3]
    assert command(file("a.json", a), file("b.json", b)) == 0
    printed = capsys.readouterr().out
    assert "1 same within noise" in printed
    assert "measured in A only: 2\n  geglu 1, forward, ours (B: about 5 s needed, 2 s left)\n" in printed
    assert "  geglu 3, forward, ours (B: no row)\n" in printed
    assert "measured in neither: 1\n  geglu 2, forward, ours (A and B: about 5 s needed, 2 s left)" in printed


@pytest.mark.parametrize("status", ["failed", "out of memory", "unavailable"])
def test_a_row_of_ours_that_is_lost_in_b(
    status: str, file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_runs.run("kernels", [made_up_runs.row(f"geglu {i}", "ours", 100, 120) for i in range(2)])
    lost = copy.deepcopy(run)
    lost["rows"][1].update(status=status, reason="no kernel", gpu_us=None, wall_us=None)
    assert command(file("a.json", run), file("b.json", lost)) == 1
    assert f"broken ({status} no kernel)" in " ".join(capsys.readouterr().out.split())


def test_an_existing_file_is_a_file(file: Callable[..., str]) -> None:
    run = made_up_runs.kernels()
    assert command(file("before", run), file("after", faster(run, 0.5))) == 1


# Revisions

HARNESS = """
import importlib, json, sys
from pathlib import Path
header = json.loads(Path(__file__).with_name("header.json").read_text())
import hdit_kernels
assert Path(hdit_kernels.__file__).parent.parent == Path.cwd(), hdit_kernels.__file__
out = Path(sys.argv[sys.argv.index("--output") + 1])
log = Path(header.pop("log"))
with log.open("a") as file:
    file.write(json.dumps([sys.argv[1:], hdit_kernels.TIME]) + "\\n")
turn = log.read_text().count(str(hdit_kernels.TIME))
for row in header["rows"]:
    time = hdit_kernels.TIME
    row["gpu_us"] = {"median": time + turn, "p20": time, "p80": time + 3, "repeats": 5}
out.write_text(json.dumps(header))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone with two revisions, "old" (100 µs) and "new" (200 µs); its benchmarks are in neither."""
    root = tmp_path / "clone"
    (root / "hdit_kernels").mkdir(parents=True)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "--quiet")
    for tag, microseconds in (("old", 100), ("new", 200)):
        (root / "hdit_kernels" / "__init__.py").write_text(f"TIME = {microseconds}\n")
        git("add", ".")
        git("commit", "--quiet", "-m", tag)
        git("tag", tag)
    (root / "benchmarks").mkdir()
    header = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", 1, 120)])
    (root / "benchmarks" / "__init__.py").touch()  # else an installed package of that name would come first
    (root / "benchmarks" / "__main__.py").write_text(HARNESS)
    (root / "benchmarks" / "header.json").write_text(json.dumps(header | {"log": str(tmp_path / "log")}))
    return root


@pytest.fixture
def turns(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[set[str], str]]:
    """Verdicts of two revisions, given the times of each's turns, the last for all that follow; and the order."""
    base = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", 100, 120)])

    def judge(a: list[float], b: list[float]) -> tuple[set[str], str]:
        order: list[str] = []

        def measure(tree: Path, *_: Any) -> dict[str, Any]:
            order.append(tree.name)
            times = a if tree.name == "a" else b
            return faster(base, 100 / times[min(order.count(tree.name), len(times)) - 1])

        monkeypatch.setattr(compare, "_measure", measure)
        verdicts = compare.compare_runs(*compare.measure_revisions("old", "new", root=repository))
        return words(verdicts), "".join(order)

    return judge


def test_a_difference_that_goes_away_is_none(turns: Callable[..., tuple[set[str], str]]) -> None:
    assert turns([100], [66, 66, 100]) == ({"same within noise"}, "abba" + "ba" * 3)
    assert turns([100], [66, 100]) == ({"same within noise"}, "abba" + "ba")
    assert turns([100], [100]) == ({"same within noise"}, "abba")
    assert turns([100, 140, 100, 140, 140, 100, 140], [100, 140, 140, 140, 100, 100, 100])[0] == {"same within noise"}


@pytest.mark.parametrize("stray", [132, 200, 1000])
def test_a_stray_turn_hides_no_difference(stray: float, turns: Callable[..., tuple[set[str], str]]) -> None:
    everything = "abba" + "ba" * compare.CONFIRMATIONS
    for a in ([stray, 100], [100, stray, 100], [100, 100, 100, stray, 100]):
        assert turns(a, [166]) == ({"slower"}, everything)
        assert turns([166], a) == ({"faster"}, everything)


def worktrees(root: Path) -> int:
    listed = subprocess.run(["git", "worktree", "list"], cwd=root, check=True, capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def test_revisions_are_measured_in_turns(repository: Path) -> None:
    a, b = compare.measure_revisions("old", "old", "kernels", ["rms_norm"], root=repository)
    lines = [json.loads(line) for line in (repository.parent / "log").read_text().splitlines()]
    assert [time for _, time in lines] == [100] * 4  # nothing differs
    assert all(
        arguments[0] == "kernels" and arguments[3:] == ["--contestant=ours", "--case=rms_norm"]
        for arguments, _ in lines
    )
    common = {"median": 102.5, "p20": 100, "p80": 103, "repeats": 10}
    assert a["rows"][0]["gpu_us"] == common | {"turns": [101, 104]}
    assert b["rows"][0]["gpu_us"] == common | {"turns": [102, 103]}
    assert worktrees(repository) == 1


def test_what_differs_is_measured_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = compare.measure_revisions("old", "new", root=repository)
    lines = [json.loads(line) for line in (repository.parent / "log").read_text().splitlines()]
    assert [time for _, time in lines] == [100, 200, 200, 100] + [200, 100] * compare.CONFIRMATIONS
    assert [arguments[4:] for arguments, _ in lines] == [[]] * 4 + [["--case=rms_norm 1"]] * 10
    assert [run["rows"][0]["gpu_us"]["median"] for run in (a, b)] == [104, 204]
    assert a["rows"][0]["gpu_us"]["repeats"] == 35

    monkeypatch.setattr(results, "ROOT", repository)
    assert command("old", "new", "--case", "rms_norm", "--case", "geglu", "--quick") == 1
    printed = capsys.readouterr().out
    assert "1 slower" in printed and "whether results are right is for the tests" in printed
    assert "unconfirmed" not in printed and "margin" not in printed
    asked = [json.loads(line)[0][3:] for line in (repository.parent / "log").read_text().splitlines()[-14:]]
    options = ["--contestant=ours", "--quick", f"--budget={compare.QUICK_SECONDS}"]
    assert asked[:4] == [[*options, "--case=rms_norm", "--case=geglu"]] * 4
    assert asked[4:] == [[*options, "--case=rms_norm 1"]] * 10
    assert command("new", "old", "--kind", "scaling") == 0
    arguments = json.loads((repository.parent / "log").read_text().splitlines()[-1])[0]
    assert arguments[0] == "scaling" and arguments[3:] == [
        "--contestant=ours",
        "--contestant=HDiT",
        "--case=rms_norm 1",
    ]


def test_a_revision_that_cannot_run(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "benchmarks" / "__main__.py").write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match="kernels on old ended with exit status 2 and wrote nothing$"):
        compare.measure_revisions("old", "new", root=repository)
    assert worktrees(repository) == 1


def test_a_revision_that_does_not_import_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "ROOT", repository)
    (repository / "benchmarks" / "__main__.py").write_text("import no_such_module")
    assert command("old", "new") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("wrote nothing: ModuleNotFoundError: No module named 'no_such_module'")


def test_files_that_do_not_stay_are_not_named(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    says = 'print("rms_norm 1")\nprint("Written: /tmp/x")\nprint("With pictures: python -m benchmarks report /tmp")\n'
    (repository / "benchmarks" / "__main__.py").write_text(HARNESS + says)
    compare.measure_revisions("old", "old", root=repository)
    assert capfd.readouterr() == ("", "rms_norm 1\n" * 4)


SLOW = """
import time
time.sleep(60)
"""


def test_quick_ends_whatever_it_finds(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "ROOT", repository)
    monkeypatch.setattr(compare, "QUICK_TOTAL", 4)
    monkeypatch.setattr(compare, "SHORTEST", 1)
    main_file = repository / "benchmarks" / "__main__.py"
    began = time.monotonic()
    main_file.write_text(HARNESS + SLOW)  # what is written by then counts
    assert command("old", "new", "--quick") == 1  # by more than two files of the same sources differ
    assert time.monotonic() - began < 10
    assert "1 slower" in capsys.readouterr().out
    main_file.write_text(SLOW)
    assert command("old", "new", "--quick") == 2
    assert "old: no turn of it measured anything in the time that there is" in capsys.readouterr().err
    assert time.monotonic() - began < 20 and worktrees(repository) == 1


@pytest.mark.parametrize(("change", "word"), [(1.12, "unconfirmed"), (1.3, "slower")])
def test_few_turns_tell_large_differences_only(change: float, word: str) -> None:
    one = made_up_runs.run("kernels", [made_up_runs.row("rms_norm 1", "ours", 100, 120)])
    other = faster(one, 1 / change)
    for count in (1, 2, 3):
        (found,) = compare.compare_runs(compare.joined([one] * count), compare.joined([other] * count))
        assert found.word == word and found.regression == (word == "slower"), count
    (found,) = compare.compare_runs(compare.joined([one] * 4), compare.joined([other] * 4))
    assert found.word == "slower"  # all of eight turns in order: once in 35 times by chance


def test_joins_turns() -> None:
    first, second = made_up_runs.kernels(), faster(made_up_runs.kernels(), 1.1)
    lost = second["rows"][1]
    lost.update(status="failed", reason="wrong", gpu_us=None, wall_us=None)
    found = compare.joined([first, second])
    runs.validate(found)
    one, two, both = (run["rows"][0]["gpu_us"] for run in (first, second, found))
    for name in ("median", "p20", "p80"):
        assert both[name] == pytest.approx((one[name] + two[name]) / 2)
    assert both["turns"] == [one["median"], two["median"]]
    assert found["rows"][1] == lost and len(found["rows"]) == len(first["rows"])


def test_turns_joined_leave_out_those_whose_time_was_up() -> None:
    first, second = made_up_runs.kernels(), made_up_runs.kernels()
    timed = second["rows"][0]
    names = timed["case"], timed["contestant"], timed["pass"]
    first["rows"][0] = runs.row(*names, "not measured", reason="the budget is spent")
    found = compare.joined([first, second])["rows"][0]
    assert found["gpu_us"] == timed["gpu_us"] | {"turns": [timed["gpu_us"]["median"]]} and found["status"] == "ok"
    assert compare.joined([first | {"rows": []}, second])["rows"][0] == found  # a turn that was ended
    second["rows"][0] = first["rows"][0]
    assert compare.joined([first, second])["rows"][0] == first["rows"][0]
