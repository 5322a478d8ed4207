"""Lanes: CPU tests (the default), Triton's interpreter (tests/interpreter, TRITON_INTERPRET=1, run by
test_interpreter.py in processes of their own), ahead-of-time compilation (test_aot.py), and the GPU tests (-m gpu)."""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config

from benchmarks import runs
from hdit_kernels import testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

collect_ignore = [] if INTERPRETING else ["interpreter"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.stash[SEED]
    lines = [f"torch {torch.__version__}, seed {seed} (repeat with HDIT_TEST_SEED={seed})"]
    if torch.cuda.is_available():
        lines.append(f"GPU: {torch.cuda.get_device_name()}; its tests run with -m gpu")
    else:
        lines.append("NOT run here, for want of a CUDA or ROCm device: everything marked gpu (kernels at real shapes,")
        lines.append(
            "  model parity on the kernels, one training step, resume); run `pytest -m gpu` on a machine with one"
        )
    if not HAS_TRITON:
        lines.append(
            "NOT run here, for want of Triton: the interpreter and ahead-of-time lanes; install the extra [test]"
        )
    return lines


SEED = pytest.StashKey[int]()
RECORD = pytest.StashKey[dict[str, Any]]()
RUN = pytest.StashKey[runs.Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what the GPU tests saw to this record, or a new one")


def pytest_configure(config: pytest.Config) -> None:
    # The cache on disk knows an operator by its name: it would hand out graphs made with another fake implementation.
    torch._inductor.config.force_disable_caches = True
    if hasattr(config, "workerinput"):
        # Beside others a worker has one thread, and its Inductor no pool of processes: where threads are more than
        # cores, OpenMP's wait for each other ten times as long as they work.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # of processes that tests start
        torch._inductor.config.compile_threads = 1
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:  # as nohup and a shell's background leave it; tests send them
            signal.signal(number, handler)
    config.stash[RECORD] = {}
    config.stash[SEED] = int(os.environ.setdefault("HDIT_TEST_SEED", str(random.randrange(2**31))))
    path = config.getoption("--record")
    if path and torch.cuda.is_available() and HAS_TRITON:
        note_launches(lambda file, kernel: kept(config, "launched", file, kernel, True))
    if path and not hasattr(config, "workerinput"):
        command = ["python", "-m", "pytest", *config.invocation_params.args]
        try:  # now, rather than when all tests have run
            config.stash[RUN] = runs.Run.open(path, "gpu_tests", command)
        except runs.RunError as error:
            raise pytest.UsageError(str(error)) from error


# The GPU tests that take longest, with which workers begin, so that none has much left when the others are done.
LONGEST = (
    "test_digits_on_the_gpu",
    "test_measures_on_a_gpu",
    "test_random_cases[neighborhood_self_attention-float",
    "test_random_cases[neighborhood_self_attention-bfloat16",
    "test_random_cases[na2d-float",
    "test_random_cases[na2d-bfloat16",
    "test_random_cases[na2d_options-float",
    "test_a_training_step_on_the_gpu",
    "test_the_largest_batch_on_a_gpu",
    "test_two_copies_live_beside_the_package_on_a_gpu",
    "test_resume_on_the_gpu",
    "test_random_cases[na2d",
    "test_random_cases[neighborhood_self_attention",
    "test_memcheck",  # finds on disk what those before it have compiled
    "test_random_cases",
)


def place(name: str) -> int:
    """Where a GPU test of this name comes in the order."""
    return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    elif gpu:
        items.sort(key=lambda item: place(item.name))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config, seen = session.config, session.config.stash[RECORD]
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist hands over what it saw
        config.workeroutput["record"] = json.dumps(seen)
        return
    run = config.stash.get(RUN, None)
    if run is not None and seen:
        stats = config.pluginmanager.get_plugin("terminalreporter").stats
        counts = {outcome: len(stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")}
        run.put_tests({"tests": counts, "seed": config.stash[SEED]} | seen)
        run.save()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Joins what the workers of pytest-xdist saw."""
    seen = node.config.stash[RECORD]
    for section, operators in json.loads(getattr(node, "workeroutput", {}).get("record", "{}")).items():
        for operator, kinds in operators.items():
            seen.setdefault(section, {}).setdefault(operator, {}).update(kinds)


@pytest.fixture(autouse=True, scope="session")
def compiled_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of pytest-xdist's workers that need a kernel at once, one compiles it; the rest have it of Triton's cache."""
    if not (hasattr(request.config, "workerinput") and torch.cuda.is_available() and HAS_TRITON):
        yield
        return
    from triton.runtime.jit import JITFunction

    folder = tmp_path_factory.getbasetemp().parent  # which all workers share
    with mock.patch.object(JITFunction, "_do_compile", one_at_a_time(JITFunction._do_compile, folder)):
        yield


def one_at_a_time(compiling: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """JITFunction._do_compile, in one process or thread at a time for any one kernel and key."""

    def in_turn(kernel: Any, key: str, *args: Any) -> Any:
        named = f"{kernel.fn.__module__} {kernel.fn.__name__} {key}"
        with (folder / f"{hashlib.sha256(named.encode()).hexdigest()}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            return compiling(kernel, key, *args)

    return in_turn


@pytest.fixture(autouse=True)
def other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may read pytest's own arguments, which pytest-xdist hides and a run of one file doesn't."""
    monkeypatch.setattr(sys, "argv", ["a test", "--whose-arguments-are-not-these"])


@pytest.fixture(autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """A worker beside others keeps no GPU memory that its last test is done with."""
    yield
    if request.node.get_closest_marker("gpu"):
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, str, Any], None]:
    """record(section, operator, dtype, value) keeps a figure for the file that --record names."""

    return functools.partial(kept, request.config)


def kept(config: pytest.Config, section: str, operator: str, dtype: str, value: Any) -> None:
    config.stash[RECORD].setdefault(section, {}).setdefault(operator, {})[dtype] = value


def note_launches(note: Callable[[str, str], None]) -> None:
    """From now on, file and name of every kernel that is launched are told of."""
    from hdit_kernels import launch

    run = launch.run

    def noting(*launches: launch.Launch) -> None:
        run(*launches)
        for each in launches:
            function = each.function.fn
            note(f"{function.__module__.replace('.', '/')}.py", function.__name__)

    launch.run = noting


@pytest.fixture
def seed() -> int:
    """A new seed every run, printed in the header and by a failing test; also set as torch's own."""
    value = int(os.environ["HDIT_TEST_SEED"])
    torch.manual_seed(value)
    print(f"HDIT_TEST_SEED={value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def few_large_tiles() -> Iterator[None]:
    with testing.large_tiles(torch.device("cuda")):
        yield
