"""token_merge and token_split: the launchers themselves, on tiny tensors (the interpreter's tl.dot has no bfloat16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from hdit_kernels import reference, tokens_triton
from hdit_kernels.testing import FLOOR, relative_error
from hdit_kernels.tokens import _patches
from hdit_kernels.tokens_triton import (
    Tile,
    tile_for,
    token_merge_backward,
    token_merge_forward,
    token_split_backward,
    token_split_forward,
)
from tests.lanes import kernels_only


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """So that tiny tensors have many tiles; test_shipped_tiles undoes it."""
    tile = Tile(16, 16, 16, 1, 1)
    with (
        mock.patch.object(tokens_triton, "tile_for", lambda *_: tile),
        mock.patch.object(tokens_triton, "SUM_PROGRAMS", 3),
    ):
        yield


def check_merge(x: Tensor, weight: Tensor, patch_size: tuple[int, int], dout: Tensor) -> None:
    out, wanted = exact([x, weight], dout, lambda x, weight: reference.token_merge(x, weight, patch_size))
    _, (_, terms) = exact([x.abs(), weight], dout.abs(), lambda x, weight: reference.token_merge(x, weight, patch_size))
    with kernels_only():
        (alone,) = token_merge_forward(x, weight, patch_size, False)
        found, patches = token_merge_forward(x, weight, patch_size, True)
        dx, dweight = token_merge_backward(dout, patches, weight, patch_size, [True, True])
    compare(alone, out, x.dtype)
    compare(found, out, x.dtype)
    assert torch.equal(patches, _patches(x, patch_size))
    compare(dx, wanted[0], x.dtype)
    compare(dweight, wanted[1], x.dtype, weight.dtype, terms)


def check_split(
    x: Tensor, weight: Tensor, patch_size: tuple[int, int], skip: Tensor | None, fac: Tensor | None, dout: Tensor
) -> None:
    def split(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return reference.token_split(x, weight, patch_size, *rest)

    given = [t for t in (x, weight, skip, fac) if t is not None]
    out, wanted = exact(given, dout, split)
    magnitudes = [x.abs(), weight.abs()] if skip is None or fac is None else [x.abs(), weight.abs(), -skip.abs(), fac]
    _, terms = exact(magnitudes, dout.abs(), split)  # their sums for weight and fac have no term of another sign
    needed = [t is not None for t in (x, weight, skip, fac)]
    with kernels_only():
        (alone,) = token_split_forward(x, weight, patch_size, skip, fac, False)
        found, *kept = token_split_forward(x, weight, patch_size, skip, fac, True)
        more = (None, None, None) if skip is None else (kept[0], fac, skip.dtype)
        gradients = token_split_backward(dout, x, weight, patch_size, *more, needed)
    compare(alone, out, x.dtype)
    assert torch.equal(found, alone)
    for index in range(len(given)):
        summed = terms[index] if index in (1, 3) else None  # weight and fac
        compare(gradients[index], wanted[index], x.dtype, given[index].dtype, summed)
    assert all(gradient.numel() == 0 for gradient in gradients[len(given) :])


def exact(inputs: list[Tensor], dout: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients in float64."""
    leaves = [t.double().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout.double())


def compare(
    found: Tensor, wanted: Tensor, dtype: torch.dtype, own: torch.dtype | None = None, terms: Tensor | None = None
) -> None:
    """Error within the floor of the dtypes, relative to the result; or, of a sum over tokens, whose terms nearly cancel
    in a tiny case, relative to the sum of their magnitudes.
    """
    own = own or dtype
    assert found.dtype == own and found.shape == wanted.shape and found.is_contiguous()
    size = 1.0 if terms is None else max(1.0, (terms.norm() / wanted.norm()).item())
    assert relative_error(found, wanted) <= max(FLOOR[dtype], FLOOR[own]) * size


