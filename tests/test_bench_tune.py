"""benchmarks.tune, with made-up kernels and times; tests/interpreter has the launches themselves."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.runs import RunError
from hdit_kernels.neighborhood_attention import triton_configs_hopper
from hdit_kernels.neighborhood_attention.triton_configs import Config
from tests import made_up_runs
from tests.made_up_runs import stats

ENTRY = tune.Entry("forward", 16, 64, 9)
PRESENT, ONE, TWO = tune.candidates(*ENTRY)[:3]
RIGHT = torch.tensor([1.0, -2.0])


def prepare(entry: tune.Entry, configs: Sequence[Config], results: Mapping[Config, Any] | None = None) -> Any:
    """Calls that give RIGHT, or what results say; an exception is raised."""

    def call(config: Config) -> Sequence[Tensor]:
        result = (results or {}).get(config, RIGHT)
        if isinstance(result, Exception):
            raise result
        return (result,)

    return {config: functools.partial(call, config) for config in configs}


def stopwatch(*times: Mapping[Config, Any]) -> Callable[[Any], Any]:
    """Times (medians, or their Stats) by configuration, the last ones from then on; 100 µs for any other."""
    seen: dict[Config, int] = {}

    def measure(call: Any) -> Any:
        (config,) = call.args
        turn = min(seen.get(config, 0), len(times) - 1)
        seen[config] = turn + 1
        found = times[turn].get(config, 100)
        return found if isinstance(found, dict) else stats(found)

    return measure


def measured(*times: Mapping[Config, Any], results: Mapping[Config, Any] | None = None) -> tune.Row:
    row = tune.measure_entry(ENTRY, functools.partial(prepare, results=results), stopwatch(*times))
    json.dumps(row, allow_nan=False)
    return row


def chosen(*times: Mapping[Config, Any], results: Mapping[Config, Any] | None = None) -> Config:
    return Config(*measured(*times, results=results)["chosen"])


# Candidates


@pytest.mark.parametrize("entry", tune.all_entries(), ids=lambda entry: entry.name)
def test_candidates_are_few_differ_and_fit(entry: tune.Entry) -> None:
    found = tune.candidates(*entry)
    assert found[0] == entry.present and len(set(found)) == len(found) and 5 <= len(found) <= 30
    assert all(tune.shared_bytes(entry, config) <= 227 * 1024 for config in found)
    least = min(config.products((entry.window, entry.window)) for config in found)
    assert all(config.products((entry.window, entry.window)) <= 1.25 * least for config in found[1:])


def test_entries_are_chosen_by_name() -> None:
    every = tune.all_entries()
    assert len(every) == 60 and ENTRY.name == "forward bfloat16 head_dim 64 window 9"
    assert tune.select_entries([]) == every
    assert tune.select_entries([ENTRY.name]) == [ENTRY]
    assert {entry.kernel for entry in tune.select_entries(["dq*128*", "dkdv*128*"])} == {"dq", "dkdv"}
    with pytest.raises(RunError, match="no entry matches 'window 8'; one of them is 'forward bfloat16"):
        tune.select_entries([ENTRY.name, "window 8"])


# Choosing


def test_the_fastest_is_taken() -> None:
    assert chosen({ONE: 90, TWO: 80}) == TWO
    row = measured({ONE: 80, TWO: 90})
    assert row["chosen"] == list(ONE) and row["present"] == list(PRESENT)
    assert [trial["config"] for trial in row["trials"]] == [list(config) for config in tune.candidates(*ENTRY)]
    assert {name: found["median"] for name, found in row["again"].items()} == {"present": 100, "best": 80}


@pytest.mark.parametrize(
    "times",
    [
        {},
        {ONE: 120},
        {ONE: stats(90, 0.15), PRESENT: stats(100, 0.15)},  # the intervals overlap
        {ONE: stats(99.5, 0.001), PRESENT: stats(100, 0.001)},  # apart, but by less than what is called a difference
    ],
)
def test_the_present_one_stays_within_the_spread(times: dict[Config, Any]) -> None:
    row = measured(times)
    assert row["chosen"] == row["present"] and "again" not in row


def test_what_is_faster_once_only_is_not_taken() -> None:
    cold = {PRESENT: 120, ONE: 100}  # the present one is timed first, on a GPU that isn't warm yet
    row = measured(cold, {})
    assert row["chosen"] == row["present"] and row["again"]["present"]["median"] == 100


@pytest.mark.parametrize(
    ("result", "status", "reason"),
    [
        (RuntimeError("out of resource:\nshared memory"), "failed", "RuntimeError: out of resource: shared memory"),
        (RIGHT * 1.1, "wrong", "off by 1.0e-01 of the largest, allowed 2e-02"),
        (torch.tensor([1.0, math.nan]), "wrong", "off by nan of the largest, allowed 2e-02"),
    ],
)
def test_what_fails_or_is_wrong_is_said_and_skipped(
    result: Any, status: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = measured({ONE: 50, TWO: 80}, results={ONE: result})
    trial = row["trials"][1]
    assert (trial["status"], trial["reason"], trial["gpu_us"]) == (status, reason, None)
    assert row["chosen"] == list(TWO)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(row["trials"])
    assert lines[0] == (
        "forward bfloat16 head_dim 64 window 9 · tile 8x8, block 4x16, 4 warps, 3 stages, 128 registers (present): "
        "100.0 µs [99.0, 101.0]"
    )
    assert lines[1].endswith(f": {status}: {reason}")


def test_roundings_are_not_wrong() -> None:
    assert chosen({ONE: 50}, results={ONE: RIGHT * (1 + 2**-8)}) == ONE


# The whole of it


def test_the_budget_leaves_entries_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    entries, written = tune.all_entries()[1:4], []

    def write(rows: Sequence[tune.Row]) -> None:
        written.append(len(rows))
        if len(rows) == 2:
            monkeypatched.setattr(time, "monotonic", lambda: math.inf)

    with pytest.MonkeyPatch.context() as monkeypatched:
        rows = tune.tune(entries, prepare, stopwatch({ONE: 80}), time.monotonic() + 1000, write)
    assert written == [1, 2] and [tune.Entry(**row["entry"]) for row in rows] == entries[:2]
    assert f"1 entries are not measured, from {entries[2].name} on" in capsys.readouterr().out
    tables = tune.updated(rows)
    assert tables["forward"][16, 64][9] == tuple(ONE) != triton_configs_hopper.FORWARD[16, 64][9]
    tables["forward"][16, 64][9] = tuple(PRESENT)
    assert tables == tune.TABLES


def loaded(path: Path) -> dict[str, Any]:
    """The tables of a module, by kernel."""
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {kernel: getattr(module, kernel.upper()) for kernel in tune.TABLES}


def test_the_module_gives_back_what_was_chosen(tmp_path: Path) -> None:
    rows = [measured({ONE: 80})]
    history = tune.last_run(made_up_runs.ENVIRONMENT | {"date": "2026-11-23"}, rows)
    path = tmp_path / "configs.py"
    path.write_text(tune.source(tune.updated(rows), history), encoding="utf-8")
    assert loaded(path) == tune.updated(rows) != tune.TABLES
    assert history in " ".join(path.read_text(encoding="utf-8").split())
    assert history == (
        "Last run: Made-up GPU, torch 2.11.0+cu130, triton 3.6.0, cuda 13.0, driver 580.1, 2026-11-23: "
        "1 of 60 entries measured, 1 changed."
    )


def test_the_package_s_module_is_as_it_would_be_written() -> None:
    text = Path(triton_configs_hopper.__file__).read_text(encoding="utf-8")
    assert text.partition("FORWARD")[2] == tune.source(tune.TABLES, "").partition("FORWARD")[2]


def test_the_command_writes_module_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "hopper_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "prepare", lambda entry, configs, device: prepare(entry, configs))
    monkeypatch.setattr(tune.timing, "queued_time", lambda call, device: FakeStats(stopwatch({ONE: 80})(call)))
    module, log = tmp_path / "new" / "configs.py", tmp_path / "log.json"
    assert main(["tune", "--case", "head_dim 64 window 9", "--output", str(module), "--log", str(log)]) == 0
    data = json.loads(log.read_text())
    assert set(data) == {"environment", "sources", "command", "entries"} and len(data["entries"]) == 6
    assert loaded(module) == tune.updated(data["entries"])
    said = capsys.readouterr().out
    assert "changed: forward bfloat16 head_dim 64 window 9: tile 8x8, block 4x16" in said
    assert "6 of 60 entries measured" in said and f"Written: {module}\nWritten: {log}" in said


class FakeStats(dict):
    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@pytest.mark.parametrize("found", ["no GPU", "another"])
def test_without_its_gpu_nothing_is_done(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if found == "another":
        pytest.importorskip("triton")
        monkeypatch.setattr("benchmarks.api.device", lambda: torch.device("cpu"))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: found)
    monkeypatch.setattr("torch.cuda.is_available", lambda: found == "another")
    assert main(["tune", "--output", str(tmp_path / "configs.py"), "--log", str(tmp_path / "log.json")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"python -m benchmarks: tune needs a Hopper GPU (H100, H200), whose table it writes; torch finds {found} here\n"
    )
    assert not list(tmp_path.iterdir())
