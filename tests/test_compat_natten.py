"""hdit_kernels.compat.natten: values by the definition, NATTEN's arguments, its modules, and `import natten`."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import math
import sys
import types
import warnings
from collections.abc import Iterator
from functools import reduce

import pytest
import torch
from torch import Tensor

import hdit_kernels
from hdit_kernels.compat import natten
from hdit_kernels.compat.natten import context

GRIDS = {1: (11,), 2: (6, 7), 3: (5, 4, 6)}
FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_told", set())


def sees(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """[query, key] along one axis, True where the query sees the key: NATTEN's definition, one pair at a time."""
    found = torch.zeros(length, length, dtype=torch.bool)
    for query, key in itertools.product(range(length), repeat=2):
        if query % dilation == key % dilation:
            size = math.ceil((length - query % dilation) / dilation)
            q, k, group = query // dilation, key // dilation, query // dilation // stride * stride
            if causal:
                leader = min(group + stride - 1, size - 1)
                found[query, key] = leader - window < k <= q
            else:
                leader = min(group + stride // 2, size - 1)
                start = min(max(leader - window // 2, 0), size - window)
                found[query, key] = start <= k < start + window
    return found


def by_definition(query, key, value, *axes, scale, extra=None) -> tuple[Tensor, Tensor]:
    """Dense attention of all tokens under the product of the axes' masks. axes: of each, the arguments of `sees`."""
    grid, heads, dims = query.shape[1:-2], query.shape[-2], query.ndim - 3
    masks = [sees(length, *axis) for length, axis in zip(grid, axes, strict=True)]
    mask = reduce(lambda a, b: (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1), masks)
    q, k, v = (t.flatten(1, dims) for t in (query, key, value))
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
        mask = torch.cat([mask, torch.ones(len(mask), extra[0].shape[1], dtype=torch.bool)], 1)
    k, v = (t.repeat_interleave(heads // t.shape[-2], -2) for t in (k, v))
    logits = torch.einsum("bqhd,bkhd->bqhk", q, k) * scale
    logits = logits.masked_fill(~mask[:, None], -math.inf)
    out = torch.einsum("bqhk,bkhd->bqhd", logits.softmax(-1), v)
    return out.reshape(*query.shape[:-1], v.shape[-1]), logits.logsumexp(-1).reshape(query.shape[:-1])


def tensors(axes: int, heads: int = 2, heads_kv: int = 2, dim: int = 4, value_dim: int = 4) -> list[Tensor]:
    shapes = [(2, *GRIDS[axes], heads, dim), (2, *GRIDS[axes], heads_kv, dim), (2, *GRIDS[axes], heads_kv, value_dim)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


WINDOWS = {  # of each axis: window, stride, dilation, causal
    "1d": [(5, 1, 1, False)],
    "1d all options": [(3, 2, 3, True)],
    "2d": [(3, 1, 1, False), (4, 1, 1, False)],
    "2d all options": [(3, 2, 2, True), (2, 1, 3, False)],
    "3d": [(3, 1, 1, False), (3, 1, 1, False), (2, 1, 1, False)],
    "3d causal, strided": [(4, 2, 1, True), (2, 2, 2, False), (3, 1, 2, True)],
    "3d dilated": [(2, 2, 2, False), (3, 3, 1, True), (2, 1, 3, False)],
    "3d causal, dilated": [(2, 1, 2, True), (4, 1, 1, False), (6, 1, 1, False)],
}


@pytest.mark.parametrize("axes", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("kind", ["plain", "grouped heads", "wide values", "narrow values, additional keys"])
def test_equals_the_definition(axes, kind, seed) -> None:
    """Values, LSE and gradients."""
    sizes = {"grouped heads": (4, 2, 4, 4), "wide values": (2, 1, 4, 10)}.get(kind, (2, 2, 4, 4))
    if "narrow" in kind:
        sizes = (4, 2, 4, 3)
    given = tensors(len(axes), *sizes)
    _, heads_kv, dim, value_dim = sizes
    if "additional" in kind:
        given += [torch.randn(2, 3, heads_kv, d, dtype=torch.float64, requires_grad=True) for d in (dim, value_dim)]
    settings = list(zip(*axes, strict=True))
    found = FUNCTIONS[len(axes)](*given[:3], *settings, 0.7, *given[3:], return_lse=True)
    wanted = by_definition(*given[:3], *axes, scale=0.7, extra=given[3:] or None)
    torch.testing.assert_close(found, wanted)
    cotangents = [torch.randn_like(t) for t in wanted]
    torch.testing.assert_close(
        torch.autograd.grad(found, given, cotangents), torch.autograd.grad(wanted, given, cotangents)
    )
    alone = FUNCTIONS[len(axes)](*given[:3], *settings, 0.7, *given[3:])
    torch.testing.assert_close(alone, found[0])


def test_equals_hdit_kernels_na2d(seed) -> None:
    """The same bits, in the commonest call, as k-diffusion makes it."""
    query, key, value = torch.randn(3, 2, 9, 8, 2, 16).unbind()
    found = natten.functional.na2d(query, key, value, 7, scale=1.0)
    assert torch.equal(found, hdit_kernels.na2d(query, key, value, 7, scale=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, seed) -> None:
    for axes, function in FUNCTIONS.items():
        query, key, value = (t.detach().to(dtype) for t in tensors(axes))
        out, lse = function(query, key, value, 2, return_lse=True)
        wanted, _ = by_definition(*(t.double() for t in (query, key, value)), *[(2, 1, 1, False)] * axes, scale=0.5)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert (out - wanted).norm() <= {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[
            dtype
        ] * wanted.norm()


def test_autocast(seed) -> None:
    """The tensors in the autocast dtype, and nothing rounded to it on the way."""
    query, key, value = (t.detach().float() for t in tensors(3))
    tokens = [t.flatten(1, 3) for t in (query, key, value)]

    def calls(cast):
        q, k, v = map(cast, (query, key, value))
        flat = [cast(t) for t in tokens]
        yield natten.na3d(q, k, v, 3, additional_keys=flat[1], additional_values=flat[2])
        yield natten.functional.na3d_qk(query=q, key=k, kernel_size=2)
        yield natten.attention(*flat)
        yield from natten.attention(*flat, return_lse=True)

    with torch.autocast("cpu", torch.bfloat16):
        found = list(calls(lambda t: t))
    wanted = list(calls(lambda t: t.bfloat16()))
    assert [t.dtype for t in found] == [torch.bfloat16] * 4 + [torch.float32]
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:natten.na3d. backend")
def test_compiled_whole(seed) -> None:
    given = [t.detach() for t in tensors(3)]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        three = natten.na3d(query, key, value, 2, is_causal=(True, False, False), backend="cutlass-fna")
        return three + natten.na1d(query.flatten(1, 3), key.flatten(1, 3), value.flatten(1, 3), 3).view(three.shape)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), call(*given))


# Arguments

NA = (
    "query key value kernel_size stride dilation is_causal scale additional_keys additional_values attention_kwargs "
    "backend q_tile_shape kv_tile_shape backward_q_tile_shape backward_kv_tile_shape backward_kv_splits "
    "backward_use_pt_reduction run_persistent_kernel kernel_schedule torch_compile return_lse"
).split()
ATTENTION = (
    "query key value is_causal scale seqlens_Q seqlens_KV cumulative_seqlen_Q cumulative_seqlen_KV max_seqlen_Q "
    "max_seqlen_KV backend q_tile_size kv_tile_size backward_q_tile_size backward_kv_tile_size backward_kv_splits "
    "backward_use_pt_reduction run_persistent_kernel kernel_schedule torch_compile return_lse"
).split()
MODULE = "embed_dim num_heads kernel_size stride dilation is_causal qkv_bias qk_scale proj_drop".split()
SIGNATURES = {
    natten.na1d: NA,
    natten.na2d: NA,
    natten.na3d: NA,
    natten.attention: ATTENTION,
    natten.merge_attentions: ["outputs", "lse_tensors", "torch_compile", "use_autograd_fix"],
    natten.NeighborhoodAttention1D: MODULE,
    natten.NeighborhoodAttention2D: MODULE,
    natten.NeighborhoodAttention3D: MODULE,
    natten.functional.na2d_qk: "query key kernel_size dilation additional_keys is_causal rpb".split(),
    natten.functional.na2d_av: "attn value kernel_size dilation additional_values is_causal".split(),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_arguments_stand_in_nattens_order(function) -> None:
    found = inspect.signature(function).parameters.values()
    assert [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] == SIGNATURES[function]


SPEED = {
    "backend": "hopper-fna",
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 8),
    "backward_q_tile_shape": (8, 8),
    "backward_kv_tile_shape": (8, 8),
    "backward_kv_splits": (1, 1),
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": "pp",
    "torch_compile": True,
    "attention_kwargs": {"backend": "cutlass-fmha", "q_tile_size": 64},
}


@pytest.mark.parametrize("name", SPEED)
def test_what_steers_speed_is_taken_and_named_once(name, seed) -> None:
    given = [t.detach() for t in tensors(2)]
    with pytest.warns(UserWarning, match=f"natten.*{name}.*taken without effect") as told:
        found = natten.na2d(*given, 3, **{name: SPEED[name]})
    assert all(warning.filename == __file__ for warning in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natten.na2d(*given, 3, **{name: SPEED[name]})
        assert torch.equal(
            found, natten.na2d(*given, 3, is_causal=None, torch_compile=False, run_persistent_kernel=True)
        )


def call_na2d(**changes):
    query, key, value = (t.detach() for t in tensors(2))
    return natten.na2d(**(dict(query=query, key=key, value=value, kernel_size=3) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(backend="fast"), ValueError, "backend: expected one of cutlass-fna, .*got 'fast'"),
        (dict(attention_kwargs={"scale": 1}), ValueError, "attention_kwargs: expected some of backend, .*got scale"),
        (dict(xformers_kwargs={"p": 0.1}), ValueError, "xformers_kwargs: expected None"),
        (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size: expected one integer or 2"),
        (dict(kernel_size=7), ValueError, r"kernel_size: expected .* the grid \(6, 7\), got kernel_size \(7, 7\)"),
        (dict(stride=4), ValueError, r"stride: expected at most kernel_size \(3, 3\), got \(4, 4\)"),
        (dict(dilation=True), TypeError, "dilation: expected an integer"),  # is_causal of 0.17, by position
        (dict(is_causal=1), TypeError, "is_causal: expected True or False, or 2 of them"),
        (dict(scale=0), ValueError, "scale: expected a number above 0"),
        (dict(return_lse=None), TypeError, "return_lse: expected True or False"),
        (dict(additional_keys=torch.zeros(2, 3, 2, 4)), ValueError, "additional_values: expected .*, got one"),
        (dict(query=torch.zeros(2, 6, 7, 8)), ValueError, r"query: expected shape \[B, H, W, heads, head_dim\]"),
        (dict(key=torch.zeros(2, 6, 7, 3, 4)), ValueError, "value: expected shape"),
        (
            dict(query=torch.zeros(2, 6, 7, 3, 4).double()),
            ValueError,
            "key: expected heads_kv that divide 3 heads, got 2",
        ),
        (dict(value=torch.zeros(2, 6, 7, 2, 4)), TypeError, "value: expected float64 like query, got float32"),
        (dict(rpb=torch.zeros(2, 5, 5), stride=2), NotImplementedError, "na2d: rpb is not taken together with stride"),
        (dict(rpb=torch.zeros(2, 5, 4)), ValueError, r"rpb: expected shape \[2, 5, 5\], got \[2, 5, 4\]"),
    ],
)
def test_bad_arguments(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        call_na2d(**changes)


def test_additional_keys_of_other_sizes() -> None:
    extra = torch.zeros(2, 3, 1, 4).double()
    with pytest.raises(ValueError, match=r"additional_keys: expected shape \[2, 3, 2, 4\], got \[2, 3, 1, 4\]"):
        call_na2d(additional_keys=extra, additional_values=extra)


def test_the_other_layout_is_named(seed) -> None:
    """Where a window does not fit, but would if heads lay elsewhere."""
    heads_first = torch.randn(1, 2, 9, 8, 4)
    with pytest.raises(ValueError, match=r"looks like \[B, heads, H, W, head_dim\]; na2d takes .*movedim\(1, -2\)"):
        natten.na2d(heads_first, heads_first, heads_first, 7)
    heads_last = heads_first.movedim(1, -2)
    natten.na2d(heads_last, heads_last, heads_last, 7)
    with pytest.raises(ValueError, match=r"looks like \[B, H, W, heads, head_dim\]; na2d_qk takes .*movedim\(-2, 1\)"):
        natten.functional.na2d_qk(heads_last, heads_last, 7)
    natten.functional.na2d_qk(heads_last.movedim(-2, 1), heads_first, 7)


def test_generic_takes_one_to_three_axes(seed) -> None:
    for axes, function in FUNCTIONS.items():
        given = [t.detach() for t in tensors(axes)]
        found = natten.functional.neighborhood_attention_generic(*given, 3, return_lse=True)
        torch.testing.assert_close(found, function(*given, 3, return_lse=True))
    with pytest.raises(ValueError, match="query: expected 4, 5 or 6 dimensions"):
        natten.functional.neighborhood_attention_generic(torch.zeros(3), torch.zeros(3), torch.zeros(3), 3)


# attention and merge_attentions


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal, seed) -> None:
    query, key, value = tensors(1, 4, 2, 4, 6)
    wanted = by_definition(query, key, value, (11, 1, 1, causal), scale=0.5)
    torch.testing.assert_close(natten.attention(query, key, value, causal, return_lse=True), wanted)
    torch.testing.assert_close(natten.attention(query, key, value, causal), wanted[0])


def test_attention_refuses_by_name() -> None:
    query, key = torch.zeros(1, 4, 1, 2), torch.zeros(1, 5, 1, 2)
    with pytest.raises(NotImplementedError, match="attention: seqlens_Q is not taken"):
        natten.attention(query, query, query, seqlens_Q=torch.tensor([4]))
    with pytest.raises(ValueError, match="is_causal: expected as many keys as queries, 4, got 5"):
        natten.attention(query, key, key, is_causal=True)
    with pytest.raises(ValueError, match="backend: expected one of cutlass-fmha"):
        natten.attention(query, query, query, backend="cutlass-fna")
    with pytest.warns(UserWarning, match="natten.attention: q_tile_size"):
        natten.attention(query, query, query, q_tile_size=64)


def test_merge_attentions(seed) -> None:
    query, key, value = (t.flatten(1, 2) for t in tensors(2))
    halves = [
        natten.attention(query, k, v, return_lse=True)
        for k, v in zip(key.split(20, 1), value.split(20, 1), strict=True)
    ]
    merged = natten.merge_attentions([out for out, _ in halves], [lse for _, lse in halves], torch_compile=False)
    torch.testing.assert_close(merged, natten.attention(query, key, value, return_lse=True))


def test_merge_attentions_refuses_an_incomplete_gradient() -> None:
    """NATTEN's default makes up for an LSE without gradient; a silent difference would be a wrong gradient."""
    outputs, lse = [torch.zeros(1, 2, 1, 4, requires_grad=True)] * 2, [torch.zeros(1, 2, 1)] * 2
    with pytest.raises(ValueError, match=r"lse_tensors\[0\]: expected a gradient like outputs\[0\]'s, got none"):
        natten.merge_attentions(outputs, lse)
    natten.merge_attentions(outputs, lse, use_autograd_fix=False)
    with torch.no_grad():
        natten.merge_attentions(outputs, lse)


# The halves of 0.17, and relative position biases


def heads_first(given: list[Tensor]) -> list[Tensor]:
    return [t.movedim(-2, 1) for t in given]


HALVES = {
    1: (natten.functional.na1d_qk, natten.functional.na1d_av, [(3, 1, 3, False)]),
    2: (natten.functional.na2d_qk, natten.functional.na2d_av, [(3, 1, 2, False), (4, 1, 1, False)]),
    3: (natten.functional.na3d_qk, natten.functional.na3d_av, [(3, 1, 1, False), (2, 1, 2, False), (3, 1, 2, False)]),
}


@pytest.mark.parametrize("axes", HALVES)
def test_the_two_halves_are_the_whole(axes, seed) -> None:
    qk, av, windows = HALVES[axes]
    given = tensors(axes, value_dim=6)
    wanted, lse = by_definition(*given, *windows, scale=1.0)
    query, key, value = heads_first(given)
    sizes, _, steps, _ = zip(*windows, strict=True)
    logits = qk(query, key, sizes, steps)
    assert logits.shape == (2, 2, *GRIDS[axes], math.prod(sizes))
    torch.testing.assert_close(logits.logsumexp(-1).movedim(1, -1), lse)
    found = av(logits.softmax(-1), value, sizes, steps).movedim(1, -2)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given), atol=1e-12, rtol=1e-7
    )


def test_order_of_a_windows_keys() -> None:
    """Rows first, from the window's start: of a key that is 1 at one place, the logits show where it stands."""
    query, key = torch.ones(1, 1, 5, 6, 1), torch.zeros(1, 1, 5, 6, 1)
    key[0, 0, 3, 4] = 1
    logits = natten.functional.na2d_qk(query, key, (3, 4))[0, 0]
    assert logits[2, 3].view(3, 4).nonzero().tolist() == [[2, 3]]  # its window starts at (1, 1)
    assert logits[4, 5].view(3, 4).nonzero().tolist() == [[1, 2]]  # moved inwards, to (2, 2)


def biased_by_definition(given: list[Tensor], window: int, dilation: int, rpb: Tensor, scale: float) -> Tensor:
    """One query at a time, over a 2-D grid."""
    query, key, value = given
    out = torch.empty_like(query)
    _, height, width, heads, _ = query.shape
    rows, columns = (sees(n, window, 1, dilation, False) for n in (height, width))
    for y, x, h in itertools.product(range(height), range(width), range(heads)):
        keys = [(r, c) for r in range(height) for c in range(width) if rows[y, r] and columns[x, c]]
        places = [((r - y) // dilation + window - 1, (c - x) // dilation + window - 1) for r, c in keys]
        bias = torch.stack([rpb[h, row, column] for row, column in places])
        at = tuple(zip(*keys, strict=True))
        logits = torch.einsum("bd,bkd->bk", query[:, y, x, h], key[:, at[0], at[1], h]) * scale + bias
        out[:, y, x, h] = torch.einsum("bk,bkd->bd", logits.softmax(-1), value[:, at[0], at[1], h])
    return out


@pytest.mark.parametrize("dilation", [1, 2])
def test_relative_position_biases(dilation, seed) -> None:
    given = [t.detach() for t in tensors(2)]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    wanted = biased_by_definition(given, 3, dilation, rpb, 0.7)
    torch.testing.assert_close(natten.na2d(*given, 3, dilation=dilation, scale=0.7, rpb=rpb), wanted)
    query, key, value = heads_first(given)
    weights = natten.functional.natten2dqkrpb(query * 0.7, key, rpb, 3, dilation).softmax(-1)
    torch.testing.assert_close(natten.functional.natten2dav(weights, value, 3, dilation).movedim(1, -2), wanted)


def test_halves_refuse_by_name() -> None:
    query = torch.zeros(1, 1, 5, 5, 2)
    with pytest.raises(NotImplementedError, match="na2d_qk: is_causal is not taken; natten.na2d takes it"):
        natten.functional.na2d_qk(query, query, 3, is_causal=True)
    with pytest.raises(NotImplementedError, match="na2d_av: additional_values is not taken"):
        natten.functional.na2d_av(torch.zeros(1, 1, 5, 5, 9), query, 3, additional_values=query)
    with pytest.raises(ValueError, match=r"attn: expected shape \[1, 1, 5, 5, 9\], got \[1, 1, 5, 5, 8\]"):
        natten.functional.na2d_av(torch.zeros(1, 1, 5, 5, 8), query, 3)


# Modules

MODULES = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D}


@pytest.mark.parametrize("axes", MODULES)
def test_modules(axes, seed) -> None:
    """[B, *grid, channels], from weights under NATTEN's names: the packed projection holds query, key, value in turn,
    heads inside each.
    """
    module = MODULES[axes](8, 2, 3, is_causal=True, qk_scale=0.3).double()
    assert list(module.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    x = torch.randn(2, *GRIDS[axes], 8, dtype=torch.float64)
    query, key, value = (t.unflatten(-1, (2, 4)) for t in (x @ module.qkv.weight.T + module.qkv.bias).split(8, -1))
    out, _ = by_definition(query, key, value, *[(3, 1, 1, True)] * axes, scale=0.3)
    torch.testing.assert_close(module(x), out.flatten(-2) @ module.proj.weight.T + module.proj.bias)


def test_modules_of_0_17(seed) -> None:
    """rpb among the parameters, dim for embed_dim, and no bias of qkv."""
    module = natten.NeighborhoodAttention2D(
        dim=8, num_heads=2, kernel_size=3, dilation=2, rel_pos_bias=True, qkv_bias=False, attn_drop=0.0
    ).double()
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == {
        "rpb": (2, 5, 5),
        "qkv.weight": (24, 8),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    given = [t.unflatten(-1, (2, 4)) for t in (x @ module.qkv.weight.T).split(8, -1)]
    out = biased_by_definition(given, 3, 2, module.rpb, 0.5)
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2)))


def test_position_biases_are_not_lost_in_loading() -> None:
    old = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).state_dict()
    new = torch.nn.Sequential(natten.NeighborhoodAttention2D(8, 2, 3))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="0.rpb: expected none or zeros, .* rel_pos_bias=True"):
            new.load_state_dict({f"0.{n}": t for n, t in old.items()}, strict=strict)
    new.load_state_dict({f"0.{n}": torch.zeros_like(t) if n == "rpb" else t for n, t in old.items()})
    assert torch.equal(new[0].qkv.weight, old["qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(num_heads=3), ValueError, "num_heads: expected a divisor of embed_dim 8, got 3"),
        (dict(dim=8), ValueError, "dim: expected embed_dim or dim, got both"),
        (dict(embed_dim=None), TypeError, "embed_dim: expected an integer"),
        (dict(kernel_size=None), TypeError, "kernel_size: expected an integer"),
        (dict(attn_drop=0.1), ValueError, "attn_drop: expected 0"),
        (dict(rel_pos_bias=True, is_causal=True), NotImplementedError, "rel_pos_bias: not taken together"),
        (dict(bias=True), TypeError, "bias"),
    ],
)
def test_modules_refuse_by_name(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        natten.NeighborhoodAttention2D(**(dict(embed_dim=8, num_heads=2, kernel_size=3) | changes))


def test_a_module_names_its_input() -> None:
    module = natten.NeighborhoodAttention2D(8, 2, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, H, W, 8\], got \[1, 6, 8\]"):
        module(torch.zeros(1, 6, 8))


# Switches and questions


def test_version_says_what_runs() -> None:
    assert natten.__version__ == f"0.21.7+hdit.kernels.{hdit_kernels.__version__}"


def test_switches_say_that_they_have_no_effect() -> None:
    for name in context.SWITCHES:
        with pytest.warns(UserWarning, match=f"natten.{name}: taken without effect"):
            getattr(natten, name)(False)


def test_questions() -> None:
    """k-diffusion asks has_fused_na() at every call; True takes it to na2d."""
    from hdit_kernels.compat.natten import has_fused_na, use_fused_na

    assert has_fused_na() is True and natten.has_fused_na is has_fused_na and callable(use_fused_na)
    assert natten.are_deterministic_algorithms_enabled() and natten.has_cuda() is torch.cuda.is_available()
    assert natten.get_configs_for_cutlass_hopper_fna(1, 2, 3) == natten.get_bwd_configs_for_cutlass_fmha() == []


def test_what_is_missing_says_so() -> None:
    with pytest.raises(AttributeError, match="natten.profiler is not in .*: measure with torch.profiler"):
        natten.profiler  # noqa: B018
    with pytest.raises(AttributeError, match="natten.nothing_known is not in hdit_kernels' compatible layer$"):
        natten.nothing_known  # noqa: B018
    assert not hasattr(context, "nothing_known")


NATTENS_NAMES = """NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D
are_deterministic_algorithms_enabled use_deterministic_algorithms use_kv_parallelism_in_fused_na
is_kv_parallelism_in_fused_na_enabled set_memory_usage_preference is_memory_usage_default is_memory_usage_strict
is_memory_usage_unrestricted is_flex_compile_allowed is_flex_compile_backprop_allowed allow_flex_compile
allow_flex_compile_backprop disable_flex_compile disable_flex_compile_backprop get_bwd_configs_for_cutlass_fmha
get_bwd_configs_for_cutlass_fna get_configs_for_cutlass_fmha get_configs_for_cutlass_fna
get_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fmha get_configs_for_cutlass_hopper_fna
get_bwd_configs_for_cutlass_hopper_fna get_bwd_configs_for_cutlass_blackwell_fmha
get_bwd_configs_for_cutlass_blackwell_fna get_configs_for_cutlass_blackwell_fmha get_configs_for_cutlass_blackwell_fna
get_configs_for_flex_fmha get_configs_for_flex_fna HAS_LIBNATTEN na1d na2d na3d attention merge_attentions
use_fna is_fna_enabled use_fused_na is_fused_na_enabled use_autotuner force_flex_attention disable_autotuner
is_autotuner_enabled is_autotuner_enabled_for_forward is_autotuner_enabled_for_backward
is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward has_cuda has_half has_bfloat has_gemm has_fna
has_fused_na has_tf32_gemm has_fp32_gemm has_fp64_gemm use_tf32_in_gemm_na use_tiled_na use_gemm_na
use_flex_attention is_tf32_in_gemm_na_enabled is_tiled_na_enabled is_gemm_na_enabled enable_tf32 disable_tf32
enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na""".split()


def test_public_names_of_0_21_and_0_17_are_there() -> None:
    """All of both versions' __all__ but get_memory_usage_preference, which answers with an enum of NATTEN's own."""
    assert [name for name in NATTENS_NAMES if not hasattr(natten, name)] == []


# install


@pytest.fixture
def clean_modules() -> Iterator[None]:
    """sys.modules without natten, as it was afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "natten"}
    yield
    natten.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "natten"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_install_and_uninstall(clean_modules) -> None:
    natten.install()
    natten.install()  # again: nothing more
    names = "import natten\nimport natten.functional\nfrom natten.functional import na2d, na2d_qk\n"
    names += "from natten import NeighborhoodAttention2D, has_fused_na\nfrom natten.context import is_fna_enabled"
    found: dict[str, object] = {}
    exec(names, found)
    assert found["natten"] is natten and found["na2d"] is natten.na2d
    assert found["NeighborhoodAttention2D"] is natten.NeighborhoodAttention2D
    assert importlib.import_module("natten.modules") is natten.modules
    assert importlib.metadata.version("natten") == natten.__version__
    assert torch.__version__.startswith(importlib.metadata.version("torch"))  # others are found as before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.utils")
    finders = list(sys.meta_path)
    natten.uninstall()
    assert len(sys.meta_path) == len(finders) - 1
    natten.uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "natten"]


def test_install_beside_a_real_natten(clean_modules) -> None:
    real = types.ModuleType("natten")
    real.__version__, real.__file__ = "0.21.7", "/site-packages/natten/__init__.py"
    child = types.ModuleType("natten.functional")
    other = types.ModuleType("natten_tools")
    sys.modules |= {"natten": real, "natten.functional": child, "natten_tools": other}
    try:
        with pytest.raises(
            RuntimeError, match="natten: expected none imported yet, got version 0.21.7 from /site-pack"
        ):
            natten.install()
        assert sys.modules["natten"] is real
        natten.install(force=True)
        assert sys.modules["natten"] is natten and sys.modules["natten.functional"] is natten.functional
        natten.uninstall()
        assert sys.modules["natten"] is real and sys.modules["natten.functional"] is child
        assert "natten.modules" not in sys.modules and sys.modules["natten_tools"] is other
    finally:
        del sys.modules["natten_tools"]


def test_importing_installs_nothing(clean_modules) -> None:
    importlib.reload(importlib.import_module("hdit_kernels.compat"))
    assert "natten" not in sys.modules
