from __future__ import annotations

import torch

from hdit_kernels.neighborhood_attention.dispatch import na2d_backward, na2d_forward

NARROW = [(64, [2, 2]), (64, [5, 5]), (64, [7, 7]), (64, [9, 9]), (64, [13, 13]), (32, [7, 7]), (32, [9, 9])]
WIDE = [(128, [7, 7]), (128, [13, 13])]
REST = ([1, 1], [1, 1], [False, False], 0.125)


def launch(dtype: torch.dtype, wide: bool) -> None:
    """Windows of each set of configurations, and on Hopper of each of its own kernels' compile keys."""
    for head_dim, window in WIDE if wide else NARROW:
        qkv = torch.randn(1, 13, 13, 3, 2, head_dim, dtype=dtype)
        out, lse, stats = na2d_forward(*qkv.unbind(3), None, None, window, *REST, True, True)
        na2d_forward(*qkv.unbind(3), None, None, window, *REST, False, False)
        na2d_backward(out, lse, *qkv.unbind(3), None, None, out, stats, window, *REST)
    options(dtype, wide)


def options(dtype: torch.dtype, wide: bool) -> None:
    """The variants of the portable kernels, which have no shapes of windows of their own."""
    if dtype == torch.float16 or (wide and dtype == torch.float32):  # as bfloat16; takes long
        return
    head_dim, head_dim_v = (256, 512) if wide else (64, 64)
    shapes = [(4, head_dim), (2, head_dim), (2, head_dim_v)]
    query, key, value = (torch.randn(1, 9, 9, *shape, dtype=dtype) for shape in shapes)
    tensors, settings = (query, key, value, key[:, 0], value[:, 0]), ([7, 7], [2, 3], [1, 1], [True, False], 0.125)
    out, lse, stats = na2d_forward(*tensors, *settings, True, True)
    na2d_backward(out, lse, *tensors, out, stats, *settings)