def parameters(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


def check_both(grid, patch_size, channels, features, dtype, parameter_dtype) -> None:
    (height, width), (h, w) = grid, patch_size
    fine, coarse, columns = (2, height * h, width * w, channels), (2, height, width, features), h * w * channels
    check_merge(
        torch.randn(fine).to(dtype),
        parameters(features, columns, parameter_dtype),
        patch_size,
        torch.randn(coarse).to(dtype),
    )
    x, weight = torch.randn(coarse).to(dtype), parameters(columns, features, parameter_dtype)
    dout, skip, fac = torch.randn(fine).to(dtype), torch.randn(fine).to(dtype), torch.tensor([0.3]).to(parameter_dtype)
    check_split(x, weight, patch_size, None, None, dout)
    check_split(x, weight, patch_size, skip, fac, dout)


@pytest.mark.parametrize(
    ("grid", "patch_size", "channels", "features"),
    [
        ((3, 5), (2, 2), 8, 16),
        ((1, 3), (4, 4), 3, 16),  # patches of pixels
        ((3, 1), (2, 4), 5, 7),
        ((1, 5), (3, 1), 16, 24),  # whole blocks of columns within a position of the patch
        ((5, 2), (1, 1), 1, 1),
        ((2, 2), (1, 2), 32, 17),
    ],
)
def test_shapes(grid, patch_size, channels, features, seed) -> None:
    """Products by the kernel where x's runs are multiples of 16."""
    check_both(grid, patch_size, channels, features, torch.float16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize(("channels", "features"), [(3, 10), (16, 16)])
def test_dtypes(channels, features, dtype, parameter_dtype, seed) -> None:
    check_both((1, 3), (2, 2), channels, features, dtype, parameter_dtype)


@pytest.mark.parametrize(("channels", "gap"), [(3, 0), (32, 0), (8, 8), (8, 3)])
def test_strided(channels: int, gap: int, seed: int) -> None:
    """Every activation as an image [B, C, H, W] seen channels last (gap 0), or with gaps between tokens and swapped
    axes; the weights with gaps between rows.
    """

    def strided(batch: int, height: int, width: int, size: int) -> Tensor:
        if gap == 0:
            return torch.randn(batch, size, height, width).half().movedim(-3, -1)
        return torch.randn(width, batch, height, size + gap).half().permute(1, 2, 0, 3)[..., :size]

    fine, coarse = strided(2, 6, 4, channels), strided(2, 3, 2, 32)
    weight = (torch.randn(32, 4 * channels + gap) / 4).half()[:, : 4 * channels]
    check_merge(fine, weight, (2, 2), coarse)
    weight = (torch.randn(4 * channels, 32 + gap) / 4).half()[:, :32]
    check_split(coarse, weight, (2, 2), strided(2, 6, 4, channels), torch.rand(1), fine)
    check_split(coarse, weight, (2, 2), None, None, fine)


def test_transposed_weight_and_expanded_gradient(seed: int) -> None:
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(32, 16).t() / 4
    check_merge(x, weight, (2, 2), torch.ones(()).expand(1, 2, 2, 16))
    check_split(
        x, torch.randn(8, 32).t() / 4, (2, 2), torch.randn(1, 8, 8, 8), torch.ones(1), torch.ones(()).expand(1, 8, 8, 8)
    )


def test_offset_start(seed: int) -> None:
    """x, skip and the weight begin in the middle of a 16-byte word, though their strides are multiples of one."""
    x, weight = torch.randn(1, 4, 4, 48)[..., 3:35], (torch.randn(8, 136) / 10)[:, 5:133]
    check_merge(x, weight, (2, 2), torch.randn(1, 2, 2, 8))
    weight = (torch.randn(128, 40) / 6)[:, 5:37]
    check_split(
        x, weight, (2, 2), torch.randn(1, 8, 8, 40)[..., 1:33], torch.rand(1), torch.randn(1, 8, 8, 40)[..., 7:39]
    )


@pytest.mark.parametrize("channels", [3, 8])
def test_products_by_cublas(channels: int, seed: int) -> None:
    """As the widest are made."""
    x, weight, dout = (
        torch.randn(2, 6, 4, channels),
        parameters(16, 4 * channels, torch.float32),
        torch.randn(2, 3, 2, 16),
    )
    with mock.patch.multiple(tokens_triton, MERGE_FUSED=0, SPLIT_FUSED=0):
        check_merge(x, weight, (2, 2), dout)
        check_merge(x.transpose(1, 2).contiguous().transpose(1, 2), weight, (2, 2), dout)
        check_split(dout, weight.t(), (2, 2), None, None, x)
        check_split(dout, weight.t(), (2, 2), torch.randn(2, channels, 6, 4).movedim(-3, -1), torch.rand(1), x)


def test_autocast_changes_no_product(seed: int) -> None:
    """As a backward pass may run in it."""
    with torch.autocast("cpu", torch.bfloat16), mock.patch.multiple(tokens_triton, MERGE_FUSED=0, SPLIT_FUSED=0):
        check_both((1, 3), (2, 2), 3, 10, torch.float32, torch.float32)


@pytest.mark.parametrize("family", ["default", "hopper"])
def test_shipped_tiles(family: str, seed: int) -> None:
    dtype = torch.float16
    with (
        mock.patch("hdit_kernels.launch.gpu_family", lambda device: family),
        mock.patch.object(tokens_triton, "tile_for", tile_for),
    ):
        fine, coarse = torch.randn(1, 4, 4, 32).to(dtype), torch.randn(1, 2, 2, 64).to(dtype)
        check_merge(fine, parameters(64, 128, dtype), (2, 2), coarse)
        check_split(coarse, parameters(128, 64, dtype), (2, 2), fine.flip(0), torch.rand(1), fine)
        check_split(coarse, parameters(48, 64, dtype), (4, 4), None, None, torch.randn(1, 8, 8, 3).to(dtype))


@pytest.mark.parametrize("fac", [0.0, 1.0])
def test_only_the_needed_gradients(fac: float, seed: int) -> None:
    """Each alone equals the one that comes with all others, the rest are empty; at the ends of the interpolation."""
    x, weight, kept = torch.randn(2, 3, 2, 8), torch.randn(12, 8), torch.randn(2, 3, 2, 12)
    dout, merge_dout, factor = torch.randn(2, 6, 4, 3), torch.randn(2, 3, 2, 8), torch.tensor([fac])
    rest = (kept, factor, torch.float32)
    calls = {
        2: lambda needed: token_merge_backward(merge_dout, kept, weight.t().contiguous(), (2, 2), needed),
        4: lambda needed: token_split_backward(dout, x, weight, (2, 2), *rest, needed),
    }
    for count, call in calls.items():
        with kernels_only():
            together = call([True] * count)
            for index in range(count):
                alone = call([index == other for other in range(count)])
                assert torch.equal(alone[index], together[index]) and together[index].isfinite().all()
                assert all(alone[other].numel() == 0 for other in range(count) if other != index)
