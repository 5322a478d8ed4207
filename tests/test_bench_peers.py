"""The contestants of the kernel benchmarks: that each computes the case (or says what else), and how peers that can't
run here are set up, on stand-ins for their packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import correctness, timing
from benchmarks.kernels import Case, all_cases
from benchmarks.kernels.geglu import geglu
from benchmarks.kernels.neighborhood_attention import na2d, neighborhood_self_attention, reference_na2d
from benchmarks.kernels.norms import ada_rms_norm, rms_norm
from benchmarks.measure import Calls, Entry
from benchmarks.peers import (
    Contestant,
    Implementation,
    Peer,
    Unsupported,
    _available,
    all_contestants,
    compiled,
    flex,
    liger,
    quack,
)
from benchmarks.peers import natten as natten_peer
from hdit_kernels import reference, testing

CPU = torch.device("cpu")
CASES = {case.name: case for case in all_cases()}
SMALL = [case for case in CASES.values() if not case.full_size]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _available.cache_clear()
    yield
    _available.cache_clear()


def contestant(name: str) -> Contestant:
    return next(found for found in all_contestants() if found.name == name)


def errors(case: Case, entry: Entry, seed: int) -> dict[str, correctness.Error]:
    return entry.check(correctness.truth(entry.checked, CPU, seed, entry.implementation.reference))


@pytest.mark.parametrize(
    "rival", [c for c in all_contestants() if c.name in ("ours", "eager", "sdpa")], ids=lambda c: c.name
)
def test_computes_every_small_case(rival: Contestant, seed: int) -> None:
    cases = [case for case in SMALL if case.operator in rival.operators]
    assert cases
    for case in cases:
        found = errors(case, Entry(case, rival), seed)
        learned = {f"{name}.grad" for name in case.shapes if name not in case.frozen}
        assert set(found) == {"out"} | learned
        assert all(error.right for error in found.values()), (case.name, found)


def test_checked_gradients_get_the_layout_that_is_timed(seed: int) -> None:
    """Whatever the reference's output is like: that of full attention has its heads outside its tokens."""
    entry = Entry(na2d(2, 8, 8, 3, 8, 3, "float32", full_size=False), contestant("sdpa"))
    truth = correctness.truth(entry.checked, CPU, seed, entry.implementation.reference)
    assert not truth.wanted["out"].is_contiguous() and truth.dout.is_contiguous()


def test_sdpa_and_what_is_timed_of_it(seed: int) -> None:
    """Its output is [B, tokens, heads, D], finish makes the case's of it, and the gradients that are timed are those of
    full attention for the contiguous dout."""
    case = na2d(2, 5, 7, 3, 8, 3, "float32", full_size=False)
    entry = Entry(case, contestant("sdpa"))
    inputs = case.inputs(CPU, seed)
    calls = entry.calls(inputs)
    out = calls.prepared("forward")()
    assert out.shape == (2, 35, 3, 8)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    logits = torch.einsum("bijhd,bklhd->bhijkl", *leaves[:2]) * 8**-0.5
    wanted = torch.einsum("bhijkl,bklhd->bijhd", logits.flatten(4).softmax(-1).view_as(logits), leaves[2])
    finished = entry.implementation.finish(out)
    assert finished.shape == case.shapes["query"] and testing.relative_error(finished, wanted) < 1e-6

    for direction in ("backward", "forward+backward"):
        found = calls.prepared(direction)()
        assert calls.dout is not None and calls.dout.is_contiguous()
        dout = entry.implementation.finish(calls.dout).double()
        gradients = torch.autograd.grad(wanted, leaves, dout, retain_graph=True)
        expected = entry.implementation.prepare(dict(zip(inputs, gradients, strict=True))).values()
        assert all(testing.relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True)), direction


