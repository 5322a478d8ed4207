"""launch.run: which launches take the kernel that an earlier one compiled. On a GPU: test_gpu_operators.py."""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the launchers need Triton: install the extra [test] on Linux")

import triton.language as tl  # noqa: E402 (after the skip)
from triton.runtime._async_compile import active_mode  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from hdit_kernels import launch  # noqa: E402 (imports triton)


class Compiled:
    """Stands for what Triton compiled: launches take all arguments in order, constants included."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.calls.append(("again", grid, args))


class Kernel:
    arg_names = ("x_ptr", "n", "B", "A")

    def __init__(self, compiles: bool = True) -> None:
        self.calls: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def first(*args: Any, **constants: Any) -> Any:
            self.calls.append(("first", grid, args, constants))
            return Compiled(self.calls) if self.compiles else None

        return first


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)


def aligned(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.zeros(64, dtype=dtype)
    return x[-x.data_ptr() % 16 // x.itemsize :]


def test_the_second_launch_takes_what_the_first_compiled() -> None:
    kernel, x, y = Kernel(), aligned(), aligned()
    launch.run(launch.Launch(kernel, (2, 1, 1), [x], [7], {"A": 1, "B": 2, "num_warps": 4}))
    launch.run(launch.Launch(kernel, (3, 1, 1), [y], [8], {"A": 1, "B": 2, "num_warps": 4}))
    first, again = kernel.calls
    assert first == ("first", (2, 1, 1), (x, 7), {"A": 1, "B": 2, "num_warps": 4})
    assert again == ("again", (3, 1, 1), (y.data_ptr(), 8, 2, 1))  # in the order of arguments


class KernelWithOptions(Kernel):
    arg_names = ("x_ptr", "n", "A", "OPTIONS", "stride", "extra_ptr")


def test_optional_arguments_come_last() -> None:
    """The plain binary, compiled without them, is launched with None in their places."""
    kernel, x = KernelWithOptions(), aligned()
    for stride in (2, 3):
        optional = {"stride": stride, "extra_ptr": x}
        launch.run(launch.Launch(kernel, (1, 1, 1), [x], [7], {"A": 1, "OPTIONS": True}, optional))
        launch.run(launch.Launch(kernel, (1, 1, 1), [x], [7], {"A": 1}))
    assert kernel.calls[:2] == [
        ("first", (1, 1, 1), (x, 7), {"A": 1, "OPTIONS": True, "stride": 2, "extra_ptr": x}),
        ("first", (1, 1, 1), (x, 7), {"A": 1}),
    ]
    pointer = x.data_ptr()
    assert kernel.calls[2:] == [
        ("again", (1, 1, 1), (pointer, 7, 1, True, 3, x)),
        ("again", (1, 1, 1), (pointer, 7, 1, None, None, None)),
    ]


def test_integers_are_no_compile_keys() -> None:
    def kernel(x_ptr, n: tl.int32, A: tl.constexpr, B: tl.constexpr = None, extra_ptr=None, stride=None):
        pass

    assert launch.kernel(kernel, lambda function, do_not_specialize: do_not_specialize) == ["n", "stride"]


def test_what_decides_about_a_kernel_decides_here() -> None:
    kernel, constants = Kernel(), {"A": 1, "B": 2, "num_warps": 4}
    for x, changed in [
        (aligned(), {}),
        (aligned(torch.float16), {}),
        (aligned(), {"A": 3}),
        (aligned(), {"num_warps": 8}),
    ]:
        launch.run(launch.Launch(kernel, (1, 1, 1), [x], [7], constants | changed))
    launch.run(launch.Launch(Kernel(), (1, 1, 1), [aligned()], [7], constants))
    assert [call[0] for call in kernel.calls] == ["first"] * 4


class Binary:
    """What Triton compiles ahead of a launch; its first `run` loads it."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    @property
    def run(self) -> None:
        self.events.append(f"{self.name} loaded")


class Function(JITFunction):
    """A kernel that notes what happens to it, and compiles only while another one does."""

    def __init__(self, name: str, events: list[str], barrier: threading.Barrier) -> None:
        self.name, self.events, self.barrier = name, events, barrier
        self.arg_names = ["x_ptr"]

    @property
    def cache_key(self) -> str:
        self.events.append(f"{self.name} hashed by {threading.current_thread().name}")
        return self.name

    def warmup(self, *args: Any, grid: Any, **constants: Any) -> Any:
        self.barrier.wait(timeout=10)
        return Binary(self.name, self.events)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def first(*args: Any, **constants: Any) -> Any:
            self.events.append(f"{self.name} launched")
            return Compiled([])

        return first


