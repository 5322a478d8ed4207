"""token_merge and token_split on the CPU: the reference against einops and a convolution, and how they behave."""

from __future__ import annotations

import einops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hdit_kernels import token_merge, token_split

OPERATORS = torch.ops.hdit_kernels
NAMES = ["token_merge", "token_split", "token_split with skip"]
sizes, seeds = st.integers(1, 4), st.integers(0, 2**31)


def draw(
    name: str, patch=(2, 2), grid=(3, 2), channels=3, features=5, dtype=torch.float64, parameter_dtype=None, batch=2
):
    """The tensors that the function takes, by name, with gradients."""
    parameter_dtype = parameter_dtype or dtype
    (h, w), (height, width) = patch, grid
    fine, coarse, inside = (batch, height * h, width * w, channels), (batch, height, width, features), h * w * channels
    weight = (features, inside) if name == "token_merge" else (inside, features)
    tensors = {
        "x": torch.randn(fine if name == "token_merge" else coarse).to(dtype),
        "weight": (torch.randn(weight) / weight[1] ** 0.5).to(parameter_dtype),
    }
    if name == "token_split with skip":
        tensors |= {"skip": torch.randn(fine).to(dtype), "fac": torch.tensor([0.3]).to(parameter_dtype)}
    return {key: tensor.requires_grad_() for key, tensor in tensors.items()}


def function(name: str):
    return token_merge if name == "token_merge" else token_split


def compare(found, wanted, dtype) -> None:
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=2 * eps, atol=1e-2 * eps**0.5)


@settings(max_examples=40, deadline=None)
@given(st.tuples(sizes, sizes), st.tuples(sizes, sizes), sizes, sizes, sizes, seeds)
def test_equal_einops_and_a_product(patch, grid, batch, channels, features, seed) -> None:
    torch.manual_seed(seed)
    h, w = patch
    merge = draw("token_merge", patch, grid, channels, features, batch=batch)
    patches = einops.rearrange(merge["x"], "b (i h) (j w) c -> b i j (h w c)", h=h, w=w)
    torch.testing.assert_close(token_merge(**merge, patch_size=patch), patches @ merge["weight"].T)
    split = draw("token_split with skip", patch, grid, channels, features, batch=batch)
    y = einops.rearrange(split["x"] @ split["weight"].T, "b i j (h w c) -> b (i h) (j w) c", h=h, w=w)
    torch.testing.assert_close(token_split(split["x"], split["weight"], patch), y)
    mixed = (1 - split["fac"]) * split["skip"] + split["fac"] * y
    torch.testing.assert_close(token_split(**split, patch_size=patch), mixed)


def test_merge_of_pixels_is_a_strided_convolution(seed) -> None:
    """Of an image [B, C, H, W] seen channels last, without a copy."""
    image, kernel = torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    found = token_merge(image.movedim(-3, -1), kernel.permute(0, 2, 3, 1).reshape(5, 48), (4, 4))
    torch.testing.assert_close(found.movedim(-1, -3), F.conv2d(image, kernel, stride=4))


