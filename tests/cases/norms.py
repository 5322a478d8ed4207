"""Random cases of the norms and gates."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

import hdit_kernels
from hdit_kernels import reference
from tests.cases import Case, Generator, strided, turn

# Few compile keys: one for each power of two that the width rounds up to, and whether all rows are 16-byte aligned.
WIDTHS = (32, 48, 128, 257, 384, 512, 768, 1536)


def _shape(sizes: random.Random, dtype: torch.dtype, mixed: bool, per_sample: bool) -> tuple[int, ...]:
    """[B, C], tokens or a grid, some a row more or less than whole blocks of rows; rms_norm also takes one row [C]."""
    channels = sizes.choice(WIDTHS[turn(dtype, mixed) % 4 :: 4])
    kinds: list[tuple[int, ...]] = [
        (),
        (sizes.choice([1, 15, 16, 17, 65]),),
        (sizes.randint(1, 33), sizes.randint(1, 33)),
    ]
    shape = (sizes.randint(1, 8), *sizes.choice(kinds), channels)
    return shape if per_sample or sizes.randrange(8) else (channels,)


def _parameter(sizes: random.Random, values: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B, C], at random a chunk of a wider projection."""
    chunks = sizes.choice([1, 1, 3, 6])
    wide = torch.randn(shape[0], chunks * shape[-1], generator=values).to(dtype)
    return wide.chunk(chunks, 1)[sizes.randrange(chunks)]


def _activation(sizes: random.Random, values: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of different size around a mean, in any layout."""
    size = torch.empty(*shape[:-1], 1).uniform_(-3, 3, generator=values).exp()
    mean = sizes.choice([0.0, 0.0, 2.0])
    return strided(((torch.randn(shape, generator=values) + mean) * size).to(dtype), sizes)


def _norm(name: str, parameters: tuple[str, ...]) -> Generator:
    def generate(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
        shape, eps = _shape(sizes, dtype, mixed, name != "rms_norm"), sizes.choice([1e-6, 1e-6, 1e-3])
        parameter_dtype = torch.float32 if mixed else dtype
        tensors = {"x": _activation(sizes, values, shape, dtype)}
        for parameter in parameters:
            row = shape if name != "rms_norm" else (1, shape[-1])
            tensor = _parameter(sizes, values, row, parameter_dtype)
            tensors[parameter] = tensor if name != "rms_norm" else tensor[0]
        return Case(
            f"{name} {list(shape)} strides {list(tensors['x'].stride())} parameters {parameter_dtype} eps {eps}",
            tensors,
            functools.partial(getattr(hdit_kernels, name), eps=eps),
            functools.partial(getattr(reference, name), eps=eps),
            pooled=frozenset(parameters),
        )

    return generate


def gated_residual(sizes: random.Random, values: torch.Generator, dtype: torch.dtype, mixed: bool) -> Case:
    shape, parameter_dtype = _shape(sizes, dtype, mixed, True), torch.float32 if mixed else dtype
    tensors = {
        "x": _activation(sizes, values, shape, dtype),
        "y": _activation(sizes, values, shape, dtype),
        "gate": _parameter(sizes, values, shape, parameter_dtype),
    }
    strides = [list(tensors[name].stride()) for name in ("x", "y")]
    return Case(
        f"gated_residual {list(shape)} strides {strides} gate {parameter_dtype}",
        tensors,
        hdit_kernels.gated_residual,
        reference.gated_residual,
        pooled=frozenset({"gate"}),
    )


OPERATORS: dict[str, Generator] = {
    "rms_norm": _norm("rms_norm", ("weight",)),
    "ada_rms_norm": _norm("ada_rms_norm", ("scale",)),
    "ada_layer_norm": _norm("ada_layer_norm", ("shift", "scale")),
    "gated_residual": gated_residual,
}