def test_compiled_computes_every_small_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch.compile that compiles nothing; what it is asked for, and that a backward pass may be repeated."""
    asked: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    rival = contestant("compiled")
    cases = [case for case in SMALL if case.operator in rival.operators]
    with torch._functorch.config.patch(donated_buffer=True):  # monkeypatch would leave torch's config without it
        for case in cases:
            entry = Entry(case, rival)
            assert entry.implementation.compiles
            assert all(error.right for error in errors(case, entry, seed).values())
        assert torch._functorch.config.donated_buffer is False
    assert len(asked) == len(cases) == 9 and asked[0] == {"dynamic": False, "fullgraph": True}


@pytest.mark.parametrize("operator", ["rms_norm", "geglu", "token_merge", "token_split"])
def test_compiled_is_plain_pytorch_in_the_case_s_own_dtype(
    operator: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference would widen to float32, products too: no opponent in bfloat16."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(reference, "_widen", lambda tensor: pytest.fail("the reference"))
    small = next(case for case in SMALL if case.operator == operator)
    case = small.build(**small.settings | {"dtype": "bfloat16"})
    with torch._functorch.config.patch(donated_buffer=True):
        calls = Entry(case, contestant("compiled")).calls(case.inputs(CPU, seed))
    for direction in ("forward", "backward", "forward+backward"):
        calls.prepared(direction)()


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.PEER.available() is None
    _available.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "needs a compiler" in (compiled.PEER.available() or "")


def test_peers_say_why_they_cannot_run() -> None:
    for name, package in (("natten hopper-fna", "natten"), ("liger", "liger-kernel"), ("quack", "quack-kernels")):
        reason = contestant(name).peer.available()
        assert reason is not None and "it needs a GPU" in reason and f"pip install {package}" in reason
    for name in ("ours", "eager", "sdpa"):
        assert contestant(name).peer.available() is None
    missing = Peer("nothing", "no_such_package_of_hdit", "pip install nothing")
    assert missing.available() == "nothing is not installed: pip install nothing"


def test_a_broken_package_is_no_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer_of_hdit.py").write_text("raise OSError('libmissing.so\\nnot found')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = Peer("it", "broken_peer_of_hdit", "pip install it").available()
    assert reason == "it can't be imported (OSError: libmissing.so not found): pip install it"


# FlexAttention

GRIDS = [(19, 37, 7, 1), (24, 20, 5, 2), (16, 32, 4, 1), (15, 33, 3, 4)]


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), GRIDS)
def test_flex_mask_is_that_of_the_windows(height: int, width: int, kernel_size: int, dilation: int) -> None:
    grid = torch.arange(height * width).view(1, height, width, 1, 1)
    where = (
        flex.to_tiles(grid + 1).flatten() - 1
    )  # grid position of each token in the order of tiles, -1 in the padding
    assert torch.equal(flex.from_tiles(flex.to_tiles(grid), height, width), grid)
    axes = []
    for length in (height, width):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for query in range(length):
            own = range(query % dilation, length, dilation)
            start = min(max(query // dilation - kernel_size // 2, 0), len(own) - kernel_size)
            axis[query, own[start : start + kernel_size]] = True
        axes.append(axis)
    wanted = (axes[0][:, None, :, None] & axes[1][None, :, None, :]).flatten(2).flatten(0, 1)

    mask = flex.block_mask(height, width, kernel_size, dilation, CPU)
    token = torch.arange(len(where))
    found = flex.mask_mod(height, width, kernel_size, dilation)(None, None, token[:, None], token[None])  # type: ignore
    real = where >= 0
    assert torch.equal(found[real][:, real], wanted[where[real]][:, where[real]])
    assert not found[:, ~real].any() and found.any(1).all()
    blocks = found.unflatten(1, (-1, flex.BLOCK)).unflatten(0, (-1, flex.BLOCK)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_case(seed: int) -> None:
    case = na2d(2, 19, 37, 2, 16, 5, "float32", dilation=2, full_size=False)
    tensors = case.inputs(CPU, seed)
    mask = flex.block_mask(19, 37, 5, 2, CPU)
    out = flex.from_tiles(flex_attention(**flex.prepare(tensors), block_mask=mask), 19, 37)
    wanted = case.reference(**{name: t.double() for name, t in tensors.items()})
    assert testing.relative_error(out, wanted) < 1e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_after_norm_and_rotation(seed: int) -> None:
    case = neighborhood_self_attention(2, 19, 37, 2, 16, 5, "float32", full_size=False)
    tensors = case.inputs(CPU, seed)
    out = flex.self_attention(**tensors, block_mask=flex.block_mask(19, 37, 5, 1, CPU))
    wanted = case.reference(**{name: t.double() for name, t in tensors.items()})
    assert testing.relative_error(out, wanted) < 1e-5


# NATTEN


class Schedule(Enum):
    NonPersistent = 0


@pytest.fixture
def fake_natten(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A natten whose na2d is the reference. Tiles cost what `cost` says; those of height 1 raise."""
    module = ModuleType("natten")
    forward = [((1, 8), (8, 8)), ((8, 8), (16, 8)), ((16, 8), (8, 8))]
    backward = [((8, 8), (8, 8)), ((8, 8), (4, 4))]
    seen: dict[str, Any] = {"cost": {(8, 8, 16, 8): 2.0, (16, 8, 8, 8): 1.0, (8, 8, 8, 8): 3.0, (8, 8, 4, 4): 1.5}}

    def natten_na2d(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int,
        dilation: int = 1,
        scale: float | None = None,
        **tile: Any,
    ) -> Tensor:
        seen["last"] = tile
        if tile.get("q_tile_shape", (8, 8))[0] == 1:
            raise RuntimeError("no kernel for this tile")
        return reference_na2d(query, key, value, kernel_size, dilation, scale)

    module.na2d, module.HAS_LIBNATTEN = natten_na2d, True  # type: ignore[attr-defined]
    module.get_configs_for_cutlass_hopper_fna = lambda *qkv: [(pair, Schedule.NonPersistent) for pair in forward]  # type: ignore[attr-defined]
    module.get_configs_for_cutlass_fna = lambda *qkv: forward[:1]  # type: ignore[attr-defined]
    module.get_bwd_configs_for_cutlass_hopper_fna = lambda *qkv: backward  # type: ignore[attr-defined]
    module.get_bwd_configs_for_cutlass_fna = lambda *qkv: backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "natten", module)

    def queued_time(call: Any, device: torch.device, effort: timing.Effort) -> timing.Stats:
        call()
        tile = seen["last"]
        kind = "backward_" if "backward_q_tile_shape" in tile else ""
        cost = seen["cost"][(*tile[f"{kind}q_tile_shape"], *tile[f"{kind}kv_tile_shape"])]
        return timing.Stats(cost, cost, cost, 3)

    monkeypatch.setattr(timing, "queued_time", queued_time)
    return seen


