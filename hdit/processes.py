"""The processes of one run, as torchrun starts them: each has a copy of the model, a device and a part of every batch.

Where there is only one process, there is no process group, and nothing here does anything. With several, what they tell
each other goes by gloo on the CPU, and the gradients of models on GPUs by NCCL. The first process writes and prints.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hdit._runtime import Stopped, pick_device

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = timedelta(hours=4)  # the others wait while the first looks at all images, or draws samples
FIRST_WORD = 5.0  # seconds; what all find wrong, all find at nearly the same time

T = TypeVar("T")


def count() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def part(batch_size: int) -> slice:
    """Which images of a batch of all processes are this one's. Raises ValueError if it can't be shared equally."""
    if batch_size % count():
        raise ValueError(f"--batch-size: expected a multiple of {count()}, the number of processes, got {batch_size}")
    size = batch_size // count()
    return slice(rank() * size, (rank() + 1) * size)


def device(name: str | None = None) -> torch.device:
    """The device of this process. One alone: as pick_device. Of several, each takes the GPU of its LOCAL_RANK, or all
    the CPU if that is the name or there are no GPUs. Raises ValueError if that can't be.
    """
    if count() == 1:
        return pick_device(name)
    if name not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {name}: expected cpu, or nothing: each of {count()} processes takes a GPU of its own"
        )
    found = pick_device(name)
    if found.type != "cuda":
        return found
    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= gpus:
        raise ValueError(
            f"LOCAL_RANK: expected less than {gpus}, the number of GPUs here, got {index}: "
            "start fewer processes on this machine, or pass --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def replicated(model: nn.Module) -> nn.Module:
    """model, so wrapped that its backward pass leaves the mean of all processes' gradients; itself if it is alone.

    Raises ConnectionError if another process is gone; so does the backward pass inside `connected`.
    """
    if count() == 1:
        return model
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with connected():
        return DistributedDataParallel(model, devices or None, gradient_as_bucket_view=True)


def mean(*values: float) -> list[float]:
    """Of each value, its mean over all processes. Raises ConnectionError if one of them is gone."""
    if count() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cpu")
    with connected():
        dist.all_reduce(total)
    return (total / count()).tolist()


def from_first(value: T) -> T:
    """What the first process passed. Raises ConnectionError if one is gone."""
    if count() == 1:
        return value
    values = [value]
    with connected():
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def require_same(values: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the entry, if a process has other values than the first; on that process only."""
    for name, value in from_first(values).items():
        if values[name] != value:
            raise ValueError(f"{name}: expected what the first process has, got other ones in process {rank()}")


@contextmanager
def connected() -> Iterator[None]:
    """Raises ConnectionError if what is done inside fails since another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if dist.is_available() and (isinstance(error, dist.DistError) or re.search(r"\bgloo/", str(error))):
            raise ConnectionError("another process of this run ended, or can't be reached") from error
        raise


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, if it started several.

    What the others print is dropped, and so are their errors if the first process has the same one. All end together,
    once the first has saved; if one of them dies, one line of the others says so.
    Raises ValueError if not all of torchrun's variables are set.
    """
    several = os.environ.get(VARIABLES[0], "1")
    if several in ("", "0", "1"):
        yield
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {several}, but {', '.join(missing)} not set: start all processes by torchrun")
    if not dist.is_available():
        raise ValueError(f"WORLD_SIZE is {several}, but this torch is built without torch.distributed")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with connected():
        store, own, number = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=own, world_size=number, timeout=PATIENCE)
    try:
        with _silent(own > 0):
            try:
                yield
            except Stopped:
                _wait()
                raise
            _wait()
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which sees one end: first say why
        if own == 0:
            with suppress(RuntimeError):
                store.set("hdit/first", _words(error))
        elif isinstance(error, (Stopped, KeyboardInterrupt)):
            sys.exit(128 + getattr(error, "number", signal.SIGINT))
        elif isinstance(error, Exception) and _is_said(error, store):
            sys.exit(2)
        raise
    dist.destroy_process_group()


def _wait() -> None:
    """Until all processes are here, or one is gone. torchrun would end the first, still saving, after any other."""
    with suppress(ConnectionError):
        mean(0)


@contextmanager
def _silent(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _is_said(error: Exception, store: Any) -> bool:
    """Whether another process says what this error does."""
    end = time.monotonic() + FIRST_WORD
    try:
        while time.monotonic() < end:
            if store.check(["hdit/first"]):
                return isinstance(error, ConnectionError) or store.get("hdit/first").decode() == _words(error)
            time.sleep(0.1)
        return isinstance(error, ConnectionError) and store.add("hdit/others", 1) > 1  # the first is dead, or well
    except RuntimeError:  # the store was in a process that is gone
        return False
