"""benchmarks model, train and scaling, and the reference HDiT as a peer: on a CPU, with tiny networks."""

from __future__ import annotations

import functools
import gc
import json
import math
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import __main__, api, captured, ceilings, model, networks, plots, report, runs, scaling, timing, train
from benchmarks.captured import Pass, Watched
from benchmarks.measure import DeviceLost
from benchmarks.networks import Check, Network
from benchmarks.peers import kdiffusion
from hdit import HDiT, HDiTConfig, presets
from hdit.config import Attention, GlobalAttention, Level, NeighborhoodAttention, NoAttention, ShiftedWindowAttention
from tests import golden_files, made_up_runs
from tests.made_up_runs import stats
from tests.tiny import CONFIG

CPU = torch.device("cpu")
TINY = {"tiny": CONFIG}
CEILINGS = {"copy_tb_s": 0.01, "matmul_bf16_tflop_s": 0.05, "matmul_fp32_tflop_s": 0.05}


def new_run(kind: str, path: Path | None = None) -> runs.Run:
    run = runs.Run.open(path, kind, ["test"])
    run.session["ceilings"] = dict(CEILINGS)
    return run


def by_name(run: runs.Run) -> dict[tuple[str, str, str], runs.Row]:
    runs.validate(run.data)
    return {runs.key(row): row for row in run.data["rows"]}


@pytest.fixture
def small_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "DIT_SIZES", {"S": (32, 1, 2), "B": (64, 2, 2)})


# The reference HDiT, from a made-up checkout that has the modules and imports of k-diffusion's


CHECKOUT = {
    "__init__.py": "raise ImportError('the whole package is not needed')",
    "sampling.py": "import torchsde_which_is_not_here",
    "layers.py": "from dctorch import functional as df\nfrom . import sampling, utils\nclass FourierFeatures: pass",
    "models/__init__.py": "from . import image_v1",
    "models/flags.py": "",
    "models/image_transformer_v2.py": """
from dataclasses import dataclass
import hdit
from . import flags
from .. import layers
try:
    import natten
except ImportError:
    natten = None

@dataclass
class GlobalAttentionSpec:
    d_head: int
@dataclass
class NeighborhoodAttentionSpec:
    d_head: int
    kernel_size: int
@dataclass
class ShiftedWindowAttentionSpec:
    d_head: int
    window_size: int
@dataclass
class NoAttentionSpec:
    pass
@dataclass
class LevelSpec:
    depth: int
    width: int
    d_ff: int
    self_attn: object
    dropout: float
@dataclass
class MappingSpec:
    depth: int
    width: int
    d_ff: int
    dropout: float

KINDS = {
    GlobalAttentionSpec: hdit.GlobalAttention,
    NeighborhoodAttentionSpec: hdit.NeighborhoodAttention,
    ShiftedWindowAttentionSpec: hdit.ShiftedWindowAttention,
    NoAttentionSpec: hdit.NoAttention,
}

class ImageTransformerDenoiserModelV2(hdit.HDiT):
    def __init__(self, levels, mapping, in_channels, out_channels, patch_size, num_classes=0, mapping_cond_dim=0):
        assert layers.FourierFeatures
        made = [
            hdit.Level(l.depth, l.width, l.d_ff, KINDS[type(l.self_attn)](*vars(l.self_attn).values()), l.dropout)
            for l in levels
        ]
        mapping = hdit.Mapping(mapping.depth, mapping.width, mapping.d_ff, mapping.dropout)
        super().__init__(hdit.HDiTConfig(tuple(made), mapping, in_channels=in_channels, out_channels=out_channels,
            patch_size=patch_size, num_classes=num_classes, mapping_cond_dim=mapping_cond_dim))

    def forward(self, x, sigma, aug_cond=None, class_cond=None, mapping_cond=None):
        assert natten.has_fused_na()
        out = super().forward(x, sigma, aug_cond, class_cond, mapping_cond)
        return natten.functional.na2d(out)
""",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in CHECKOUT.items():
        path = tmp_path / "clone" / "k_diffusion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    natten = ModuleType("natten")  # as it is from version 0.20 on: without has_fused_na
    natten.na2d = lambda x: x  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "natten", natten)
    yield tmp_path / "clone"
    kdiffusion._load.cache_clear()


def test_reference_is_built_as_configured(checkout: Path) -> None:
    kinds: list[Attention] = [
        NeighborhoodAttention(8, 3), ShiftedWindowAttention(16, 4), NoAttention(), GlobalAttention(8)
    ]  # fmt: skip
    levels = tuple(Level(i + 1, 16 * (i + 1), 40 + i, kind, i / 10) for i, kind in enumerate(kinds))
    config = replace(CONFIG, levels=levels, image_size=(256, 256), mapping_cond_dim=6)
    for path in (checkout, checkout / "k_diffusion"):
        built = kdiffusion.build(config, path)
        assert built.config == config
    assert "dctorch" not in sys.modules and "k_diffusion" not in sys.modules


def test_reference_runs_on_present_natten_and_leaves_it_alone(checkout: Path) -> None:
    assert kdiffusion.available(checkout) is None
    built, (x, sigma, class_cond) = kdiffusion.build(CONFIG, checkout), networks.draw(CONFIG, 8, 2)
    assert built(x, sigma, class_cond=class_cond).shape == x.shape
    assert not hasattr(sys.modules["natten"], "has_fused_na") and not hasattr(sys.modules["natten"], "functional")


def test_reference_that_is_not_there(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kdiffusion.available() == "k-diffusion's image_transformer_v2.py is not installed"
    assert kdiffusion.available(tmp_path) == f"k-diffusion's image_transformer_v2.py is not at {tmp_path}"
    monkeypatch.setitem(sys.modules, "natten", None)
    assert "NATTEN" in (kdiffusion.available(checkout) or "")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=None))
    assert kdiffusion.available() is None  # installed


def test_the_reference_s_version_is_recorded(checkout: Path, tmp_path: Path) -> None:
    assert kdiffusion.version() is None and kdiffusion.version(checkout) is None
    (checkout / "setup.cfg").write_text("[metadata]\nname = k-diffusion\nversion = 0.2.0.dev0\n")
    assert kdiffusion.version(checkout) == kdiffusion.version(checkout / "k_diffusion") == "0.2.0.dev0"
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch(r"0\.2\.0\.dev0\+[0-9a-f]{12}", kdiffusion.version(checkout) or "")

    run = runs.Run.open(tmp_path / "run.json", "model", ["test"])
    for _ in range(2):
        run.name_peer("k-diffusion", "0.2")
    assert run.data["environment"]["peers"]["k-diffusion"] == "0.2"
    with pytest.raises(runs.RunError, match="can't be continued, choose another file: k-diffusion 0.2 and 0.3"):
        run.name_peer("k-diffusion", "0.3")


# Networks


def test_the_dit_beside_a_preset() -> None:
    found = {name: networks.dit_like(presets[name]).name for name in model.BATCHES}
    assert found == {
        "flowers-256": "DiT-S/4", "ffhq-1024": "DiT-B/4", "imagenet-128": "DiT-B/4", "imagenet-256": "DiT-XL/4"
    }  # fmt: skip