def test_natten_takes_its_fastest_tile(fake_natten: dict[str, Any], seed: int) -> None:
    case = na2d(1, 16, 16, 1, 16, 3, "float32", full_size=False)
    entry = Entry(case, contestant("natten hopper-fna"))
    entry.calls(case.inputs(CPU, seed))
    wanted = "forward 16x8/8x8 NonPersistent, backward 8x8/4x4"
    assert entry.implementation.detail == wanted
    assert all(error.right for error in errors(case, entry, seed).values())
    chosen = {"q_tile_shape": (16, 8), "kv_tile_shape": (8, 8), "kernel_schedule": Schedule.NonPersistent}
    chosen |= {"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (4, 4), "backend": "hopper-fna"}
    assert fake_natten["last"] == chosen
    other = na2d(1, 8, 24, 1, 16, 3, "float32", full_size=False)
    assert entry.implementation.at is not None and entry.implementation.at(other).detail == wanted


def test_natten_without_a_tile_that_runs(fake_natten: dict[str, Any], seed: int) -> None:
    case = na2d(1, 16, 16, 1, 16, 3, "float32", full_size=False)
    with pytest.raises(Unsupported, match="none of the 1 forward tiles of cutlass-fna runs.*no kernel for this tile"):
        Entry(case, contestant("natten cutlass-fna")).calls(case.inputs(CPU, seed))
    sys.modules["natten"].get_configs_for_cutlass_fna = lambda *qkv: []  # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match="lists no forward tile of cutlass-fna"):
        Entry(case, contestant("natten cutlass-fna")).calls(case.inputs(CPU, seed))


def test_natten_after_norm_and_rotation(
    fake_natten: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compile", lambda function: function)
    case = neighborhood_self_attention(1, 16, 8, 2, 16, 3, "float32", full_size=False)
    entry = Entry(case, contestant("natten hopper-fna"))
    entry.calls(case.inputs(CPU, seed))
    found = errors(case, entry, seed)
    assert all(error.right for error in found.values()) and set(found) == {"out", "qkv.grad", "scale.grad"}
    assert "qk_norm_rope" in (entry.implementation.detail or "")


def test_natten_without_its_compiled_part(fake_natten: dict[str, Any]) -> None:
    assert natten_peer._incomplete() is None
    sys.modules["natten"].HAS_LIBNATTEN = False  # type: ignore[attr-defined]
    assert "without its compiled part" in (natten_peer._incomplete() or "")


# liger-kernel and quack, by stand-ins with their signatures


class FakeGELUMul(torch.autograd.Function):
    """tanh GELU of the first times the second; its backward writes gradients over what it saved, like Liger's."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.gelu(gate, approximate="tanh") * value

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (gate, value)]
            out = F.gelu(leaves[0], approximate="tanh") * leaves[1]
            gradients = torch.autograd.grad(out, leaves, dout)
        for saved, gradient in zip((gate, value), gradients, strict=True):
            saved.data.copy_(gradient)
        return gate.data, value.data


def test_liger_geglu_is_restored_before_each_call(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("liger_kernel.ops.geglu")
    module.LigerGELUMulFunction = FakeGELUMul  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    case = geglu(32, 16, "float32", full_size=False)
    entry = Entry(case, Contestant("liger", Peer("stand-in", None, ""), {"geglu": liger.geglu}))
    found = errors(case, entry, seed)
    assert all(error.right for error in found.values()), found
    exact = correctness.truth(case, CPU, seed)
    assert not entry.check(exact)["out"].right  # the tanh GELU is another function than the case's

    calls = entry.calls(case.inputs(CPU, seed))
    assert calls.restore is not None
    for direction in ("backward", "forward+backward"):
        call = calls.prepared(direction)
        first = [t.clone() for t in call()]
        calls.restore()
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)), direction
        assert not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)), "nothing was overwritten"


def test_liger_norms(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
            assert (eps, offset, mode, in_place) == (1e-6, 0.0, "llama", False)
            return reference.rms_norm(x, weight, eps)

    class Modulated:
        @staticmethod
        def apply(
            x: Tensor, weight: None, scale: Tensor, shift: None, eps: float, offset: float, mode: str, in_place: bool
        ) -> Tensor:
            assert (weight, shift, eps, offset, mode, in_place) == (None, None, 1e-6, 0.0, "llama", False)
            return reference.ada_rms_norm(x, scale, eps)

    for name, attribute, fake in (("rms_norm", "RMSNorm", Norm), ("modulated_rms_norm", "ModulatedRMSNorm", Modulated)):
        module = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, f"Liger{attribute}Function", fake)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for case in (rms_norm(64, 16, "float32", False), ada_rms_norm(2, 8, 16, "float32", False)):
        entry = Entry(case, contestant("liger"))
        assert all(error.right for error in errors(case, entry, seed).values())


def test_an_older_liger_has_no_modulated_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.modulated_rms_norm", None)
    with pytest.raises(Unsupported, match="no modulated RMSNorm"):
        Entry(ada_rms_norm(2, 8, 16, "float32", False), contestant("liger"))


def test_quack(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("quack")
    module.rmsnorm = lambda x, weight, eps: reference.rms_norm(x, weight, eps)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", module)
    case = rms_norm(64, 16, "float32", False)
    found = errors(case, Entry(case, Contestant("quack", quack.PEER, {"rms_norm": quack.rms_norm})), seed)
    assert all(error.right for error in found.values())


def test_calls_time_what_they_say(seed: int) -> None:
    """A forward pass leaves autograd out, a backward alone runs no forward, both directions run both."""
    case, ran = rms_norm(8, 4, "float32", False), []

    def function(x: Tensor, weight: Tensor) -> Tensor:
        ran.append(torch.is_grad_enabled() and x.requires_grad)
        return reference.rms_norm(x, weight)

    calls = Calls(case, Implementation(function), case.inputs(CPU, seed))
    assert not calls.prepared("forward")().requires_grad
    both = calls.prepared("forward+backward")
    ran.clear()
    assert len(both()) == 2 and ran == [True]
    backward = calls.prepared("backward")
    ran.clear()
    assert len(backward()) == len(backward()) == 2 and ran == []


def test_the_timed_gradient_is_contiguous_whatever_the_output(seed: int) -> None:
    case = rms_norm(8, 4, "float32", False)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight).mT.contiguous().mT

    for direction in ("backward", "forward+backward"):
        calls = Calls(case, Implementation(function), case.inputs(CPU, seed))
        calls.prepared(direction)()
        assert calls.dout is not None and calls.dout.shape == (8, 4) and calls.dout.is_contiguous()
        assert not calls.prepared("forward")().is_contiguous()
