from __future__ import annotations

import torch

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
    token_merge_forward(fine, merge, patch_size)
    token_merge_backward(coarse, fine, merge, patch_size, [True, True])
    token_split_forward(coarse, split, patch_size, skip, fac)
    token_split_backward(fine, coarse, split, patch_size, skip, fac, [True, True, wide, wide])