def test_two_kernels_are_compiled_side_by_side_and_launched_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    events: list[str] = []
    barrier = threading.Barrier(2)
    first, second = (
        launch.Launch(Function(name, events, barrier), (1, 1, 1), [aligned()], [], {}) for name in ("first", "second")
    )
    launch.run(first, second)
    assert events[:2] == ["first hashed by MainThread", "second hashed by MainThread"]
    assert sorted(events[2:4]) == ["first loaded", "second loaded"]
    assert events[4:] == ["first launched", "second launched"]
    launch.run(first, second)
    assert len(events) == 6


def test_what_is_missing_behind_one_that_is_there_is_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    events: list[str] = []
    barrier = threading.Barrier(2)
    first, second, third = (
        launch.Launch(Function(name, events, barrier), (1, 1, 1), [aligned()], [], {}) for name in "abc"
    )
    launch.run(first)
    launch.run(first, second, third)
    assert sorted(events[3:5]) == ["b loaded", "c loaded"]
    assert events[5:] == ["b launched", "c launched"]


def test_a_kernel_that_is_launched_twice_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sum of a norm's partial sums, for shift and for scale."""
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    events: list[str] = []
    barrier = threading.Barrier(2)
    first, second = (launch.Launch(Function(name, events, barrier), (1, 1, 1), [aligned()], [], {}) for name in "ab")
    launch.run(first, second, second)
    assert sorted(events[2:]) == ["a launched", "a loaded", "b launched", "b loaded"]


def test_inside_compiled_together_nothing_is_launched() -> None:
    events: list[str] = []
    only = launch.Launch(Function("a", events, threading.Barrier(1)), (1, 1, 1), [aligned()], [], {})
    with launch.compiled_together():
        launch.run(only, only)
        assert active_mode.get() is None
    assert events == []
    launch.run(only)
    assert events == ["a launched"]


def test_every_kernel_is_launched_by_run() -> None:
    """None directly, kernel[grid](…)."""
    sources = Path(launch.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if re.search(r"_kernel\[", path.read_text())] == []


def test_one_that_is_left_to_compile_is_compiled_as_it_is_launched() -> None:
    events: list[str] = []
    first, second = (
        launch.Launch(Function(name, events, threading.Barrier(1)), (1, 1, 1), [aligned()], [], {}) for name in "ab"
    )
    launch.run(first)
    launch.run(first, second)
    assert events == ["a launched", "b launched"]


def test_rocm_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """There tensors of storages up to 2 GiB get a binary of their own."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Kernel()
    for _ in range(2):
        launch.run(launch.Launch(kernel, (1, 1, 1), [aligned()], [7], {"A": 1, "B": 2}))
    assert [call[0] for call in kernel.calls] == ["first"] * 2


def test_unaligned_tensors_are_left_to_triton() -> None:
    kernel = Kernel()
    for x in (aligned(), aligned()[1:], aligned()[1:]):
        launch.run(launch.Launch(kernel, (1, 1, 1), [x], [7], {"A": 1, "B": 2}))
    assert [call[0] for call in kernel.calls] == ["first"] * 3


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    for _ in range(2):
        launch.run(launch.Launch(kernel, (1, 1, 1), [aligned()], [7], {"A": 1, "B": 2}))
    assert [call[0] for call in kernel.calls] == ["first"] * 2


def test_kernels_take_tensors_first_and_constants_last() -> None:
    """As launch.run hands them over."""
    from hdit_kernels import feed_forward_hopper, geglu_triton, norms_triton, rope_triton, tokens_triton
    from hdit_kernels.neighborhood_attention import (
        hopper_backward,
        hopper_backward_wide,
        hopper_forward,
        triton_additional,
        triton_backward,
        triton_forward,
    )

    found = 0
    modules = (triton_additional, triton_backward, triton_forward, hopper_backward, hopper_backward_wide)
    for module in (
        *modules,
        hopper_forward,
        feed_forward_hopper,
        geglu_triton,
        norms_triton,
        rope_triton,
        tokens_triton,
        launch,
    ):
        for name, kernel in vars(module).items():
            if name.startswith("_") and name.endswith("_kernel"):
                found += 1
                every = list(inspect.signature(kernel.fn).parameters.values())
                parameters = [p for p in every if p.default is inspect.Parameter.empty]
                assert [p.default is None for p in every] == sorted(p.default is None for p in every), name
                constant = ["constexpr" in str(p.annotation) for p in parameters]
                assert constant == sorted(constant), name
                kinds = [2 * p.name.endswith("_desc") + p.name.endswith("_ptr") for p in parameters]
                assert kinds == sorted(kinds, reverse=True), name
    assert found == 23
