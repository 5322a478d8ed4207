"""torch's scaled_dot_product_attention over all tokens, which neighborhood attention replaces: another function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer, Tensors

PEER = Peer("PyTorch", None, "pip install torch")
CHECKED = 32  # side of the grid that it is checked on: the reference keeps every logit


def prepare(tensors: Tensors) -> Tensors:
    """[B, H, W, heads, D] -> [B, heads, H·W, D], without a copy."""
    return {name: t.flatten(1, 2).transpose(1, 2) for name, t in tensors.items()}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, tokens, D] thrice -> [B, tokens, heads, D], as a model's next projection takes it."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = prepare({"q": query, "k": key, "v": value}).values()
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(query.shape)


def build(case: Case) -> Implementation:
    batch, height, width, heads, head_dim = case.shapes["query"]
    sides = {"batch": 1, "height": min(height, CHECKED), "width": min(width, CHECKED)}
    sides["kernel_size"] = min(case.settings["kernel_size"], *(sides[s] for s in ("height", "width")))
    return Implementation(
        attend,
        prepare=prepare,
        finish=lambda out: out.unflatten(1, (height, width)),
        detail=f"another function: every query sees all {height * width} keys",
        reference=full_attention,
        check_on=case.build(**{**case.settings, **sides, "dilation": 1}),
        work=4 * batch * heads * (height * width) ** 2 * head_dim,
    )


CONTESTANTS = [Contestant("sdpa", PEER, {"na2d": build})]
