"""qk_norm_rope on the CPU: the reference against complex rotation, and how the operator behaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdit_kernels import qk_norm_rope


def draw(height=5, width=7, heads=2, dim=16, dtype=torch.float64):
    qkv = torch.randn(2, height, width, 3, heads, dim, dtype=dtype, requires_grad=True)
    scale = (torch.rand(heads, dtype=dtype) * 10 + 1).requires_grad_()
    theta = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        qkv,
        scale,
        torch.randn(height, heads, dim // 8, dtype=theta),
        torch.randn(width, heads, dim // 8, dtype=theta),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_equals_complex_rotation(height, width, heads, eighths, seed) -> None:
    torch.manual_seed(seed)
    qkv, scale, theta_y, theta_x = draw(height, width, heads, 8 * eighths)
    quarter = 2 * eighths
    q = torch.nn.functional.normalize(qkv[:, :, :, :2], dim=-1, eps=0) * scale.sqrt()[:, None]
    angle = torch.cat([theta_y[:, None] + 0 * theta_x[None], theta_x[None] + 0 * theta_y[:, None]], -1)
    turned = (
        torch.complex(q[..., :quarter], q[..., quarter : 2 * quarter])
        * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    )
    wanted = torch.cat([turned.real, turned.imag, q[..., 2 * quarter :]], -1)
    found = qk_norm_rope(qkv, scale, theta_y, theta_x, eps=0.0)
    torch.testing.assert_close(found[:, :, :, :2], wanted)
    assert torch.equal(found[:, :, :, 2], qkv[:, :, :, 2])


def test_eps_is_added_to_the_sum_of_squares(seed) -> None:
    qkv, scale, theta_y, theta_x = draw()
    ready = qk_norm_rope(qkv, scale, theta_y, theta_x, eps=3.0)[:, :, :, 0]
    norm = qkv[:, :, :, 0].square().sum(-1)
    torch.testing.assert_close(ready.square().sum(-1), scale * norm / (norm + 3.0))


def test_gradients(seed) -> None:
    qkv, scale, theta_y, theta_x = draw(2, 3, 2, 8)
    assert torch.autograd.gradcheck(lambda qkv, scale: qk_norm_rope(qkv, scale, theta_y, theta_x), (qkv, scale))


def test_opcheck(seed) -> None:
    inputs = [t.detach() for t in draw(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.hdit_kernels.qk_norm_rope_forward.default, (*inputs, 1e-6))
    torch.library.opcheck(torch.ops.hdit_kernels.qk_norm_rope_backward.default, (inputs[0], *inputs, 1e-6))


def test_compiles_whole(seed) -> None:
    inputs = draw(dtype=torch.float32)
    wanted, found = qk_norm_rope(*inputs), torch.compile(qk_norm_rope, fullgraph=True)(*inputs)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs[:2], cotangent), torch.autograd.grad(wanted, inputs[:2], cotangent)
    )


def test_dtypes_and_autocast(seed) -> None:
    qkv, scale, theta_y, theta_x = draw(dtype=torch.float32)
    assert qk_norm_rope(qkv.bfloat16(), scale, theta_y, theta_x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        ready = qk_norm_rope(qkv, scale, theta_y, theta_x)
    assert ready.dtype == torch.bfloat16
    dqkv, dscale = torch.autograd.grad(ready.float().sum(), [qkv, scale])
    assert dqkv.dtype == dscale.dtype == torch.float32


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.randn(2, 5, 7, 2, 2, 16), r"qkv: expected shape \[B, H, W, 3, heads, head_dim\]"),
        (0, torch.randn(2, 5, 7, 3, 2, 12), "multiple of 8, got 12"),
        (1, torch.ones(3), r"scale: expected shape \[2\], got \[3\]"),
        (2, torch.ones(7, 2, 2), r"theta_y: expected shape \[5, 2, 2\], got \[7, 2, 2\]"),
        (3, torch.ones(7, 2, 2, dtype=torch.int64), "theta_x: expected bfloat16"),
    ],
)
def test_bad_input(position, bad, message) -> None:
    inputs = list(draw(dtype=torch.float32))
    inputs[position] = bad
    with pytest.raises((TypeError, ValueError), match=message):
        qk_norm_rope(*inputs)


def test_sparse_tensors_are_named_after_a_call_alike() -> None:
    """Checks of shapes are remembered, and a sparse tensor has its dense one's."""
    inputs = draw(dtype=torch.float32)
    qk_norm_rope(*inputs)
    for i, name in enumerate(("qkv", "scale", "theta_y", "theta_x")):
        sparse = [t.detach().to_sparse() if i == j else t for j, t in enumerate(inputs)]
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got a sparse_coo one"):
            qk_norm_rope(*sparse)
