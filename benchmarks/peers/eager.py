"""Plain PyTorch, as one would write it: torch's own norms, activations and products, each a kernel or a few.

They compute in the tensors' own dtype, except qk_norm_rope, which is the reference: torch has no function for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer
from hdit_kernels import reference

EPS = 1e-6
PEER = Peer("PyTorch", None, "pip install torch")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def ada_rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, EPS) * (1 + scale[:, None])


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def feed_forward(x: Tensor, scale: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return x + F.linear(geglu(F.linear(ada_rms_norm(x, scale), up_weight)), down_weight)


def token_merge(x: Tensor, weight: Tensor, patch: int) -> Tensor:
    patches = x.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).transpose(2, 3)
    return F.linear(patches.flatten(3), weight)


def token_split(x: Tensor, weight: Tensor, patch: int, skip: Tensor | None = None, fac: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight).unflatten(-1, (patch, patch, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return y if skip is None or fac is None else skip.lerp(y, fac.to(y.dtype))


def _plain(function: Callable[..., Tensor]) -> Callable[[Case], Implementation]:
    return lambda case: Implementation(function)


def _patched(function: Callable[..., Tensor]) -> Callable[[Case], Implementation]:
    return lambda case: Implementation(functools.partial(function, patch=case.settings["patch"]))


OPERATORS = {
    "rms_norm": _plain(rms_norm),
    "ada_rms_norm": _plain(ada_rms_norm),
    "ada_layer_norm": _plain(ada_layer_norm),
    "gated_residual": _plain(gated_residual),
    "geglu": _plain(geglu),
    "feed_forward": _plain(feed_forward),
    "token_merge": _patched(token_merge),
    "token_split": _patched(token_split),
    "qk_norm_rope": _plain(reference.qk_norm_rope),
}
CONTESTANTS = [Contestant("eager", PEER, OPERATORS)]
