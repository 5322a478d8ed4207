"""Kernels of the Hourglass Diffusion Transformer: tensors in, tensors out, stateless. See each function's docstring."""

from hdit_kernels.backend import get_backend, set_backend
from hdit_kernels.feed_forward import feed_forward
from hdit_kernels.geglu import geglu
from hdit_kernels.merge import merge_attentions
from hdit_kernels.neighborhood_attention.na2d import na2d
from hdit_kernels.neighborhood_attention.self_attention import neighborhood_self_attention
from hdit_kernels.norms import ada_layer_norm, ada_rms_norm, gated_residual, rms_norm
from hdit_kernels.rope import qk_norm_rope
from hdit_kernels.tokens import token_merge, token_split

__version__ = "0.1.0"  # of both packages; pyproject.toml reads it here

__all__ = [
    "ada_layer_norm",
    "ada_rms_norm",
    "feed_forward",
    "gated_residual",
    "geglu",
    "get_backend",
    "merge_attentions",
    "na2d",
    "neighborhood_self_attention",
    "qk_norm_rope",
    "rms_norm",
    "set_backend",
    "token_merge",
    "token_split",
]