@pytest.mark.parametrize("patch", [(2, 2), (1, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, patch, seed) -> None:
    tensors = draw(name, patch)
    assert torch.autograd.gradcheck(
        lambda *leaves: function(name)(**dict(zip(tensors, leaves, strict=True)), patch_size=patch), [*tensors.values()]
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_at_a_time(name, seed) -> None:
    """Frozen inputs don't change the gradients of the others, and cost no product."""
    tensors = draw(name)
    out = function(name)(**tensors)
    dout = torch.randn_like(out)
    wanted = dict(zip(tensors, torch.autograd.grad(out, [*tensors.values()], dout), strict=True))
    for key, want in wanted.items():
        alone = {other: t.detach().requires_grad_(other == key) for other, t in tensors.items()}
        out = function(name)(**alone)
        with FlopCounterMode(display=False) as counter:
            (found,) = torch.autograd.grad(out, [alone[key]], dout)
        assert torch.equal(found, want)
        assert counter.get_total_flops() == (2 * 12 * 12 * 5 if key in ("x", "weight") else 0)


def test_ends_of_the_interpolation(seed) -> None:
    tensors = draw("token_split with skip")
    y = token_split(tensors["x"], tensors["weight"])
    for fac, wanted in [(0.0, tensors["skip"]), (1.0, y)]:
        fac = torch.tensor([fac], dtype=torch.float64, requires_grad=True)
        out = token_split(tensors["x"], tensors["weight"], (2, 2), tensors["skip"], fac)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-14)
        (dfac,) = torch.autograd.grad(out.sum(), [fac])  # also where fac itself is 0
        torch.testing.assert_close(dfac, (y - tensors["skip"]).sum()[None])


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, seed) -> None:
    for dtype, parameter_dtype in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]:
        tensors = {key: t.detach() for key, t in draw(name, dtype=dtype, parameter_dtype=parameter_dtype).items()}
        x, weight = tensors["x"], tensors["weight"]
        for save in (True, False):
            if name == "token_merge":
                for size in ([2, 2], [1, 2]):  # patches of one row could be views of x
                    columns = weight[:, : size[0] * size[1] * x.shape[-1]]
                    torch.library.opcheck(OPERATORS.token_merge_forward.default, (x.contiguous(), columns, size, save))
                torch.library.opcheck(OPERATORS.token_merge_forward.default, (x, weight, [2, 2], save))
            else:
                arguments = (x, weight, [2, 2], tensors.get("skip"), tensors.get("fac"), save)
                torch.library.opcheck(OPERATORS.token_split_forward.default, arguments)
        if name == "token_merge":
            dout = torch.randn(2, 5, 3, 2).to(dtype).movedim(-3, -1)
            for needed in ([True, True], [False, True]):
                patches = torch.randn(2, 3, 2, 12).to(dtype)
                torch.library.opcheck(OPERATORS.token_merge_backward.default, (dout, patches, weight, [2, 2], needed))
        else:
            dout, skipped = torch.randn(2, 3, 6, 4).to(dtype).movedim(-3, -1), "skip" in tensors
            rest = (torch.randn(2, 3, 2, 12).to(dtype), tensors["fac"], dtype) if skipped else (None, None, None)
            for needed in ([True, True, skipped, skipped], [False, True, False, False], [True, False, False, skipped]):
                arguments = (dout, x, weight, [2, 2], *rest, needed)
                torch.library.opcheck(OPERATORS.token_split_backward.default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name, seed) -> None:
    tensors = draw(name, dtype=torch.float32)
    tensors["x"] = tensors["x"].detach()  # as the pixels of the first level: no gradient
    learned = [t for t in tensors.values() if t.requires_grad]
    wanted, found = function(name)(**tensors), torch.compile(function(name), fullgraph=True)(**tensors)
    torch.testing.assert_close(found, wanted)
    dout = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(found, learned, dout), torch.autograd.grad(wanted, learned, dout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype, parameter_dtype, seed) -> None:
    """Output in x's dtype, each gradient in its input's, close to the float64 result."""
    tensors = draw(name, dtype=dtype, parameter_dtype=parameter_dtype)
    exact = {key: t.detach().double().requires_grad_() for key, t in tensors.items()}
    out, wanted = function(name)(**tensors), function(name)(**exact)
    dout = torch.randn(out.shape).to(dtype)
    assert out.dtype == dtype
    compare(out, wanted, dtype)
    gradients = torch.autograd.grad(out, [*tensors.values()], dout)
    wanted_gradients = torch.autograd.grad(wanted, [*exact.values()], dout.double())
    for key, found, want in zip(tensors, gradients, wanted_gradients, strict=True):
        assert found.dtype == tensors[key].dtype
        if key == "fac":  # a sum over y − skip, which is kept in x's dtype
            terms = dout.double() * (token_split(exact["x"], exact["weight"]) - exact["skip"])
            eps = max(torch.finfo(dtype).eps, torch.finfo(parameter_dtype).eps)
            assert (found - want).abs() <= eps * terms.abs().sum()
        else:
            compare(found, want, tensors[key].dtype)


