"""The Diffusion Transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748) on pixels: what HDiT's cost is compared with.

Every token attends to every token at the image's full resolution, so the cost grows with the fourth power of its side.
Conditioning is adaLN-Zero; the blocks use our fused norms and gates, so that the comparison is of architectures.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdit_kernels import ada_layer_norm, gated_residual

FREQUENCIES = 256  # width of the sinusoidal embedding of the timestep


def sinusoids(position: Tensor, width: int) -> Tensor:
    """[...] -> [..., width]: cos and sin of position times width/2 frequencies from 1 down to about 1/10000."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=position.device) * (-math.log(10000) / half))
    angle = position[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(cond)).chunk(6, dim=-1)
        qkv = self.qkv(ada_layer_norm(x, shift_1, scale_1)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = gated_residual(x, self.proj(out), gate_1)
        hidden = F.gelu(self.up(ada_layer_norm(x, shift_2, scale_2)), approximate="tanh")
        return gated_residual(x, self.down(hidden), gate_2)


class DiT(nn.Module):
    """DiT on square images.

    image_size: side in pixels, a multiple of patch_size. num_classes: rows of the class table, "no class" among them.
    The defaults are DiT-B/4 on ImageNet.
    """

    pos_emb: Tensor

    def __init__(
        self,
        image_size: int,
        patch_size: int = 4,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        num_classes: int = 1001,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
        self.patch_size = patch_size
        side = image_size // patch_size
        self.patch_in = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.time_emb = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.class_emb = nn.Embedding(num_classes, width)
        axis = sinusoids(torch.arange(side), width // 2)
        rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
        self.register_buffer("pos_emb", torch.cat([rows, columns], dim=-1).flatten(0, 1), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * patch_size**2)
        for layer in (self.modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, timestep: Tensor, class_cond: Tensor) -> Tensor:
        """x [B, C, S, S], timestep [B] (0 to 1000), class_cond [B] integers -> [B, C, S, S]."""
        x = self.patch_in(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + self.pos_emb
        cond = self.time_emb(sinusoids(timestep, FREQUENCIES).to(x.dtype)) + self.class_emb(class_cond)
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(F.silu(cond)).chunk(2, dim=-1)
        x = self.patch_out(ada_layer_norm(x, shift, scale))
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), self.patch_size)
