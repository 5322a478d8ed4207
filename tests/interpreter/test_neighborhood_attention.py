"""na2d and neighborhood_self_attention: the launchers themselves, on tiny grids."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from hdit_kernels import launch, reference
from hdit_kernels.neighborhood_attention import dispatch, triton_configs, triton_device
from hdit_kernels.neighborhood_attention.dispatch import na2d_backward, na2d_forward
from hdit_kernels.testing import FLOOR, relative_error
from tests.lanes import kernels_only

# grid, window, dilation, heads, head_dim: one tile, several, borders inside a tile, odd sizes, rectangles, even windows
GRIDS = [
    ((3, 3), (3, 3), (1, 1), 1, 16),
    ((7, 9), (5, 3), (1, 1), 2, 24),
    ((11, 17), (7, 7), (1, 1), 1, 8),
    ((13, 10), (4, 6), (1, 1), 1, 16),
    ((13, 9), (3, 2), (2, 3), 1, 8),
    ((1, 12), (1, 9), (1, 1), 1, 8),
    ((19, 14), (11, 13), (1, 1), 1, 8),  # tall tiles
    ((17, 18), (14, 15), (1, 1), 1, 8),  # flat tiles
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("grid", "window", "dilation", "heads", "dim"), GRIDS)
def test_na2d(grid, window, dilation, heads, dim, dtype, seed) -> None:
    batch = 2 if window[0] * window[1] < 100 else 1  # a large window takes the interpreter seconds
    packed = torch.randn(batch, *grid, 3, heads, dim).to(dtype)
    tensors = list(packed.unbind(3))
    dout, dlse = torch.randn(batch, *grid, heads, dim).to(dtype), torch.randn(batch, *grid, heads)
    exact = [t.double() for t in tensors]
    out, lse = reference.na2d(*exact, window, dilation=dilation)
    wanted = reference.na2d_backward(dout.double(), dlse.double(), *exact, window, dilation=dilation)[:3]

    settings = ([*window], [1, 1], [*dilation], [False, False], dim**-0.5)
    with kernels_only():
        found, found_lse, stats = na2d_forward(*tensors, None, None, *settings, True, True)
        gradients = na2d_backward(dout, dlse, *tensors, None, None, found, stats, *settings)[:3]
    assert relative_error(found, out) <= FLOOR[dtype]
    assert (found_lse.double() - lse).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)
    for name, gradient, want in zip("qkv", gradients, wanted, strict=True):
        assert relative_error(gradient, want) <= FLOOR[dtype], f"d{name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_output_is_the_same_without_lse_and_statistics(dtype, seed) -> None:
    query, key, value = torch.randn(3, 1, 7, 9, 2, 24).to(dtype)
    settings = ([5, 3], [1, 1], [1, 1], [False, False], 0.2)
    with kernels_only():
        found, _, _ = na2d_forward(query, key, value, None, None, *settings, True, True)
        (alone,) = na2d_forward(query, key, value, None, None, *settings, False, False)
    assert torch.equal(alone, found)


def test_blocks_that_span_more_than_32_bits(seed, monkeypatch) -> None:
    monkeypatch.setattr(triton_configs, "MAX_OFFSET", 0)
    triton_configs.plan_tiles.cache_clear()
    query, key, value = (torch.randn(1, 11, 6, 2, 8) for _ in range(3))
    settings = ([3, 3], [1, 1], [2, 1], [False, False], 1.0)
    with kernels_only():
        found, stats = na2d_forward(query, key, value, None, None, *settings, False, True)
        gradients = na2d_backward(found, None, query, key, value, None, None, found, stats, *settings)[:3]
    triton_configs.plan_tiles.cache_clear()
    exact = [t.double() for t in (query, key, value)]
    out, _ = reference.na2d(*exact, (3, 3), dilation=(2, 1), scale=1.0)
    wanted = reference.na2d_backward(found.double(), None, *exact, (3, 3), dilation=(2, 1), scale=1.0)[:3]
    for tensor, want in zip([found, *gradients], [out, *wanted], strict=True):
        assert relative_error(tensor, want) <= FLOOR[torch.float32]


def test_more_images_than_an_axis_of_the_grid_holds(seed, monkeypatch) -> None:
    monkeypatch.setattr(triton_configs, "MAX_GRID", 3)
    query, key, value = (torch.randn(2, 5, 4, 1, 8) for _ in range(3))  # 2 samples of 2 x 2 sub-grids
    settings = ([2, 2], [1, 1], [2, 2], [False, False], 1.0)
    triton_configs.plan_tiles.cache_clear()
    with kernels_only():
        found, stats = na2d_forward(query, key, value, None, None, *settings, False, True)
        gradients = na2d_backward(found, None, query, key, value, None, None, found, stats, *settings)[:3]
    triton_configs.plan_tiles.cache_clear()
    exact = [t.double() for t in (query, key, value)]
    out, _ = reference.na2d(*exact, (2, 2), dilation=(2, 2), scale=1.0)
    wanted = reference.na2d_backward(out, None, *exact, (2, 2), dilation=(2, 2), scale=1.0)[:3]
    for result, want in zip((found, *gradients), (out, *wanted), strict=True):
        assert relative_error(result, want) <= FLOOR[torch.float32]


@triton.jit
def _factor_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    tl.store(y_ptr + at, triton_device.as_operand(tl.load(x_ptr + at), "tf32"))


def test_factors_are_rounded_to_tf32(seed) -> None:
    x = torch.randn(1024) * torch.randn(1024).mul(10).exp()
    x[0] = float("nan")
    found = torch.empty(1024)
    _factor_kernel[(1,)](x, found)
    assert found[0].isnan()
    assert ((found[1:].view(torch.int32) & 0x1FFF) == 0).all()
    error = (found[1:] / x[1:] - 1).double()
    assert error.abs().max() <= 2**-10 and error.square().mean().sqrt() < 2.5e-4 and error.mean().abs() < 3e-5


def test_a_window_of_one_key_returns_the_value(seed) -> None:
    query, key, value, dout = (torch.randn(1, 9, 5, 1, 8) for _ in range(4))
    settings = ([1, 1], [1, 1], [1, 1], [False, False], 1.0)
    with kernels_only():
        found, stats = na2d_forward(query, key, value, None, None, *settings, False, True)
        dq, dk, dv = na2d_backward(dout, None, query, key, value, None, None, found, stats, *settings)[:3]
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(dv, dout)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_large_logits_stay_finite(seed) -> None:
    query, key, value = (torch.randn(1, 6, 6, 1, 16) for _ in range(3))
    query, key = query * 60, key * 60  # logits up to about 1e4
    dout = torch.randn_like(query)
    exact = [t.double() for t in (query, key, value)]
    out, _ = reference.na2d(*exact, (5, 5), scale=0.25)
    wanted = reference.na2d_backward(dout.double(), None, *exact, (5, 5), scale=0.25)[:3]
    with kernels_only():
        settings = ([5, 5], [1, 1], [1, 1], [False, False], 0.25)
        found, stats = na2d_forward(query, key, value, None, None, *settings, False, True)
        gradients = na2d_backward(dout, None, query, key, value, None, None, found, stats, *settings)[:3]
    assert relative_error(found, out) <= 1e-3
    assert relative_error(gradients[2], wanted[2]) <= 1e-3
    for gradient, want in zip(
        gradients[:2], wanted[:2], strict=True
    ):  # of a softmax that is nearly one-hot: about zero
        assert (gradient - want).abs().max() <= 0.05 * key.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_self_attention(dtype, seed) -> None:
    qkv = torch.randn(2, 7, 10, 3, 2, 16).to(dtype)
    scale, theta_y, theta_x = torch.tensor([10.0, 4.0]), torch.randn(7, 2, 2), torch.randn(10, 2, 2)
    dout = torch.randn(2, 7, 10, 2, 16).to(dtype)
    leaves = [qkv.double().requires_grad_(), scale.double().requires_grad_()]
    out = reference.neighborhood_self_attention(*leaves, theta_y.double(), theta_x.double(), (5, 5))
    dqkv, dscale = torch.autograd.grad(out, leaves, dout.double())
    with kernels_only():
        with mock.patch.object(launch, "run", side_effect=launch.run) as run:  # once, so that all compile side by side
            found, ready, stats = dispatch.self_attention_forward(qkv, scale, theta_y, theta_x, [5, 5], 1e-6, True)
            found_dqkv, found_dscale = dispatch.self_attention_backward(
                dout, qkv, scale, theta_y, theta_x, ready, found, stats, [5, 5], 1e-6
            )
    assert [len(call.args) for call in run.call_args_list] == [2, 4]
    limit = 2 * FLOOR[dtype]  # q and k are rounded once more on the way
    assert relative_error(found, out) <= limit
    assert relative_error(found_dqkv, dqkv) <= 2 * limit
    assert relative_error(found_dscale, dscale) <= (1e-5 if dtype == torch.float32 else 2e-2)
