from __future__ import annotations

import torch

from hdit_kernels.rope_triton import qk_norm_rope_backward, qk_norm_rope_forward


def launch(dtype: torch.dtype, wide: bool) -> None:
    dim = 128 if wide else 64
    qkv = torch.randn(1, 9, 9, 3, 2, dim, dtype=dtype)
    angles = (torch.ones(2), torch.randn(9, 2, dim // 8), torch.randn(9, 2, dim // 8))
    qk_norm_rope_forward(qkv, *angles, 1e-6)
    qk_norm_rope_backward(qkv, qkv, *angles, 1e-6)
