"""The cases of `python -m benchmarks kernels`: all operators of hdit_kernels at HDiT's shapes, a module a family."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("neighborhood_attention", "rope", "norms", "geglu", "feed_forward", "tokens")
PASSES = ("forward", "backward", "forward+backward")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One operator at one size and precision.

    settings: what build(**settings) makes this case of, JSON-able; "dtype" is among them ("bfloat16", "float16",
        "float32" or "float32 tf32"). label: the sizes, for the name.
    shapes: the inputs' shapes by the public function's argument names. float32: inputs that are float32 whatever the
        dtype (learned scales, angles). intervals: inputs drawn uniformly from one, the others are normal. frozen:
        inputs without a gradient.
    ours, reference: take the inputs by name; the reference is plain PyTorch, differentiable, exact in float64.
    bytes, flops: the least that forward and backward have to move and compute, 2 FLOPs a multiply-accumulate; that of
        "forward+backward" is their sum.
    grid: the settings that smaller() halves. full_size: a size of real use, which needs a GPU.
    """

    family: str
    operator: str
    label: str
    settings: dict[str, Any]
    build: Callable[..., Case] = field(repr=False)
    shapes: Shapes
    ours: Callable[..., Tensor] = field(repr=False)
    reference: Callable[..., Tensor] = field(repr=False)
    bytes: dict[str, int]
    flops: dict[str, int]
    grid: tuple[str, ...]
    float32: frozenset[str] = frozenset()
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    full_size: bool = True

    @property
    def name(self) -> str:
        return f"{self.operator} {self.label} {self.settings['dtype']}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings["dtype"].removesuffix(" tf32"))

    @property
    def largest(self) -> int:
        """Elements of the largest input."""
        return max(math.prod(shape) for shape in self.shapes.values())

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        made = {}
        for name, shape in self.shapes.items():
            if name in self.intervals:
                tensor = torch.empty(shape, device=device).uniform_(*self.intervals[name], generator=generator)
            else:
                tensor = torch.randn(shape, device=device, generator=generator)
            made[name] = tensor if name in self.float32 else tensor.to(self.dtype)
        return made

    def smaller(self, elements: int) -> Case:
        """This case, or one on a smaller grid but else the same, whose largest input has at most so many elements."""
        case = self
        while case.largest > elements:
            settings = dict(case.settings)
            wide = max(case.grid, key=lambda name: settings[name])
            if settings[wide] < 64:  # any window of the cases fits into 32
                break
            settings[wide] //= 2
            case = self.build(**settings)
        return case

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, products of float32 are IEEE, or may be tf32 where the case says so."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.settings["dtype"].endswith("tf32") else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a builder's locals(), taken first of all: what the case is built of."""
    return {name: value for name, value in arguments.items() if name != "full_size"}


def both(forward: int, backward: int) -> dict[str, int]:
    """Of the two directions, and their sum."""
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def size(*shape: int, dtype: torch.dtype | str) -> int:
    """Bytes of a tensor."""
    kind = getattr(torch, dtype.removesuffix(" tf32")) if isinstance(dtype, str) else dtype
    return math.prod(shape) * kind.itemsize


def all_cases() -> list[Case]:
    """In the order in which they are measured."""
    return [case for family in FAMILIES for case in importlib.import_module(f"{__name__}.{family}").cases()]
