"""Whether a model and its images fit into memory: told before the work, since the system kills without a word."""

from __future__ import annotations

import math
import os

import torch

from hdit.config import HDiTConfig, NoAttention


def memory(device: torch.device) -> float:
    """Bytes of a GPU's memory, or of this machine's; infinity where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def require_memory(name: str, config: HDiTConfig, device: torch.device, images: int, training: bool) -> None:
    """ValueError if a device's memory can't hold the least that a model, called `name`, needs for so many images at a
    time: pixels and finest tokens, and for training what each layer keeps for its backward pass.

    (image_size is no size of a parameter: a file of a few bytes can ask for any.)
    """
    grids, last = config.grids(*config.image_size), len(config.levels) - 1
    activations = config.levels[0].width * math.prod(grids[0])
    for i, (level, grid) in enumerate(zip(config.levels, grids, strict=True) if training else ()):
        # of a token: normed twice, query, key, value and what attention returns; and before and after the gate
        attention = 0 if isinstance(level.attention, NoAttention) else 5 * level.width
        of_a_token = attention + level.width + 3 * level.d_ff
        activations += (1 if i == last else 2) * level.depth * math.prod(grid) * of_a_token
    copies = 5 if training else 1  # of a parameter itself, its average and gradient, and AdamW's two moments
    pixels = config.in_channels * math.prod(config.image_size)
    size = 2 if device.type == "cuda" else 4  # bytes of an activation: bfloat16 by autocast
    need, total = 4 * copies * config.parameters + images * (4 * pixels + size * activations), memory(device)
    if need > total:
        height, width = config.image_size
        raise ValueError(
            f"{name}: expected what {total / 2**30:.0f} GiB of memory can hold, got {config.parameters:,} parameters "
            f"and {images:,} images of {height} x {width} pixels at a time, which take at least {need / 2**30:,.0f} GiB"
            f"{': lower batch_size' if images > 1 else ''}"
        )
