"""Every kernel, as its launcher launches it, compiled ahead of time for six GPU targets, and its shared memory checked.

tests/aot/<family>.py: `launch(dtype, wide)` calls the family's forward and backward launchers on tiny CPU tensors, at
one of two head dims or widths. Nothing runs: the launches are recorded, with the shipped configurations of the target's
family. Compiling all of them takes ten minutes of a CPU where Triton's cache is empty, so a run compiles a third.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton: install the extra [test] on Linux")

from tests.lanes import SHARED_MEMORY, TARGETS, Compilation, recorded  # noqa: E402 (imports triton)

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "aot").glob("[!_]*.py"))
DTYPES = [(target, torch.bfloat16) for target in TARGETS] + [("sm_90", torch.float16), ("sm_90", torch.float32)]


def test_every_family_has_a_launch_module() -> None:
    package = Path(__file__).parent.parent / "hdit_kernels"
    kernels = {path.stem.removesuffix("_triton") for path in package.glob("*_triton.py")} | {"neighborhood_attention"}
    assert set(FAMILIES) == kernels


def binary(launch: Compilation) -> str:
    """Equal of launches that compile to the same."""
    return f"{launch.kernel.fn.__name__} {launch.signature} {launch.constants} {launch.attributes} {launch.options}"


def in_this_run(launches: list[Compilation], target: str, dtype: torch.dtype, seed: int) -> list[Compilation]:
    """A third of the different binaries, another one for each target and dtype, and with each seed: each run has every
    binary for some of them, and three seeds in a row have all.
    """
    different = list({binary(launch): launch for launch in launches}.values())
    return different[(seed + DTYPES.index((target, dtype))) % 3 :: 3]


@pytest.mark.parametrize(("target", "dtype"), DTYPES, ids=[f"{t}-{str(d).removeprefix('torch.')}" for t, d in DTYPES])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles(family: str, target: str, dtype: torch.dtype) -> None:
    with recorded("hopper" if target == "sm_90" else "default") as launches:
        for wide in (False, True):
            importlib.import_module(f"tests.aot.{family}").launch(dtype, wide)
    chosen = in_this_run(launches, target, dtype, int(os.environ["HDIT_TEST_SEED"]))
    assert chosen
    for launch in chosen:
        shared = launch.compile(target).metadata.shared
        assert shared <= SHARED_MEMORY[target], (
            f"{launch.kernel.fn.__name__} on {target}: {shared} bytes of shared memory"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_binary_has_its_turn(family: str) -> None:
    """In each run for some target; and for each target in three seeds in a row, once."""
    with recorded("default") as launches:
        importlib.import_module(f"tests.aot.{family}").launch(torch.bfloat16, False)
    every = {binary(launch) for launch in launches}
    turns = {
        (target, seed): [binary(launch) for launch in in_this_run(launches, target, torch.bfloat16, seed)]
        for target in TARGETS
        for seed in range(3)
    }
    for target in TARGETS:
        assert sorted(every) == sorted(turns[target, 0] + turns[target, 1] + turns[target, 2])
    for seed in range(3):
        assert every == {each for target in TARGETS for each in turns[target, seed]}


def test_blocks_that_span_more_than_32_bits_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows so long that no test has one."""
    from hdit_kernels.neighborhood_attention import dispatch, triton_configs

    monkeypatch.setattr(triton_configs, "MAX_OFFSET", 0)
    triton_configs.plan_tiles.cache_clear()
    qkv = torch.zeros(3, 1, 5, 5, 1, 16, dtype=torch.bfloat16).unbind()
    settings = (None, None, [3, 3], None, [1, 1], None, 1.0)
    with recorded("default") as launches:
        out, stats = dispatch.na2d_forward(*qkv, *settings, False, True)
        dispatch.na2d_backward(out, None, *qkv, None, None, out, stats, *settings[2:])
    triton_configs.plan_tiles.cache_clear()
    assert len(launches) == 3
    for launch in launches:
        assert launch.constants["WIDE"] and launch.compile("sm_90")


CALL = {"heads": (2, 2), "dims": (16, 16), "extra": None, "stride": [1, 1], "causal": [False, False]}


@pytest.mark.parametrize(
    "change",
    [{}, {"heads": (2, 1)}, {"dims": (16, 24)}, {"extra": 3}, {"stride": [1, 2]}, {"causal": [False, True]}],
    ids=lambda change: next(iter(change), "plain"),
)
def test_only_calls_with_options_take_their_variants(change: dict) -> None:
    """The plain call's binaries have no argument more."""
    from hdit_kernels.neighborhood_attention import dispatch

    call = CALL | change
    (heads, heads_kv), (dim, dim_v) = call["heads"], call["dims"]
    query, key, value = (torch.zeros(1, 5, 5, *size) for size in ((heads, dim), (heads_kv, dim), (heads_kv, dim_v)))
    more = (None, None) if call["extra"] is None else (key[:, : call["extra"], 0], value[:, : call["extra"], 0])
    settings = ([3, 3], call["stride"], [1, 1], call["causal"], 1.0)
    with recorded("default") as launches:
        out, stats = dispatch.na2d_forward(query, key, value, *more, *settings, False, True)
        dispatch.na2d_backward(out, None, query, key, value, *more, out, stats, *settings)
    walks = [launch for launch in launches if "TILE_Y" in launch.signature]
    assert len(walks) == 3
    for launch in walks:
        kinds = [launch.signature[name] for name in ("group", "stride_y", "causal_x")]
        assert kinds == ["i32" if change else "constexpr"] * 3