@pytest.mark.parametrize(("size", "millions"), [("S", 32.9), ("B", 130.4), ("L", 457.9), ("XL", 674.9)])
def test_sizes_of_dit(size: str, millions: float) -> None:
    """As published (Peebles & Xie 2023, table 1: 33M, 130M, 458M, 675M)."""
    assert networks.parameters(networks.dit(size, presets["imagenet-256"])) / 1e6 == pytest.approx(millions, abs=0.06)


def test_flops_are_those_of_the_batch_and_the_pass() -> None:
    own = networks.hdit(presets["imagenet-128"])
    golden = golden_files.read_json("flops_full_size.json")["models"]["imagenet128_ablation"]
    assert networks.flops(own, 1, backward=False) == 2 * golden["macs"]
    assert networks.flops(own, 3, backward=False) == 6 * golden["macs"]
    assert networks.flops(own, 1, backward=True) / golden["macs"] == pytest.approx(6, rel=0.01)
    assert networks.parameters(own) == golden["parameters"]


def test_smallest_side() -> None:
    assert networks.smallest_side(CONFIG) == 8
    assert networks.smallest_side(presets["ffhq-1024"]) == 128
    assert networks.smallest_side(presets["hdit-b4-4096"]) == 1024


def test_check_of_right_networks(checkout: Path, small_dit: None) -> None:
    found = networks.check([networks.hdit(CONFIG), networks.k_diffusion(CONFIG, checkout)], CPU)
    found |= networks.check([networks.dit("S", CONFIG)], CPU, backward=False)
    assert list(found) == ["ours", "k-diffusion", "DiT-S/4"]
    for name, check in found.items():
        assert isinstance(check, Check) and 0 < check.output <= check.allowed_output < 1e-4
        errors = check.errors("step")
        assert list(errors) == (["output"] if name.startswith("DiT") else ["output", "gradient"])
        assert all(0 < error <= allowed < 1e-4 for error, allowed in errors.values())


class Wrong(HDiT):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * 1.001


class WrongBackward(HDiT):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)
        return out.detach() + 1.001 * (out - out.detach())


def broken(side: int) -> nn.Module:
    raise RuntimeError("no such\n  kernel")


def test_check_of_wrong_networks(tmp_path: Path) -> None:
    own = networks.hdit(CONFIG)
    rivals = [
        replace(own, name=name, build=build, counted=own.build)
        for name, build in {
            "wrong": lambda side: Wrong(CONFIG),
            "backward": lambda side: WrongBackward(CONFIG),
            "narrow": lambda side: HDiT(replace(CONFIG, in_channels=3, out_channels=3)),
            "broken": broken,
        }.items()
    ]
    found = networks.check([own, *rivals], CPU)
    assert "size mismatch" in str(found["narrow"]) and found["broken"] == "RuntimeError: no such kernel"
    run = new_run("model", tmp_path / "run.json")
    for network in (own, *rivals):
        for direction in ("forward", "forward+backward"):
            blank = model.blank("tiny", network, 1, direction, CPU)
            networks.attempt(blank, network, found[network.name], run, CPU, 0.01)
    rows = by_name(run)
    failed = {key[1:]: row["reason"] for key, row in rows.items() if row["status"] == "failed"}
    assert failed.keys() == {
        ("backward", "forward+backward"),
        *((name, direction) for name in ("wrong", "narrow", "broken") for direction in model.PASSES),
    }
    assert "wrong output: error 1.0e-03, allowed" in failed["wrong", "forward"]
    assert "wrong gradient: error 1.0e-03, allowed" in failed["backward", "forward+backward"]
    assert len(json.loads((tmp_path / "run.json").read_text())["rows"]) == 10

    assert networks.check([rivals[3], own], CPU) == dict.fromkeys(
        ("broken", "ours"), "not checked against float64: RuntimeError: no such kernel"
    )


def test_errors_that_are_not_finite_fail() -> None:
    wanted = {"a": torch.ones(2).double(), "b": torch.zeros(1).double()}
    assert networks._relative({"a": torch.tensor([1.0, 1.5]), "b": torch.zeros(1)}, wanted) == pytest.approx(0.125**0.5)
    assert networks._relative({"a": torch.tensor([1.0, math.nan]), "b": torch.zeros(1)}, wanted) == math.inf
    assert networks._relative({"a": torch.ones(2)}, wanted) == math.inf
    check = Check(0.0, 1e-6, math.inf, 1e-6)
    own, run = networks.hdit(CONFIG), new_run("train")
    row = networks.attempt(model.blank("tiny", own, 1, "step", CPU), own, check, run, CPU, 0.01)
    assert row["status"] == "failed" and row["error"] is None and "inf" in row["reason"]
    by_name(run)


