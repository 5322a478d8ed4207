"""na2d and neighborhood_self_attention on the CPU: the reference against its definition, and how the operators
behave.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hdit_kernels import na2d, neighborhood_self_attention, qk_norm_rope, reference


def by_definition(query, key, value, kernel_size, stride, dilation, causal, scale, extra_k=None, extra_v=None):
    """One query at a time, in words of the definition; the slowest and plainest there is."""
    batch, height, width, heads, _ = query.shape
    out, lse = query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1])

    def seen(i, length, window, stride, dilation, causal):
        index, residue = i // dilation, i % dilation
        sub_length = len(range(residue, length, dilation))
        if causal:
            leader = min(index // stride * stride + stride - 1, sub_length - 1)
            keys = range(max(leader - window + 1, 0), index + 1)
        else:
            leader = min(index // stride * stride + stride // 2, sub_length - 1)
            start = min(max(leader - window // 2, 0), sub_length - window)
            keys = range(start, start + window)
        return [residue + k * dilation for k in keys]

    for b, y, x, h in itertools.product(range(batch), range(height), range(width), range(heads)):
        shared = h * key.shape[3] // query.shape[3]
        rows = seen(y, height, kernel_size[0], stride[0], dilation[0], causal[0])
        columns = seen(x, width, kernel_size[1], stride[1], dilation[1], causal[1])
        keys = torch.stack([key[b, r, c, shared] for r in rows for c in columns])
        values = torch.stack([value[b, r, c, shared] for r in rows for c in columns])
        if extra_k is not None:
            keys, values = torch.cat([keys, extra_k[b, :, shared]]), torch.cat([values, extra_v[b, :, shared]])
        logits = keys @ query[b, y, x, h] * scale
        out[b, y, x, h], lse[b, y, x, h] = logits.softmax(0) @ values, logits.logsumexp(0)
    return out, lse


@st.composite
def problems(draw):
    window = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = tuple(w * d + draw(st.integers(0, 12)) for w, d in zip(window, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = draw(st.tuples(st.booleans(), st.booleans()))
    heads_kv, head_dim_v, extra = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    heads = heads_kv * draw(st.integers(1, 3))
    return grid, window, stride, dilation, causal, (heads, heads_kv), head_dim_v, extra, draw(st.integers(0, 2**31))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_equals_the_definition(problem) -> None:
    (height, width), window, stride, dilation, causal, (heads, heads_kv), head_dim_v, extra, seed = problem
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    query = draw(1, height, width, heads, 4)
    key, value = (draw(1, height, width, heads_kv, dim) for dim in (4, head_dim_v))
    extra_k, extra_v = (draw(1, extra, heads_kv, 4), draw(1, extra, heads_kv, head_dim_v)) if extra else (None, None)
    wanted = by_definition(query, key, value, window, stride, dilation, causal, 0.7, extra_k, extra_v)
    found = na2d(query, key, value, window, stride, dilation, causal, 0.7, extra_k, extra_v, return_lse=True)
    torch.testing.assert_close(found, wanted)


def qkv_tensors(*shape, dtype=torch.float64, grad=True):
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients(dilation, seed) -> None:
    """Both outputs, all five inputs, over more than one tile."""
    tensors = qkv_tensors(1, 10, 9, 1, 2)
    extra = [torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(query, key, value, extra_k, extra_v):
        return na2d(query, key, value, (3, 4), 1, dilation, (False, True), None, extra_k, extra_v, return_lse=True)

    assert torch.autograd.gradcheck(call, (*tensors, *extra), fast_mode=True)


def test_chunked_backward_equals_autograd_through_the_reference(seed) -> None:
    tensors = qkv_tensors(2, 19, 11, 2, 8)
    out, lse = reference.na2d(*tensors, (5, 4), dilation=(2, 1))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad([out, lse], tensors, [dout, dlse])
    found = reference.na2d_backward(dout, dlse, *(t.detach() for t in tensors), (5, 4), dilation=(2, 1))[:3]
    torch.testing.assert_close(found, wanted)


def test_only_one_output_used(seed) -> None:
    tensors = qkv_tensors(1, 5, 5, 1, 4)
    out, lse = na2d(*tensors, 3, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), tensors)
    assert dq.norm() > 0 and dk.norm() > 0 and dv.norm() == 0
    assert na2d(*tensors, 3).requires_grad


def test_a_window_of_the_whole_grid_is_global_attention(seed) -> None:
    query, key, value = qkv_tensors(2, 4, 6, 3, 8, grad=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    )
    torch.testing.assert_close(na2d(query, key, value, (4, 6)).flatten(1, 2).transpose(1, 2), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, seed) -> None:
    tensors = qkv_tensors(1, 6, 6, 1, 8, dtype=dtype)
    out, lse = na2d(*tensors, 3, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum(), tensors))


def test_opcheck(seed) -> None:
    tensors = qkv_tensors(1, 5, 6, 2, 8, dtype=torch.float32, grad=False)
    arguments = ([3, 3], [1, 1], [1, 1], [False, False], 0.3)
    ops = torch.ops.hdit_kernels
    for dtype, return_lse, save_stats in (
        (torch.float32, True, True),
        (torch.float16, False, True),
        (torch.float32, True, False),
    ):
        cast = [t.to(dtype) for t in tensors]
        torch.library.opcheck(ops.na2d_forward.default, (*cast, None, None, *arguments, return_lse, save_stats))
    out, lse, stats = ops.na2d_forward(*tensors, None, None, *arguments, True, True)
    torch.library.opcheck(ops.na2d_backward.default, (out, lse, *tensors, None, None, out, stats, *arguments))
    qkv, angles = torch.stack(tensors, 3), (torch.ones(2), torch.randn(5, 2, 1), torch.randn(6, 2, 1))
    for dtype, save_stats in ((torch.float32, True), (torch.float16, True), (torch.float32, False)):
        arguments = (qkv.to(dtype), *angles, [3, 3], 1e-6, save_stats)
        torch.library.opcheck(ops.neighborhood_self_attention_forward.default, arguments)
    saved = ops.neighborhood_self_attention_forward(qkv, *angles, [3, 3], 1e-6, True)
    torch.library.opcheck(
        ops.neighborhood_self_attention_backward.default,
        (saved[0], qkv, *angles, saved[1], saved[0], saved[2], [3, 3], 1e-6),
    )


def every_option(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], tuple]:
    """Tensors and settings of a call with all there are."""
    shapes = [(1, 6, 7, 4, 8), (1, 6, 7, 2, 8), (1, 6, 7, 2, 5), (1, 3, 2, 8), (1, 3, 2, 5)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes], ((3, 4), (2, 3), (2, 1), (False, True), 0.3)


def test_opcheck_of_every_option(seed) -> None:
    tensors, settings = every_option()
    ops, settings = torch.ops.hdit_kernels, [list(s) if isinstance(s, tuple) else s for s in settings]
    torch.library.opcheck(ops.na2d_forward.default, (*tensors, *settings, True, True))
    out, lse, stats = ops.na2d_forward(*tensors, *settings, True, True)
    assert out.shape == (1, 6, 7, 4, 5) and lse.shape == (1, 6, 7, 4)
    torch.library.opcheck(ops.na2d_backward.default, (out, lse, *tensors, out, stats, *settings))


def test_every_option_compiled_and_mapped(seed) -> None:
    """The same values and gradients in torch.compile, torch.func and vmap."""
    tensors, (window, stride, dilation, causal, scale) = every_option(torch.float64)

    def call(*given):
        out, lse = na2d(*given[:3], window, stride, dilation, causal, scale, *given[3:], return_lse=True)
        return out.square().sum() + lse.sum()

    leaves = [t.requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), wanted)
    plain = [t.detach() for t in leaves]
    gradients = torch.func.grad(call, argnums=tuple(range(5)))
    torch.testing.assert_close(gradients(*plain), wanted)
    mapped = torch.vmap(gradients)(*(torch.stack([t, t]) for t in plain))
    torch.testing.assert_close(mapped, tuple(torch.stack([w, w]) for w in wanted))


def test_vmap(seed) -> None:
    query, key, value = (torch.randn(3, 1, 5, 6, 2, 8) for _ in range(3))
    calls = [na2d(q, key[0], v, 3, return_lse=True) for q, v in zip(query, value, strict=True)]
    found = torch.vmap(lambda q, k, v: na2d(q, k, v, 3, return_lse=True), (0, None, 1))(
        query, key[0], value.movedim(0, 1)
    )
    assert all(torch.equal(f, torch.stack(w)) for f, w in zip(found, zip(*calls, strict=True), strict=True))
    qkv, angles = torch.stack([query, key, value], 4), (torch.ones(2), torch.randn(5, 2, 1), torch.randn(6, 2, 1))
    wanted = torch.stack([neighborhood_self_attention(x, *angles, 3) for x in qkv])
    assert torch.equal(torch.vmap(lambda x: neighborhood_self_attention(x, *angles, 3))(qkv), wanted)


def test_forward_mode_is_refused(seed) -> None:
    """Rather than answered with no tangent."""
    query, key, value = qkv_tensors(1, 5, 6, 2, 8, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="forward mode"):
            na2d(dual, key, value, 3)
        na2d(query, key, value, 3)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda q: na2d(q, key, value, 3), (query,), (torch.ones_like(query),))


def test_compiles_whole(seed) -> None:
    def block(query, key, value, qkv, scale, theta_y, theta_x):
        return na2d(query, key, value, 3) + neighborhood_self_attention(qkv, scale, theta_y, theta_x, 3)

    tensors = qkv_tensors(1, 6, 5, 2, 8, dtype=torch.float32)
    qkv = torch.randn(1, 6, 5, 3, 2, 8, requires_grad=True)
    scale = torch.full((2,), 10.0, requires_grad=True)
    inputs = (*tensors, qkv, scale, torch.randn(6, 2, 1), torch.randn(5, 2, 1))
    learned = inputs[:5]
    wanted = block(*inputs)
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)  # inductor would need a C++ compiler
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, learned, cotangent), torch.autograd.grad(wanted, learned, cotangent)
    )


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole_for_all_sizes(return_lse, grad, seed) -> None:
    def call(*tensors):
        out = na2d(*tensors, (3, 4), return_lse=return_lse)
        return out if return_lse else (out,)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (6, 7, 9):
        tensors = qkv_tensors(1, height, height + 4, 2, 8, dtype=torch.float32, grad=grad)
        wanted, found = call(*tensors), compiled(*tensors)
        torch.testing.assert_close(found, wanted)
        if grad:
            cotangents = [torch.randn_like(t) for t in wanted]
            torch.testing.assert_close(
                torch.autograd.grad(found, tensors, cotangents), torch.autograd.grad(wanted, tensors, cotangents)
            )
    with pytest.raises(Exception, match="at most the grid"):
        compiled(*qkv_tensors(1, 2, 6, 2, 8, dtype=torch.float32, grad=grad))


def test_autocast(seed) -> None:
    tensors = qkv_tensors(1, 6, 6, 2, 8, dtype=torch.float32)
    qkv = torch.randn(1, 6, 6, 3, 2, 8, requires_grad=True)
    scale = torch.full((2,), 10.0, requires_grad=True)
    theta = torch.randn(6, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = na2d(*tensors, 3)
        packed = neighborhood_self_attention(qkv, scale, theta, theta, 3)
    assert out.dtype == packed.dtype == torch.bfloat16
    gradients = torch.autograd.grad([out.float().sum() + packed.float().sum()], [*tensors, qkv, scale])
    assert all(g.dtype == torch.float32 for g in gradients)


def test_autocast_makes_one_dtype(seed) -> None:
    query = torch.randn(1, 6, 6, 2, 8)
    for _ in range(2):  # neither of the two says anything about the other
        with pytest.raises(TypeError, match="key: expected float32 like query, got bfloat16"):
            na2d(query, query.bfloat16(), query, 3)
        with torch.autocast("cpu", torch.bfloat16):
            assert na2d(query, query.bfloat16(), query, 3).dtype == torch.bfloat16
            with pytest.raises(TypeError, match="value: expected bfloat16 like query, got float64"):
                na2d(query, query, query.double(), 3)
            with pytest.raises(TypeError, match="value: expected bfloat16, float16, float32 or float64, got int32"):
                na2d(query, query, query.int(), 3)


def test_flops(seed) -> None:
    query, key, value = (torch.empty(2, 32, 48, 3, 64, device="meta", requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = na2d(query, key, value, (7, 5))
    forward = 4 * 2 * 32 * 48 * 3 * 64 * 35
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_self_attention_is_its_two_parts(seed) -> None:
    qkv = torch.randn(2, 9, 7, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([10.0, 3.0], dtype=torch.float64, requires_grad=True)
    theta_y, theta_x = torch.randn(9, 2, 2, dtype=torch.float64), torch.randn(7, 2, 2, dtype=torch.float64)
    found = neighborhood_self_attention(qkv, scale, theta_y, theta_x, (3, 5))
    wanted = na2d(*qk_norm_rope(qkv, scale, theta_y, theta_x).unbind(3), (3, 5), scale=1.0)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, [qkv, scale], cotangent), torch.autograd.grad(wanted, [qkv, scale], cotangent)
    )


GRID = torch.randn(1, 6, 6, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=GRID.tolist()), "query: expected a torch.Tensor, got list"),
        (dict(query=GRID.int()), "query: expected bfloat16"),
        (dict(query=GRID[0]), r"query: expected shape \[B, H, W, heads, head_dim\], got \[6, 6, 2, 8\]"),
        (dict(key=GRID[..., :4]), r"key: expected shape .* got \[1, 6, 6, 2, 4\]"),
        (dict(value=GRID[:, :, :, :1]), r"value: expected shape \[1, 6, 6, 2, head_dim_v\], got \[1, 6, 6, 1, 8\]"),
        (
            dict(key=GRID.repeat(1, 1, 1, 2, 1), value=GRID.repeat(1, 1, 1, 2, 1)),
            "key: expected heads_kv that divide 2 heads, got 4",
        ),
        (dict(key=GRID[:, :, :, :0], value=GRID[:, :, :, :0]), "value: expected every size"),
        (
            dict(additional_keys=GRID[:, 0, :, :1], additional_values=GRID[:, 0, :, :1]),
            r"additional_keys: expected shape \[1, extra, 2, 8\], got \[1, 6, 1, 8\]",
        ),
        (dict(value=GRID[:, 1:]), r"value: expected shape \[1, 6, 6, 2, head_dim_v\], got \[1, 5, 6, 2, 8\]"),
        (dict(value=GRID[..., :0]), "value: expected every size but the batch's to be at least 1"),
        (
            dict(value=GRID[..., :4], additional_keys=GRID[:, 0], additional_values=GRID[:, 0]),
            r"additional_values: expected shape \[1, 6, 2, 4\], got \[1, 6, 2, 8\]",
        ),
        (dict(value=GRID.half()), "value: expected float32 like query, got float16"),
        (dict(kernel_size=7), r"kernel_size: .* at most the grid \(6, 6\), got kernel_size \(7, 7\)"),
        (dict(dilation=3), r"kernel_size .* with dilation \(3, 3\)"),
        (dict(kernel_size=0), "kernel_size: expected an integer of at least 1 .* got 0"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size: .* two of them"),
        (dict(stride=4), r"stride: expected at most kernel_size \(3, 3\), got \(4, 4\)"),
        (dict(scale=0), "scale: expected a number above 0, got 0.0"),
        (dict(is_causal=1), "is_causal: expected True or False"),
        (
            dict(additional_keys=GRID[:, 0]),
            "additional_values: expected additional_keys and additional_values or neither",
        ),
        (
            dict(query=GRID[:, :, :0], key=GRID[:, :, :0], value=GRID[:, :, :0]),
            "query: expected every size but the batch's to be at least 1",
        ),
    ],
)
def test_bad_input(change, message) -> None:
    right = dict(query=GRID, key=GRID, value=GRID, kernel_size=3)
    na2d(**right)
    for _ in range(2):  # of which nothing is remembered
        with pytest.raises((TypeError, ValueError), match=message):
            na2d(**right | change)
    na2d(**right)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (dict(kernel_size=3), dict(kernel_size=3.0)),
        (dict(kernel_size=(3, 3)), dict(kernel_size=(3.0, 3))),
        (dict(kernel_size=[3, 3]), dict(kernel_size=[3, 3.0])),
        (dict(kernel_size=3, dilation=1), dict(kernel_size=3, dilation=1.0)),
        (dict(kernel_size=3, is_causal=False), dict(kernel_size=3, is_causal=0)),
        (dict(kernel_size=3, is_causal=(True, False)), dict(kernel_size=3, is_causal=(1, 0))),
    ],
)
def test_equal_but_wrong(right, wrong) -> None:
    """Equal to what was right just now, and of one hash with it, but not of its type."""
    for _ in range(2):
        na2d(GRID, GRID, GRID, **right)
        with pytest.raises((TypeError, ValueError)):
            na2d(GRID, GRID, GRID, **wrong)


def test_one_number_a_tuple_or_a_list() -> None:
    wanted = na2d(GRID, GRID, GRID, 3)
    for kernel_size in (3, (3, 3), [3, 3], torch.Size([3, 3])):
        torch.testing.assert_close(na2d(GRID, GRID, GRID, kernel_size), wanted)
    kernel_size = [3, 3]
    na2d(GRID, GRID, GRID, kernel_size)
    kernel_size[1] = 5
    torch.testing.assert_close(na2d(GRID, GRID, GRID, kernel_size), na2d(GRID, GRID, GRID, (3, 5)))


def test_scale_may_be_a_tensor() -> None:
    for scale in (0.5, 0.25, 0.5):
        torch.testing.assert_close(
            na2d(GRID, GRID, GRID, 3, scale=torch.tensor(scale)), na2d(GRID, GRID, GRID, 3, scale=scale)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qkv=torch.randn(1, 6, 6, 2, 2, 8)), r"qkv: expected shape \[B, H, W, 3, heads, head_dim\]"),
        (dict(scale=torch.ones(3)), r"scale: expected shape \[2\], got \[3\]"),
        (dict(theta_y=torch.ones(6, 2, 2)), r"theta_y: expected shape \[6, 2, 1\], got \[6, 2, 2\]"),
        (dict(qkv=torch.randn(1, 6, 6, 3, 2, 12)), "multiple of 8, got 12"),
        (dict(kernel_size=9), "kernel_size: .* at most the grid"),
    ],
)
def test_bad_input_to_self_attention(change, message) -> None:
    right = dict(
        qkv=torch.randn(1, 6, 6, 3, 2, 8), scale=torch.ones(2),
        theta_y=torch.ones(6, 2, 1), theta_x=torch.ones(6, 2, 1), kernel_size=3,
    )  # fmt: skip
    neighborhood_self_attention(**right)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            neighborhood_self_attention(**right | change)
    neighborhood_self_attention(**right)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "dout"])
def test_what_is_not_finite_reaches_those_that_see_it_only(where, bad, seed) -> None:
    """Of a grid larger than a tile of the reference; beside the same call without it, bit for bit nowhere else."""
    shape, (row, column), window = (2, 12, 13, 2, 8), (6, 5), 3
    tensors = {name: torch.randn(shape) for name in ("query", "key", "value", "dout")}

    def both_ways(tensors):
        leaves = {name: tensors[name].clone().requires_grad_() for name in ("query", "key", "value")}
        out = na2d(**leaves, kernel_size=window)
        gradients = torch.autograd.grad(out, list(leaves.values()), tensors["dout"])
        return dict(zip(("out", "dquery", "dkey", "dvalue"), (out, *gradients), strict=True))

    clean = both_ways(tensors)
    tensors[where][1, row, column, 1, 3] = bad
    found = both_ways(tensors)

    def around(reach):
        region = torch.zeros(shape[:-1], dtype=torch.bool)
        region[1, row - reach : row + reach + 1, column - reach : column + reach + 1, 1] = True
        return region

    here, near, further = around(0), around(1), around(2)
    spoils = {  # result -> where it may differ; a key or value reaches the keys of those that see it
        "query": {"out": here, "dquery": here, "dkey": near, "dvalue": near},
        "key": {"out": near, "dquery": near, "dkey": further, "dvalue": further},
        "value": {"out": near, "dquery": near, "dkey": further, "dvalue": ~here & here},
        "dout": {"out": ~here & here, "dquery": here, "dkey": near, "dvalue": near},
    }[where]
    for name, region in spoils.items():
        torch.testing.assert_close(found[name][~region], clean[name][~region])
        assert found[name][~region].isfinite().all(), name
    if where == "value" or (where == "key" and math.isnan(bad)):  # a logit of -inf weighs nothing
        assert not found["out"][near].isfinite().all(-1).any()
