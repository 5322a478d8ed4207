from __future__ import annotations

import torch

from hdit_kernels.neighborhood_attention.backward import na2d_backward
from hdit_kernels.neighborhood_attention.forward import na2d_forward

REST = ([1, 1], [1, 1], [False, False], 0.125)


def launch(dtype: torch.dtype, wide: bool) -> None:
    """Windows of each set of configurations, and on Hopper of each of its own kernels' compile keys."""
    for window in ([7, 7], [13, 13]) if wide else ([2, 2], [5, 5], [7, 7], [9, 9], [13, 13]):
        qkv = torch.randn(1, 13, 13, 3, 2, 128 if wide else 64, dtype=dtype)
        out, lse, stats = na2d_forward(*qkv.unbind(3), None, None, window, *REST, True, True)
        na2d_forward(*qkv.unbind(3), None, None, window, *REST, False, False)
        na2d_backward(out, lse, *qkv.unbind(3), None, None, out, stats, window, *REST)
