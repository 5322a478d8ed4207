"""Every operator on tensors of more than 2³¹ elements: the first, last and boundary-crossing slabs against the
reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import hdit_kernels
from hdit_kernels import reference
from hdit_kernels.testing import FLOOR, Pool, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("few_large_tiles"),
    pytest.mark.xdist_group("large"),  # one at a time: each takes tens of gigabytes
]

BOUNDARY = 2**31
SLAB = 24  # rows compared at each place


class Large(NamedTuple):
    """An operator with inputs of more than 2³¹ elements, which slabs of `rows` rows can check.

    sliced: (dimension, rows a unit) of each input cut into slabs; the others are shared. out: the same of the output.
    halo: units that a slab needs on either side. summed: inputs whose gradient is a sum over all slabs (none: not
        checked here).
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, torch.Tensor]
    sliced: dict[str, tuple[int, int]]
    out: tuple[int, int]
    units: int
    halo: int = 0
    frozen: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def parameter(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda") * 0.5


def rms_norm() -> Large:
    rows = BOUNDARY // 512 + 1000
    return Large(
        hdit_kernels.rms_norm, reference.rms_norm, dict(x=randn(rows, 512), weight=parameter(512)),
        dict(x=(0, 1)), (0, 1), rows, summed=frozenset({"weight"}),
    )  # fmt: skip


def per_sample(name: str, *parameters: str, second: bool = False) -> Large:
    rows = BOUNDARY // (2 * 512) + 1000
    inputs = dict(x=randn(2, rows, 512)) | (dict(y=randn(2, rows, 512)) if second else {})
    return Large(
        getattr(hdit_kernels, name), getattr(reference, name), inputs | {p: parameter(2, 512) for p in parameters},
        {n: (1, 1) for n in inputs}, (1, 1), rows, summed=frozenset(parameters),
    )  # fmt: skip


def geglu() -> Large:
    rows = BOUNDARY // 512 + 1000
    return Large(hdit_kernels.geglu, reference.geglu, dict(x=randn(rows, 1024)), dict(x=(0, 1)), (0, 1), rows)


def token_merge() -> Large:
    return Large(
        hdit_kernels.token_merge, reference.token_merge,
        dict(x=randn(1, 2050, 2048, 512), weight=parameter(256, 2048) / 32),
        dict(x=(1, 2)), (1, 1), 1025, summed=frozenset({"weight"}),
    )  # fmt: skip


def token_split() -> Large:
    return Large(
        hdit_kernels.token_split, reference.token_split,
        dict(x=randn(1, 1025, 1024, 256), weight=parameter(2048, 256) / 8, skip=randn(1, 2050, 2048, 512),
             fac=parameter(1) + 0.3),
        dict(x=(1, 1), skip=(1, 2)), (1, 2), 1025, summed=frozenset({"weight", "fac"}),
    )  # fmt: skip


def qk_norm_rope() -> Large:
    height, width, heads, dim = 1680, 1673, 4, 64
    return Large(
        hdit_kernels.qk_norm_rope, reference.qk_norm_rope,
        dict(qkv=randn(1, height, width, 3, heads, dim), scale=parameter(heads).abs() + 1,
             theta_y=parameter(height, heads, dim // 8) * 9, theta_x=parameter(width, heads, dim // 8) * 9),
        dict(qkv=(1, 1), theta_y=(0, 1)), (1, 1), height,
        frozen=frozenset({"theta_y", "theta_x"}), summed=frozenset({"scale"}),
    )  # fmt: skip


def neighborhood_self_attention() -> Large:
    large = qk_norm_rope()
    return large._replace(
        call=functools.partial(hdit_kernels.neighborhood_self_attention, kernel_size=7),
        reference=functools.partial(reference.neighborhood_self_attention, kernel_size=(7, 7)),
        halo=16, summed=frozenset(),
    )  # fmt: skip


def na2d() -> Large:
    shape = (1, 16400, 1024, 2, 64)
    return Large(
        functools.partial(hdit_kernels.na2d, kernel_size=7),
        lambda **inputs: reference.na2d(**inputs, kernel_size=(7, 7))[0],
        dict(query=randn(*shape), key=randn(*shape), value=randn(*shape)),
        dict(query=(1, 1), key=(1, 1), value=(1, 1)), (1, 1), shape[1], halo=16,
    )  # fmt: skip


OPERATORS = {
    "rms_norm": rms_norm,
    "ada_rms_norm": lambda: per_sample("ada_rms_norm", "scale"),
    "ada_layer_norm": lambda: per_sample("ada_layer_norm", "shift", "scale"),
    "gated_residual": lambda: per_sample("gated_residual", "gate", second=True),
    "geglu": geglu,
    "token_merge": token_merge,
    "token_split": token_split,
    "qk_norm_rope": qk_norm_rope,
    "neighborhood_self_attention": neighborhood_self_attention,
    "na2d": na2d,
}


def cut(tensor: torch.Tensor, where: tuple[int, int], first: int, last: int) -> torch.Tensor:
    dimension, rows = where
    return tensor.narrow(dimension, first * rows, (last - first) * rows)


def slab_gradients(large: Large, dout: torch.Tensor, first: int, last: int):
    """The reference on units [first, last) alone: its output and gradients, in float64."""
    leaves = {
        n: (cut(t, large.sliced[n], first, last) if n in large.sliced else t)
        .double()
        .requires_grad_(n not in large.frozen)
        for n, t in large.inputs.items()
    }
    out = large.reference(**leaves)
    learned = [n for n in leaves if n not in large.frozen]
    found = torch.autograd.grad(out, [leaves[n] for n in learned], cut(dout, large.out, first, last).double())
    return out, dict(zip(learned, found, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_beyond_two_to_the_31(operator: str, seed: int, record) -> None:
    torch.cuda.empty_cache()
    large = OPERATORS[operator]()
    elements = max(t.numel() for t in large.inputs.values())
    assert elements > BOUNDARY
    leaves = {n: t.requires_grad_(n not in large.frozen) for n, t in large.inputs.items()}
    learned = [n for n in leaves if n not in large.frozen]
    out = large.call(**leaves)
    dout = torch.randn_like(out)
    gradients = dict(zip(learned, torch.autograd.grad(out, [leaves[n] for n in learned], dout), strict=True))
    worst = 0.0
    largest = max(large.sliced, key=lambda n: leaves[n].numel())
    dimension, rows = large.sliced[largest]
    crossing = (BOUNDARY // (leaves[largest].stride(dimension) * rows)) % large.units
    for middle in (0, crossing, large.units):
        first, last = max(middle - SLAB, 0), min(middle + SLAB, large.units)
        low, high = max(first - large.halo, 0), min(last + large.halo, large.units)
        want_out, want = slab_gradients(large, dout, low, high)
        pairs = {"out": (cut(out, large.out, first, last), cut(want_out, large.out, first - low, last - low))}
        for name in large.sliced:
            if name not in large.frozen:
                where = large.sliced[name]
                inner = cut(want[name], where, first - low, last - low)
                pairs["d" + name] = (cut(gradients[name], where, first, last), inner)
        for name, (found, wanted) in pairs.items():
            error = relative_error(found, wanted)
            assert error <= 2 * FLOOR[torch.bfloat16], f"{operator} {name} at {middle} of {large.units}: {error:.2e}"
            worst = max(worst, error)
        del want_out, want, pairs
    if large.summed:
        totals = dict.fromkeys(large.summed, 0.0)
        chunk = -(-large.units // 128)
        for first in range(0, large.units, chunk):
            _, want = slab_gradients(large, dout, first, min(first + chunk, large.units))
            totals = {name: total + want[name] for name, total in totals.items()}
        for name, total in totals.items():
            pool = Pool()
            pool.add(gradients[name], total)
            assert pool.relative <= 2 * FLOOR[torch.bfloat16], f"{operator} d{name}: {pool.relative:.2e}"
            worst = max(worst, pool.relative)
    record("large_offsets", operator, "bfloat16", dict(elements=elements, worst_error=worst))
