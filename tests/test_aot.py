"""Every kernel, as its launcher launches it, compiled ahead of time for six GPU targets, and its shared memory checked.

tests/aot/<family>.py: `launch(dtype, wide)` calls the family's forward and backward launchers on tiny CPU tensors, at
one of two head dims or widths. Nothing runs: the launches are recorded, with the shipped configurations of the target's
family.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton: install the extra [test] on Linux")

from tests.lanes import SHARED_MEMORY, TARGETS, recorded  # noqa: E402 (imports triton)

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "aot").glob("[!_]*.py"))
DTYPES = [(target, torch.bfloat16) for target in TARGETS] + [("sm_90", torch.float16), ("sm_90", torch.float32)]


def test_every_family_has_a_launch_module() -> None:
    package = Path(__file__).parent.parent / "hdit_kernels"
    kernels = {path.stem.removesuffix("_triton") for path in package.glob("*_triton.py")} | {"neighborhood_attention"}
    assert set(FAMILIES) == kernels


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(("target", "dtype"), DTYPES, ids=[f"{t}-{str(d).removeprefix('torch.')}" for t, d in DTYPES])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles(family: str, target: str, dtype: torch.dtype, wide: bool) -> None:
    with recorded("hopper" if target == "sm_90" else "default") as launches:
        importlib.import_module(f"tests.aot.{family}").launch(dtype, wide)
    assert launches
    for launch in launches:
        shared = launch.compile(target).metadata.shared
        assert shared <= SHARED_MEMORY[target], (
            f"{launch.kernel.fn.__name__} on {target}: {shared} bytes of shared memory"
        )
