"""The cases of `python -m benchmarks model`, `train` and `scaling` as tests: checked against float64, then their wall
time measured by pytest-benchmark. On a CPU: the smallest preset and image. A pass of more than PATIENCE seconds, or for
which memory doesn't suffice, is skipped. The largest batches have to be looked for, so they are the command's own.

    pytest benchmarks --benchmark-only -k "flowers-256 and ours"
    K_DIFFUSION=~/k-diffusion pytest benchmarks --benchmark-only -k "flowers-256 and k-diffusion"
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import api, model, networks, scaling, timing, train
from benchmarks.networks import Check, Network
from benchmarks.peers import kdiffusion
from hdit import presets

ON_CPU = api.device().type == "cpu"
SIZES = scaling.SIZES[:1] if ON_CPU else scaling.SIZES
PATIENCE = 60.0 if ON_CPU else 4.0  # seconds
CLONE = Path(os.environ["K_DIFFUSION"]).expanduser() if "K_DIFFUSION" in os.environ else None
ROUNDS = 1 if ON_CPU else 20

Group = tuple[Network, ...]  # of one architecture, checked together


def entries() -> Iterator[tuple[str, int, Network, Group, tuple[str, ...]]]:
    """Case, batch, network, those it is checked with, and the passes."""
    for name, batches in (model.SMALLEST if ON_CPU else model.BATCHES).items():
        config = presets[name]
        own, reference = networks.hdit(config), networks.k_diffusion(config, CLONE)
        pair = (own,) if kdiffusion.available(CLONE) else (own, reference)
        for batch in batches:
            for network, group in ((own, pair), (reference, pair), (dit := networks.dit_like(config), (dit,))):
                yield model.case_name(name, batch), batch, network, group, (*model.PASSES, *train.PASSES)
    for size in SIZES:
        for network in scaling.families(size):
            same = [n for n in scaling.families(min(size, scaling.CHECKED)) if n.name == network.name]
            yield scaling.case_name(size, largest=False), 1, network, tuple(same), scaling.PASSES


POINTS: list[tuple[Any, ...]] = [(*entry, direction) for *entry, passes in entries() for direction in passes]


@functools.cache
def checked(group: Group) -> dict[str, Check | str]:
    return networks.check(group, api.device())


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    networks.release(api.device())


@pytest.mark.parametrize(
    ("case", "batch", "network", "group", "direction"), POINTS, ids=[f"{p[0]}-{p[2].name}-{p[4]}" for p in POINTS]
)
def test_model(case: str, batch: int, network: Network, group: Group, direction: str, benchmark: Any) -> None:
    device = api.device()
    if network.name == "k-diffusion" and (reason := kdiffusion.available(CLONE)):
        pytest.skip(f"{reason}: {kdiffusion.INSTALL}")
    found = checked(group)[network.name]
    assert isinstance(found, Check), found
    assert all(error <= allowed for error, allowed in found.errors(direction).values()), found
    try:
        call = networks.prepare(network, direction, batch, device)
        took = timing.seconds_of(call, device)
        if took > PATIENCE and not ON_CPU:  # the first may compile
            took = timing.seconds_of(call, device)
        if took > PATIENCE:
            pytest.skip(f"a pass takes {took:.1f} s, more than {PATIENCE:g} s")
    except RuntimeError as error:
        if not timing.out_of_memory(error):
            raise
        pytest.skip("out of memory")

    def waited() -> None:
        call()
        timing.synchronize(device)

    benchmark.group = f"{case} {direction}"
    benchmark.pedantic(waited, rounds=ROUNDS)
