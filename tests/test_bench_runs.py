"""benchmarks.runs and SCHEMA.md: what a run file holds, how it is taken up, merged and refused."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__, results, runs, sources

TIME = {"median": 10.0, "p20": 9.5, "p80": 11.0, "repeats": 20}


def row(status: str = "ok", **changes: Any) -> runs.Row:
    found = runs.row("geglu 8x2x4 float32", "ours", "forward", status, family="geglu", operator="geglu")
    if status == "ok":
        found |= {"wall_us": TIME}
    else:
        found |= {"reason": "it did"}
    return found | changes


def data(*rows: runs.Row) -> dict[str, Any]:
    run = runs.Run.open(None, "kernels", ["python", "-m", "benchmarks", "kernels"])
    run.put(*rows)
    return run.own


def test_valid_rows_pass() -> None:
    others = [row(status, contestant=status) for status in runs.STATUSES]
    measured = row(gpu_us=TIME, host_us=TIME, first_call_s=0.5, bytes=1, flops=0, floor_us=1.0, ratio_to_floor=10.0)
    runs.validate(data(measured | {"case": "another"}, *others))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda d: d["sessions"][0].pop("clocks"), r"session 0: \['clocks'\] missing"),
        (lambda d: d.update(schema=1), "schema 1"),
        (lambda d: d.pop("rows"), r"the run: \['rows'\] missing"),
        (lambda d: d["rows"][0].update(kind="speed"), "speed"),
        (lambda d: d["rows"][0].update(session=1), "there is no session 1"),
        (lambda d: d["rows"].append(d["rows"][0]), "two rows"),
        (lambda d: d["rows"][0].pop("error"), "error"),
        (lambda d: d["rows"][0].update(surprise=1), "surprise"),
        (lambda d: d["rows"][0].update({"pass": "sideways"}), "sideways"),
        (lambda d: d["rows"][0].update(status="fine"), "fine"),
        (lambda d: d["rows"][0].update(bytes=1.5), "bytes"),
        (lambda d: d["rows"][0].update(error=True), "error"),
        (lambda d: d["rows"][0].update(status="failed", reason="wrong"), "a time, though"),
        (lambda d: d["rows"][0].update(status="failed", wall_us=None), "without a reason"),
        (lambda d: d["rows"][0].update(wall_us=None), "no time, though its status is 'ok'"),
        (lambda d: d["rows"][0]["wall_us"].pop("p80"), "p80"),
    ],
)
def test_what_is_wrong_is_named(wrong: Callable[[dict[str, Any]], Any], words: str) -> None:
    found = json.loads(json.dumps(data(row())))
    wrong(found)
    with pytest.raises(ValueError, match=words):
        runs.validate(found)


def test_schema_names_every_field() -> None:
    text = (Path(runs.__file__).parent / "SCHEMA.md").read_text(encoding="utf-8")
    named = [*runs.HEADER, *runs.SESSION, *runs.FIELDS, *runs.STATS, *runs.KINDS, *runs.PASSES, *runs.STATUSES]
    named += [*runs.SAME, *sources.ENTRIES.keys() - sources.OPERATORS]
    assert [name for name in named if f"`{name}`" not in text] == []
    assert f"schema {runs.SCHEMA}" in text
    optional = [line.split("`")[1] for line in text.splitlines() if ", optional |" in line]
    assert optional == ["gpu_tests", *runs.OPTIONAL, "samples"]


def test_a_run_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    run = runs.Run.open(path, "kernels", ["first"])
    run.put(row(), row("failed", contestant="other"), row("not measured", contestant="third"))
    run.save()
    again = runs.Run.open(path, "kernels", ["second"])
    where = ("geglu 8x2x4 float32", "forward")
    done = {name: again.done(where[0], name, where[1]) for name in ("ours", "other", "third", "fourth")}
    assert done == {"ours": True, "other": True, "third": False, "fourth": False}
    again.put(row(contestant="third"))
    again.save()
    found = runs.read(path)
    assert [(r["contestant"], r["status"]) for r in found["rows"]] == [
        ("ours", "ok"),
        ("other", "failed"),
        ("third", "ok"),
    ]
    first, second = found["sessions"]
    assert first["command"] == ["first"] and second["command"] == ["second"]
    assert [r["session"] for r in found["rows"]] == [0, 0, 1]


@pytest.mark.parametrize("what", ["device", "torch"])
def test_another_machine_s_run_is_not_taken_up(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    run = runs.Run.open(path, "kernels", [])
    run.save()
    before = path.read_bytes()
    changed = results.environment() | {what: "another"}
    monkeypatch.setattr(results, "environment", lambda: changed)
    with pytest.raises(runs.RunError, match=f"choose another file.*{what}"):
        runs.Run.open(path, "kernels", [])
    assert path.read_bytes() == before


def network(direction: str) -> runs.Row:
    return row(family="model", operator="flowers-256", case="flowers-256 batch 1", **{"pass": direction})


ROWS = {"geglu": row(), "network": network("forward"), "training step": network("step")}


@pytest.mark.parametrize("what", ["geglu", "na2d", "network", "training step", "what measures"])
def test_what_has_changed_since_is_measured_again(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    run = runs.Run.open(path, "kernels", [])
    run.put(*ROWS.values())
    run.save()
    if what == "what measures":
        monkeypatch.setattr(results, "measuring_hash", lambda: "another")
    else:
        changed = sources.present() | {what: "another"}
        monkeypatch.setattr(sources, "present", lambda: changed)
    again = runs.Run.open(path, "kernels", [])
    kept = [name for name, found in ROWS.items() if again.done(*runs.key(found))]
    assert kept == [name for name in ROWS if what not in (name, "what measures")]


def test_a_session_of_which_nothing_is_left_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for command in ("first", "second", "third"):
        run = runs.Run.open(path, "kernels", [command])
        run.put(row(), *([row(contestant="b")] if command == "second" else []))
        run.save()
    found = runs.read(path)
    assert [session["command"] for session in found["sessions"]] == [["second"], ["third"]]
    assert [(r["contestant"], r["session"]) for r in found["rows"]] == [("ours", 1), ("b", 0)]


def test_one_file_holds_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    for kind, found in (("kernels", row()), ("train", network("step"))):
        run = runs.Run.open(path, kind, [kind])
        run.put(found)
        run.save()
        assert [r["kind"] for r in run.own["rows"]] == [kind] and len(run.own["sessions"]) == 1
    assert [r["kind"] for r in runs.read(path)["rows"]] == ["kernels", "train"]


def test_numbers_are_kept_to_six_digits() -> None:
    (found,) = data(row(wall_us=TIME | {"median": 100 / 3}, floor_us=2e9 / 3, bytes=123456789))["rows"]
    assert (found["wall_us"]["median"], found["floor_us"], found["bytes"]) == (33.3333, 666667000.0, 123456789)


def test_gpu_tests_are_kept_beside_rows(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    for command in ("first", "second"):
        run = runs.Run.open(path, "kernels", [command])
        run.put_tests({"tests": {"passed": 1}, "operators": {}})
        run.save()
    run = runs.Run.open(path, "kernels", ["third"])
    run.put(row())
    run.save()
    found = runs.read(path)
    assert found["gpu_tests"] == {"session": 0, "tests": {"passed": 1}, "operators": {}}
    assert [session["command"] for session in found["sessions"]] == [["second"], ["third"]]
    old = {"schema": 1, "kind": "kernels", "environment": {}, "rows": []}
    with pytest.raises(ValueError, match="^schema 1, expected 2$"):
        runs.validate(old)
    with pytest.raises(ValueError, match="gpu_tests: there is no session 2"):
        runs.validate(found | {"gpu_tests": {"session": 2}})


def test_samples_are_kept_of_the_time_that_counts() -> None:
    times = {name: TIME | {"samples": [1.0]} for name in runs.TIMES}
    on_gpu, on_cpu = data(row(**times), row(**times | {"gpu_us": None}, contestant="b"))["rows"]
    assert "samples" in on_gpu["gpu_us"] and "samples" not in {*on_gpu["wall_us"], *on_gpu["host_us"]}
    assert "samples" in on_cpu["wall_us"] and "samples" not in on_cpu["host_us"]


def test_what_measures_is_hashed() -> None:
    names = {path.relative_to(results.ROOT).as_posix() for path in results.measuring_files()}
    own = ("captured", "timing", "networks", "model", "scaling", "peers/dit", "kernels/norms")
    assert {"hdit_kernels/testing.py", *(f"benchmarks/{name}.py" for name in own)} <= names
    assert not names & {f"benchmarks/{name}.py" for name in ("report", "plots", "compare", "test_kernels")}


def test_another_day_and_commit_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    runs.Run.open(path, "kernels", []).save()
    changed = results.origin() | {"date": "2001-01-01", "commit": "0" * 40}
    monkeypatch.setattr(results, "origin", lambda: changed)
    assert runs.Run.open(path, "kernels", []).session["date"] == "2001-01-01"


def test_a_peer_may_come_later_but_not_in_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    here = results.environment()
    for peers, wanted in (
        ({"natten": "0.21.7"}, {"natten": "0.21.7"}),
        ({"liger-kernel": "0.8"}, {"natten": "0.21.7", "liger-kernel": "0.8"}),
    ):
        found = here | {"peers": peers}
        monkeypatch.setattr(results, "environment", lambda found=found: found)
        run = runs.Run.open(path, "kernels", [])
        run.save()
        assert run.data["environment"]["peers"] == wanted
    monkeypatch.setattr(results, "environment", lambda: here | {"peers": {"natten": "0.30"}})
    with pytest.raises(runs.RunError, match="natten 0.21.7 and 0.30"):
        runs.Run.open(path, "kernels", [])


def test_a_wrong_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="environment: .*'device'.* missing"):
        runs.validate(data() | {"environment": {}})
    with pytest.raises(ValueError, match="environment: peers is None"):
        runs.validate(data() | {"environment": results.environment() | {"peers": None}})


def test_merge_takes_the_later_measurement() -> None:
    first = data(row(), row("not measured", contestant="b"), row("failed", contestant="c"))
    second = data(row("not measured"), row(contestant="b"), row(contestant="c"), row("unavailable", contestant="d"))
    second["sessions"][0]["command"] = ["another"]
    merged = runs.merge(first, second)
    assert [(r["contestant"], r["status"]) for r in merged["rows"]] == [
        ("ours", "ok"),
        ("b", "ok"),
        ("c", "ok"),
        ("d", "unavailable"),
    ]
    runs.validate(merged)
    assert len(first["rows"]) == 3 and len(first["sessions"]) == 1  # as it was
    assert [r["session"] for r in merged["rows"]] == [0, 1, 1, 1]
    tested = second | {"gpu_tests": {"session": 0, "tests": {"passed": 1}}}
    assert runs.merge(first, tested)["gpu_tests"]["session"] == 1


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, contestant in zip(paths, ("a", "b"), strict=False):
        made = data(row(contestant=contestant))
        made["sessions"][0]["command"] = [contestant]
        runs.write(made, path)
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", str(paths[2])]) == 0
    merged = runs.read(paths[2])
    assert [found["contestant"] for found in merged["rows"]] == ["a", "b"]
    assert [session["command"] for session in merged["sessions"]] == [["a"], ["b"]]
    assert "2 rows of 2 files" in capsys.readouterr().out
    assert runs.merge(merged, runs.read(paths[1])) == merged  # nothing is told of twice
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", str(paths[2])]) == 2
    assert "c.json exists, expected a new file" in capsys.readouterr().err
    new = str(tmp_path / "new.json")
    assert __main__.main(["merge", str(paths[0]), "--output", new]) == 2
    assert "expected two run files or more, got 1" in capsys.readouterr().err
    runs.write(merged | {"environment": merged["environment"] | {"torch": "another"}}, paths[1])
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", new]) == 2
    assert "can't be merged: torch" in capsys.readouterr().err
    assert runs.read(paths[2]) == merged  # as it was


@pytest.mark.parametrize("name", ["device", "torch", "driver"])
def test_merge_refuses_what_differs(name: str) -> None:
    first, second = data(row()), data(row(contestant="b"))
    second["environment"] = second["environment"] | {name: "another"}
    with pytest.raises(runs.RunError, match=f"can't be merged: {name} .* and another"):
        runs.merge(first, second)


def test_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    for name in ("broken.json", "other.json", "missing.json"):
        with pytest.raises(runs.RunError, match=name):
            runs.read(tmp_path / name)
    for path in (tmp_path, tmp_path / "broken.json" / "below.json"):
        with pytest.raises(runs.RunError, match="can't write"):
            runs.Run.open(path, "kernels", [])


def test_nothing_invalid_is_written(tmp_path: Path) -> None:
    run = runs.Run.open(tmp_path / "run.json", "kernels", [])
    run.put(row(status="failed", wall_us=TIME))
    with pytest.raises(ValueError, match="a time, though"):
        run.save()
    assert not (tmp_path / "run.json").exists()


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(runs.RunError, match="it is neither a file nor a new one"):
            runs.check_writable(path)
    with pytest.raises(runs.RunError, match="can't write .*pipe"):
        runs.Run.open(tmp_path / "pipe", "kernels", [])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_csv_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match="can't write .*run.csv: "):
        runs.write_csv(data(row()), tmp_path / "file" / "run.csv")


def test_csv_has_a_line_for_each_row(tmp_path: Path) -> None:
    runs.write_csv(data(row(settings={"rows": 8}), row("failed", contestant="b")), tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["wall_us_median"], first["wall_us_repeats"], first["gpu_us_median"]) == ("10.0", "20", "")
    assert json.loads(first["settings"]) == {"rows": 8}
    assert (second["contestant"], second["status"], second["wall_us_median"]) == ("b", "failed", "")
