from __future__ import annotations

import torch

from hdit_kernels.feed_forward_triton import feed_forward_backward, feed_forward_forward


def launch(dtype: torch.dtype, wide: bool) -> None:
    """The widths of the one kernel on Hopper; narrow also one that has none, with float32 parameters."""
    for channels in (256,) if wide else (128, 21):
        parameters = torch.float32 if channels == 21 else dtype
        x = torch.randn(2, 3, channels, dtype=dtype)
        scale, up, down = (
            torch.randn(shape, dtype=parameters)
            for shape in ((2, channels), (6 * channels, channels), (channels, 3 * channels))
        )
        feed_forward_forward(x, scale, up, down, 1e-6)
        feed_forward_backward(x, x, scale, up, down, 1e-6, [True] * 4)
