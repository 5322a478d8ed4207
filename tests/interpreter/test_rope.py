"""qk_norm_rope: the launchers themselves, on tiny tensors."""

from __future__ import annotations

import pytest
import torch

from hdit_kernels import launch, reference
from hdit_kernels.rope_triton import (
    qk_norm_rope_backward,
    qk_norm_rope_backward_launches,
    qk_norm_rope_forward,
    qk_norm_rope_forward_launch,
)
from hdit_kernels.testing import FLOOR, relative_error
from tests.lanes import kernels_only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("grid", "heads", "dim"), [((3, 5), 2, 8), ((7, 6), 3, 24), ((1, 9), 1, 64)])
def test_qk_norm_rope(grid, heads, dim, dtype, seed) -> None:
    height, width = grid
    wide = torch.randn(2, height, width, 3, heads, dim + 8).to(dtype)
    qkv = wide[..., :dim]  # gaps between heads
    scale = torch.rand(heads) * 10 + 1
    theta_y, theta_x = torch.randn(height, heads, dim // 8) * 5, torch.randn(width, heads, dim // 8) * 5
    dready = torch.randn(width, 2, height, 3, heads, dim).to(dtype).permute(1, 2, 0, 3, 4, 5)
    leaves = [qkv.double().requires_grad_(), scale.double().requires_grad_()]
    ready = reference.qk_norm_rope(*leaves, theta_y.double(), theta_x.double())
    dqkv, dscale = torch.autograd.grad(ready, leaves, dready.double())
    with kernels_only():
        found = qk_norm_rope_forward(qkv, scale, theta_y, theta_x, 1e-6)
        only_qk = qkv.new_empty((2, height, width, 2, heads, dim))
        launch.run(qk_norm_rope_forward_launch(only_qk, qkv, scale, theta_y, theta_x, 1e-6))
        found_dqkv, found_dscale = qk_norm_rope_backward(dready, qkv, scale, theta_y, theta_x, 1e-6)
        in_place = dready.contiguous()
        launch.run(*qk_norm_rope_backward_launches(in_place, in_place, qkv, scale, theta_y, theta_x, 1e-6)[1])
    assert relative_error(found, ready) <= FLOOR[dtype]
    assert torch.equal(found[:, :, :, :2], only_qk)
    assert relative_error(found_dqkv, dqkv) <= FLOOR[dtype]
    assert relative_error(found_dscale, dscale) <= FLOOR[dtype] * 10
    assert torch.equal(in_place, found_dqkv)
