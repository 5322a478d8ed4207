"""`python -m benchmarks kernels` and benchmarks.api on a CPU, with contestants made up to go wrong in every way."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__, api, ceilings, command, measure, networks, results, runs, sources, test_models, timing
from benchmarks.kernels import FAMILIES, PASSES, Case, all_cases
from benchmarks.kernels.geglu import geglu
from benchmarks.kernels.neighborhood_attention import na2d
from benchmarks.kernels.norms import rms_norm
from benchmarks.networks import Check
from benchmarks.peers import Contestant, Implementation, Peer, Unsupported, _available, case_contestants, compiled
from hdit_kernels import reference
from tests.tiny import CONFIG

ROOT = Path(__file__).resolve().parent.parent
RATES = {"copy_tb_s": 0.01, "copy_way": "made up", "matmul_bf16_tflop_s": 0.1, "matmul_fp32_tflop_s": 0.1}
HERE = Peer("here", None, "nothing to install")
ENVIRONMENT = results.environment() | {"device_type": "cpu"}
FAST = timing.Effort(width=1.0, fewest=3, most=3)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU, ceilings and environment at no cost, three samples a time."""
    monkeypatch.setattr(results, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, on_step: dict(RATES))
    monkeypatch.setattr(api, "Session", lambda *args, **kwargs: measure.Session(*args, **kwargs, gpu=FAST, wall=FAST))
    _available.cache_clear()
    yield
    _available.cache_clear()


def case() -> Case:
    return geglu(64, 8, "float32", full_size=False)


def contestant(name: str, function: Callable[..., Tensor] = reference.geglu, **fields: Any) -> Contestant:
    return Contestant(name, HERE, {"geglu": lambda case: Implementation(function, **fields)})


def raising(error: Exception) -> Callable[..., Tensor]:
    def function(x: Tensor) -> Tensor:
        raise error

    return function


def run(*contestants: Contestant, cases: tuple[Case, ...] = (), **options: Any) -> dict[tuple[str, str], runs.Row]:
    """Rows by contestant and pass."""
    data = api.run_cases(cases or [case()], contestants, **options)
    runs.validate(data)
    return {(row["contestant"], row["pass"]): row for row in data["rows"]}


def statuses(rows: dict[tuple[str, str], runs.Row], name: str) -> list[str]:
    return [rows[name, direction]["status"] for direction in PASSES]


# What is recorded


def test_a_right_contestant_is_timed() -> None:
    rows = run(contestant("right", detail="in its way"))
    assert statuses(rows, "right") == ["ok"] * 3
    for direction in PASSES:
        row = rows["right", direction]
        assert row["wall_us"]["median"] > 0 and row["wall_us"]["repeats"] == 3
        assert row["host_us"]["median"] <= row["wall_us"]["median"]
        assert row["error"] <= row["allowed_error"] == 1e-5 and row["reason"] is None
        assert row["gpu_us"] is None and row["peak_bytes"] is None
        assert row["ratio_to_floor"] == pytest.approx(row["wall_us"]["median"] / row["floor_us"], rel=1e-5)
        assert row["detail"] == "in its way" and row["settings"] == {"rows": 64, "d_ff": 8, "dtype": "float32"}
    one = 64 * 8 * 4
    assert [rows["right", p]["bytes"] for p in PASSES] == [3 * one, 5 * one, 8 * one]
    assert rows["right", "forward"]["floor_us"] == pytest.approx(3 * one / 0.01e6)
    first = [rows["right", p]["first_call_s"] for p in PASSES]
    assert first[0] > 0 and first[1] is None and first[2] > 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: reference.geglu(x) * 1.001,
        lambda x: reference.geglu(x) * torch.where(torch.arange(x.shape[0]) == 3, torch.nan, 1.0)[:, None],
        lambda x: reference.geglu(x.flip(0)),
    ],
    ids=["a thousandth off", "NaN", "rows swapped"],
)
def test_a_wrong_result_has_no_time(function: Callable[[Tensor], Tensor]) -> None:
    rows = run(contestant("wrong", function), contestant("right"))
    assert statuses(rows, "wrong") == ["failed"] * 3 and statuses(rows, "right") == ["ok"] * 3
    for direction in PASSES:
        row = rows["wrong", direction]
        assert row["wall_us"] is None and row["gpu_us"] is None and row["reason"].startswith("out: error ")
        assert row["error"] is None or row["error"] > row["allowed_error"]


