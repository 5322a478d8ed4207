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

from benchmarks import __main__, results, runs

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
    return run.data


def test_valid_rows_pass() -> None:
    others = [row(status, contestant=status) for status in runs.STATUSES]
    measured = row(gpu_us=TIME, host_us=TIME, first_call_s=0.5, bytes=1, flops=0, floor_us=1.0, ratio_to_floor=10.0)
    runs.validate(data(measured | {"case": "another"}, *others))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda d: d.pop("clocks"), "clocks"),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.update(kind="speed"), "speed"),
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
    named = [*runs.HEADER, *runs.FIELDS, *runs.STATS, *runs.KINDS, *runs.PASSES, *runs.STATUSES, *runs.SAME]
    assert [name for name in named if f"`{name}`" not in text] == []
    assert f"schema {runs.SCHEMA}" in text
    optional = [line.split("`")[1] for line in text.splitlines() if ", optional |" in line]
    assert optional == ["continued", *runs.OPTIONAL]


def test_a_run_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    run = runs.Run.open(path, "kernels", ["first"])
    run.put(row(), row("failed", contestant="other"), row("not measured", contestant="third"))
    run.save()
    again = runs.Run.open(path, "kernels", ["second"])
    assert again.data["command"] == ["first"]
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


@pytest.mark.parametrize("what", ["sources", "measures", "device", "torch", "kind"])
def test_another_run_is_not_taken_up(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    run = runs.Run.open(path, "kernels", [])
    run.save()
    before = path.read_bytes()
    if what == "sources":
        monkeypatch.setattr(results, "source_hash", lambda: "f" * 64)
    elif what == "measures":
        monkeypatch.setattr(results, "measuring_hash", lambda: "f" * 64)
    elif what != "kind":
        changed = results.environment() | {what: "another"}
        monkeypatch.setattr(results, "environment", lambda: changed)
    with pytest.raises(runs.RunError, match=f"choose another --output.*{what}"):
        runs.Run.open(path, "model" if what == "kind" else "kernels", [])
    assert path.read_bytes() == before


def test_a_run_from_before_the_hash_of_what_measures_is_taken_up(tmp_path: Path) -> None:
    run = runs.Run.open(tmp_path / "run.json", "kernels", [])
    del run.data["measuring_sha256"]
    run.save()
    assert "measuring_sha256" not in runs.Run.open(tmp_path / "run.json", "kernels", []).data


def test_what_measures_is_hashed(tmp_path: Path) -> None:
    names = {path.relative_to(results.ROOT / "benchmarks").as_posix() for path in results.measuring_files()}
    assert {"timing.py", "networks.py", "model.py", "scaling.py", "peers/dit.py", "kernels/norms.py"} <= names
    assert not names & {"report.py", "plots.py", "compare.py", "test_kernels.py"}
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    found = {results.measuring_hash(tmp_path)}
    for name in ("timing.py", "report.py", "peers/dit.py"):
        (tmp_path / "benchmarks" / name).write_text("x = 1")
        found.add(results.measuring_hash(tmp_path))
    assert len(found) == 3


def test_another_day_and_commit_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    runs.Run.open(path, "kernels", []).save()
    changed = results.environment() | {"date": "2001-01-01", "commit": "0" * 40}
    monkeypatch.setattr(results, "environment", lambda: changed)
    assert runs.Run.open(path, "kernels", []).data["environment"]["date"] != "2001-01-01"


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
    with pytest.raises(ValueError, match="environment: .*'date'.* missing"):
        runs.validate(data() | {"environment": {}})
    with pytest.raises(ValueError, match="environment: peers is None"):
        runs.validate(data() | {"environment": results.environment() | {"peers": None}})


def test_merge_takes_the_later_measurement() -> None:
    first = data(row(), row("not measured", contestant="b"), row("failed", contestant="c"))
    second = data(row("not measured"), row(contestant="b"), row(contestant="c"), row("unavailable", contestant="d"))
    merged = runs.merge(first, second)
    assert [(r["contestant"], r["status"]) for r in merged["rows"]] == [
        ("ours", "ok"),
        ("b", "ok"),
        ("c", "ok"),
        ("d", "unavailable"),
    ]
    runs.validate(merged)
    assert len(first["rows"]) == 3  # as it was


def test_later_sessions_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run = runs.Run.open(path, "kernels", ["first"])
    assert run.session is run.data
    run.session["ceilings"] = {"copy_tb_s": 1.0}
    run.put(row())
    run.save()
    idle = runs.Run.open(path, "kernels", ["idle"])  # times nothing, so it is not told of
    idle.put(row("not measured", contestant="b"))
    idle.save()
    assert "continued" not in runs.read(path)
    again = runs.Run.open(path, "kernels", ["second"])
    again.session |= {"ceilings": {"copy_tb_s": 2.0}, "gpu_uuid": "another card"}
    again.put(row(contestant="b"), row(contestant="c"))
    again.session["clocks"] |= {"sm_mhz_end": 1980}
    again.save()
    data = runs.read(path)
    first, second = runs.sessions(data)
    assert first["command"] == ["first"] and first["ceilings"] == data["ceilings"] == {"copy_tb_s": 1.0}
    assert second["command"] == ["second"] and second["ceilings"] == {"copy_tb_s": 2.0}
    assert first["gpu_uuid"] == data["environment"]["gpu_uuid"] and second["gpu_uuid"] == "another card"
    assert second["date"] == data["environment"]["date"] and second["clocks"]["sm_mhz_end"] == 1980
    with pytest.raises(ValueError, match=r"continued 0: \['commit'\] missing"):
        runs.validate(data | {"continued": [{n: value for n, value in second.items() if n != "commit"}]})


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, contestant in zip(paths, ("a", "b"), strict=False):
        runs.Run(data(row(contestant=contestant)) | {"command": [contestant]}, path).save()
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", str(paths[2])]) == 0
    merged = runs.read(paths[2])
    assert [found["contestant"] for found in merged["rows"]] == ["a", "b"]
    assert [session["command"] for session in runs.sessions(merged)] == [["a"], ["b"]]
    assert "2 rows of 2 files" in capsys.readouterr().out
    assert runs.merge(merged, runs.read(paths[1])) == merged  # nothing is told of twice
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", str(paths[2])]) == 2
    assert "c.json exists, expected a new file" in capsys.readouterr().err
    new = str(tmp_path / "new.json")
    assert __main__.main(["merge", str(paths[0]), "--output", new]) == 2
    assert "expected two run files or more, got 1" in capsys.readouterr().err
    other = data(row()) | {"source_sha256": "e" * 64}
    runs.Run(other, paths[1]).save()
    assert __main__.main(["merge", str(paths[0]), str(paths[1]), "--output", new]) == 2
    assert "can't be merged: sources" in capsys.readouterr().err
    assert runs.read(paths[2]) == merged  # as it was


@pytest.mark.parametrize("name", ["device", "torch", "driver"])
def test_merge_refuses_what_differs(name: str) -> None:
    first, second = data(row()), data(row(contestant="b"))
    second["environment"] = second["environment"] | {name: "another"}
    with pytest.raises(runs.RunError, match=f"can't be merged: {name} .* and another"):
        runs.merge(first, second)
    second["environment"] = first["environment"]
    second["source_sha256"] = "e" * 64
    with pytest.raises(runs.RunError, match="sources .* and eeeeeeeeeeee"):
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
