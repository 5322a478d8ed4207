from __future__ import annotations

import torch

from hdit_kernels.geglu_triton import geglu_backward, geglu_forward


def launch(dtype: torch.dtype, wide: bool) -> None:
    d_ff = 768 if wide else 21  # wide loads, and narrow ones
    x, dout = torch.randn(1, 3, 2 * d_ff, dtype=dtype), torch.randn(1, 3, d_ff, dtype=dtype)
    geglu_forward(x)
    geglu_backward(dout, x)