def test_a_wrong_gradient_leaves_the_forward_pass() -> None:
    def function(x: Tensor) -> Tensor:
        return reference.geglu(x + 0.001 * (x - x.detach()))

    rows = run(contestant("wrong", function))
    assert statuses(rows, "wrong") == ["ok", "failed", "failed"]
    assert rows["wrong", "backward"]["reason"].startswith("x.grad: error 1.0e-03, allowed 1.0e-05")


def test_wrong_without_autograd_only_is_wrong() -> None:
    def function(x: Tensor) -> Tensor:
        return reference.geglu(x) * (1.0 if torch.is_grad_enabled() else 1.01)

    assert statuses(run(contestant("wrong", function)), "wrong") == ["failed"] * 3


def test_what_raises_is_a_row_and_the_others_go_on() -> None:
    def unsupported(case: Case) -> Implementation:
        raise Unsupported("no such width")

    def no_backward(x: Tensor) -> Tensor:
        return reference.geglu(x).detach()

    rows = run(
        contestant("broken", raising(ValueError("two\nlines"))),
        contestant("large", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))),
        Contestant("other width", HERE, {"geglu": unsupported}),
        Contestant("missing", Peer("it", "no_such_package_of_hdit", "pip install it"), {"geglu": unsupported}),
        contestant("no backward", no_backward),
        contestant("right"),
    )
    found = {name: (statuses(rows, name), rows[name, "backward"]["reason"]) for name, _ in rows}
    assert found["broken"] == (["failed"] * 3, "ValueError: two lines")
    assert found["large"][0] == ["out of memory"] * 3 and "2 GiB" in found["large"][1]
    assert found["other width"] == (["unavailable"] * 3, "no such width")
    assert found["missing"] == (["unavailable"] * 3, "it is not installed: pip install it")
    assert found["no backward"][0] == ["failed"] * 3 and "grad" in found["no backward"][1]
    assert found["right"][0] == ["ok"] * 3


def test_a_lost_gpu_ends_the_run_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []

    def function(x: Tensor) -> Tensor:
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def synchronize(device: torch.device) -> None:
        if lost:
            raise RuntimeError("the context is gone")

    monkeypatch.setattr(timing, "synchronize", synchronize)
    path = tmp_path / "run.json"
    with pytest.raises(
        measure.DeviceLost, match="culprit: the GPU no longer answers: RuntimeError: the context is gone"
    ):
        api.run_cases([case()], [contestant("culprit", function)], output=path)
    rows = runs.read(path)["rows"]
    assert [row["status"] for row in rows] == ["failed"] * 3 and "illegal" in rows[0]["reason"]
    lost.clear()
    rows = api.run_cases([case()], [contestant("culprit", function), contestant("right")], output=path)["rows"]
    assert len(rows) == 6 and not lost, "the culprit was tried again"


def test_another_function_is_checked_against_itself(seed: int) -> None:
    def squares(x: Tensor) -> Tensor:
        return x.chunk(2, -1)[0] ** 2

    rows = run(contestant("as it says", squares, reference=squares), contestant("not", squares))
    assert statuses(rows, "as it says") == ["ok"] * 3 and statuses(rows, "not") == ["failed"] * 3


def test_checked_on_a_smaller_case() -> None:
    smaller = geglu(32, 8, "float32", full_size=False)
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(len(x))
        return reference.geglu(x) * (1.1 if len(x) == 32 else 1.0)

    rows = run(contestant("wrong there", function, check_on=smaller))
    assert statuses(rows, "wrong there") == ["failed"] * 3
    assert rows["wrong there", "forward"]["detail"] == f"checked on {smaller.name}"
    assert {32, 64} == set(seen) and seen[0] == 32


