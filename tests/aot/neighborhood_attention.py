from __future__ import annotations

import torch

from hdit_kernels.neighborhood_attention.backward import na2d_backward
from hdit_kernels.neighborhood_attention.forward import na2d_forward

SETTINGS = ([7, 7], [1, 1], [1, 1], [False, False], 0.125)


def launch(dtype: torch.dtype, wide: bool) -> None:
    qkv = torch.randn(1, 9, 9, 3, 2, 128 if wide else 64, dtype=dtype)
    out, lse, stats = na2d_forward(*qkv.unbind(3), None, None, *SETTINGS, True)
    na2d_backward(out, lse, *qkv.unbind(3), None, None, out, stats, *SETTINGS)
