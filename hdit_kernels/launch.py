"""What the launchers share: the kernel decorator, launches, layouts of strided tensors, a deterministic sum.

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
    return jit(function, do_not_specialize=integers)


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
    """function[grid](*descriptors, *tensors, *numbers, **constants, **optional) of a `kernel`.

    optional: the last parameters, which default to None, in their order: integers, and tensors at multiples of 16
    bytes. descriptors: what TMA copies of tensors, of the last tensor's dtype; constants tell their blocks.
    """

    function: Any
    grid: tuple[int, int, int]
    tensors: Sequence[Tensor]
    numbers: Sequence[float]
    constants: Mapping[str, Any]
    optional: Mapping[str, Any] = NO_OPTIONS
    descriptors: Sequence[Any] = ()

    def by_triton(self) -> Any:
        return self.function[self.grid](
            *self.descriptors, *self.tensors, *self.numbers, **self.constants, **self.optional
        )

    def compile(self) -> Any:
        arguments = (*self.descriptors, *self.tensors, *self.numbers)
        return self.function.warmup(*arguments, grid=self.grid, **self.constants, **self.optional)

    def key(self) -> tuple[Any, ...]:
        """What decides about the binary, where tensors are at multiples of 16 bytes."""
        dtypes = [tensor.dtype for tensor in self.tensors]
        return (id(self.function), self.tensors[0].device, *dtypes, *self.constants.values(), *self.optional)


Plan = tuple[tuple[int, int, int], Sequence[int], dict[str, Any]]  # a launch's grid, integers and constants
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}


def run(*launches: Launch) -> None:
    """Launches one after the other, with less time on the host; what has to be compiled first is compiled side by side.

    Triton looks at every argument of every launch for what it has compiled, which takes longer than the launch. Of
    these kernels only tensors' types, whether they are at multiples of 16 bytes, and constants decide on CUDA (on ROCm
    their storages' sizes, too, which is left to Triton). Addresses in place of tensors spare it a question to the
    driver for each.
    """
    if _together is not None:
        before = active_mode.set(_together)  # in this thread: autograd's backward passes have threads of their own
        try:
            for each in launches:
                each.compile()
        finally:
            active_mode.reset(before)
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
            compiled[each.grid](*each.descriptors, *addresses, *each.numbers, *values, *each.optional.values())
            continue
        if compiling:  # this one and all that are still to come
            _compile(launches[index:])
            compiling = False
        compiled = each.by_triton()
        if isinstance(compiled, CompiledKernel):  # not in the interpreter
            names = each.function.arg_names[len(each.descriptors) + len(addresses) + len(each.numbers) :]
            values = [each.constants.get(name) for name in names if name not in each.optional]
            _compiled[key] = (compiled, values)


def _compile(launches: Sequence[Launch]) -> None:
    """Compiles kernels at the same time, since most of what that takes is outside Python. Launching them then finds
    them.
    """
    missing = {
        key: each
        for each in launches
        if isinstance(each.function, JITFunction) and (key := each.key()) not in _compiled
    }
    if len(missing) < 2:
        return
    for each in missing.values():
        each.function.cache_key  # noqa: B018 (hashes the helpers that kernels share: not by two threads at once)

    def warm_up(each: Launch) -> None:
        with torch.cuda.device(each.tensors[0].device):
            each.compile().run  # noqa: B018 (brings it onto the GPU)

    # Triton changes the warnings' filters while it compiles; threads may put them back in the wrong order.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        for _ in pool.map(warm_up, missing.values()):
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
    """How many the GPU has; 128 where it can't be asked, as on a CPU."""
    if device.type != "cuda":
        return 128
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 products follow torch's own matmul setting, read at every call."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous, of the tensor's shape and dtype. (new_empty takes twice as long.)"""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def readable(strides: Sequence[Sequence[int]]) -> bool:
    """Whether kernels can read tensors of these strides for sure: `rows` would give them as they are."""
    for stride in strides:  # all(…) would take three times as long
        if stride[-1] != 1 or len(stride) > 4:
            return False
    return True


def rows(*tensors: Tensor, keep_first: bool = False) -> list[Tensor]:
    """Tensors of one shape, dense and with leading dimensions that `merged` makes three of, copied only if need be."""
    found = [dense(tensor) for tensor in tensors]
    sizes, _ = merged(found[0].shape, tuple([tensor.stride() for tensor in found]), keep_first)
    return found if len(sizes) == 3 else [tensor.contiguous() for tensor in found]


def dense(tensor: Tensor) -> Tensor:
    """A tensor whose last stride is 1; as a rule the given one itself."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=4096)