def test_large_cases_are_checked_on_a_smaller_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    big = na2d(1, 64, 48, 2, 16, 5, "float32", full_size=False)
    assert big.smaller(big.largest) is big
    small = big.smaller(big.largest - 1)
    assert small.name == "na2d 1x32x48x2x16 k5 float32" and small.smaller(1) is small
    monkeypatch.setattr(measure, "CHECKED", 1)
    entry = measure.Entry(big, case_contestants(big)[0])
    assert entry.checked.name == small.name and not entry.same


def test_nothing_holds_the_tensors_of_a_contestant_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Dynamo does with what it has compiled: in cycles, and until it is reset."""
    held: list[Any] = []
    seen: list[StorageWeakRef] = []
    monkeypatch.setattr(torch._dynamo, "reset", held.clear)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def function(x: Tensor, **others: Tensor) -> Tensor:
        cycle: list[Any] = [x]
        cycle.append(cycle)
        held.append(x)
        seen.append(StorageWeakRef(x.untyped_storage()))
        return reference.geglu(x, **others)

    gc.disable()
    try:
        assert statuses(run(contestant("holding", compiled.compile(function))), "holding") == ["ok"] * 3
    finally:
        gc.enable()
    assert seen and all(storage.expired() for storage in seen)


def test_the_tuned_variant_is_measured_and_named() -> None:
    def slow(x: Tensor) -> Tensor:
        raise AssertionError("not this one")

    tuned = Implementation(reference.geglu, detail="tile 8x8")
    rows = run(contestant("tuned", slow, tune=lambda own: tuned if own["x"].shape == (64, 16) else None))
    assert statuses(rows, "tuned") == ["ok"] * 3 and rows["tuned", "backward"]["detail"] == "tile 8x8"


def test_what_would_take_too_long_is_not_measured() -> None:
    rows = run(contestant("slow", raising(AssertionError("called")), work=10**12))
    assert statuses(rows, "slow") == ["not measured"] * 3
    assert rows["slow", "forward"]["reason"] == "at least 10.0 s a forward pass"


def test_quick_leaves_out_what_compiles() -> None:
    rows = run(
        contestant("compiler", raising(AssertionError("called")), compiles=True), contestant("right"), quick=True
    )
    assert statuses(rows, "compiler") == ["not measured"] * 3 and statuses(rows, "right") == ["ok"] * 3


def test_order_is_random() -> None:
    names = ["a", "b", "c", "d"]
    orders = set()
    for _ in range(6):
        rows = api.run_cases([case()], [contestant(name, work=10**12) for name in names])["rows"]
        orders.add(tuple(dict.fromkeys(row["contestant"] for row in rows)))
    assert len(orders) > 1 and all(sorted(order) == names for order in orders)


def test_inputs_are_drawn_anew_and_shared() -> None:
    seen: dict[str, list[float]] = {"a": [], "b": []}

    def looking(name: str) -> Contestant:
        def function(x: Tensor) -> Tensor:
            seen[name].append(x.sum().item())
            return reference.geglu(x)

        return contestant(name, function)

    run(looking("a"), looking("b"))
    assert set(seen["a"]) == set(seen["b"]) and len(set(seen["a"])) == 1
    run(looking("a"))
    assert len(set(seen["a"])) == 2


def test_clocks_are_read_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every session; again, and told, by each that timed something."""
    path, readings = tmp_path / "run.json", iter([1980, 1900, 1755, 1890, 1880, 1700])
    monkeypatch.setattr(ceilings, "clocks", lambda device: {"sm_mhz": next(readings), "memory_mhz": 1, "seen": "here"})
    api.run_cases([case()], [contestant("broken", raising(ValueError("no")))], output=path)
    for name in ("right", "right", "more"):  # in the second there is nothing left to measure
        api.run_cases([case()], [contestant(name)], output=path)
    found = [session["clocks"] for session in runs.read(path)["sessions"]]
    ends = [(1900, 1755), (1880, 1700)]
    timed = [{"sm_mhz": a, "memory_mhz": 1, "seen": "here", "sm_mhz_end": b, "memory_mhz_end": 1} for a, b in ends]
    assert found == [{"sm_mhz": 1980, "memory_mhz": 1, "seen": "here"}, *timed]
    assert next(readings, None) is None


# Budget, resuming, progress


