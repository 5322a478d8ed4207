"""The three backends on a GPU: the portable kernels never take Gluon's, the reference no kernel, and all agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from hdit_kernels import get_backend, launch, na2d, neighborhood_self_attention, qk_norm_rope, reference, set_backend
from hdit_kernels.testing import FLOOR, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("few_large_tiles")]


def packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    thetas = [torch.zeros(length, 2, 8, device="cuda") for length in query.shape[1:3]]
    return torch.stack((query, key, value), 3), torch.full((2,), 10.0, device="cuda"), *thetas


def by_parts(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Neighborhood self-attention with queries and keys rounded before attention, as the kernels have them."""
    ready = qk_norm_rope(*packed(query, key, value))
    return na2d(*ready.unbind(3), window, scale=1.0)


OPERATORS = {
    "na2d": na2d,
    "neighborhood_self_attention": lambda query, key, value, window: neighborhood_self_attention(
        *packed(query, key, value), window
    ),
}
ROUNDED = OPERATORS | {"neighborhood_self_attention": by_parts}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = get_backend()
    yield
    set_backend(before)


def run(operator: Callable[..., Tensor], window: int, tensors: list[Tensor]) -> tuple[list[Tensor], set[str]]:
    """Output and gradients, and the names of the kernels that were launched."""
    names: set[str] = set()
    launched = launch.run

    def listen(*launches: launch.Launch) -> None:
        names.update(each.function.fn.__name__ for each in launches)
        launched(*launches)

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with mock.patch.object(launch, "run", listen):
        out = operator(*leaves, window)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    return [out, *gradients], names


@pytest.mark.parametrize("window", [7, 13])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backends_agree(operator: str, window: int, seed: int) -> None:
    tensors = [torch.randn(2, 20, 19, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results, kernels = {}, {}
    for name in ("auto", "triton", "reference"):
        set_backend(name)
        results[name], kernels[name] = run(OPERATORS[operator], window, tensors)
    assert kernels["reference"] == set()
    assert kernels["triton"] and not any("hopper" in name for name in kernels["triton"])
    if torch.cuda.get_device_capability()[0] == 9:
        assert any("hopper" in name for name in kernels["auto"])
    set_backend("reference")
    exact, _ = run(OPERATORS[operator], window, [tensor.double() for tensor in tensors])
    rounded, _ = run(ROUNDED[operator], window, tensors)
    floor = FLOOR[torch.bfloat16]
    for plain, *all_found, want in zip(rounded, *results.values(), exact, strict=True):
        for found in all_found:
            assert relative_error(found, want) <= max(2 * relative_error(plain, want), floor)


def test_triton_has_no_float64_on_a_gpu() -> None:
    set_backend("triton")
    query = torch.randn(1, 9, 9, 1, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected bfloat16, float16 or float32, got float64"):
        na2d(query, query, query, 3)


def test_the_reference_runs_plain_pytorch_on_a_gpu() -> None:
    set_backend("reference")
    query = torch.randn(1, 9, 9, 1, 8, device="cuda")
    assert torch.equal(na2d(query, query, query, 3), reference.na2d(query, query, query, (3, 3))[0])