def merged(
    shape: Sequence[int], tensor_strides: tuple[Sequence[int], ...], keep_first: bool = False
) -> tuple[list[int], list[int]]:
    """Sizes (three or more) of the leading dimensions, neighbours merged where all tensors allow it and the first kept
    apart if asked; and the strides: those of the first tensor, then those of the second.
    """
    keep = int(keep_first)
    dims: list[tuple[int, list[int]]] = []
    for index, size in enumerate(shape[:-1]):
        strides = [s[index] for s in tensor_strides]
        if len(dims) > keep and dims[-1][1] == [s * size for s in strides]:
            dims[-1] = (dims[-1][0] * size, strides)
        elif size != 1 or index < keep:
            dims.append((size, strides))
    dims[keep:keep] = [(1, [0] * len(tensor_strides))] * (3 - len(dims))
    return [size for size, _ in dims], [dim[1][t] for t in range(len(tensor_strides)) for dim in dims]


def vector_width(is_aligned: bool, *strides: int) -> int:
    """8 where every row starts at a multiple of 8 elements and of 16 bytes, so that loads can be wide; else 1.

    Strides are handed over in units of it: kernels multiply them back, which tells the compiler that they are
    multiples. (It looks at each, so use it in what is remembered.)
    """
    return 8 if is_aligned and all(stride % 8 == 0 for stride in strides) else 1


def sum_launch(partials: Tensor, like: Tensor) -> tuple[Tensor, Launch]:
    """float32 [groups, parts, columns], contiguous, summed over the parts, always in the same order of additions: the
    result [groups, columns], of the shape and dtype of `like`, and the launch that fills it.
    """
    groups, parts, columns = partials.shape
    total = empty_like(like)
    vector = 4 if columns % 4 == 0 else 1  # 16 bytes of float32
    grid = (groups * cdiv(columns, SUM_CONSTANTS["BLOCK"]), 1, 1)
    constants = {**SUM_CONSTANTS, "VECTOR": vector}
    return total, Launch(_sum_partials_kernel, grid, (partials, total), (parts, columns // vector), constants)


# Narrow and deep: thousands of parts of 128 columns still make several programs of few steps.
SUM_CONSTANTS = {"BLOCK": 16, "PARTS": 256, "num_warps": 4}


@kernel
def _sum_partials_kernel(
    partials_ptr, total_ptr, parts: tl.int32, columns: tl.int32,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    columns = columns * VECTOR
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
    """Where row `row` (int32) of a tensor of leading dimensions [n0, n1, n2] starts, in elements, int64."""
    i0, rest = row // (n1 * n2), row % (n1 * n2)
    return (i0.to(tl.int64) * s0 + (rest // n2).to(tl.int64) * s1 + (rest % n2).to(tl.int64) * s2) * VECTOR


@triton.jit
def strided(i0, i1, row, column, s0, s1, s2, VECTOR: tl.constexpr):
    """Offsets [rows, columns] in a tensor of the given strides, int64, of rows `row` (int64) of the line (i0, i1)."""
    return (i0.to(tl.int64) * s0 + i1.to(tl.int64) * s1) * VECTOR + (row * s2 * VECTOR)[:, None] + column[None, :]


@triton.jit
def contiguous(line, row, column, n2, columns):
    """Offsets [rows, columns] in a contiguous tensor, int64, of rows `row` (int64) of a line of n2 rows."""
    return ((line.to(tl.int64) * n2 + row) * columns)[:, None] + column[None, :]
