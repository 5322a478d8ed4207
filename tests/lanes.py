"""What the interpreter and ahead-of-time lanes share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from hdit_kernels import reference

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
SHARED_MEMORY = {  # bytes a program may use
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx1100": 64 * 1024,
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@contextmanager
def kernels_only() -> Iterator[None]:
    """Inside, every function of the reference raises: what runs is the kernels."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference was called where only kernels may run")

    with ExitStack() as stack:
        for name, function in inspect.getmembers(reference, inspect.isfunction):
            if function.__module__ == reference.__name__:
                stack.enter_context(mock.patch.object(reference, name, forbidden))
        yield


class Compilation(NamedTuple):
    """Of one kernel launch: what Triton would compile for it, its grid, and the values of its arguments (of tensors
    where they lie)."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]
    grid: Any
    values: list[Any]

    def compile(self, target: str) -> Any:
        make = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = make(self.kernel, self.signature, {k: v for k, v in self.constants.items()}, self.attributes)
        return triton.compile(source, target=TARGETS[target], options=self.options)


@contextmanager
def recorded(family: str) -> Iterator[list[Compilation]]:
    """Inside, launches run nothing and are listed; the launch configurations are those of the given GPU family."""
    launches: list[Compilation] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        signature, constants, attributes, values = {}, {}, {}, []
        for position, parameter in enumerate(self.params):
            value = bound.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                values.append((tuple(value.shape), value.stride(), value.storage_offset()))
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                block = ", ".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
                values.append((tuple(value.shape), tuple(value.strides)))
            else:
                signature[parameter.name] = parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")
                values.append(value)
        launches.append(Compilation(self, signature, constants, attributes, options, grid, values))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch("hdit_kernels.launch._compile", lambda launches: None),
        mock.patch("hdit_kernels.launch.gpu_family", lambda device: family),
        mock.patch("hdit_kernels.launch.multiprocessors", lambda device: 132),
    ):
        yield launches


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