def test_measured_row(tmp_path: Path) -> None:
    own, run = networks.hdit(CONFIG), new_run("train", tmp_path / "run.json")
    row = networks.attempt(model.blank("tiny", own, 2, "step", CPU), own, Check(1e-7, 1e-6), run, CPU, 0.05)
    assert row["status"] == "ok" and row["gpu_us"] is None and row["peak_bytes"] is None and row["kernels"] is None
    median = row["wall_us"]["median"]
    assert row["images_per_s"] == pytest.approx(2e6 / median) and row["first_call_s"] > 0
    assert "captured_us" not in row and row["detail"] is None
    assert row["floor_us"] == pytest.approx(row["flops"] / 0.05e6)
    assert row["ratio_to_floor"] == pytest.approx(median / row["floor_us"])
    assert runs.read(tmp_path / "run.json")["rows"] == run.data["rows"] and runs.key(row) in by_name(run)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (RuntimeError("shapes\ndiffer"), "failed"),
    ],
)
def test_an_error_is_one_row(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> None:
        raise error

    monkeypatch.setattr(networks, "measure_call", raises)
    own, run = networks.hdit(CONFIG), new_run("model")
    row = networks.attempt(model.blank("tiny", own, 1, "forward", CPU), own, Check(0.0, 1.0), run, CPU, 1)
    assert row["status"] == status and "\n" not in row["reason"] and row["wall_us"] is None
    by_name(run)


def test_a_gpu_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(networks, "measure_call", dead)
    monkeypatch.setattr(networks.timing, "synchronize", dead)
    own, run = networks.hdit(CONFIG), new_run("model")
    with pytest.raises(DeviceLost, match="tiny batch 1, ours: the GPU no longer answers"):
        networks.attempt(model.blank("tiny", own, 1, "forward", CPU), own, Check(0.0, 1.0), run, CPU, 1)
    assert [row["status"] for row in run.data["rows"]] == ["failed"]


def test_passes_do_what_they_say(monkeypatch: pytest.MonkeyPatch, small_dit: None) -> None:
    built: list[nn.Module] = []

    def randomise(made: nn.Module, kept: Callable[[nn.Module], nn.Module] = networks.randomise) -> nn.Module:
        built.append(kept(made))
        return built[-1]

    monkeypatch.setattr(networks, "randomise", randomise)
    for network in (networks.hdit(CONFIG), networks.dit("S", CONFIG)):
        for direction in ("forward", "forward+backward", "step"):
            call = networks.prepare(network, direction, 2, CPU)
            own = built[-1]
            before = {name: p.detach().clone() for name, p in own.named_parameters()}
            call()
            call()
            changed = [name for name, p in own.named_parameters() if not torch.equal(p, before[name])]
            with_gradient = [name for name, p in own.named_parameters() if p.grad is not None and p.grad.any()]
            assert own.training == (direction != "forward")
            assert bool(changed) == (direction == "step")
            assert bool(with_gradient) == (direction != "forward")
            if direction == "step":
                assert len(changed) > 0.9 * len(before)


def test_a_slow_first_call_is_followed_by_others_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def slow() -> None:
        called.append(1)
        time.sleep(0.05)

    assert (
        networks.measure_call(slow, CPU, 0.01).wall_us.repeats == networks.fewest_calls(CPU) == 3 and len(called) == 4
    )
    found = networks.measure_call(slow, CPU, 0.3)
    assert found.wall_us.repeats >= 3 and found.wall_us.median == pytest.approx(5e4, rel=0.5)

    def cold() -> None:  # its first call only
        time.sleep(0.2 if len(called) == 0 else 0.001)
        called.append(1)

    called.clear()
    found = networks.measure_call(cold, CPU, 0.1)
    assert found.wall_us.repeats >= 3 and found.wall_us.median < 5e4

    monkeypatch.setattr(networks, "LONG", 0.04)  # what takes minutes is not waited for so often
    called.clear()
    assert networks.measure_call(slow, CPU, 0.01).wall_us.repeats == 2 and len(called) == 3


class Block:
    itself: Block  # what a test makes a cycle of


class Memory:
    """A GPU's allocator, made up: bytes are held from take() until what it gives is dropped. before: what was held as
    each network was built; calls: of them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.most = self.calls = 0
        self.before: list[int] = []
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: setattr(self, "most", self.held))
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def take(self, size: int) -> Block:
        block = Block()
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(block, self.give, size)
        return block

    def give(self, size: int) -> None:
        self.held -= size


GPU = torch.device("cuda", 0)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Networks of 100 bytes whose passes need 30 more, the first one 500 more."""
    found = Memory(monkeypatch)

    def prepare(*_: Any, capturing: bool = False) -> Pass:
        found.before.append(found.held)
        weights, needs = found.take(100), [500]

        def call() -> Tensor:
            assert weights
            found.take(needs.pop() if needs else 30)
            found.calls += 1
            return torch.ones(1)

        return Pass(call)

    monkeypatch.setattr(networks, "prepare", prepare)
    monkeypatch.setattr(networks, "profile", lambda call, device: (float(call() or 1.0), ["gemm"]))
    return found


def test_peak_memory_is_the_network_s_own(memory: Memory) -> None:
    others = memory.take(70)  # what nobody frees
    own, run = networks.hdit(CONFIG), new_run("model")
    blank = model.blank("tiny", own, 1, "forward", CPU)
    row = networks.attempt(blank, own, Check(1e-7, 1e-6), run, GPU, 0.01)
    assert row["status"] == "ok" and row["peak_bytes"] == 130, row
    assert networks.peak(own, "forward", 4, GPU) == 130
    assert others and memory.held == 70
    assert memory.before == [70] * 3  # the one to be captured, too, has the memory for itself


def test_nothing_of_earlier_measurements_takes_a_network_s_memory(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer that flushes the cache, and what only a collection of garbage frees."""
    monkeypatch.setattr(timing, "_flush_buffer", functools.cache(lambda device: memory.take(256)))
    own, run = networks.hdit(CONFIG), new_run("model")
    seen: list[int] = []

    def measure(call: Callable[[], object], device: torch.device, *_: Any) -> None:
        seen.append(memory.held)
        raise RuntimeError("enough")

    def litter() -> None:
        timing._flush_buffer(GPU)
        cycle = memory.take(768)
        cycle.itself = cycle

    gc.disable()
    try:
        litter()
        networks.peak(own, "forward", 1, GPU)
        assert memory.held == 0
        monkeypatch.setattr(networks, "measure_call", measure)
        litter()
        networks.attempt(model.blank("tiny", own, 1, "forward", CPU), own, Check(1e-7, 1e-6), run, GPU, 0.01)
    finally:
        gc.enable()
    assert seen == [100] and memory.held == 0


@pytest.mark.parametrize("direction", ["forward", "step", "forward+backward"])
def test_rows_of_what_is_captured_and_what_is_not(
    direction: str, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, run = networks.hdit(CONFIG), new_run("train")
    blank = model.blank("tiny", own, 1, direction, CPU) | {"detail": "checked at 8²"}

    def row() -> runs.Row:
        memory.calls = 0
        found = networks.attempt(blank, own, Check(1e-7, 1e-6, 1e-7, 1e-5), run, GPU, 0.0)
        by_name(run)
        assert found["status"] == "ok" and memory.held == 0, found
        return found

    found, calls = row(), memory.calls
    if direction == "forward+backward":
        assert "captured_us" not in found and found["detail"] == "checked at 8²"
        return
    assert found["captured_us"]["repeats"] == captured.LEAST and found["detail"] == "checked at 8²"
    assert calls - 1 == networks.fewest_calls(GPU) - (3 if direction == "forward" else 0)

    asked: list[Any] = []
    monkeypatch.setattr(captured, "measure", lambda *arguments: asked.append(arguments) or "it waits; for me")
    found = row()
    assert found["detail"] == "checked at 8²; not captured: it waits, for me" and "captured_us" not in found
    ((_, kind, wanted, allowed, _, _),) = asked
    assert (kind, len(wanted), allowed) == (direction, captured.FIRST[direction], 1e-6 if kind == "forward" else 1e-5)

    monkeypatch.setattr(captured, "LONGEST", 0)
    found = row()
    assert found["detail"] == "checked at 8²; not captured: a pass takes more than 0 s" and len(asked) == 1
    assert memory.calls - 1 == networks.fewest_calls(GPU, 1.0)


def test_a_gpu_that_is_lost_in_a_graph_ends_the_run(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any) -> str:
        monkeypatch.setattr(networks.timing, "synchronize", dead)
        if len(memory.before) == 1:
            memory.before.append(0)
            return "AcceleratorError: an illegal memory access was encountered"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(captured, "measure", dead)
    own, run = networks.hdit(CONFIG), new_run("model")
    with pytest.raises(DeviceLost, match="tiny batch 1, ours: the GPU no longer answers"):
        networks.attempt(model.blank("tiny", own, 1, "forward", CPU), own, Check(1e-7, 1e-6), run, GPU, 0.0)
    (row,) = run.data["rows"]
    assert row["status"] == "ok" and "not captured: AcceleratorError" in row["detail"]


def test_first_results_are_of_random_numbers_of_their_own() -> None:
    found = []
    for _ in range(2):
        watched = Watched(lambda: (torch.rand(2), torch.rand(1)), 2)
        for _ in range(3):
            watched()
            torch.rand(1)
        found.append(torch.cat(watched.results))
    assert torch.equal(*found) and len(set(found[0].tolist())) == 6


class Graph:
    """What hdit.capture and hdit.capture_step return, made up: captures at once, and makes each call as it is."""

    reason: str | None = None

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        self.function, self.results = function, [] if inputs else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.function(*args, **kwargs)
        assert self.results is not None or not found.requires_grad
        return found


class Waits(Graph):
    reason = "an operation in it waits"


class Full(Graph):
    reason = "capturing failed (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has)"


class Stale(Graph):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.results = self.results or [super().__call__(*args, **kwargs)]
        return self.results[0]


class Frozen(Graph):
    """Its random numbers are the same each time."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return super().__call__(*args, **kwargs)


class Off(Graph):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        return (1.01 * found[0], found[1]) if isinstance(found, tuple) else 1.01 * found


class Fails(Graph):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of\nluck")


def graph_of(direction: str, kind: type[Graph] | None, monkeypatch: pytest.MonkeyPatch) -> timing.Stats | str:
    """captured.measure of the tiny model, on a CPU."""
    own = networks.hdit(CONFIG)
    eager = Watched(networks.prepare(own, direction, 2, CPU), captured.FIRST[direction])
    for _ in range(captured.FIRST[direction] + 1):
        eager()
    for name in ("capture", "capture_step") if kind else ():
        monkeypatch.setattr(f"hdit.cuda_graphs.{name}", kind)
    again = functools.partial(networks.prepare, own, direction, 2, CPU, capturing=True)
    return captured.measure(again, direction, eager.results, 1e-4, CPU, 0.0)


@pytest.mark.parametrize("direction", captured.FIRST)
def test_a_graph_counts_if_it_does_what_the_eager_pass_does(
    direction: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    assert graph_of(direction, None, monkeypatch) == "no CUDA graphs on cpu" and not recwarn
    found = graph_of(direction, Graph, monkeypatch)
    assert isinstance(found, timing.Stats) and found.repeats == captured.LEAST and found.median > 0
    assert graph_of(direction, Waits, monkeypatch) == "an operation in it waits"
    assert graph_of(direction, Full, monkeypatch) == "out of memory"
    assert graph_of(direction, Fails, monkeypatch) == "RuntimeError: out of luck"
    assert graph_of(direction, Off, monkeypatch) == "it differs from the eager one by 1.0e-02, allowed 2.0e-04"
    if direction == "step":
        for kind in (Stale, Frozen):
            assert str(graph_of(direction, kind, monkeypatch)).startswith("it differs from the eager one by ")
    monkeypatch.setitem(sys.modules, "hdit.cuda_graphs", None)  # as in older revisions, of benchmarks.compare
    assert "ModuleNotFoundError" in str(graph_of(direction, None, monkeypatch))


@pytest.mark.parametrize("steady", [0.0, 0.2])
def test_a_gpu_s_first_pass_may_compile(steady: float, memory: Memory) -> None:
    called: list[int] = []

    def call() -> None:
        called.append(1)
        time.sleep(0.2 if len(called) == 1 else steady)

    if steady:
        with pytest.raises(networks.TooSlow, match=r"its second pass took 0\.2\d* s, more than the 0\.1 s allowed"):
            networks.measure_call(call, GPU, 0.01, patience=0.1)
        assert len(called) == 2
    else:
        assert networks.measure_call(call, GPU, 0.01, patience=0.1).wall_us.median < 1e5


def test_profile_sums_what_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.autograd.DeviceType

    def event(device: Any, elapsed: float, annotation: bool = False, name: str = "gemm") -> Any:
        span = SimpleNamespace(elapsed_us=lambda: elapsed)
        return SimpleNamespace(device_type=device, time_range=span, is_user_annotation=annotation, name=name)

    class Profile:
        events_seen = [event(kind.CUDA, 10), event(kind.CUDA, 2.5), event(kind.CUDA, 99, True), event(kind.CPU, 50)]

        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def events(self) -> list[Any]:
            return self.events_seen

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert networks.profile(lambda: None, CPU) == (12.5, ["gemm", "gemm"])
    Profile.events_seen = [event(kind.CPU, 50)]
    with pytest.raises(RuntimeError, match="nothing on the GPU"):
        networks.profile(lambda: None, CPU)


@pytest.mark.parametrize(
    ("kernel", "whose"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "cuDNN"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>", "FlashAttention"),
        (
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
            "memory-efficient attention",
        ),
        ("void cudnn::ops::nchwToNhwcKernel<float>", None),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", None),  # the package flash-attn's own
        ("_na2d_hopper_forward_kernel", None),
    ],
)
def test_whose_kernels_sdpa_ran(kernel: str, whose: str | None) -> None:
    assert networks.sdpa_of(["ampere_sgemm_128x64_tn", kernel]) == whose


# model and train


def test_models_beside_their_peers(checkout: Path, small_dit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("model")
    options: dict[str, Any] = {"device": CPU, "seconds": 0.01, "configs": TINY, "k_diffusion": checkout}
    model.measure_networks(run, {"tiny": (1, 2)}, contestants=["ours", "DiT"], **options)
    assert len(by_name(run)) == 8
    model.measure_networks(run, {"tiny": (1, 2)}, **options)
    rows = by_name(run)
    assert rows.keys() == {
        (f"tiny batch {batch}", name, direction)
        for batch in (1, 2)
        for name in ("ours", "k-diffusion", "DiT-S/4")
        for direction in ("forward", "forward+backward")
    }
    assert {row["status"] for row in rows.values()} == {"ok"}
    one, two = (rows[f"tiny batch {batch}", "k-diffusion", "forward"] for batch in (1, 2))
    assert two["flops"] == 2 * one["flops"] and one["settings"] == {
        "preset": "tiny", "batch": 1, "precision": "float32"
    }  # fmt: skip
    assert one["parameters"] == sum(p.numel() for p in HDiT(CONFIG).parameters())

    monkeypatch.setattr(networks, "check", None)  # nothing is left to do
    model.measure_networks(run, {"tiny": (1, 2)}, **options)


def test_training_steps_and_what_is_unavailable(small_dit: None, tmp_path: Path) -> None:
    run = new_run("train", tmp_path / "train.json")
    options: dict[str, Any] = {"device": CPU, "seconds": 0.01, "configs": TINY, "k_diffusion": tmp_path}
    model.measure_networks(run, {"tiny": (2,)}, train.PASSES, **options)
    found = {name: row["status"] for (_, name, _), row in by_name(run).items()}
    assert found == {"ours": "ok", "k-diffusion": "unavailable", "DiT-S/4": "ok"}
    assert "git clone" in by_name(run)["tiny batch 2", "k-diffusion", "step"]["reason"]
    assert all(row["images_per_s"] > 0 for row in run.data["rows"] if row["status"] == "ok")
    assert runs.read(tmp_path / "train.json")["rows"] == run.data["rows"]


def test_a_spent_budget_leaves_rows_not_measured(small_dit: None) -> None:
    run = new_run("model")
    model.measure_networks(run, {"tiny": (1,)}, device=CPU, configs=TINY, deadline=time.monotonic())
    assert {row["contestant"]: row["reason"] for row in run.data["rows"] if row["status"] == "not measured"} == {
        "ours": "the budget is spent", "DiT-S/4": "the budget is spent"
    }  # fmt: skip


def test_quick_leaves_the_reference_out_since_it_compiles_for_long(
    small_dit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("model")
    monkeypatch.setattr("benchmarks.peers.kdiffusion.available", lambda path: None)
    monkeypatch.setattr("benchmarks.peers.kdiffusion.build", lambda *_: pytest.fail("it was built"))
    model.measure_networks(run, {"tiny": (1,)}, ["forward"], device=CPU, configs=TINY, compiling=False)
    assert {row["contestant"]: (row["status"], row["reason"]) for row in run.data["rows"]} == {
        "ours": ("ok", None),
        "k-diffusion": ("not measured", "left out: its first call compiles for long"),
        "DiT-S/4": ("ok", None),
    }


def test_a_pass_that_would_go_beyond_the_budget_is_left_after_one_call(
    small_dit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("model")
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: 3.0)
    options: dict[str, Any] = {"device": CPU, "configs": TINY, "contestants": ["ours"], "seconds": 0.0}
    model.measure_networks(run, {"tiny": (1,)}, **options, deadline=time.monotonic() + 10)
    reasons = {row["reason"] for row in run.data["rows"]}
    assert {row["status"] for row in run.data["rows"]} == {"not measured"}
    assert all(re.fullmatch(r"its first pass took 3 s, more than the [012](\.\d+)? s allowed", r) for r in reasons)
    model.measure_networks(run, {"tiny": (1,)}, **options, deadline=time.monotonic() + 600)
    assert {row["status"] for row in run.data["rows"]} == {"ok"}


def test_a_pass_whose_flops_alone_go_beyond_the_budget_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("model")
    run.session["ceilings"]["matmul_fp32_tflop_s"] = 1e-12  # one FLOP a second
    monkeypatch.setattr(networks, "prepare", lambda *_: pytest.fail("it was tried"))
    options: dict[str, Any] = {"device": CPU, "configs": TINY, "contestants": ["ours"]}
    model.measure_networks(run, {"tiny": (1,)}, **options, deadline=time.monotonic() + 60)
    assert {row["status"] for row in run.data["rows"]} == {"not measured"}
    for row in run.data["rows"]:
        assert re.fullmatch(r"at least \S+ s a pass, more than the \d+(\.\d+)? s allowed", row["reason"])


@pytest.mark.parametrize("kind", ["model", "train"])
def test_a_folder_without_k_diffusion_is_an_error(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main([kind, "--quick", "--k-diffusion", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is not at {tmp_path}; expected a clone of crowsonkb/k-diffusion" in line


def test_cases_are_selected_by_pattern() -> None:
    assert model.select([], model.BATCHES, model.SMALLEST) == {"flowers-256": (1,)}
    assert model.select(["imagenet", "ffhq-1024 batch 4"], model.BATCHES, {}) == {
        "ffhq-1024": [4], "imagenet-128": [1, 32], "imagenet-256": [1, 16]
    }  # fmt: skip
    assert model.select(["imagenet-256 batch 1"], model.BATCHES, {}) == {"imagenet-256": [1]}
    with pytest.raises(runs.RunError, match="no case matches 'mnist'; they are: flowers-256 batch 1"):
        model.select(["flowers-256", "mnist"], model.BATCHES, {})


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch, small_dit: None) -> None:
    """The commands measure the tiny model, as the smallest of presets, with ceilings made up."""
    monkeypatch.setitem(presets, "flowers-256", CONFIG)
    monkeypatch.setattr("benchmarks.ceilings.measure_ceilings", lambda *_: dict(CEILINGS))


@pytest.mark.parametrize("kind", ["model", "train"])
def test_commands(kind: str, tiny_presets: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, csv = tmp_path / "new" / "run.json", tmp_path / "run.csv"
    command = [kind, "--quick", "--contestant", "ours", "--output", str(output), "--csv", str(csv)]
    assert __main__.main(command) == 0
    data = runs.read(output)
    (session,) = data["sessions"]
    assert {row["kind"] for row in data["rows"]} == {kind} and session["ceilings"] == CEILINGS
    assert session["clocks"] == dict.fromkeys(("sm_mhz", "memory_mhz", "seen", "sm_mhz_end", "memory_mhz_end"))
    passes = ["forward", "forward+backward"] if kind == "model" else ["step"]
    assert [(row["contestant"], row["pass"], row["status"]) for row in data["rows"]] == [
        ("ours", direction, "ok") for direction in passes
    ]
    assert len(csv.read_text().splitlines()) == 1 + len(passes)
    printed = capsys.readouterr().out
    assert f"{len(passes)} ok" in printed and re.search(r"^\[ +\d+\.\d s\] .*: checking ours", printed, re.M)

    assert __main__.main([*command, "--case", "flowers-256 batch 1"]) == 0  # there is nothing left to measure
    assert runs.read(output)["rows"] == data["rows"]
    assert __main__.main([kind, "--case", "mnist"]) == 2
    assert "no case matches 'mnist'" in capsys.readouterr().err
    assert __main__.main([kind, "--quick", "--output", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert __main__.main([kind, "--quick", "--contestant", "zzz"]) == 2
    assert "no contestant matches 'zzz'; they are: ours, k-diffusion, DiT-" in capsys.readouterr().err


def test_lists_cases_and_why_a_peer_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ffhq = "  ffhq-1024 batch {0}: ours, k-diffusion, DiT-B/4"
    asked = "  (only with --case 'ffhq-1024 batch {0}')"
    for module in (model, train):
        lines = module.listing()
        assert "  flowers-256 batch 1: ours, k-diffusion, DiT-S/4" in lines  # what a CPU measures
        assert (ffhq + asked).format(4) in lines
        assert "needs --k-diffusion FOLDER here" in lines[-1]
        assert module.listing(["ffhq"])[1:3] == [line for line in lines if "ffhq" in line]
        assert not module.listing(["zzz"])
    assert len(scaling.listing(["image 4096"])) == 3 and not scaling.listing(["zzz"])
    lines = scaling.listing()
    assert "  image 4096x4096 batch 1" in lines and "  image 64x64 largest batch  (needs a GPU)" in lines
    assert lines[-1].startswith(
        "  attention 1024x1024 tokens: ours, natten hopper-fna, natten cutlass-fna, flex, sdpa  ("
    )
    assert "  ours: runs here" in scaling.listing(["attention 32*"])
    monkeypatch.setattr(api, "device", lambda: torch.device("cuda", 0))
    assert ffhq.format(4) in model.listing() and ffhq.format(4) in train.listing()
    assert ffhq.format(1) in model.listing() and (ffhq + asked).format(1) in train.listing()


# scaling: the models


def test_hdit_b4_at_every_size() -> None:
    for size in (128, 256, 512, 1024, 2048, 4096):
        assert scaling.hdit_b4(size) == presets[f"hdit-b4-{size}"]
    assert scaling.hdit_b4(64) == replace(presets["hdit-b4-128"], image_size=(64, 64))
    larger = presets["hdit-b4-4096"]
    assert scaling.hdit_b4(8192) == replace(larger, levels=(larger.levels[0], *larger.levels), image_size=(8192, 8192))
    for size in (32, 96, 1000):
        with pytest.raises(ValueError, match=f"power of two from 64 on, got {size}"):
            scaling.hdit_b4(size)


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024, 2048, 8192])
def test_flops_of_both_families(size: int) -> None:
    """Equal to the golden counts where there are some; beyond, HDiT's go with pixels, DiT's with their square."""
    found = [networks.flops(network, 1, backward=False) for network in scaling.families(size)]
    golden = golden_files.read_json("flops_full_size.json")["scaling"].get(str(size))
    if golden:
        assert found == [2 * golden["front_equal_width"]["macs"], 2 * golden["dit_b4"]["macs"]]
    else:
        ratios = [
            networks.flops(network, 1, backward=False) / other
            for network, other in zip(scaling.families(2 * size), found, strict=True)
        ]
        assert 3.8 < ratios[0] < 4.2 and (15 < ratios[1] < 16 or size == 64)


class Tiny(nn.Module):
    """side x side matrix products of one channel, so that FLOPs are 2·side³; waits as long as it is told to."""

    def __init__(self, side: int, wait: Callable[[int], None], products: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(side, side))
        self.wait, self.products = wait, products

    def forward(self, x: Tensor, noise_level: Tensor, class_cond: Tensor) -> Tensor:
        if x.device.type != "meta" and x.shape[-1] > 4:  # where it is checked, it doesn't wait
            self.wait(x.shape[-1])
        for _ in range(self.products):
            x = x @ self.weight
        return x


def tiny(name: str, wait: Callable[[int], None] = lambda side: None, products: int = 1) -> Callable[[int], Network]:
    def at(size: int) -> Network:
        config = replace(CONFIG, image_size=(size, size))
        return Network(name, lambda side: Tiny(side, wait, products), config, checked=4)

    return at


def measured(
    networks_at: Sequence[Callable[[int], Network]], sizes: Sequence[int], budget: float = 60, **options: Any
) -> dict[tuple[str, int], runs.Row]:
    """Rows of forward passes by contestant and size."""
    run = options.pop("run", None) or new_run("scaling")
    options = {"device": CPU, "seconds": budget / 20, "patience": budget, "budget_seconds": budget} | options
    scaling.measure_models(run, sizes, ["forward"], at=lambda size: [at(size) for at in networks_at], **options)
    runs.validate(run.data)
    return {(row["contestant"], row["settings"]["size"]): row for row in run.data["rows"]}


def test_measures_every_point_that_fits() -> None:
    steps: list[str] = []
    rows = measured([tiny("a"), tiny("b")], (8, 16), on_step=steps.append)
    assert {key: row["flops"] for key, row in rows.items()} == {
        (name, size): 2 * size**3 for name in "ab" for size in (8, 16)
    }
    for (_, size), row in rows.items():
        assert row["status"] == "ok" and row["wall_us"]["repeats"] >= 3 and row["parameters"] == size**2
        assert row["settings"] == {"size": size, "batch": 1, "largest": False} and row["family"] == "model"
        assert row["detail"] == (None if size == 8 else "checked at 8²")
    assert len(steps) == 2 + 2 + 4  # counting, checking, measuring


def test_contestants_and_a_run_that_is_taken_up() -> None:
    run, called = new_run("scaling"), []
    measured([tiny("a"), tiny("b", called.append)], (8,), run=run, contestants=["a"])
    assert [row["contestant"] for row in run.data["rows"]] == ["a"] and not called
    first = dict(run.data["rows"][0])
    assert set(measured([tiny("a", called.append), tiny("b")], (8,), run=run)) == {("a", 8), ("b", 8)}
    assert run.data["rows"][0] == first and not called


def test_without_a_budget_flops_are_counted_still(tmp_path: Path) -> None:
    run = new_run("scaling", tmp_path / "run.json")
    rows = measured([tiny("a")], (8, 16), 0, run=run, seconds=1)
    assert runs.read(tmp_path / "run.json") == run.data
    assert [row["flops"] for row in rows.values()] == [2 * 8**3, 2 * 16**3]
    assert all(row["status"] == "not measured" and row["reason"] and not row["wall_us"] for row in rows.values())


def test_a_point_that_would_not_fit_is_not_tried() -> None:
    called: list[int] = []

    def wait(size: int) -> None:
        called.append(size)
        time.sleep(0.05 * (size / 8) ** 3)  # as the FLOPs grow: 0.05, 0.4 and 3.2 seconds

    rows = measured([tiny("a", wait)], (8, 16, 32), 3)
    assert set(called) == {8, 16}
    assert rows["a", 8]["wall_us"]["median"] >= 0.05e6 and rows["a", 16]["wall_us"]["median"] >= 0.4e6
    assert rows["a", 32]["status"] == "not measured"


def test_a_point_beyond_patience_is_not_tried() -> None:
    def wait(size: int) -> None:
        time.sleep(0.02 * (size / 8) ** 3)

    rows = measured([tiny("a", wait)], (8, 16), patience=0.05)
    assert rows["a", 8]["status"] == "ok" and "more than the 0.05 s allowed" in rows["a", 16]["reason"]


def test_a_family_is_not_predicted_from_another() -> None:
    """What takes 50 times the FLOPs of another in less time than it."""
    rows = measured([tiny("a", lambda size: time.sleep(0.05)), tiny("b", products=50)], (8, 16), patience=0.4)
    assert all(rows["b", size]["status"] == "ok" for size in (8, 16)), rows
    assert rows["b", 8]["flops"] == 50 * rows["a", 8]["flops"]


@pytest.mark.parametrize(("patience", "budget"), [(0.1, 60), (60, 0.1)])
def test_the_first_point_of_a_family_is_left_after_one_call_that_takes_too_long(patience: float, budget: float) -> None:
    called: list[int] = []

    def wait(size: int) -> None:
        called.append(size)
        time.sleep(0.3)

    rows = measured([tiny("b", wait)], (8, 16), budget, patience=patience, seconds=1)
    assert called == [8]
    assert rows["b", 8]["status"] == "not measured" and rows["b", 8]["first_call_s"] >= 0.3
    assert re.fullmatch(r"its first pass took 0\.\d+ s, more than the 0\.\d+ s allowed", rows["b", 8]["reason"])
    assert rows["b", 16]["status"] == "not measured"
    if budget == 60:
        assert "s a pass expected, more than the 0.1 s allowed" in rows["b", 16]["reason"]


def test_a_pass_is_predicted_from_another_of_the_same_family() -> None:
    called: list[int] = []

    def wait(size: int) -> None:
        called.append(size)
        time.sleep(0.1)

    run = new_run("scaling")
    measured([tiny("a", wait)], (8,), run=run)
    forward, step = (scaling.blank(tiny("a", wait)(8), 8, 1, direction) for direction in ("forward", "step"))
    seconds = run.data["rows"][0]["wall_us"]["median"] / 1e6
    assert scaling._expected(run, forward) == pytest.approx(seconds)
    assert scaling._expected(run, step) == pytest.approx(seconds * step["flops"] / forward["flops"])
    assert step["flops"] > forward["flops"]
    assert scaling._expected(run, step | {"contestant": "b"}) == 0


def test_out_of_memory_ends_a_family_only() -> None:
    def full(size: int) -> None:
        if size == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    rows = measured([tiny("a", full), tiny("b")], (8, 16, 32))
    assert rows["a", 16]["status"] == "out of memory"
    assert rows["a", 32]["reason"] == "smaller images don't fit into memory"
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {("a", 8), ("b", 8), ("b", 16), ("b", 32)}


# scaling: the largest batch


@pytest.mark.parametrize(
    ("first", "grown", "room", "fits", "batch", "limit"),
    [
        (1000.0, 10, 500, 64, 32, "memory"),  # 10 + 49 images of 10 bytes each
        (1000.0, 10, 500, 8, 8, "memory"),  # 32 and 16 turn out not to fit
        (1000.0, 100, 500, 64, 32, "memory"),  # 4 were predicted, and leave room for more
        (1000.0, 100, 500, 8, 8, "memory"),  # then 16 turn out not to fit
        (1000.0, 10, 15, 1, 1, "memory"),
        (100.0, 10, 10**9, 10**9, 4096, "the 4096 images tried at most"),
        (12e3, 10, 10**9, 10**9, 128, "2 s a pass"),  # 166 images would take 2 s, one after another
        (1e6, 10, 10**9, 10**9, 64, "2 s a pass"),  # many together are expected to take 30 ms each
        (3e6, None, 0, 0, 1, "2 s a pass"),  # expected of two: 60 s, so that no memory is probed
        (1000.0, None, 0, 2, 2, "memory"),  # four images are too many
        (1000.0, None, 0, 1, 1, "memory"),
    ],
)
def test_the_largest_batch(
    first: float, grown: int | None, room: int, fits: int, batch: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("scaling")
    (network,) = at = [tiny("a")(8)]
    single = scaling.blank(network, 8, 1, "forward")
    single |= {"status": "ok", "wall_us": stats(first), "peak_bytes": 10, "error": 1e-7, "allowed_error": 1e-6}
    single["floor_us"] = 9e3 if first < 3e6 else 9e6
    run.put(single)

    def peak(*_: Any) -> int:
        assert first < 3e6
        if grown is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10 + 3 * grown

    def attempt(row: runs.Row, *_: Any) -> runs.Row:
        fit = row["settings"]["batch"] <= fits
        found = (
            {"status": "ok", "wall_us": stats(2.0), "peak_bytes": 10 * row["settings"]["batch"]}
            if fit
            else {"status": "out of memory", "reason": "full"}
        )
        run.put(row | found)
        return row | found

    scaling.measure_largest(run, [8], device=CPU, deadline=time.monotonic(), at=lambda size: at)
    late = by_name(run)["image 8x8 largest batch", "a", "forward"]
    assert (late["status"], late["reason"]) == ("not measured", "the budget is spent")
    monkeypatch.setattr(networks, "peak", peak)
    monkeypatch.setattr(networks, "room", lambda device: float(room))
    monkeypatch.setattr(networks, "attempt", attempt)
    for _ in range(2):  # the second time there is nothing left to do
        scaling.measure_largest(run, [8], device=CPU, at=lambda size: at)
        scaling.measure_largest(run, [8], ["b"], device=CPU, at=lambda size: at)
        monkeypatch.setattr(networks, "attempt", None)
    row = by_name(run)["image 8x8 largest batch", "a", "forward"]
    assert row["settings"] == {"size": 8, "batch": batch, "largest": True} and row["detail"] == f"limited by {limit}"
    assert row["status"] == "ok" and row["flops"] == batch * 2 * 8**3
    assert row["wall_us"] == (stats(first) if batch == 1 else stats(2.0))


# scaling: attention alone


def test_attention_by_all_that_can_run() -> None:
    run = new_run("scaling")
    scaling.measure_attention(run, [8], ["ours", "natten", "sdpa"], device=CPU)
    rows = by_name(run)
    found = {name: row["status"] for (_, name, _), row in rows.items()}
    assert found == {
        "ours": "ok", "sdpa": "ok", "natten hopper-fna": "unavailable", "natten cutlass-fna": "unavailable"
    }  # fmt: skip
    assert {row["pass"] for row in rows.values()} == {"forward", "forward+backward"}
    for (case, name, direction), row in rows.items():
        assert case == "attention 8x8 tokens" and row["family"] == "attention"
        assert row["settings"] == {
            "grid": 8, "batch": 1, "heads": 2, "head_dim": 64, "kernel_size": 7, "dtype": "float32"
        }  # fmt: skip
        keys = 8 * 8 if name == "sdpa" else 7 * 7
        assert row["flops"] == 4 * 8 * 8 * keys * 2 * 64 * (7 if direction == "forward+backward" else 2) // 2
        floor = ceilings.floor_us(run.session["ceilings"], row["bytes"], row["flops"], "float32")
        assert row["floor_us"] == pytest.approx(floor, rel=1e-5)
        if row["status"] == "ok":
            assert row["error"] <= row["allowed_error"] and row["wall_us"]["repeats"] >= 3
    before = run.data["rows"]
    scaling.measure_attention(run, [8, 16], ["ours", "flex"], device=CPU, deadline=time.monotonic())
    late = run.data["rows"][len(before) :]
    assert run.data["rows"][: len(before)] == before
    assert {(row["case"], row["contestant"], row["status"], row["reason"]) for row in late} == {
        ("attention 8x8 tokens", "flex", "unavailable", "it needs a GPU"),
        ("attention 16x16 tokens", "flex", "unavailable", "it needs a GPU"),
        ("attention 16x16 tokens", "ours", "not measured", "the budget is spent"),
    }


# scaling: what is shown, and the command


def made_up(run: runs.Run) -> None:
    """A run of four points, one of them not measured."""
    times = {"HDiT-B/4": {512: 12_300.0, 1024: 2.5e6}, "DiT-B/4": {512: 3.25e6, 1024: None}}
    for size in (512, 1024):
        for network in scaling.families(size):
            row, time_us = scaling.blank(network, size, 1, "forward"), times[network.name][size]
            found = {"status": "ok", "wall_us": stats(time_us)} if time_us else {"reason": "about 900 s needed"}
            run.put(row | found)


def test_report_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def measure(run: runs.Run, sizes: Sequence[int], passes: Sequence[str], **options: Any) -> None:
        asked.update(options, sizes=sizes, passes=passes)
        options["on_step"]("working")
        made_up(run)

    monkeypatch.setattr(scaling, "measure_models", measure)
    monkeypatch.setenv("COLUMNS", "200")
    for _ in range(2):  # a demonstration can be repeated
        data = scaling.report(tmp_path / "new", budget_seconds=7)
    assert asked["budget_seconds"] == 7 and asked["passes"] == ["forward"]
    assert asked["sizes"] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert data == runs.read(tmp_path / "new" / "scaling.json") and len(data["rows"]) == 4
    printed = capsys.readouterr().out
    assert "12.3 ms" in printed and "2.50 s" in printed and "not measured" in printed
    assert "At 1024² HDiT-B/4 takes 0.86% of the FLOPs (counted)" in printed and "our reading" in printed
    with Image.open(tmp_path / "new" / "scaling.png") as image:
        assert image.width > 1000 and image.text["Description"] == plots.digest(data, "scaling")
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20


def test_summary_states_exponents(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run("scaling")
    for size in (128, 256, 512):
        for name, exponent in (("HDiT-B/4", 1.0), ("DiT-B/4", 2.0)):
            row = scaling.blank(tiny(name)(8), size, 1, "forward") | {"flops": size**2}
            run.put(row | {"status": "ok", "wall_us": stats(3.0 * size ** (2 * exponent))})
    scaling.print_summary(run.data)
    printed = capsys.readouterr().out
    assert "Parameters and memory of a forward pass, batch 1" in printed and "The largest batch" not in printed
    assert (
        "HDiT-B/4 grows as pixels to the power of 1.00 [1.00, 1.00] (95% interval) from 128² to 512²; 1.00" in printed
    )
    assert "DiT-B/4 grows as pixels to the power of 2.00 [2.00, 2.00] (95% interval)" in printed
    run.put(run.data["rows"][0] | {"wall_us": stats(1e6)})
    scaling.print_summary(run.data)
    assert "Wall time, forward pass: HDiT-B/4's exponent is not determined, [" in capsys.readouterr().out
    scaling.print_summary(made_up_runs.scaling())
    assert "The largest batch that fits, of powers of two" in capsys.readouterr().out


def test_selection_of_sizes_and_grids() -> None:
    everything = scaling.select([], quick=False, on_gpu=True)
    assert everything.sizes == everything.largest == list(scaling.SIZES) and everything.grids == list(scaling.GRIDS)
    assert min(everything.sizes) == 64 and max(everything.sizes) > 4096
    assert scaling.select([], quick=False, on_gpu=False).largest == []
    assert len(scaling.select([], quick=True, on_gpu=True).sizes) == 3
    one = scaling.select(["image 1024x1024 largest"], quick=False, on_gpu=True)
    assert (one.sizes, one.largest, one.grids) == ([1024], [1024], [])  # it starts from batch 1
    assert scaling.select(["attention 64x64 "], quick=False, on_gpu=False) == scaling.Selection([], [], [64])
    unknown = ["image 64x64", "image 100x100"], "no case matches 'image 100x100'"
    for patterns, message in (unknown, (["64x64 largest"], "needs a GPU")):
        with pytest.raises(runs.RunError, match=message):
            scaling.select(patterns, quick=False, on_gpu=False)


def test_scaling_command(
    tiny_presets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "families", None)
    monkeypatch.setitem(scaling.measure_models.__kwdefaults__, "at", lambda size: [tiny("HDiT-B/4")(size // 8)])
    output = tmp_path / "scaling.json"
    command = ["scaling", "--case", "image 64x64 batch", "--case", "attention 32x32", "--contestant", "HDiT"]
    assert __main__.main([*command, "--contestant", "sdpa", "--output", str(output), "--budget", "60"]) == 0
    rows = {runs.key(row): row for row in runs.read(output)["rows"]}
    assert rows.keys() == {
        *(("image 64x64 batch 1", "HDiT-B/4", direction) for direction in ("forward", "step")),
        *(("attention 32x32 tokens", "sdpa", direction) for direction in ("forward", "forward+backward")),
    }
    assert all(row["status"] == "ok" for row in rows.values()), rows
    assert "4 ok" in capsys.readouterr().out
    assert __main__.main(["scaling", "--contestant", "zzz"]) == 2
    assert "no contestant matches 'zzz'; they are: HDiT-B/4, DiT-B/4, ours, natten" in capsys.readouterr().err
    assert __main__.main(["scaling", "--case", "attention 32x32", "--contestant", "DiT"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["scaling", "--patience", "-1"])
    assert stopped.value.code == 2 and "--patience" in capsys.readouterr().err


def test_a_report_is_made_of_a_scaling_run(tmp_path: Path) -> None:
    run = runs.Run.open(tmp_path / "runs" / "scaling.json", "scaling", ["test"])
    made_up(run)
    run.save()
    report.write_page(tmp_path / "runs", tmp_path / "page")
    assert "0.86% of the FLOPs (counted)" in (tmp_path / "page" / "report.md").read_text()


# On a GPU


@pytest.mark.gpu
def test_measures_on_a_gpu(small_dit: None) -> None:
    config: HDiTConfig = replace(presets["flowers-256"], levels=presets["flowers-256"].levels[1:], image_size=(64, 64))
    run, device = new_run("model"), api.device()
    options: dict[str, Any] = {"device": device, "seconds": 0.2, "configs": {"small": config}}
    model.measure_networks(run, {"small": (2,)}, (*model.PASSES, *train.PASSES), ["ours"], **options)
    model.measure_networks(run, {"small": (2,)}, ["forward+backward"], ["DiT"], **options)
    rows = by_name(run)
    assert len(rows) == 4
    for row in rows.values():
        assert row["status"] == "ok", row
        assert 0 < row["gpu_us"]["median"] <= 1.05 * row["wall_us"]["median"]
        assert row["kernels"] > 10 and row["peak_bytes"] > 4 * row["parameters"] and row["gpu_us"]["repeats"] >= 5
        assert 0 < row["error"] <= row["allowed_error"] < 0.1
        if row["pass"] == "forward+backward":
            assert "captured_us" not in row
        else:
            assert 0.95 * row["gpu_us"]["median"] <= row["captured_us"]["median"] <= 1.05 * row["wall_us"]["median"]


@pytest.mark.gpu
def test_what_is_captured_gives_the_same_bits() -> None:
    """Of a forward pass; a step's losses may differ as two eager ones do, where SDPA's gradients are not the same."""
    own, found = networks.hdit(replace(presets["flowers-256"], image_size=(64, 64))), []
    for capturing in (False, True):
        call = networks.prepare(own, "forward", 2, api.device(), capturing=capturing)
        found.append(call())
        assert call.reason is None
    assert torch.equal(*found)


@pytest.mark.gpu
def test_the_largest_batch_on_a_gpu(monkeypatch: pytest.MonkeyPatch, small_dit: None) -> None:
    monkeypatch.setattr(scaling, "LARGEST", 8)
    run, device = new_run("scaling"), api.device()
    options: dict[str, Any] = {"device": device, "seconds": 0.2}
    scaling.measure_models(run, [64], ["forward"], ["DiT"], **options)
    scaling.measure_largest(run, [64], **options)
    single, largest = (row for row in run.data["rows"] if row["contestant"].startswith("DiT"))  # "DiT" fits HDiT too
    assert largest["status"] == "ok" and largest["settings"]["batch"] == 8 and "8 images" in largest["detail"]
    assert largest["images_per_s"] > single["images_per_s"]
