"""Launches of the norms and gates, at a narrow width (several rows a program) and a wide one (one row, more warps)."""

from __future__ import annotations

import torch

from hdit_kernels import norms_triton


def launch(dtype: torch.dtype, wide: bool) -> None:
    channels = 5000 if wide else 128  # 5000 is no power of two
    x, y, dout = (torch.zeros(2, 3, channels, dtype=dtype) for _ in range(3))
    per_sample = torch.zeros(2, channels)
    weight = torch.zeros(channels)
    norms_triton.rms_norm_forward(x, weight, 1e-6)
    norms_triton.rms_norm_backward(dout, x, weight, 1e-6)
    norms_triton.ada_rms_norm_forward(x, per_sample, 1e-6)
    norms_triton.ada_rms_norm_backward(dout, x, per_sample, 1e-6)
    norms_triton.ada_layer_norm_forward(x, per_sample, per_sample, 1e-6)
    norms_triton.ada_layer_norm_backward(dout, x, per_sample, per_sample, 1e-6)
    norms_triton.gated_residual_forward(x, y, per_sample)
    norms_triton.gated_residual_backward(dout, y, per_sample)
