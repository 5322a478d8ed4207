"""The Hourglass Diffusion Transformer (Crowson et al. 2024, arXiv 2401.11605), top to bottom.

    pixels -> patches -> [down level -> merge 2x2] … -> middle level -> … [split 2x2 -> up level] -> patches -> pixels

Tokens are kept as [batch, rows, columns, channels] throughout. Parameter and buffer names are those of k-diffusion's
ImageTransformerDenoiserModelV2, so that its checkpoints load with load_state_dict(strict=True). The network itself
neither scales its input nor weighs its output by the noise level: hdit.Denoiser does.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.compiler import is_dynamo_compiling

from hdit.config import GlobalAttention, HDiTConfig, NeighborhoodAttention, NoAttention, ShiftedWindowAttention
from hdit.config import Level as LevelConfig
from hdit.config import Mapping as MappingConfig
from hdit_kernels import (
    ada_rms_norm,
    checks,
    feed_forward,
    geglu,
    neighborhood_self_attention,
    qk_norm_rope,
    rms_norm,
    token_merge,
    token_split,
)
from hdit_kernels.feed_forward import is_one_kernel
from hdit_kernels.registration import autocast_dtype, cast_dtype

# torch.compile(dynamic=True) makes an input of each Python float but literals, and compiles everything a second time
# where an operator takes one. Hence eps and 2π written out, and the integers for a dropout of 0 and for norm_type.

LINEAR_FORWARD = nn.Linear.forward
AUGMENTATIONS = 9  # numbers that describe an augmentation (EDM, arXiv 2206.00364, appendix F.2)


def zero_init(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is the product with its weight and nothing else, which an operator may do instead.

    Not so with an adapter in its place, a hook, a parametrization, a quantized or sharded weight, a patched forward or
    a bias: then the layer is called.
    """
    return (
        type(layer) is nn.Linear
        and is_untouched(layer)
        and nn.Linear.forward is LINEAR_FORWARD
        and layer.bias is None
        and type(layer.weight) in (Tensor, nn.Parameter, FakeTensor)
    )


