"""`NeighborhoodAttention1D`, `2D`, `3D`, with NATTEN's arguments and parameter names, so that its checkpoints load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hdit_kernels import checks
from hdit_kernels.compat.natten import arguments, functional
from hdit_kernels.compat.natten.context import without_effect

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    """Neighborhood self-attention between two projections: [B, *grid, embed_dim] -> the same shape.

    Arguments are NATTEN 0.21.7's: embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale
    (default head_dim ** -0.5) and proj_drop. Of 0.17's, by keyword: dim for embed_dim; rel_pos_bias, in plain PyTorch;
    attn_drop, which must be 0; use_experimental_ops, without effect. Parameters: qkv, proj, and rpb with rel_pos_bias.
    """

    axes: int

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        dim: int | None = None,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim is not None and dim is not None:
            raise ValueError(f"dim: expected embed_dim or dim, got both ({embed_dim} and {dim})")
        self.embed_dim = checks.integer("embed_dim", dim if embed_dim is None else embed_dim)
        self.num_heads = checks.integer("num_heads", num_heads)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}")
        if attn_drop != 0:
            raise ValueError(
                f"attn_drop: expected 0, since the weights are never stored, got {checks.shown(attn_drop)}"
            )
        if use_experimental_ops:
            without_effect("natten.NeighborhoodAttention: use_experimental_ops")
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else checks.number("qk_scale", qk_scale, above=0)
        self.kernel_size = arguments.per_axis("kernel_size", kernel_size, self.axes)
        self.stride = arguments.per_axis("stride", stride, self.axes)
        self.dilation = arguments.per_axis("dilation", dilation, self.axes)
        self.is_causal = arguments.causal_axes(is_causal, self.axes)
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if rel_pos_bias:
            if any(self.is_causal) or max(self.stride) > 1:
                raise NotImplementedError("rel_pos_bias: not taken together with is_causal or stride")
            self.rpb = nn.Parameter(torch.empty(self.num_heads, *(2 * size - 1 for size in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    def forward(self, x: Tensor) -> Tensor:
        checks.floating(x=x)
        checks.shape("x", x, ["B", *arguments.AXES[self.axes], self.embed_dim])
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        attend = (functional.na1d, functional.na2d, functional.na3d)[self.axes - 1]
        settings = (self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        return self.proj_drop(self.proj(attend(query, key, value, *settings, rpb=self.rpb).flatten(-2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Position biases of an old checkpoint, for a module without: dropped where all are 0, else an error, with
        strict=False, too.
        """
        name, errors = f"{prefix}rpb", others[-1]
        if self.rpb is None and name in state_dict:
            if state_dict[name].any():
                errors.append(f"{name}: expected none or zeros, got position biases; build with rel_pos_bias=True")
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    axes = 3