def test_budget_ends_the_run_and_another_one_goes_on(tmp_path: Path) -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.05)
        return reference.geglu(x)

    path, rivals = tmp_path / "run.json", [contestant("a", slow), contestant("b", slow)]
    cases = [geglu(rows, 8, "float32", full_size=False) for rows in (8, 16, 32, 64)]
    began = time.monotonic()
    rows = api.run_cases(cases, rivals, output=path, budget_seconds=1)["rows"]
    assert time.monotonic() - began < 4
    counts = {status: sum(row["status"] == status for row in rows) for status in runs.STATUSES}
    assert counts["ok"] > 0 and counts["not measured"] > 0 and counts["ok"] + counts["not measured"] == len(rows) == 24
    late = next(row for row in rows[::-1] if row["status"] == "not measured")
    assert late["reason"] == "the budget is spent"
    kept = {runs.key(row): row["wall_us"] for row in rows if row["status"] == "ok"}
    lines: list[str] = []
    rows = api.run_cases(cases, [contestant("a"), contestant("b")], output=path, on_line=lines.append)["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 24
    assert all({runs.key(row): row["wall_us"] for row in rows}[name] == wall for name, wall in kept.items())
    assert lines[0] == f"{path} holds 24 rows: what is missing, or of other sources, is measured"


def test_the_file_is_whole_after_every_contestant(tmp_path: Path) -> None:
    path, counts = tmp_path / "run.json", []

    def look(line: str) -> None:
        if path.exists():
            counts.append(len(runs.read(path)["rows"]))

    api.run_cases([case()], [contestant("a"), contestant("b")], output=path, on_line=look)
    assert counts == [3, 3, 3, 6, 6, 6]
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_progress_lines() -> None:
    lines: list[str] = []
    twice = lambda x: reference.geglu(x + (x - x.detach()))  # noqa: E731
    rivals = [
        contestant("right", detail="its way"),
        contestant("twice", twice),
        contestant("broken", raising(ValueError("no"))),
    ]
    run(*rivals, on_line=lines.append)
    text = "\n".join(lines)
    assert "geglu 64x2x8 float32 · right · forward: wall " in text and ", its way" in text and "first call " in text
    assert "geglu 64x2x8 float32 · twice · backward: failed: x.grad: error 1.0e+00, allowed 1.0e-05" in text
    assert "geglu 64x2x8 float32 · broken: failed: ValueError: no" in text and text.count(" · broken") == 1
    assert api.duration(0.5) == "0.500 µs" and api.duration(123.4) == "123 µs" and api.duration(12345) == "12.3 ms"
    assert api.duration(1.25e6) == "1.25 s"


# The cases


def test_every_operator_has_cases_of_both_sizes() -> None:
    cases = all_cases()
    for full_size in (True, False):
        assert {c.operator for c in cases if c.full_size == full_size} == set(sources.OPERATORS)
    assert {c.family for c in cases} == set(FAMILIES) and len({c.name for c in cases}) == len(cases)
    for found in cases:
        again = found.build(**json.loads(json.dumps(found.settings)))
        assert (again.name, again.shapes, again.bytes) == (found.name, found.shapes, found.bytes)
        assert any(c.name == "ours" for c in case_contestants(found))


def test_cases_of_issue_4() -> None:
    table = "4,256,256,2,64,7 1,512,512,2,64,7 1,1024,1024,2,64,7 1,256,256,2,64,7 8,64,64,6,64,7 32,64,64,2,64,7"
    table += " 4,128,128,4,64,7 32,32,32,12,64,7 4,128,128,4,128,7 1,256,256,2,64,13"
    names = {found.name for found in all_cases()}
    for line in table.split():
        *shape, window = line.split(",")
        assert f"na2d {'x'.join(shape)} k{window} bfloat16" in names
    settings = [found.settings for found in all_cases() if found.operator == "na2d" and found.full_size]
    assert {3, 5, 9, 11} <= {s["kernel_size"] for s in settings} and {32, 96} <= {s["head_dim"] for s in settings}
    assert {"float16", "float32", "float32 tf32"} <= {s["dtype"] for s in settings}
    assert 2 in {s["dilation"] for s in settings} and (127, 251) in {(s["height"], s["width"]) for s in settings}


def test_floors_of_the_anchors() -> None:
    """Microseconds at 3.02 TB/s, forward and forward + backward."""
    rates = {"copy_tb_s": 3.02, "matmul_bf16_tflop_s": 751.0, "matmul_fp32_tflop_s": 50.0}
    by_name = {found.name: found for found in all_cases()}
    for label, forward, both in (
        ("4x256x256x2x64 k7", 88.9, 266.7),
        ("32x32x32x12x64 k7", 66.7, 200.0),
        ("1x1024x1024x2x64 k7", 355.5, 1066.6),
        ("1x256x256x2x64 k13", 22.2, 66.6),
    ):
        found = by_name[f"na2d {label} bfloat16"]
        for direction, floor in (("forward", forward), ("forward+backward", both)):
            counted = ceilings.floor_us(rates, found.bytes[direction], found.flops[direction], "bfloat16")
            assert counted == pytest.approx(floor, abs=0.1)


@pytest.mark.parametrize("operator", ["na2d", "neighborhood_self_attention", "token_merge", "token_split"])
def test_flops_are_those_that_the_operators_register(operator: str) -> None:
    found = next(c for c in all_cases() if c.operator == operator and c.full_size)
    dtypes = {name: torch.float32 if name in found.float32 else found.dtype for name in found.shapes}
    inputs = {
        name: torch.empty(shape, dtype=dtypes[name], device="meta").requires_grad_(name not in found.frozen)
        for name, shape in found.shapes.items()
    }
    with FlopCounterMode(display=False) as counter:
        out = found.ours(**inputs)
    assert counter.get_total_flops() == found.flops["forward"] > 0
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    backward = counter.get_total_flops()
    if operator == "token_split":  # ours computes the product again for fac's gradient: more than the least
        assert backward >= found.flops["backward"]
    else:
        assert backward == found.flops["backward"]


def test_least_bytes_are_at_least_inputs_and_output() -> None:
    for found in all_cases():
        inputs = {name: torch.empty(shape, device="meta") for name, shape in found.shapes.items()}
        out = found.ours(**inputs)
        width = {name: 4 if name in found.float32 else found.dtype.itemsize for name in inputs}
        moved = sum(t.numel() * width[name] for name, t in inputs.items()) + out.numel() * found.dtype.itemsize
        scalars = 16 * 64  # learned scales of a few heads are not counted
        assert found.bytes["forward"] == pytest.approx(moved, abs=scalars), found.name
        assert found.bytes["backward"] > found.bytes["forward"] * 0.99


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(not c.full_size for c in api.select_cases())
    assert {c.name for c in api.select_cases(["geglu"])} == {"geglu 960x2x96 float32"}
    assert [c.operator for c in api.select_cases(["rms_norm *", "geglu"])] == ["rms_norm", "geglu"]
    quick = api.select_cases(quick=True)
    assert len({c.operator for c in quick}) == len(quick) == 11
    with pytest.raises(runs.RunError, match="no case matches 'zzz'"):
        api.select_cases(["geglu", "zzz"])
    with pytest.raises(runs.RunError, match="need a GPU"):
        api.select_cases(["geglu 131072*"])
    assert [c.name for c in api.select_contestants(["natten"])] == ["natten hopper-fna", "natten cutlass-fna"]
    with pytest.raises(runs.RunError, match="no contestant matches 'flash'; they are: ours, natten"):
        api.select_contestants(["ours", "flash"])
    small = api.select_cases(["na2d 2x24x20x2x32 k7 float32"])
    assert [c.name for c in small] == ["na2d 2x24x20x2x32 k7 float32"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = "na2d 1x256x256x2x64 k7 float32"  # another case is called that, and tf32
    assert [c.name for c in api.select_cases([whole])] == [whole]
    assert all(c.full_size for c in api.select_cases()) and all(c.full_size for c in api.select_cases(["na2d"]))
    assert [c.full_size for c in api.select_cases(["2x24x20x2x32 k7 bfloat16"])] == [False]


def test_a_pattern_that_is_a_name_chooses_that_one_alone() -> None:
    names = ["HDiT-B/4", "DiT-B/4", "ours"]
    assert api.chosen(["DiT-B/4"], names) == ["DiT-B/4"]
    assert api.chosen(["DiT-B"], names) == ["HDiT-B/4", "DiT-B/4"]
    assert api.chosen(["DiT-B/4", "our*"], names) == ["DiT-B/4", "ours"]
    assert api.chosen(["DiT*"], names) == ["DiT-B/4"]
    assert api.chosen([], names) == names and api.chosen(["iT-B?4"], names) == []


# The command line


def main(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = __main__.main(argv)
    except SystemExit as end:
        status = int(str(end.code))
    out, err = capsys.readouterr()
    return status, out, err


def test_nothing_measured_is_no_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "benchmarks.ceilings.measure_ceilings",
        lambda *_: {"copy_tb_s": 0.01, "matmul_bf16_tflop_s": 0.05, "matmul_fp32_tflop_s": 0.05},
    )
    status, out, _ = main(capsys, "kernels", "--case", "geglu 960x2x96 float32", "--contestant", "liger")
    assert status == 1 and "Nothing was measured." in out and "3 unavailable" in out


def test_no_memory_for_the_ceilings_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes.")

    monkeypatch.setattr("benchmarks.ceilings.measure_ceilings", full)
    status, _, err = main(capsys, "kernels", "--case", "geglu", "--contestant", "ours")
    assert status == 2 and "no memory to measure the ceilings in" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kernels", "--speed"], "unrecognized arguments: --speed"),
        (["kernels", "--case", "zzz"], "no case matches 'zzz'"),
        (["kernels", "--contestant", "zzz"], "no contestant matches 'zzz'"),
        (["kernels", "--budget", "soon"], "argument --budget: invalid number of seconds value: 'soon'"),
        (["kernels", "--case", "geglu", "--output", "/dev/null/run.json"], "can't write /dev/null/run.json"),
        (["kernels", "--case", "geglu", "--csv", "/dev/null/run.csv"], "can't write /dev/null/run.csv"),
        (["kernels", "--case", "geglu", "--output", "/dev/null"], "can't write /dev/null: it is neither a file nor"),
        (["kernels", "--case", "geglu", "--case", "zzz"], "no case matches 'zzz'"),
        (["kernels", "--output", "a.json", "--csv", "./a.json"], "--csv and --output: expected two files, got a.json"),
        (["kernels", "--case", "geglu 131072*"], "need a GPU"),
        (["kernels", "--case", "geglu", "--contestant", "natten", "--budget", "1"], "nothing to measure"),
        (["list", "--case", "zzz"], "no case matches 'zzz'"),
        (["kernel"], "invalid choice: 'kernel'"),
        ([], "required: command"),
    ],
)
def test_what_the_user_has_to_change_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = main(capsys, *argv)
    assert status == 2 and not out and err.count("\n") == 1 and words in err


