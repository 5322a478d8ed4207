"""What tests/cases cover with a quarter to a half of all binaries a run; that the GPU suite's workers compile each
once, and begin with what takes longest.
"""

from __future__ import annotations

import collections
import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.cases import neighborhood_attention as attention
from tests.cases import norms, rope, tokens
from tests.conftest import LONGEST, one_at_a_time, place

KINDS = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.bfloat16, True)]
SEEDS = range(2**31 - 4, 2**31)


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda seed: monkeypatch.setenv("HDIT_TEST_SEED", str(seed))


def test_all_kinds_of_a_run_have_all_widths_and_all_runs_every_kind(seeded: Any) -> None:
    def drawn(dtype: torch.dtype, mixed: bool) -> set[tuple[str, Any]]:
        sizes, values = random.Random(0), torch.Generator()
        widths = {("width", norms._shape(sizes, dtype, mixed, True)[-1]) for _ in range(80)}
        dims = {("dim", rope.qk_norm_rope(sizes, values, dtype, mixed).tensors["qkv"].shape[-1]) for _ in range(20)}
        sides = [tokens.sides(sizes, dtype, mixed)[1:3] for _ in range(80)]
        return widths | dims | {("sides", (fine[3] % 8 == 0, coarse[3] % 8 == 0)) for fine, coarse in sides}

    every = {("width", width) for width in norms.WIDTHS} | {("dim", dim) for dim in rope.HEAD_DIMS}
    every |= {("sides", (a, b)) for a in (False, True) for b in (False, True)}
    found: dict[Any, set[Any]] = {kind: set() for kind in KINDS}
    for seed in SEEDS:
        seeded(seed)
        of_run = [drawn(*kind) for kind in KINDS]
        assert set().union(*of_run) == every and max(map(len, of_run)) <= 6
        for kind, drawn_here in zip(KINDS, of_run, strict=True):
            found[kind] |= drawn_here
    assert all(kind == every for kind in found.values())


def test_four_seeds_have_every_attention_and_each_hdits_own(seeded: Any) -> None:
    """Those of Hopper's own kernels are in every second run, the other ones in every fourth."""
    windows = list(itertools.product(range(1, 14), repeat=2))
    every = list(itertools.product(attention.HEAD_DIMS, windows, ((1, 1), (2, 1))))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        turns: collections.Counter[Any] = collections.Counter()
        for seed in SEEDS:
            seeded(seed)
            here = [case for case in every if attention.in_this_run(*case, dtype)]
            assert len(here) < 0.45 * len(every)
            assert dtype == torch.float32 or (64, (7, 7), (1, 1)) in here
            turns.update(here)
        assert turns.keys() == set(every)
        portable = [turns[dim, window, (2, 1)] for dim, window, dilation in every if dilation == (2, 1)]
        assert set(portable) == {1}


def test_four_seeds_have_all_options_once(seeded: Any) -> None:
    every = list(itertools.product(attention.OPTION_DIMS, ((7, 1), (2, 9), (12, 12))))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        turns: collections.Counter[Any] = collections.Counter()
        for seed in SEEDS:
            seeded(seed)
            here = [case for case in every if attention.options_in_this_run(*case, dtype)]
            assert 2 <= len(here) <= 6
            turns.update(here)
        assert turns == collections.Counter(every)


def test_every_attention_has_cases_in_each_run(seeded: Any) -> None:
    """Of every kind; drawing them ends."""
    for seed in SEEDS:
        seeded(seed)
        for dtype, mixed in KINDS:
            for generate in attention.OPERATORS.values():
                sizes = random.Random(seed)
                with mock.patch("torch.randn", lambda *shape, generator: torch.zeros(1).expand(*shape)):
                    assert generate(sizes, torch.Generator(), dtype, mixed).tensors


@pytest.fixture
def launched() -> Iterator[list[Any]]:
    """The launches of calls on a CPU, as an H100 would have them."""
    lanes = pytest.importorskip("tests.lanes", reason="needs Triton")
    with ExitStack() as stack:
        for where, value in {
            "backend.chosen": "triton",
            "backend.check_kernels_run": lambda tensors: None,
            "neighborhood_attention.dispatch.on_hopper": lambda tensor: True,
        }.items():
            stack.enter_context(mock.patch(f"hdit_kernels.{where}", value))
        yield stack.enter_context(lanes.recorded("hopper"))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_every_run_has_all_that_compiles_hoppers_kernels_anew(seed: int, seeded: Any, launched: list[Any]) -> None:
    """In one of the 16-bit dtypes or the other, and that with half of the binaries."""
    seeded(seed)
    for dtype, mixed in KINDS[:2]:
        sizes, values = random.Random(seed), torch.Generator()
        for generate in 60 * [attention.na2d_small_windows] + 3 * [attention.na2d_large_windows]:
            with mock.patch("torch.randn", lambda *shape, generator: torch.zeros(1).expand(*shape)):
                case = generate(sizes, values, dtype, mixed)
            leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
            out, lse = case.call(*leaves)
            torch.autograd.grad([out, lse], leaves, [out, lse])
    hopper = [each for each in launched if each.kernel.is_gluon()]
    rows = {(2, 0), (4, 0), (4, 2), (8, 0)}
    keys = {(each.kernel.fn.__name__, *(each.constants.get(name) for name in ("D", "MORE", "LAST"))) for each in hopper}
    every = {
        (f"_na2d_hopper_{name}_kernel", dim, *blocks)
        for name in ("forward", "dq", "dkdv")
        for dim in (32, 64)
        for blocks in rows
    }
    every |= {("_na2d_hopper_forward_128_kernel", 128, *blocks) for blocks in rows}
    every |= {("_na2d_hopper_dkdv_wide_kernel", dim, None, None) for dim in (32, 64)}
    assert keys == every
    binaries = {(each.kernel.fn.__name__, str(each.signature), str(each.constants)) for each in hopper}
    assert len(binaries) < 0.6 * 2 * len(every)


def test_what_takes_longest_is_there_and_comes_first() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for index, start in enumerate(LONGEST):
        name, _, case = start.partition("[")
        operator, _, kind = case.partition("-")
        assert f"def {name}(" in tests and any(each.startswith(operator) for each in attention.OPERATORS)
        assert any(each.startswith(kind) for each in ("bfloat16", "float16", "float32", "mixed"))
        assert place(start) == index < place("test_deterministic[na2d]")


def test_one_compiles_what_many_need(tmp_path: Path) -> None:
    at_work: list[str] = []
    met = threading.Barrier(2)

    def compiling(kernel: Any, key: str) -> str:
        if key != "alone":
            met.wait(10)  # another key at the same time
        at_work.append(key)
        assert at_work.count(key) == 1
        threading.Event().wait(0.02)
        at_work.remove(key)
        return key

    def compile_(key: str) -> str:
        return one_at_a_time(compiling, tmp_path)(SimpleNamespace(fn=test_one_compiles_what_many_need), key)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(compile_, 4 * ["alone"])) == 4 * ["alone"]
        assert list(pool.map(compile_, ["a", "b"])) == ["a", "b"]
