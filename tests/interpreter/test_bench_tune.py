"""What `python -m benchmarks tune` launches."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from tests.made_up_runs import stats


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_a_candidate_gives_what_the_present_configuration_gives(
    kernel: str, bits: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tune.SHAPES, 64, (1, 10, 9, 1, 64))
    monkeypatch.setitem(tune.DTYPES, 16, torch.float16)  # the interpreter's tl.dot has no bfloat16
    entry = tune.Entry(kernel, bits, 64, 9)
    launch = tune.launcher(entry, torch.device("cpu"))
    *_, last = tune.candidates(*entry)
    wanted = launch(entry.present)()
    trial = tune.attempt(last, launch(last), wanted, tune.TOLERANCE[bits], lambda call: stats(1))
    assert trial["status"] == "ok", trial