def test_missing_rich_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    status, out, err = main(capsys, "kernels", "--case", "geglu")
    assert status == 2 and not out and err.count("\n") == 1 and "rich is needed here" in err and "[bench]" in err


def test_list_shows_cases_and_why_a_peer_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = main(capsys, "list", "--case", "na2d")
    lines = out.splitlines()
    assert status == 0
    assert "  na2d: ours, natten hopper-fna, natten cutlass-fna, flex, sdpa" in lines
    assert "    na2d 4x256x256x2x64 k7 bfloat16  (needs a GPU)" in lines
    assert "    na2d 2x24x20x2x32 k7 float32  (small: what a CPU runs)" in lines
    assert "  ours: runs here" in lines and "  flex: can't run here: it needs a GPU" in lines
    assert not any("image" in line or "ffhq" in line for line in lines)
    assert any(
        line.startswith("  natten hopper-fna: can't run here: ") and "pip install natten" in line for line in lines
    )


def test_exit_status_tells_of_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for failing, wanted in ((None, 0), (ValueError("no"), 1), (MemoryError("no"), 1), (Unsupported("no"), 0)):
        function = reference.geglu if failing is None else raising(failing)
        rivals = [contestant("right"), contestant("other", function)]
        monkeypatch.setattr(api, "all_contestants", lambda rivals=rivals: rivals)
        status, out, _ = main(capsys, "kernels", "--case", "geglu")
        assert status == wanted and ("6 ok" if failing is None else "3 ok, 3 ") in out, failing
        assert "geglu 960x2x96 float32" in out


