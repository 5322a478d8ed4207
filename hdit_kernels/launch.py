"""What the launchers share: the kernel decorator, row layouts of strided tensors, the GPU family, a deterministic sum.

Imports Triton, so only the `*_triton` modules import it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction


def kernel(function: Callable[..., Any], jit: Callable[..., Any] = triton.jit) -> Any:
    """`triton.jit` (or Gluon's) that compiles once for all sizes and strides: no integer argument is specialised on its
    value.

    Annotate integers with tl.int32 (sizes, row indices) or tl.int64 (strides), so that their width is no compile key
    either; not optional ones (default None, 32 bits), which an annotation would have given.
    """
    integers = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if str(p.annotation).startswith("tl.int")
        or (p.default is None and p.annotation is p.empty and not name.endswith("_ptr"))
    ]
    compiled = jit(function, do_not_specialize=integers)
    if isinstance(compiled, JITFunction):  # not in the interpreter
        compiled.run = functools.partial(_launch_or_compile, compiled)  # type: ignore[method-assign]
    return compiled


def _launch_or_compile(function: JITFunction[Any], *args: Any, warmup: bool, **kwargs: Any) -> Any:
    run = type(function).run
    if _together is None:
        return run(function, *args, warmup=warmup, **kwargs)
    before = active_mode.set(_together)  # in this thread: autograd's backward passes have threads of their own
    try:
        return run(function, *args, warmup=True, **kwargs)
    finally:
        active_mode.reset(before)


_together: AsyncCompileMode | None = None


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inside, kernels are not launched but compiled, side by side; on leaving it, they are there.

    What operators return inside is garbage: make a pass of a network, forward and backward, and throw its results
    away. Then its first real pass doesn't compile one kernel after the other, most of which is time outside Python.
    """
    global _together
    # Triton changes the warnings' filters while it compiles; threads may put them back in the wrong order.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        _together = mode = AsyncCompileMode(pool)
        try:
            yield
        finally:
            _together = None
            with mode:
                pass  # waits for the compilers


NO_OPTIONS: Mapping[str, Any] = {}


class Launch(NamedTuple):
    """function[grid](*tensors, *numbers, **constants, **optional) of a `kernel`.

    optional: the last parameters, which default to None, in their order: integers, and tensors at multiples of 16
    bytes.
    """

    function: Any
    grid: tuple[int, int, int]
    tensors: Sequence[Tensor]
    numbers: Sequence[float]
    constants: Mapping[str, Any]
    optional: Mapping[str, Any] = NO_OPTIONS

    def by_triton(self) -> Any:
        return self.function[self.grid](*self.tensors, *self.numbers, **self.constants, **self.optional)

    def key(self) -> tuple[Any, ...]:
        """What decides about the binary, where tensors are at multiples of 16 bytes."""
        dtypes = [tensor.dtype for tensor in self.tensors]
        return (id(self.function), self.tensors[0].device, *dtypes, *self.constants.values(), *self.optional)


_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}


def run(*launches: Launch) -> None:
    """Launches one after the other, with less time on the host; what has to be compiled first is compiled side by side.

    Triton looks at every argument of every launch for what it has compiled, which takes longer than the launch. Of
    these kernels only tensors' types, whether they are at multiples of 16 bytes, and constants decide on CUDA (on ROCm
    their storages' sizes, too, which is left to Triton). Addresses in place of tensors spare it a question to the
    driver for each.
    """
    if _together is not None:
        for each in launches:
            each.by_triton()
        return
    compiling = True
    for index, each in enumerate(launches):
        addresses = [tensor.data_ptr() for tensor in each.tensors]
        unaligned = [address for address in addresses if address % 16]
        if unaligned or torch.version.hip is not None:  # so rare that Triton may look for it
            each.by_triton()
            continue
        key = each.key()
        found = _compiled.get(key)
        if found is not None:
            compiled, values = found
            compiled[each.grid](*addresses, *each.numbers, *values, *each.optional.values())
            continue
        if compiling:  # this one and all that are still to come
            _compile(launches[index:])
            compiling = False
        compiled = each.by_triton()
        if isinstance(compiled, CompiledKernel):  # not in the interpreter
            names = each.function.arg_names[len(addresses) + len(each.numbers) :]
            values = [each.constants.get(name) for name in names if name not in each.optional]
            _compiled[key] = (compiled, values)


