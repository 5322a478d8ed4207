"""Kernels and launchers of `feed_forward`.

Forward on Hopper GPUs at the widths of `feed_forward_hopper`: one kernel. Elsewhere, and backward: the norm's and
GEGLU's kernels and torch's products. Backward keeps nothing but the inputs: it computes the hidden activations anew.
For N tokens, b bytes an element, between the products `geglu_in_place` reads the up projection u and the hidden
gradient and puts du and the hidden activations in their places: 6·N·d_ff·b bytes, where GEGLU forward and backward
would move 8. So the most that backward holds beside the gradients is 3·N·d_ff + 2·N·C elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit_kernels import feed_forward_hopper, launch
from hdit_kernels.geglu_triton import geglu_forward, geglu_in_place
from hdit_kernels.norms_triton import ada_rms_norm_backward, ada_rms_norm_forward


def feed_forward_forward(x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    x, up, down = x.contiguous(), _factor(up, x), _factor(down, x)
    if feed_forward_hopper.takes(x, scale, up, down):
        out = launch.empty_like(x)
        launch.run(feed_forward_hopper.forward_launch(x, scale, up, down, eps, out))
        return out
    hidden = geglu_forward(F.linear(ada_rms_norm_forward(x, scale, eps), up))
    return torch.addmm(_rows(x), _rows(hidden), down.T).view(x.shape)


def feed_forward_backward(
    dout: Tensor, x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    dout, x = dout.contiguous(), x.contiguous()
    up_factor, down_factor = _factor(up, x), _factor(down, x)
    normed = ada_rms_norm_forward(x, scale, eps)
    u = _rows(normed) @ up_factor.T
    hidden = _rows(dout) @ down_factor  # its gradient, until the kernel
    geglu_in_place(hidden, u)
    found = [dout.new_empty(0) for _ in needed]
    if needed[3]:
        found[3] = (_rows(dout).T @ hidden).to(down.dtype)
    del hidden
    if needed[2]:
        found[2] = (u.T @ _rows(normed)).to(up.dtype)
    if needed[0] or needed[1]:
        dnormed = (u @ up_factor).view(x.shape)
        del u
        dx, dscale = ada_rms_norm_backward(dnormed, x, scale, eps, residual=dout)
        if needed[0]:
            found[0] = dx
        if needed[1]:
            found[1] = dscale
    return tuple(found)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])


def _factor(weight: Tensor, x: Tensor) -> Tensor:
    """A weight as products take it."""
    return weight.to(x.dtype).contiguous()