def test_skip_may_have_its_own_dtype(seed) -> None:
    tensors = draw("token_split with skip", dtype=torch.bfloat16, parameter_dtype=torch.float32)
    skip = tensors["skip"].detach().float().requires_grad_()
    out = token_split(tensors["x"], tensors["weight"], (2, 2), skip, tensors["fac"])
    assert out.dtype == torch.bfloat16 and torch.equal(out, token_split(**tensors))
    assert torch.autograd.grad(out.sum(), [skip])[0].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, seed) -> None:
    """x and skip are rounded to the autocast dtype, weight and fac are not; gradients come in their inputs' dtypes."""
    tensors = draw(name, dtype=torch.float32)
    rounded = {key: t.bfloat16() if key in ("x", "skip") else t for key, t in tensors.items()}
    wanted = function(name)(**rounded)
    dout = torch.randn(wanted.shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = function(name)(**tensors)
        gradients = torch.autograd.grad(found, [*tensors.values()], dout)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    for gradient, want in zip(gradients, torch.autograd.grad(wanted, [*tensors.values()], dout), strict=True):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, want)
    exact = {key: t.detach().double() for key, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert function(name)(**exact).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_no_alias(name, seed) -> None:
    tensors = {key: t.detach() for key, t in draw(name).items()}
    wanted = function(name)(**tensors)
    turned = {key: t.transpose(0, -1).contiguous().transpose(0, -1) for key, t in tensors.items()}
    found = function(name)(**turned)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous() and all(found.data_ptr() != t.data_ptr() for t in turned.values())


@pytest.mark.parametrize("name", NAMES)
def test_flops(name, seed) -> None:
    """2 a multiply-accumulate, 2 · rows · in · out; the backward has two such products."""
    tensors = draw(name, patch=(2, 4), grid=(3, 5), channels=6, features=7)
    once = 2 * (2 * 3 * 5) * (2 * 4 * 6) * 7
    with FlopCounterMode(display=False) as counter:
        out = function(name)(**tensors, patch_size=(2, 4))
        assert counter.get_total_flops() == once
        out.sum().backward()
        assert counter.get_total_flops() == 3 * once
    with FlopCounterMode(display=False) as counter:
        on_meta = function(name)(**{key: t.to("meta") for key, t in tensors.items()}, patch_size=(2, 4))
        assert counter.get_total_flops() == once and on_meta.shape == out.shape


X, MERGE, COARSE, SPLIT = torch.ones(2, 4, 6, 3), torch.ones(5, 12), torch.ones(2, 2, 3, 5), torch.ones(12, 5)
FAC = torch.ones(1)
BAD: list[tuple] = [
    (token_merge, (1.0, MERGE), TypeError, r"x: expected a torch.Tensor, got float"),
    (token_merge, (X.int(), MERGE), TypeError, r"x: expected bfloat16, .*, got int32"),
    (token_merge, (X[0], MERGE), ValueError, r"x: expected shape \[B, H·h, W·w, C\], got \[4, 6, 3\]"),
    (token_merge, (X[:, :3], MERGE), ValueError, r"x: expected height and width divisible .*2, 2\), got 3 x 6"),
    (
        token_merge,
        (X[:, :0], MERGE),
        ValueError,
        r"x: expected every size but the batch's to be at least 1, got shape \[2, 0, 6, 3\]",
    ),
    (token_merge, (X, MERGE[:0]), ValueError, r"weight: expected every size to be at least 1, got shape \[0, 12\]"),
    (token_merge, (X, MERGE, (4, 4)), ValueError, r"x: expected height and width divisible .*4, 4\), got 4 x 6"),
    (token_merge, (X, MERGE, (1, 1)), ValueError, r"weight: expected shape \[out, 3\], got \[5, 12\]"),
    (token_merge, (X, MERGE.double()), TypeError, r"weight: expected float64 exactly when x is, got torch.float64"),
    (token_merge, (X, MERGE.to("meta")), ValueError, r"weight: expected a tensor on cpu like x, got one on meta"),
    (token_merge, (X, MERGE, 2), TypeError, r"patch_size: expected two integers \(rows, columns\), got 2"),
    (
        token_merge,
        (X, MERGE, (2, 0)),
        ValueError,
        r"patch_size: expected an integer of at least 1 or two .*, got \(2, 0\)",
    ),
    (token_split, (COARSE[0], SPLIT), ValueError, r"x: expected shape \[B, H, W, in\], got \[2, 3, 5\]"),
    (token_split, (COARSE, SPLIT.t()), ValueError, r"weight: expected shape \[h·w·C, 5\], got \[5, 12\]"),
    (token_split, (COARSE, SPLIT, (5, 2)), ValueError, r"weight: expected rows divisible by .*5 · 2, got 12"),
    (token_split, (COARSE, SPLIT, (2, 2), X), ValueError, r"fac: expected a tensor when skip is, got None"),
    (token_split, (COARSE, SPLIT, (2, 2), None, FAC), ValueError, r"skip: expected a tensor when fac is, got None"),
    (token_split, (COARSE, SPLIT, (2, 2), X[:1], FAC), ValueError, r"skip: expected shape \[2, 4, 6, 3\], got \[1, 4"),
    (token_split, (COARSE, SPLIT, (2, 2), X, FAC[0]), ValueError, r"fac: expected shape \[1\], got \[\]"),
    (token_split, (COARSE, SPLIT, (2, 2), X, FAC.long()), TypeError, r"fac: expected bfloat16, .*, got int64"),
]


@pytest.mark.parametrize(("call", "inputs", "error", "message"), BAD, ids=[f"{c[0].__name__} {c[3]}" for c in BAD])
def test_bad_input(call, inputs: tuple[Tensor, ...], error, message) -> None:
    with pytest.raises(error, match=message):
        call(*inputs)
