"""merge_attentions: attention over several sets of keys, merged, is attention over their union."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hdit_kernels import merge_attentions, na2d


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query [tokens, heads, head_dim] to key and value [keys, heads, head_dim]: out and lse."""
    logits = torch.einsum("qhd,khd->qhk", query, key)
    return torch.einsum("qhk,khd->qhd", logits.softmax(-1), value), logits.logsumexp(-1)


def parts(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A query, then keys and values of each size."""
    sizes = (5, *(size for size in sizes for _ in "kv"))
    return [torch.randn(size, 2, 3, dtype=dtype, requires_grad=True) for size in sizes]


def merged(query: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
    results = [attention(query, key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
    return merge_attentions([out for out, _ in results], [lse for _, lse in results])


def of_the_union(query: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
    return attention(query, torch.cat(pairs[::2]), torch.cat(pairs[1::2]))


@pytest.mark.parametrize("sizes", [(4,), (4, 1), (2, 7, 3), (1, 1, 1, 1)])
def test_equals_attention_to_all_keys(sizes, seed) -> None:
    tensors = parts(sizes)
    found, wanted = merged(*tensors), of_the_union(*tensors)
    torch.testing.assert_close(found, wanted)
    cotangents = [torch.randn_like(t) for t in wanted]
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, cotangents), torch.autograd.grad(wanted, tensors, cotangents)
    )


def test_a_window_beside_additional_keys(seed) -> None:
    """As na2d's own additional_keys."""
    query, key, value = (torch.randn(1, 5, 6, 2, 8) for _ in range(3))
    extra_k, extra_v = torch.randn(2, 1, 3, 2, 8).unbind()
    window, lse = na2d(query, key, value, 3, scale=1.0, return_lse=True)
    text, text_lse = attention(query[0].flatten(0, 1), extra_k[0], extra_v[0])
    found = merge_attentions([window, text.view(1, 5, 6, 2, 8)], [lse, text_lse.view(1, 5, 6, 2)])
    wanted = na2d(query, key, value, 3, 1, 1, False, 1.0, extra_k, extra_v, return_lse=True)
    torch.testing.assert_close(found, wanted)


def test_derivatives(seed) -> None:
    tensors = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    tensors += [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attentions(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_large_logits_do_not_overflow() -> None:
    outputs, lse = [torch.ones(1, 2), torch.zeros(1, 2)], [torch.tensor([3000.0]), torch.tensor([3000.0])]
    out, merged_lse = merge_attentions(outputs, lse)
    assert out.tolist() == [[0.5, 0.5]] and merged_lse.item() == pytest.approx(3000 + math.log(2))


def test_parts_without_keys(seed) -> None:
    """Query 0 sees part 0 only, query 1 both, query 2 none; what an empty part holds, NaN here, reaches nothing."""
    outputs = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    outputs[1][0] = outputs[0][2] = outputs[1][2] = math.nan
    lse = [torch.tensor([0.3, 0.2, -math.inf]).double(), torch.tensor([-math.inf, 0.1, -math.inf]).double()]
    leaves = [t.requires_grad_() for t in (*outputs, *lse)]
    out, merged_lse = merge_attentions(outputs, lse)
    assert torch.equal(out[0], outputs[0][0]) and merged_lse[0] == lse[0][0]
    assert torch.equal(out[2], torch.zeros(4, dtype=torch.float64)) and merged_lse[2] == -math.inf
    gradients = torch.autograd.grad([out, merged_lse], leaves, [torch.ones_like(out), torch.ones_like(merged_lse)])
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[1][0].any() and not gradients[0][2].any() and gradients[2][2] == gradients[3][2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding(dtype, seed) -> None:
    outputs = [torch.randn(2, 3, 4, dtype=dtype) for _ in range(3)]
    lse = [torch.randn(2, 3) for _ in range(3)]
    out, merged_lse = merge_attentions(outputs, lse)
    wide, _ = merge_attentions([t.float() for t in outputs], lse)
    assert out.dtype == dtype and merged_lse.dtype == torch.float32
    assert torch.equal(out, wide.to(dtype))


def test_vmap_and_compile(seed) -> None:
    outputs, lse = torch.randn(2, 3, 5, 2, 4), torch.randn(2, 3, 5, 2)
    wanted = merge_attentions(list(outputs), list(lse))
    found = torch.vmap(lambda out, part: merge_attentions(out.unbind(), part.unbind()), (1, 1))(outputs, lse)
    torch.testing.assert_close(found, wanted)
    compiled = torch.compile(merge_attentions, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(list(outputs), list(lse)), wanted)


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outputs", "lse", "message"),
    [
        ([], [], "outputs: expected a list of one tensor or more"),
        (OUT, [LSE], "outputs: expected a list of one tensor or more"),
        ([OUT], LSE, "lse: expected a list of one tensor or more"),
        ([OUT, OUT], [LSE], "lse: expected one for each of 2 outputs, got 1"),
        ([OUT, OUT[:1]], [LSE, LSE], r"outputs\[1\]: expected shape \[2, 3, 4\], got \[1, 3, 4\]"),
        ([OUT, OUT.half()], [LSE, LSE], r"outputs\[1\]: expected float32 like outputs\[0\], got float16"),
        ([OUT], [OUT], r"lse\[0\]: expected shape \[2, 3\], got \[2, 3, 4\]"),
        ([OUT.half()], [LSE.half()], r"lse\[0\]: expected float32, got float16"),
        ([OUT.double()], [LSE], r"lse\[0\]: expected float64, got float32"),
        ([OUT[0, 0]], [LSE[0, 0]], r"outputs\[0\]: expected shape \[..., heads, head_dim\], got \[4\]"),
        ([OUT], [3.0], r"lse\[0\]: expected a torch.Tensor, got float"),
    ],
)
def test_bad_input(outputs, lse, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        merge_attentions(outputs, lse)