def _compile(launches: Sequence[Launch]) -> None:
    """Compiles kernels at the same time, since most of what that takes is outside Python. Launching them then finds
    them.
    """
    functions = [each for each in launches if isinstance(each.function, JITFunction) and each.key() not in _compiled]
    if len(functions) < 2:
        return
    for each in functions:
        each.function.cache_key  # noqa: B018 (hashes the helpers that kernels share: not by two threads at once)

    def warm_up(each: Launch) -> None:
        with torch.cuda.device(each.tensors[0].device):
            arguments = (*each.tensors, *each.numbers)
            compiled = each.function.warmup(*arguments, grid=each.grid, **each.constants, **each.optional)
            compiled.run  # noqa: B018 (brings it onto the GPU)

    # Triton changes the warnings' filters while it compiles; threads may put them back in the wrong order.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        for _ in pool.map(warm_up, functions):
            pass


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at multiples of 16 bytes."""
    for tensor in tensors:  # all(…) would take twice as long
        if tensor.data_ptr() % 16:
            return False
    return True


def cdiv(count: int, size: int) -> int:
    """count / size, rounded up. (triton.cdiv takes 2.6 µs of host time.)"""
    return -(-count // size)


@functools.cache
def gpu_family(device: torch.device) -> str:
    """ "hopper" for compute capability 9.0, else "default": the keys of the launch configurations."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9:
        return "hopper"
    return "default"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 products follow torch's own matmul setting, read at every call."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


class Rows(NamedTuple):
    """A tensor seen as rows of its last dimension: row r lies at (r // (n1·n2))·s0 + (r // n2 % n1)·s1 + (r % n2)·s2.

    Strides are in units of `vector` elements: kernels multiply them back, which tells the compiler that offsets are
    multiples.
    """

    tensor: Tensor
    n1: int
    n2: int
    s0: int
    s1: int
    s2: int
    vector: int


def rows(x: Tensor) -> Rows:
    """The rows of x, copied only if its last stride is not 1 or its other dimensions need more than three strides."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    dims = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 3:
        return rows(x.contiguous())
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(merged)) + merged
    vector = vector_width(x, s0, s1, s2)
    return Rows(x, n1, n2, s0 // vector, s1 // vector, s2 // vector, vector)


def vector_width(x: Tensor, *strides: int) -> int:
    """8 when every row starts at a multiple of 8 elements and of 16 bytes, so that loads can be wide; else 1."""
    return 8 if all(s % 8 == 0 for s in strides) and aligned(x) else 1


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [groups, parts, columns], contiguous -> [groups, columns] in dtype: always in the same order of
    additions.
    """
    total, summing = sum_launch(partials, dtype)
    run(summing)
    return total


def sum_launch(partials: Tensor, dtype: torch.dtype) -> tuple[Tensor, Launch]:
    """The result of `sum_partials` and the launch that fills it."""
    groups, parts, columns = partials.shape
    total = torch.empty(groups, columns, dtype=dtype, device=partials.device)
    block = 16  # narrow and deep: thousands of parts of 128 columns still make several programs of few steps
    grid = (groups * cdiv(columns, block), 1, 1)
    constants = {"BLOCK": block, "PARTS": 256, "num_warps": 4}
    return total, Launch(_sum_partials_kernel, grid, (partials, total), (parts, columns), constants)


@kernel
def _sum_partials_kernel(
    partials_ptr, total_ptr, parts: tl.int32, columns: tl.int32, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    blocks = tl.cdiv(columns, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (group * parts + part[:, None]) * columns + column[None, :]
        total += tl.load(partials_ptr + at, (part < parts)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(total_ptr + group * columns + column, tl.sum(total, 0), column < columns)


@triton.jit
def row_offset(row, n1, n2, s0, s1, s2, VECTOR: tl.constexpr):
    """Where row `row` (int32) of a `Rows` tensor starts, in elements, int64."""
    i0, rest = row // (n1 * n2), row % (n1 * n2)
    return (i0.to(tl.int64) * s0 + (rest // n2).to(tl.int64) * s1 + (rest % n2).to(tl.int64) * s2) * VECTOR
