"""On a GPU: derivatives beyond the ordinary backward pass, single gradients, empty batches, and how far NaN reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hdit_kernels
from hdit_kernels import launch
from tests.cases import Case
from tests.test_autograd import OPERATIONS, drawn, energy
from tests.test_gpu_operators import OPERATORS, on_gpu, variants

pytestmark = pytest.mark.gpu


def each_operation(test: Any) -> Any:
    return pytest.mark.usefixtures("cuda_by_default")(pytest.mark.parametrize("name", OPERATIONS)(test))


@pytest.fixture
def cuda_by_default() -> Iterator[None]:
    """The README recommends it, and the operations of test_autograd.py make tensors of their own."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def call(name: str) -> Any:
    """The operator on float32 tensors, which run the kernels."""
    return OPERATIONS[name].call


def close(found: Any, wanted: Any) -> None:
    wanted = torch.utils._pytree.tree_map(lambda t: t.float(), wanted)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@each_operation
def test_second_derivatives(name: str, seed: int) -> None:
    """First derivatives by the kernels, second ones by the reference, beside float64."""

    def derivatives(tensors: tuple[Tensor, ...], function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(energy(function, *leaves), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    exact = drawn(name)
    found = derivatives(tuple(t.float() for t in exact), call(name))
    close(found, derivatives(exact, OPERATIONS[name].plain))


@each_operation
def test_torch_func(name: str, seed: int) -> None:
    positions = tuple(range(len(OPERATIONS[name].shapes)))

    def gradients(function: Any) -> Any:
        return torch.func.grad(lambda *t: energy(function, *t), argnums=positions)

    exact = drawn(name, 2)
    several = tuple(t.float() for t in exact)
    wanted = [gradients(OPERATIONS[name].plain)(*(t[i] for t in exact)) for i in range(2)]
    close(gradients(call(name))(*(t[0] for t in several)), wanted[0])
    close(torch.vmap(gradients(call(name)))(*several), tuple(map(torch.stack, zip(*wanted, strict=True))))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_single_gradient_is_that_of_all(operator: str, seed: int) -> None:
    """Bit for bit: kernels leave out what nobody asks for, and nothing else changes."""
    for case in variants(OPERATORS[operator], seed, largest=2**20):
        tensors = on_gpu(case.tensors)
        names = [name for name in tensors if name not in case.frozen]
        together = gradients_of(case, tensors, names, seed)
        for name in names:
            (alone,) = gradients_of(case, tensors, [name], seed)
            assert torch.equal(alone, together[names.index(name)]), f"{name} of {case.description}"


def gradients_of(case: Case, tensors: dict[str, Tensor], asked: list[str], seed: int) -> tuple[Tensor, ...]:
    leaves = {n: t.detach().requires_grad_(n in asked) for n, t in tensors.items()}
    found = case.call(**leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    values = torch.Generator("cuda").manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=values, device="cuda").to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, [leaves[n] for n in asked], cotangents)


@each_operation
def test_an_empty_batch(name: str) -> None:
    shared = {
        "rms_norm": (1,),
        "feed_forward": (2, 3),
        "token_merge": (1,),
        "token_split": (1,),
        "token_split_skip": (1, 3),
    }
    kept = (shared | {"qk_norm_rope": (1,), "neighborhood_self_attention": (1,)}).get(name, ())
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [(t if i in kept else t[:0]).to(dtype).requires_grad_() for i, t in enumerate(drawn(name))]
        found = call(name)(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        assert all(output.shape[0] == 0 and output.is_cuda for output in outputs)
        cotangents = [torch.empty_like(output) for output in outputs]
        assert all(not g.any() for g in torch.autograd.grad(outputs, leaves, cotangents))


# Where NaN goes


@pytest.mark.parametrize(
    ("dtype", "dim", "window", "dilation"),
    [
        (torch.bfloat16, 64, 7, 1),
        (torch.bfloat16, 32, 3, 1),
        (torch.float16, 64, 9, 1),
        (torch.bfloat16, 128, 7, 1),
        (torch.bfloat16, 64, 13, 1),
        (torch.float32, 64, 7, 1),
        (torch.bfloat16, 24, 5, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_how_far_nan_reaches(where: str, dtype: torch.dtype, dim: int, window: int, dilation: int, seed: int) -> None:
    """Every query that sees it is spoiled; so may be neighbours in its tile, but no other head or image."""
    shape, (row, column) = (2, 120, 104, 2, dim), (61, 50)
    tensors = {name: torch.randn(shape, device="cuda").to(dtype) for name in ("query", "key", "value")}
    spoiled = {name: t.clone() for name, t in tensors.items()}
    spoiled[where][1, row, column, 1] = math.nan

    def both_ways(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        out = hdit_kernels.na2d(**leaves, kernel_size=window, dilation=dilation)
        gradients = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        return {"out": out, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}

    clean, found = both_ways(tensors), both_ways(spoiled)
    seen = torch.zeros(shape[1:3], dtype=torch.bool, device="cuda")
    if where == "query":
        seen[row, column] = True
    else:  # far from the borders
        near = [p + dilation * (torch.arange(window) - window // 2) for p in (row, column)]
        seen[near[0][:, None], near[1][None, :]] = True
    bad = found["out"].isnan().any(-1)
    assert bad[1, :, :, 1][seen].all()
    # a tile of queries and what its blocks hold beyond their windows; the docstring of na2d says 48 for every GPU
    beyond = 16 if launch.gpu_family(bad.device) == "hopper" else 48
    for name, result in found.items():
        bad = ~(result == clean[name]).all(-1)
        others = bad.clone()
        others[1, :, :, 1] = False
        assert not others.any(), f"{name} of another head or image"
        away = (bad[1, :, :, 1].nonzero() - torch.tensor([row, column], device="cuda")).abs()
        distance = away.max().item() if len(away) else 0  # a value has no say in its own gradient
        print(f"{where} {name}: {bad.sum().item()} spoiled, at most {distance} away")
        half, steps = window // 2, 2 if name in ("dkey", "dvalue") else 1  # to queries, and on to the keys they see
        assert distance <= steps * (half + beyond) * dilation, name
