"""What CUDA graphs of calls and of training steps share: a stream, memory, a look for what waits."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WAITS = "called a synchronizing CUDA operation"  # how torch's warning about an operation that waits begins


class Replayable:
    """What both kinds have: why they run eagerly, a stream to capture on, and memory that graphs share."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.reason: str | None = None
        """None while calls are captured; else why the last of those that weren't ran eagerly."""
        self.memory = 0
        """Bytes that graphs, their inputs and copies of weights hold."""
        self._function = function
        self._said: set[str] = set()
        self._lock = threading.RLock()
        self._pool: Any = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._used: torch.cuda.Event | None = None

    def _eagerly(self, reason: str) -> None:
        self.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"hdit.capture: runs eagerly: {reason}", stacklevel=4)

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream]:
        """On a stream of our own, as capturing needs: autograd's nodes keep the stream they were made on."""
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream(device).wait_stream(stream)

    def _record(self, call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a call, and what it returned. Nothing has run."""
        gc.collect()  # what a cycle holds would be freed while the graph is made
        torch.cuda.empty_cache()  # what warming up took, for the graph's own memory
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with self._beside(device) as stream, no_autocast_cache():
            # thread_local: data workers' threads may pin memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                results = call()
        self.memory += torch.cuda.memory_reserved(device) - before
        return graph, results

    @contextmanager
    def _alone(self, device: torch.device) -> Iterator[None]:
        """One call at a time, each behind the one before, on whatever streams: they share memory."""
        with self._lock:
            if self._used is not None:
                self._used.wait(torch.cuda.current_stream(device))
            else:
                self._used = torch.cuda.Event()
            yield
            self._used.record(torch.cuda.current_stream(device))


def waits_in(call: Callable[[], Any], watch: bool = True) -> str | None:
    """Makes a call and says whether an operation in it waits for the GPU, which a graph can't."""
    if not watch:
        call()
        return None
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = False
    for each in said:
        if WAITS in str(each.message):
            waits = True
        elif "Synchronization debug mode" not in str(each.message):  # which says that it is a prototype
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    what = "an operation in it waits for the GPU (a number read, a mask indexed with, a copy from the CPU)"
    return what if waits else None


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """A weight that autocast has rounded outside a graph must not be taken for this one."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def map_tensors(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    """function of each tensor in results, which may be nested in tuples, lists and dicts."""
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, dict):
        return type(results)((name, map_tensors(function, value)) for name, value in results.items())
    if isinstance(results, tuple) and hasattr(results, "_fields"):
        return type(results)(*[map_tensors(function, value) for value in results])
    if isinstance(results, (tuple, list)):
        return type(results)(map_tensors(function, value) for value in results)
    return results
