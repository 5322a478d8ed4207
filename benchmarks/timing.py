"""How a callable is timed.

On a GPU: replays of a CUDA graph of the call between two events, the L2 cache flushed before each (GPU time), and
beside it what a user waits, perf_counter around the call and a synchronisation, without a graph (wall time; its part
until the call returns is the host time). On a CPU: wall time alone. All times are in microseconds.

A sample is repeated until its median is known to a stated width or a time limit is reached (Effort). The flush writes a
buffer of several times the cache, as triton.testing.do_bench does: the lines that it leaves are written back on the
timed code's account, in place of the timed code's own last ones.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

Call = Callable[[], Any]

GRAPH = "CUDA graph"
KEPT = 20  # samples of a measurement


@dataclass(frozen=True)
class Stats:
    """Median and quantiles of the samples, microseconds; and at most KEPT of them, spread over all, as measured."""

    median: float
    p20: float
    p80: float
    repeats: int
    samples: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"samples": list(self.samples)}


@dataclass(frozen=True)
class Effort:
    """When a median is known well enough: its 95% confidence interval is at most `width` of it wide, after at least
    `fewest` samples. `seconds` and `most` end the sampling before that, but never before `least` samples."""

    width: float = 0.01
    fewest: int = 20
    most: int = 500
    seconds: float = 0.5
    least: int = 3

    def within(self, seconds: float) -> Effort:
        """The same, in no more than these seconds."""
        return replace(self, seconds=max(0.0, min(self.seconds, seconds)))


GPU = Effort()
WALL = Effort(width=0.03, most=200, seconds=0.3)


def stats(samples: Sequence[float]) -> Stats:
    ordered = sorted(samples)
    median, p20, p80 = (_quantile(ordered, q) for q in (0.5, 0.2, 0.8))
    step = max(len(samples) / KEPT, 1)
    kept = [samples[int(i * step)] for i in range(min(len(samples), KEPT))]
    return Stats(median, p20, p80, len(ordered), tuple(float(f"{sample:.4g}") for sample in kept))


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the median, by order statistics."""
    ordered = sorted(samples)
    half = 0.98 * math.sqrt(len(ordered))  # 1.96 standard deviations of a binomial count at 1/2
    low, high = math.floor(len(ordered) / 2 - half), math.ceil(len(ordered) / 2 + half)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


def sample(once: Callable[[], float], effort: Effort) -> Stats:
    """Calls once(), which gives one sample in microseconds, as often as the effort says."""
    deadline = time.monotonic() + effort.seconds
    samples: list[float] = []
    while len(samples) < max(effort.least, effort.most):
        samples.append(once())
        if len(samples) < effort.least:
            continue
        if time.monotonic() >= deadline:
            break
        if len(samples) >= effort.fewest and len(samples) % 5 == 0:
            low, high = interval(samples)
            if high - low <= effort.width * stats(samples).median:
                break
    return stats(samples)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives cached memory and the buffer that flushes the cache back, if the GPU still answers."""
    if device.type == "cuda":
        _flush_buffer.cache_clear()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a stream of its own: a graph can't be captured on the default one, and a backward pass is
    only captured on the stream of its forward pass."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    """Seconds that one call takes, all its work done. Of a first call: compilation included."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def wall_time(
    call: Call, device: torch.device, effort: Effort = WALL, before: Call | None = None
) -> tuple[Stats, Stats]:
    """What a user waits for one call to be done, and how much of it until the call returns.

    before: done ahead of each call, outside the time.
    """
    returned: list[float] = []

    def once() -> float:
        if before is not None:
            before()
        synchronize(device)
        began = time.perf_counter()
        call()
        returned.append((time.perf_counter() - began) * 1e6)
        synchronize(device)
        return (time.perf_counter() - began) * 1e6

    for _ in range(2):
        once()
    returned.clear()
    waited = sample(once, effort)
    return waited, stats(returned)


def gpu_time(call: Call, device: torch.device, effort: Effort = GPU, before: Call | None = None) -> tuple[Stats, str]:
    """GPU time of a warm call, and in a few words how it was had. To be called inside side_stream.

    The call is captured into a CUDA graph. Where that fails it is queued behind a kernel that waits until the host has
    enqueued it all (see queued_time). before: done ahead of each replay, outside the time.
    """
    try:
        graph = _captured(call)
    except Exception as error:  # whatever a capture doesn't allow; a call that is wrong in itself raises again below
        synchronize(device)
        return queued_time(call, device, effort, before), f"no CUDA graph ({one_line(error, 80)})"
    try:
        return sample(lambda: _between_events(graph.replay, device, before), effort), GRAPH
    finally:
        graph.reset()


def queued_time(call: Call, device: torch.device, effort: Effort = GPU, before: Call | None = None) -> Stats:
    """GPU time without a graph: a waiting kernel holds the GPU until the host has enqueued the call.

    Costs less than a capture, so it also serves to choose among many variants.
    """
    for _ in range(2):  # the second tells the host's time
        synchronize(device)
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
    cycles = int(min(1.5 * host + 50e-6, 0.1) * 2e9)  # at about 2 GHz

    def once() -> float:
        return _between_events(call, device, before, cycles)

    once()
    return sample(once, effort)


def _captured(call: Call) -> Any:
    for _ in range(2):
        call()
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    graph.replay()
    torch.cuda.current_stream().synchronize()
    return graph


def _between_events(call: Call, device: torch.device, before: Call | None, wait_cycles: int = 0) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if before is not None:
        before()
    _flush_buffer(device).zero_()  # also keeps the GPU busy while a graph is launched
    if wait_cycles:
        torch.cuda._sleep(wait_cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(256 * 2**20, 4 * cache), dtype=torch.int8, device=device)


def peak_bytes(call: Call, device: torch.device, inputs: Sequence[torch.Tensor]) -> int | None:
    """Most device memory held at once during a warm call: its inputs, and what it allocates. None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inputs}
    return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before


def out_of_memory(error: BaseException) -> bool:
    text = str(error)
    wanted = "CUDA out of memory", "can't allocate memory", "CUDA error: out of memory"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in wanted)


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception in one line; of one that is out of memory without torch's account of who holds how much."""
    text = " ".join(str(error).split())
    if out_of_memory(error):
        text = text.partition(" GPU ")[0]
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
