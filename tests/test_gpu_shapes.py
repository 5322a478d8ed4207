"""Every operator at the shapes that HDiT runs it at, bfloat16 activations and float32 parameters, against float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import hdit_kernels
from hdit_kernels import reference, testing
from tests.cases import Case
from tests.test_gpu_operators import beside_references

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("few_large_tiles")]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def parameter(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda") / 4


def case(name: str, tensors: dict[str, torch.Tensor], frozen: tuple[str, ...] = (), **settings: object) -> Case:
    call, plain = (functools.partial(getattr(module, name), **settings) for module in (hdit_kernels, reference))
    if name == "na2d":
        call = functools.partial(call, return_lse=True)
    return Case(name, tensors, call, plain, frozen=frozenset(frozen))


def attention(batch: int, height: int, width: int, heads: int, dim: int, window: int) -> Case:
    query, key, value = randn(batch, height, width, 3, heads, dim).unbind(3)  # slices of one projection
    return case("na2d", dict(query=query, key=key, value=value), kernel_size=(window, window))


def packed(name: str, batch: int, height: int, width: int, heads: int, dim: int, **settings: object) -> Case:
    theta_y, theta_x = (parameter(n, heads, dim // 8) * 40 for n in (height, width))
    tensors = dict(qkv=randn(batch, height, width, 3, heads, dim), scale=parameter(heads).abs() + 9)
    return case(name, tensors | dict(theta_y=theta_y, theta_x=theta_x), ("theta_y", "theta_x"), **settings)


def feed_forward(*shape: int) -> Case:
    width = shape[-1]
    tensors = dict(x=randn(*shape), scale=parameter(shape[0], width))
    weights = dict(up_weight=parameter(6 * width, width), down_weight=parameter(width, 3 * width))
    return case("feed_forward", tensors | {name: 4 * w / w.shape[1] ** 0.5 for name, w in weights.items()})


def merge(x: torch.Tensor, width: int, patch: tuple[int, int] = (2, 2)) -> Case:
    fan_in = x.shape[-1] * math.prod(patch)
    return case("token_merge", dict(x=x, weight=parameter(width, fan_in) / fan_in**0.5), patch_size=patch)


def split(*shape: int, width: int) -> Case:
    batch, height, columns, channels = shape
    tensors = dict(x=randn(*shape), weight=parameter(4 * width, channels) / channels**0.5)
    return case(
        "token_split", tensors | dict(skip=randn(batch, 2 * height, 2 * columns, width), fac=parameter(1) + 0.5)
    )


SHAPES = {
    "na2d ffhq-1024": lambda: attention(1, 256, 256, 2, 64, 7),
    "na2d flowers-256": lambda: attention(32, 64, 64, 2, 64, 7),
    "na2d imagenet-256": lambda: attention(32, 32, 32, 12, 64, 7),
    "na2d head_dim 128": lambda: attention(4, 128, 128, 4, 128, 7),
    "na2d window 13": lambda: attention(1, 256, 256, 2, 64, 13),
    "na2d odd grid": lambda: attention(2, 127, 251, 2, 64, 7),
    "neighborhood_self_attention": lambda: packed("neighborhood_self_attention", 8, 64, 64, 6, 64, kernel_size=(7, 7)),
    "qk_norm_rope": lambda: packed("qk_norm_rope", 16, 16, 16, 24, 64),
    "rms_norm": lambda: case("rms_norm", dict(x=randn(32, 64, 64, 128), weight=parameter(128))),
    "ada_rms_norm fine": lambda: case("ada_rms_norm", dict(x=randn(4, 256, 256, 128), scale=parameter(4, 128))),
    "ada_rms_norm coarse": lambda: case("ada_rms_norm", dict(x=randn(16, 16, 16, 1536), scale=parameter(16, 1536))),
    "ada_layer_norm": lambda: case(
        "ada_layer_norm", dict(x=randn(4, 4096, 768), shift=parameter(4, 768), scale=parameter(4, 768))
    ),
    "gated_residual": lambda: case(
        "gated_residual", dict(x=randn(4, 4096, 768), y=randn(4, 4096, 768), gate=parameter(4, 768))
    ),
    "geglu fine": lambda: case("geglu", dict(x=randn(4, 256, 256, 768))),
    "geglu coarse": lambda: case("geglu", dict(x=randn(16, 16, 16, 9216))),
    "feed_forward flowers-256": lambda: feed_forward(8, 4096, 128),
    "feed_forward ffhq-1024": lambda: feed_forward(1, 128, 128, 256),
    "feed_forward coarse": lambda: feed_forward(4, 256, 768),
    "token_merge": lambda: merge(randn(32, 64, 64, 128), 256),
    "token_merge of pixels": lambda: merge(randn(8, 3, 256, 256).permute(0, 2, 3, 1), 128, (4, 4)),
    "token_split": lambda: split(32, 32, 32, 256, width=128),
    "token_split to pixels": lambda: case(
        "token_split", dict(x=randn(8, 64, 64, 128), weight=parameter(48, 128)), patch_size=(4, 4)
    ),
}  # fmt: skip


# The float64 reference of attention takes up to 20 GB: with pytest-xdist's --dist loadgroup, one at a time.
IN_TURN = [
    pytest.param(name, marks=pytest.mark.xdist_group("shapes")) if "na2d" in name or "attention" in name else name
    for name in SHAPES
]


@pytest.mark.parametrize("shape", IN_TURN)
def test_real_shapes(shape: str, seed: int, record) -> None:
    this = SHAPES[shape]()
    ratios = {}
    for name, (result, want, simple) in beside_references(this, this.tensors, torch.bfloat16).items():
        limit = testing.allowed(torch.bfloat16, testing.relative_error(simple, want))
        ratios[name] = min(testing.relative_error(result, want) / limit, 1e9)
    record("real_shapes", shape, "mixed", dict(shape=list(next(iter(this.tensors.values())).shape), ratios=ratios))
    assert max(ratios.values()) <= 1.0, ratios