def test_interrupted_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "measure_cases", interrupt)
    status, _, err = main(capsys, "kernels")
    assert status == 130 and "interrupted" in err and err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`python -m benchmarks list | head`."""
    command = [sys.executable, "-m", "benchmarks", "list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_quick_counts_from_the_start_of_the_command_and_a_budget_from_the_ceilings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    ceilings_known = 1030.0
    found = []
    for options in ([], ["--quick"], ["--budget", "6"], ["--quick", "--budget", "6"]):
        parser = argparse.ArgumentParser()
        command.add_options(parser, "")
        args = parser.parse_args(options, argparse.Namespace(began=time.monotonic()))
        with monkeypatch.context() as later:
            later.setattr(time, "monotonic", lambda: ceilings_known)
            found.append(command.deadline(args))
    assert found == [math.inf, 1000 + api.QUICK_SECONDS, 1036, 1036]


def test_quick_from_end_to_end(tmp_path: Path) -> None:
    """The real command in a process of its own, in a minute at most: rows of every operator, times or why not."""
    output, table = tmp_path / "run.json", tmp_path / "run.csv"
    arguments = ["kernels", "--quick", "--budget", "6", "--output", str(output), "--csv", str(table)]
    began = time.monotonic()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert time.monotonic() - began < 60
    data = runs.read(output)
    assert {row["operator"] for row in data["rows"]} == {c.operator for c in all_cases()}
    assert {row["status"] for row in data["rows"]} <= {"ok", "unavailable", "not measured"}
    assert any(row["status"] == "ok" and row["contestant"] == "ours" for row in data["rows"])
    (session,) = data["sessions"]
    assert session["sources"] == sources.present() and session["command"][3:] == arguments
    assert session["ceilings"]["copy_tb_s"] > 0 and data["environment"]["device_type"] == "cpu"
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(data["rows"])
    assert "On a CPU: wall time only" in found.stdout and f"Written: {output}" in found.stdout
    assert "it needs a GPU" in found.stdout


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_the_same_cases_through_pytest_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "(gated_residual and ours) or (tokens and 32x32 and sdpa)"]
    command += [f"--benchmark-json={output}", "--benchmark-max-time=0.05"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    names = {benchmark["name"] for benchmark in json.loads(output.read_text())["benchmarks"]}
    assert names == {
        *(f"test_kernel[gated_residual 2x480x96 float32-ours-{p}]" for p in PASSES),
        *(f"test_kernel[attention 32x32 tokens-sdpa-{p}]" for p in PASSES),
    }


def test_a_network_through_pytest_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny one: checking the smallest that there is takes ten seconds."""
    assert {("flowers-256 batch 1", "ours", "step"), ("image 64x64 batch 1", "HDiT-B/4", "forward")} <= {
        (case, network.name, direction) for case, _, network, _, direction in test_models.POINTS
    }
    network = networks.hdit(CONFIG)
    passes: list[object] = []
    benchmark = SimpleNamespace(pedantic=lambda call, rounds: passes.extend(call() for _ in range(rounds)))
    for direction in ("forward", "forward+backward", "step"):
        test_models.test_model("tiny", 1, network, (network,), direction, benchmark)
        assert len(passes) == test_models.ROUNDS and benchmark.group == f"tiny {direction}"
        passes.clear()
    test_models.checked.cache_clear()
    for found in ("not checked against float64: out of memory", Check(output=2e-3, allowed_output=1e-3)):
        monkeypatch.setattr(test_models, "checked", lambda group, found=found: {network.name: found})
        with pytest.raises(AssertionError):
            test_models.test_model("tiny", 1, network, (network,), "forward", benchmark)
    assert not passes


def test_benchmarks_are_no_part_of_the_default_tests(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_a_case_restores_the_precision_of_float32() -> None:
    before = torch.get_float32_matmul_precision()
    with replace(rms_norm(8, 4), settings={"dtype": "float32 tf32"}).precision():
        assert torch.get_float32_matmul_precision() == "high"
    with rms_norm(8, 4).precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before