def is_untouched(layer: nn.Module) -> bool:
    """Whether a call of the layer is its class's forward and nothing else."""
    every = nn.modules.module  # the hooks of all modules; nn.Module.__call__ has the same test
    return (
        not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not (every._global_forward_hooks or every._global_forward_pre_hooks)
        and not (every._global_backward_hooks or every._global_backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the module's first floating-point parameter; the default if it has none, as quantized ones."""
    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return floating[0] if floating else default


def filled(sizes: Sequence[int], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.full; under torch.compile without making the value a constant, which would be a graph for each value."""
    if is_dynamo_compiling():
        return torch.ones(sizes, dtype=dtype, device=device) * value
    return torch.full(sizes, value, dtype=dtype, device=device)


# Conditioning: noise level, augmentation, class and anything else become one vector [B, mapping width]


class FourierFeatures(nn.Module):
    """x [B, in_features] -> cos and sin of fixed random projections of x, [B, out_features]."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features))

    def forward(self, x: Tensor) -> Tensor:
        # A product by broadcasting: autocast would run a matrix product in bfloat16, too coarse for angles.
        angle = 6.283185307179586 * (x[:, None, :] * self.weight).sum(-1)  # 2π
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, 1e-6)


class MappingBlock(nn.Module):
    def __init__(self, width: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.up_proj = nn.Linear(width, 2 * d_ff, bias=False)
        self.dropout = nn.Dropout(dropout or 0)
        self.down_proj = zero_init(nn.Linear(d_ff, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.dropout(geglu(self.up_proj(self.norm(x)))))


class MappingNetwork(nn.Module):
    def __init__(self, config: MappingConfig) -> None:
        super().__init__()
        self.in_norm = RMSNorm(config.width)
        blocks = [MappingBlock(config.width, config.d_ff, config.dropout) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.out_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


# Position: axial rotary embedding


def axial_positions(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of a grid's rows [rows] and columns [columns]: the longer side spans [-1, 1], the other a part of it."""

    def centres(count: int) -> Tensor:
        # Not by linspace, whose steps torch.compile takes for a constant.
        return (2 * torch.arange(count, dtype=dtype, device=device) + (1 - count)) / max(rows, columns)

    return centres(rows), centres(columns)


def halve(pos: Tensor) -> Tensor:
    """Positions of merged tokens along one axis: the mean of the two they come from."""
    return pos.view(-1, 2).mean(-1)


class AxialRoPE(nn.Module):
    """Angles of one layer: pos_y [H], pos_x [W] -> theta_y [H, heads, head_dim/8], theta_x [W, heads, head_dim/8]."""

    freqs: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        count = heads * head_dim // 8
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), count + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(head_dim // 8, heads).T.contiguous())

    def forward(self, pos_y: Tensor, pos_x: Tensor) -> tuple[Tensor, Tensor]:
        freqs = self.freqs.to(pos_y.dtype)
        return pos_y[:, None, None] * freqs, pos_x[:, None, None] * freqs


# Transformer layers


class AdaRMSNorm(nn.Module):
    """RMS norm of x [B, H, W, C] whose scale is 1 + a projection of cond [B, mapping width]."""

    def __init__(self, width: int, cond_width: int) -> None:
        super().__init__()
        self.linear = zero_init(nn.Linear(cond_width, width, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return ada_rms_norm(x, self.linear(cond), 1e-6)


def global_attention(qkv: Tensor) -> Tensor:
    """Attention of all tokens to all: qkv [B, H, W, 3, heads, D], ready by qk_norm_rope -> [B, H, W, heads, D]."""
    query, key, value = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    batch, height, width, _, heads, head_dim = qkv.shape
    return out.transpose(1, 2).reshape(batch, height, width, heads, head_dim)


def shifted_window_attention(qkv: Tensor, size: int, shift: int) -> Tensor:
    """Attention inside size x size windows of the grid, rolled by shift: shapes as in global_attention."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rows, columns = height // size, width // size

    mask = None
    if shift:
        qkv = qkv.roll((shift, shift), dims=(1, 2))
        # The roll brings tokens from opposite edges of the image together, which must not see each other: they are told
        # apart by whether their row and their column come before the shift.
        past_y = (torch.arange(height, device=qkv.device) < shift).view(rows, 1, size, 1)
        past_x = (torch.arange(width, device=qkv.device) < shift).view(1, columns, 1, size)
        region = (2 * past_y + past_x).view(rows * columns, size * size)
        mask = (region[:, :, None] == region[:, None, :])[:, None]
    windows = qkv.view(batch, rows, size, columns, size, 3, heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = windows.contiguous().view(3, batch, rows * columns, heads, size * size, head_dim)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
    out = out.view(batch, rows, columns, heads, size, size, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.contiguous().view(batch, height, width, heads, head_dim)
    return out.roll((-shift, -shift), dims=(1, 2)) if shift else out


class SelfAttentionBlock(nn.Module):
    """Cosine-similarity attention with a learned scale per head; index: which of its level's layers this is."""

    def __init__(
        self,
        config: LevelConfig,
        attention: GlobalAttention | NeighborhoodAttention | ShiftedWindowAttention,
        cond_width: int,
        index: int,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.heads = config.width // attention.head_dim
        self.shifted = index % 2 == 1
        self.norm = AdaRMSNorm(config.width, cond_width)
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.scale = nn.Parameter(torch.full([self.heads], 10.0))
        self.pos_emb = AxialRoPE(self.heads, attention.head_dim)
        self.dropout = nn.Dropout(config.dropout or 0)
        self.out_proj = zero_init(nn.Linear(config.width, config.width, bias=False))

    def forward(self, x: Tensor, pos_y: Tensor, pos_x: Tensor, cond: Tensor) -> Tensor:
        kind = self.attention
        qkv = self.qkv_proj(self.norm(x, cond)).view(*x.shape[:3], 3, self.heads, kind.head_dim)
        theta_y, theta_x = self.pos_emb(pos_y, pos_x)
        if isinstance(kind, NeighborhoodAttention):
            out = neighborhood_self_attention(qkv, self.scale, theta_y, theta_x, kind.kernel_size, 1e-6)
        else:
            qkv = qk_norm_rope(qkv, self.scale, theta_y, theta_x, 1e-6)
            if isinstance(kind, GlobalAttention):
                out = global_attention(qkv)
            else:
                out = shifted_window_attention(qkv, kind.window_size, kind.window_size // 2 if self.shifted else 0)
        return x + self.out_proj(self.dropout(out.flatten(-2)))


class FeedForwardBlock(nn.Module):
    def __init__(self, config: LevelConfig, cond_width: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(config.width, cond_width)
        self.up_proj = nn.Linear(config.width, 2 * config.d_ff, bias=False)
        self.dropout = nn.Dropout(config.dropout or 0)
        self.down_proj = zero_init(nn.Linear(config.d_ff, config.width, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        same_dtype = cast_dtype(x.dtype, autocast_dtype(x)) == x.dtype  # the operator's output has the autocast dtype
        if same_dtype and self._is_plain():
            if not torch.is_grad_enabled() or is_one_kernel(x, self.down_proj.in_features):
                scale = self.norm.linear(cond)
                return feed_forward(x, scale, self.up_proj.weight, self.down_proj.weight, 1e-6)
        return x + self.down_proj(self.dropout(geglu(self.up_proj(self.norm(x, cond)))))

    def _is_plain(self) -> bool:
        """Whether the four layers do nothing but what the operator does, dropout nothing at all."""
        norm, dropout = self.norm, self.dropout
        return (
            is_plain(self.up_proj)
            and is_plain(self.down_proj)
            and (type(norm) is AdaRMSNorm and is_untouched(norm))
            and (type(dropout) is nn.Dropout and is_untouched(dropout) and not (dropout.training and dropout.p))
        )


class TransformerLayer(nn.Module):
    def __init__(self, config: LevelConfig, cond_width: int, index: int) -> None:
        super().__init__()
        self.self_attn = None
        if not isinstance(config.attention, NoAttention):
            self.self_attn = SelfAttentionBlock(config, config.attention, cond_width, index)
        self.ff = FeedForwardBlock(config, cond_width)

    def forward(self, x: Tensor, pos_y: Tensor, pos_x: Tensor, cond: Tensor) -> Tensor:
        if self.self_attn is not None:
            x = self.self_attn(x, pos_y, pos_x, cond)
        return self.ff(x, cond)


class Level(nn.ModuleList):
    """The layers of one level on one way; first: index of the first (the way up continues the way down's count)."""

    def __init__(self, config: LevelConfig, cond_width: int, first: int = 0) -> None:
        super().__init__(TransformerLayer(config, cond_width, first + i) for i in range(config.depth))

    def forward(self, x: Tensor, pos_y: Tensor, pos_x: Tensor, cond: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, pos_y, pos_x, cond)
        return x


# Between levels, and between pixels and tokens


def unshuffle(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, H*h, W*w, C] -> [B, H, W, h*w*C] in the order row, column, channel."""
    (batch, height, width, channels), (h, w) = x.shape, patch_size
    x = x.reshape(batch, height // h, h, width // w, w, channels).transpose(2, 3)
    return x.reshape(batch, height // h, width // w, h * w * channels)


def shuffle(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The inverse: [B, H, W, h*w*C] -> [B, H*h, W*w, C]."""
    (batch, height, width, features), (h, w) = x.shape, patch_size
    x = x.reshape(batch, height, width, h, w, features // (h * w)).transpose(2, 3)
    return x.reshape(batch, height * h, width * w, features // (h * w))


class TokenMerge(nn.Module):
    """x [B, H*h, W*w, in_features] -> [B, H, W, out_features]."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_features * math.prod(patch_size), out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.proj):
            return token_merge(x, self.proj.weight, self.patch_size)
        return self.proj(unshuffle(x, self.patch_size))


class TokenSplit(nn.Module):
    """x [B, H, W, in_features] -> [B, H*h, W*w, out_features], mixed with the skip of that shape."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features * 4, bias=False)
        self.fac = nn.Parameter(torch.full([1], 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if is_plain(self.proj):
            return token_split(x, self.proj.weight, (2, 2), skip, self.fac)
        y = shuffle(self.proj(x), (2, 2))
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.lerp(skip.to(wide), y.to(wide), self.fac.to(wide)).to(y.dtype)


class PatchOut(nn.Module):
    """x [B, H, W, in_features] -> [B, H*h, W*w, out_features]."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = zero_init(nn.Linear(in_features, out_features * math.prod(patch_size), bias=False))

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.proj):
            return token_split(x, self.proj.weight, self.patch_size)
        return shuffle(self.proj(x), self.patch_size)


class HDiT(nn.Module):
    """The whole network. config: what it is made of (see hdit.HDiTConfig; hdit.presets has the published ones).

    Every nn.Linear may be wrapped by an adapter (LoRA), quantized, parametrized or hooked, before the model is
    compiled: each is called as a layer, save plain ones between levels, which are part of a fused operator. So are
    those of feed-forward blocks where dropout does nothing and either no gradient is wanted or one kernel does it all.
    Second derivatives need global attention that has them: torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
    TypeError if config is no HDiTConfig.
    """

    def __init__(self, config: HDiTConfig) -> None:
        super().__init__()
        if not isinstance(config, HDiTConfig):
            raise TypeError(f"config: expected an HDiTConfig, got {checks.shown(config)}")
        self.config = config
        levels, width = config.levels, config.mapping.width

        self.patch_in = TokenMerge(config.in_channels, levels[0].width, config.patch_size)

        self.time_emb = FourierFeatures(1, width)
        self.time_in_proj = nn.Linear(width, width, bias=False)
        self.aug_emb = FourierFeatures(AUGMENTATIONS, width)
        self.aug_in_proj = nn.Linear(width, width, bias=False)
        self.class_emb = nn.Embedding(config.num_classes, width, norm_type=2) if config.num_classes else None
        extra = config.mapping_cond_dim
        self.mapping_cond_in_proj = nn.Linear(extra, width, bias=False) if extra else None
        self.mapping = MappingNetwork(config.mapping)

        self.down_levels = nn.ModuleList(Level(level, width) for level in levels[:-1])
        self.up_levels = nn.ModuleList(Level(level, width, first=level.depth) for level in levels[:-1])
        self.mid_level = Level(levels[-1], width)
        pairs = list(zip(levels[:-1], levels[1:], strict=True))
        self.merges = nn.ModuleList(TokenMerge(fine.width, coarse.width) for fine, coarse in pairs)
        self.splits = nn.ModuleList(TokenSplit(coarse.width, fine.width) for fine, coarse in pairs)

        self.out_norm = RMSNorm(levels[0].width)
        self.patch_out = PatchOut(levels[0].width, config.out_channels, config.patch_size)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        x [B, in_channels, H, W]: noised images scaled to about unit variance, in the parameters' dtype (in any under
        autocast); H and W multiples of the patch and its merges; B may be 0. sigma [B]: positive noise levels, floating
        point of any width, or one for the whole batch: a number or a tensor without dimensions. aug_cond [B, 9]: how
        the images were augmented, floating point, zeros if not given. class_cond [B]: class indices, int64 or int32,
        below num_classes; mapping_cond [B, mapping_cond_dim], in a dtype as x: each needed exactly if the model has it.
        Returns [B, out_channels, H, W]. Raises TypeError or ValueError, naming the argument, for whatever doesn't fit;
        the values of sigma and class_cond are checked on the CPU only, where that doesn't wait for a GPU.
        """
        self._check(x, sigma, aug_cond, class_cond, mapping_cond)
        rows, columns = self._grid(x)
        if not isinstance(sigma, Tensor):
            sigma = filled((), sigma, self._wide_dtype, x.device)
        cond = self.condition(sigma.expand(x.shape[0]), aug_cond, class_cond, mapping_cond)

        # Positions need at least float32: in bfloat16 the neighbours of a large grid would share one.
        pos_y, pos_x = axial_positions(rows, columns, self._wide_dtype, x.device)

        x = self.patch_in(x.permute(0, 2, 3, 1))
        skips = []
        for level, merge in zip(self.down_levels, self.merges, strict=True):
            x = level(x, pos_y, pos_x, cond)
            skips.append((x, pos_y, pos_x))
            x, pos_y, pos_x = merge(x), halve(pos_y), halve(pos_x)

        x = self.mid_level(x, pos_y, pos_x, cond)

        for level, split in zip(reversed(self.up_levels), reversed(self.splits), strict=True):
            skip, pos_y, pos_x = skips.pop()
            x = level(split(x, skip), pos_y, pos_x, cond)

        return self.patch_out(self.out_norm(x)).permute(0, 3, 1, 2)

    def condition(
        self, sigma: Tensor, aug_cond: Tensor | None, class_cond: Tensor | None, mapping_cond: Tensor | None
    ) -> Tensor:
        """The conditioning vector [B, mapping width]; arguments as in forward, sigma [B]."""
        dtype, wide = dtype_of(self.time_in_proj, self.out_norm.scale.dtype), self._wide_dtype
        log_sigma = sigma.to(wide).log()[:, None] / 4
        cond = self.time_in_proj(self.time_emb(log_sigma).to(dtype))
        if aug_cond is None:
            aug_cond = log_sigma.new_zeros(sigma.shape[0], AUGMENTATIONS)
        cond = cond + self.aug_in_proj(self.aug_emb(aug_cond.to(wide)).to(dtype))
        if self.class_emb is not None:
            cond = cond + self.class_emb(class_cond)
        if self.mapping_cond_in_proj is not None:
            cond = cond + self.mapping_cond_in_proj(mapping_cond)
        return self.mapping(cond)

    @property
    def _wide_dtype(self) -> torch.dtype:
        """float32, or float64 in a float64 model: for numbers that must not be rounded to half precision."""
        return torch.promote_types(self.out_norm.scale.dtype, torch.float32)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the finest tokens of x."""
        try:
            return self.config.grids(*x.shape[2:])[0]
        except ValueError as error:
            raise ValueError(f"x: {error}") from None

    def _check(
        self,
        x: Tensor,
        sigma: Any,
        aug_cond: Tensor | None,
        class_cond: Tensor | None,
        mapping_cond: Tensor | None,
    ) -> None:
        classes, dim = self.config.num_classes, self.config.mapping_cond_dim
        for name, given, needed in (("class_cond", class_cond, classes > 0), ("mapping_cond", mapping_cond, dim > 0)):
            if needed:
                checks.tensor(name, given)
            elif given is not None:
                raise ValueError(f"{name}: expected None, since this model takes none, got {checks.shown(given)}")
        tensors = {"sigma": sigma}
        if isinstance(sigma, numbers.Real):
            checks.number("sigma", sigma, at_least=checks.SMALLEST_LEVEL, at_most=checks.LARGEST_LEVEL)
            tensors = {}
        if aug_cond is not None:
            tensors["aug_cond"] = aug_cond
        if mapping_cond is not None:
            tensors["mapping_cond"] = mapping_cond
        checks.floating(x=x, **tensors)

        batch, default = x.shape[0] if x.ndim else 0, self.out_norm.scale.dtype
        checks.shape("x", x, ["B", self.config.in_channels, "H", "W"])
        checks.nonempty("x", x)
        if autocast_dtype(x) is None:
            checks.same_dtype(**{"the model": dtype_of(self.patch_in, default), "x": x.dtype})
        if is_plain(self.time_in_proj) and x.device != self.time_in_proj.weight.device:
            device = self.time_in_proj.weight.device
            raise ValueError(f"x: expected a tensor on {device} like the model, got one on {x.device}")
        if isinstance(sigma, Tensor):
            checks.shape("sigma", sigma, [batch] if sigma.ndim else [])
            checks.values("sigma", sigma, checks.noise_level, "finite noise levels above 0, 1e-18 to 1e18")
        if aug_cond is not None:
            checks.shape("aug_cond", aug_cond, [batch, AUGMENTATIONS])
        if mapping_cond is not None and self.mapping_cond_in_proj is not None:
            checks.shape("mapping_cond", mapping_cond, [batch, dim])
            if autocast_dtype(x) is None:
                wanted = dtype_of(self.mapping_cond_in_proj, default)
                checks.same_dtype(**{"mapping_cond_in_proj": wanted, "mapping_cond": mapping_cond.dtype})
        if class_cond is not None:
            if class_cond.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"class_cond: expected int64 or int32, got {class_cond.dtype}")
            if class_cond.device != x.device:
                raise ValueError(f"class_cond: expected a tensor on {x.device} like x, got one on {class_cond.device}")
            checks.shape("class_cond", class_cond, [batch])
            below = f"classes from 0 to {classes - 1} (the last: no class)"
            checks.values("class_cond", class_cond, lambda index: (index >= 0) & (index < classes), below)

    def param_groups(self, base_lr: float = 5e-4, mapping_lr_scale: float = 1 / 3) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: [others, others without decay, mapping, mapping without decay].

        The mapping network and the projections from it learn mapping_lr_scale times as fast. Projections take the
        optimizer's own weight decay; norms, scales, mixing factors, biases and embeddings of the conditions take none.
        What adapters and parametrizations add to a layer goes into its group.
        """
        checks.number("base_lr", base_lr, at_least=0)
        checks.number("mapping_lr_scale", mapping_lr_scale, at_least=0)
        embeddings = ("time_in_proj.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj.")
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": base_lr},
            {"params": [], "lr": base_lr, "weight_decay": 0.0},
            {"params": [], "lr": base_lr * mapping_lr_scale},
            {"params": [], "lr": base_lr * mapping_lr_scale, "weight_decay": 0.0},
        ]
        for name, parameter in self.named_parameters():
            mapping = name.startswith("mapping.") or ".norm.linear." in name
            decays = not name.startswith(embeddings) and {"scale", "fac", "bias"}.isdisjoint(name.split("."))
            groups[2 * mapping + (not decays)]["params"].append(parameter)
        return groups
