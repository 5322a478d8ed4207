from __future__ import annotations

from unittest import mock

import torch

from hdit_kernels import tokens_triton
from hdit_kernels.tokens_triton import (
    token_merge_backward,
    token_merge_forward,
    token_split_backward,
    token_split_forward,
)


def launch(dtype: torch.dtype, wide: bool) -> None:
    """Wide: levels of 128 and 256 channels, with a skip. Narrow: pixels, channels first, and 128; float32 weights."""
    if wide:
        fine, coarse, patch_size = (
            torch.randn(1, 4, 4, 128, dtype=dtype),
            torch.randn(1, 2, 2, 256, dtype=dtype),
            (2, 2),
        )
    else:
        fine = torch.randn(1, 3, 8, 8, dtype=dtype).movedim(-3, -1)
        coarse, patch_size = torch.randn(1, 2, 2, 128, dtype=dtype), (4, 4)
    inside, outside = patch_size[0] * patch_size[1] * fine.shape[-1], coarse.shape[-1]
    merge = torch.randn(outside, inside, dtype=dtype if wide else torch.float32)
    split = torch.randn(inside, outside, dtype=merge.dtype)
    skip, fac = (fine, torch.ones(1, dtype=merge.dtype)) if wide else (None, None)
    for save in (False, True):
        token_merge_forward(fine, merge, patch_size, save)
        token_split_forward(coarse, split, patch_size, skip, fac, save)
        with mock.patch.object(tokens_triton, "SPLIT_FUSED", 0):
            token_split_forward(coarse, split, patch_size, skip, fac, save)
    patches = coarse.new_empty(*coarse.shape[:3], inside)
    token_merge_backward(coarse, patches, merge, patch_size, [True, True])
    rest = (patches, fac, dtype) if wide else (None, None, None)
    token_split_backward(fine, coarse, split, patch_size, *rest, [True, True, wide, wide])
