"""Every operator under torch.compile and torch.export: one graph for all sizes, also under a default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import hdit_kernels

OPERATORS: dict[str, tuple[Callable[..., Any], Callable[[int, int, int], tuple[Tensor, ...]]]] = {
    # what is called, and its tensors for a batch, height and width
    "rms_norm": (hdit_kernels.rms_norm, lambda b, h, w: (torch.randn(b, h, w, 6), torch.randn(6))),
    "ada_rms_norm": (hdit_kernels.ada_rms_norm, lambda b, h, w: (torch.randn(b, h, w, 6), torch.randn(b, 6))),
    "ada_layer_norm": (
        hdit_kernels.ada_layer_norm,
        lambda b, h, w: (torch.randn(b, h, w, 6), torch.randn(b, 6), torch.randn(b, 6)),
    ),
    "gated_residual": (
        hdit_kernels.gated_residual,
        lambda b, h, w: (torch.randn(b, h, w, 6), torch.randn(b, h, w, 6), torch.randn(b, 6)),
    ),
    "geglu": (hdit_kernels.geglu, lambda b, h, w: (torch.randn(b, h, w, 6),)),
    "feed_forward": (
        hdit_kernels.feed_forward,
        lambda b, h, w: (torch.randn(b, h, w, 6), torch.randn(b, 6), torch.randn(26, 6), torch.randn(6, 13)),
    ),
    "token_merge": (hdit_kernels.token_merge, lambda b, h, w: (torch.randn(b, 2 * h, 2 * w, 3), torch.randn(5, 12))),
    "token_split": (
        lambda x, weight, skip, fac: hdit_kernels.token_split(x, weight, (2, 2), skip, fac),
        lambda b, h, w: (torch.randn(b, h, w, 5), torch.randn(12, 5), torch.randn(b, 2 * h, 2 * w, 3), torch.rand(1)),
    ),
    "qk_norm_rope": (
        hdit_kernels.qk_norm_rope,
        lambda b, h, w: (torch.randn(b, h, w, 3, 2, 8), torch.rand(2) + 1, torch.randn(h, 2, 1), torch.randn(w, 2, 1)),
    ),
    "neighborhood_self_attention": (
        lambda *tensors: hdit_kernels.neighborhood_self_attention(*tensors, kernel_size=3),
        lambda b, h, w: (torch.randn(b, h, w, 3, 2, 8), torch.rand(2) + 1, torch.randn(h, 2, 1), torch.randn(w, 2, 1)),
    ),
    "na2d": (
        lambda query, key, value: hdit_kernels.na2d(query, key, value, 3, return_lse=True),
        lambda b, h, w: tuple(torch.randn(b, h, w, 2, 8) for _ in range(3)),
    ),
}
each_operator = pytest.mark.parametrize("name", OPERATORS)
# None equals another size of its tensors: Dynamo takes equal ones for the same.
SIZES = [(4, 7, 9), (7, 9, 10), (9, 4, 11)]


@pytest.fixture
def default_device() -> Iterator[None]:
    """As torch.set_default_device, which the README recommends on a GPU: a mode that sees every call."""
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


def leaves(make: Callable[..., tuple[Tensor, ...]], size: tuple[int, int, int]) -> list[Tensor]:
    """The tensors; all have a gradient but the angles, so that the backward pass is traced, too."""
    return [t.requires_grad_(t.ndim != 3) for t in make(*size)]


def fresh_compile(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


@each_operator
def test_one_graph_for_all_sizes(name: str, seed: int) -> None:
    function, make = OPERATORS[name]
    compiled, counter = fresh_compile(function, dynamic=True)
    for size in SIZES:
        tensors = leaves(make, size)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert counter.frame_count == 1


@each_operator
def test_sizes_marked_dynamic(name: str, seed: int) -> None:
    """mark_dynamic raises where a size becomes a constant of the graph."""
    function, make = OPERATORS[name]
    compiled, counter = fresh_compile(function)
    for size in SIZES[:2]:
        tensors = leaves(make, size)
        for tensor in tensors:
            for dim in range(3 if tensor.ndim > 3 else 1):
                if tensor.shape[dim] in (*size, 2 * size[1], 2 * size[2]):
                    torch._dynamo.mark_dynamic(tensor, dim)
        compiled(*tensors)
    assert counter.frame_count == 1


@each_operator
def test_compiles_whole_under_a_default_device(name: str, seed: int, default_device: None) -> None:
    function, make = OPERATORS[name]
    compiled, _ = fresh_compile(function)
    tensors = leaves(make, SIZES[0])
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in OPERATORS), ("na2d", True), ("geglu", True)])
def test_exports_with_a_free_batch(name: str, strict: bool, seed: int) -> None:
    function, make = OPERATORS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    tensors, others, batch = tuple(leaves(make, (4, 7, 9))), leaves(make, (9, 7, 9)), torch.export.Dim("batch")
    free = tuple({0: batch} if t.shape != o.shape else None for t, o in zip(tensors, others, strict=True))
    exported = torch.export.export(Module(), tensors, dynamic_shapes=(free,), strict=strict)
    torch.testing.assert_close(exported.module()(*others), function(*others))
