"""Every case, contestant and pass of `python -m benchmarks kernels`, and the attention grids of `scaling`, as a test:
checked against the reference, then its wall time measured by pytest-benchmark. GPU times and ceilings are the commands'
own. On a CPU: small cases and grids.

    pytest benchmarks --benchmark-only -k "ada_rms_norm and ours"
    pytest benchmarks --benchmark-only -k "tokens and ours"
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import api, correctness, measure, scaling, timing
from benchmarks.kernels import PASSES, Case
from benchmarks.peers import Contestant, Unsupported, case_contestants

CASES = [(case.name, case, case_contestants(case)) for case in api.select_cases()]
CASES += [
    (scaling.grid_name(grid), *scaling.grid_case(grid, api.device()))
    for grid in (scaling.GRIDS[:2] if api.device().type == "cpu" else scaling.GRIDS)
]
PAIRS = [(name, case, contestant) for name, case, rivals in CASES for contestant in rivals]


@pytest.fixture(autouse=True)
def own_stream() -> Iterator[None]:
    with timing.side_stream(api.device()):
        yield
    timing.release(api.device())


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    ("name", "case", "contestant"), PAIRS, ids=[f"{name}-{rival.name}" for name, _, rival in PAIRS]
)
def test_kernel(name: str, case: Case, contestant: Contestant, direction: str, benchmark: Any) -> None:
    if reason := contestant.peer.available():
        pytest.skip(reason)
    device = api.device()
    with case.precision():
        try:
            entry = measure.Entry(case, contestant)
            calls = entry.calls(case.inputs(device, secrets.randbits(31)))
        except Unsupported as error:
            pytest.skip(str(error))
        truth = correctness.truth(entry.checked, device, secrets.randbits(31), entry.implementation.reference)
        errors = measure.relevant(entry.check(truth), direction)
        assert all(error.right for error in errors.values()), errors
        del truth
        call = calls.prepared(direction)

        def waited() -> None:
            call()
            timing.synchronize(device)

        benchmark.group = f"{name} {direction}"
        if calls.restore is None:
            benchmark(waited)
        else:
            benchmark.pedantic(waited, setup=calls.restore, rounds=50, warmup_rounds=2)
