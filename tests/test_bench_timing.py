"""benchmarks.timing and benchmarks.ceilings, as far as they go without a GPU."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ceilings, timing
from benchmarks.timing import Effort

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [3, 4, 20, 33])
def test_stats_are_quantiles(count: int, seed: int) -> None:
    samples = torch.rand(count, dtype=torch.float64)
    found = timing.stats(samples.tolist())
    for value, q in ((found.median, 0.5), (found.p20, 0.2), (found.p80, 0.8)):
        assert value == pytest.approx(samples.quantile(q).item(), rel=1e-12)
    assert found.repeats == count


def test_at_most_twenty_samples_are_kept_spread_over_all_to_four_digits() -> None:
    assert timing.stats([3.14159, 2.0]).samples == (3.142, 2.0)  # in the order of measuring
    kept = timing.stats([float(i) for i in range(101)]).samples
    steps = {after - before for before, after in itertools.pairwise(kept)}
    assert len(kept) == 20 and kept[0] == 0 and kept[-1] > 90 and steps <= {5, 6}


def test_interval_holds_the_median_95_times_in_100(seed: int) -> None:
    numbers = random.Random(seed)
    held = 0
    for _ in range(2000):
        low, high = timing.interval([numbers.gauss(0, 1) for _ in range(40)])
        held += low <= 0 <= high
    assert 0.93 <= held / 2000 <= 1.0  # ranks are whole numbers, so a little more than 95%


def test_samples_until_the_median_is_known(seed: int) -> None:
    numbers = random.Random(seed)
    steady = timing.sample(lambda: numbers.gauss(100, 0.1), Effort(width=0.01, fewest=20, most=500, seconds=60))
    noisy = timing.sample(lambda: numbers.gauss(100, 10), Effort(width=0.01, fewest=20, most=500, seconds=60))
    assert steady.repeats == 20 and noisy.repeats == 500
    assert steady.median == pytest.approx(100, rel=0.01) and noisy.p20 < 95 < 105 < noisy.p80


def test_sampling_ends_with_its_time_but_takes_three() -> None:
    def once() -> float:
        time.sleep(0.02)
        return 20e3

    assert timing.sample(once, Effort(seconds=0)).repeats == 3
    began = time.monotonic()
    assert timing.sample(once, Effort(width=0, seconds=0.2)).repeats <= 11
    assert time.monotonic() - began < 2


def test_wall_time_leaves_out_what_comes_before() -> None:
    order: list[str] = []

    def before() -> None:
        order.append("before")
        time.sleep(0.2)

    def call() -> None:
        order.append("call")
        time.sleep(0.002)

    waited, host = timing.wall_time(call, CPU, Effort(seconds=0), before)
    assert 2000 <= waited.median < 150000 and 2000 <= host.median <= waited.median
    assert order == ["before", "call"] * (len(order) // 2) and waited.repeats == host.repeats == 3


class FakeCuda:
    """Of torch.cuda, what the timing calls; keeps the order of what is enqueued. Events are 7 µs apart."""

    def __init__(self, capturable: bool) -> None:
        self.order: list[str] = []
        self.capturable = capturable
        self.capturing = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.order.append("event")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 0.007

        class Graph:
            def replay(self) -> None:
                fake.order.append("replay")

            def reset(self) -> None:
                fake.order.append("reset")

        class Flush:
            def zero_(self) -> None:
                fake.order.append("flush")

        @contextmanager
        def graph(target: Graph, stream: Any) -> Iterator[None]:
            fake.capturing = True
            yield
            fake.capturing = False
            if not fake.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")

        stream = SimpleNamespace(synchronize=lambda: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "current_stream": lambda: stream,
            "synchronize": lambda device=None: None,
            "_sleep": lambda cycles: fake.order.append(f"wait {'long' if cycles > 0 else 'no'}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: Flush())

    def call(self) -> None:
        self.order.append("captured" if self.capturing else "call")


@pytest.mark.parametrize("capturable", [True, False])
def test_gpu_time_is_that_of_flushed_calls(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(capturable)
    cuda.install(monkeypatch)
    effort = Effort(fewest=3, most=3)
    found, way = timing.gpu_time(cuda.call, torch.device("cuda", 0), effort, lambda: cuda.order.append("before"))
    assert found == timing.Stats(pytest.approx(7), pytest.approx(7), pytest.approx(7), 3, (7.0, 7.0, 7.0))
    if capturable:
        assert way == timing.GRAPH
        sample = ["before", "flush", "event", "replay", "event"]
        assert cuda.order == ["call", "call", "captured", "replay", *sample * 3, "reset"]
    else:
        assert way == "no CUDA graph (RuntimeError: operation not permitted when stream is capturing)"
        sample = ["before", "flush", "wait long", "event", "call", "event"]
        assert cuda.order[-15 - 3 :] == sample * 3


def test_errors_in_one_line() -> None:
    assert timing.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert timing.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(timing.one_line(ValueError("x" * 999), 50)) == 50
    assert timing.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    text = (
        "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 139.80 GiB of which 203.12 MiB"
    )
    shorter = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB."
    assert timing.one_line(torch.OutOfMemoryError(text)) == shorter
    assert timing.out_of_memory(MemoryError()) and not timing.out_of_memory(RuntimeError("illegal memory access"))
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(2**60)
    assert timing.out_of_memory(allocation.value)


def test_no_gpu_time_on_a_cpu() -> None:
    assert timing.peak_bytes(lambda: None, CPU, []) is None
    with timing.side_stream(CPU):
        assert timing.seconds_of(lambda: time.sleep(0.01), CPU) >= 0.01


def test_floor_is_the_larger_of_two() -> None:
    rates = {"copy_tb_s": 3.02, "matmul_bf16_tflop_s": 751.0, "matmul_fp32_tflop_s": 50.0, "matmul_tf32_tflop_s": 400.0}
    # ANCHORS: na2d 4,256,256,2,64,7 forward
    moved, computed = 4 * 4 * 256 * 256 * 2 * 64 * 2, 4 * 4 * 256 * 256 * 2 * 64 * 49
    assert ceilings.floor_us(rates, moved, computed, "bfloat16") == pytest.approx(88.9, abs=0.05)
    assert ceilings.floor_us(rates, 0, computed, "float16") == pytest.approx(computed / 751e6)
    assert ceilings.floor_us(rates, 0, computed, "float32") == pytest.approx(computed / 50e6)
    assert ceilings.floor_us(rates, 0, computed, "float32 tf32") == pytest.approx(computed / 400e6)
    slow = rates | {"matmul_bf16_tflop_s": 1.0}  # a processor without instructions for bfloat16: float32 is a way, too
    assert ceilings.floor_us(slow, 0, computed, "bfloat16") == pytest.approx(computed / 50e6)


def test_ceilings_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SIZES", (2**22,))
    steps: list[str] = []
    before = torch.get_float32_matmul_precision()
    found = ceilings.measure_ceilings(CPU, steps.append)
    assert set(found) == {"copy_tb_s", "copy_way", "matmul_bf16_tflop_s", "matmul_fp32_tflop_s"}
    assert 1e-5 < found["copy_tb_s"] < 10 and found["copy_way"] == "copy_, 4 MiB"
    assert 1e-6 < found["matmul_fp32_tflop_s"] < 1000
    assert steps and torch.get_float32_matmul_precision() == before
    assert ceilings.clocks(CPU) == {"sm_mhz": None, "memory_mhz": None, "seen": None}
