from __future__ import annotations

import copy
import dataclasses
import io
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from hdit import (
    GlobalAttention,
    HDiT,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
)
from hdit.model import AxialRoPE, FeedForwardBlock, FourierFeatures, TransformerLayer, axial_positions, halve
from tests import golden_files

MODELS = ["A", "B", "F"]
Record = Callable[[str, str, str, Any], None]
ON_DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


# Parity with the reference implementation


def inputs(name: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The golden tensors, x as a leaf, and the model's other arguments."""
    golden = golden_files.tensors(f"model_{name}.safetensors")
    cond = {key: golden[key] for key in ("sigma", "aug_cond", "class_cond") if key in golden}
    cond = {key: t.to(device, dtype if t.is_floating_point() else t.dtype) for key, t in cond.items()}
    return golden, golden["x"].to(device, dtype), cond


def run(model: HDiT, x: Tensor, cond: dict[str, Tensor], cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and every gradient, under the golden files' names."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x, **cond)
    out.backward(cotangent.to(out))
    return out, {"grad.x": x.grad} | {f"grad.{name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_float64_equals_golden(name: str, record: Record) -> None:
    golden, x, cond = inputs(name, torch.float64, "cpu")
    model = golden_files.model(name, torch.float64)
    out, gradients = run(model, x, cond, golden["cotangent"])
    assert gradients.keys() == {key for key in golden if key.startswith("grad.")}
    errors = {key: golden_files.max_error(gradient, golden[key]) for key, gradient in gradients.items()}
    output, gradient = golden_files.max_error(out, golden["output"]), max(errors.values())
    record("model_parity", name, "float64 on cpu", {"output error": output, "worst gradient error": gradient})
    assert output < 1e-5
    assert gradient < 1e-5, errors


def test_activations_equal_golden() -> None:
    golden, x, cond = inputs("A", torch.float64, "cpu")
    model, activations = golden_files.model("A", torch.float64), {}
    names = [key.removeprefix("act.") for key in golden if key.startswith("act.")]
    assert len(names) == 7
    for name in names:
        keep = lambda _module, _args, out, name=name: activations.update({name: out})  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    model(x, **cond)
    for name in names:
        assert golden_files.max_error(activations[name], golden[f"act.{name}"]) < 1e-5, name


@ON_DEVICES
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_as_good_as_the_reference(name: str, device: str, record: Record) -> None:
    """Output within 3x the reference's own float32 error, every gradient within 3x its worst.

    The gradients of the attention scales are sums that cancel almost entirely: a last-bit change of x moves the worst
    one of model F by anything from 1 to 5 times the recorded figure. So x is moved by its last bit, and the median of
    nine runs (the first with x as it is) is held to the bound.
    """
    golden, x, cond = inputs(name, torch.float32, device)
    model = golden_files.model(name, torch.float32, device)
    bound = golden_files.entry(f"model_{name}.safetensors")["float32_vs_float64"]
    errors: dict[str, list[float]] = {}
    for seed in range(9):
        sign = torch.randint(3, x.shape, generator=torch.Generator().manual_seed(seed)).to(device) - 1
        moved = x if seed == 0 else torch.nextafter(x, x + sign)
        out, gradients = run(model, moved, cond, golden["cotangent"])
        for key, found in ({"output": out} | gradients).items():
            errors.setdefault(key, []).append(golden_files.max_error(found, golden[key]))
    ratios = {
        key: [error / bound["output" if key == "output" else "worst_gradient"] for error in found]
        for key, found in errors.items()
    }
    seen = {"output, times the recorded": ratios["output"][0]}
    for words, figure in (("as it is", lambda found: found[0]), ("median of nine", statistics.median)):
        worst = max(figure(found) for key, found in ratios.items() if key != "output")
        seen[f"worst gradient, times the recorded, {words}"] = worst
    record("model_parity", name, f"float32 on {device}", seen)
    for key, found in ratios.items():
        assert statistics.median(found) <= 3, key


def test_a_state_dict_of_another_shape_is_refused() -> None:
    golden = golden_files.tensors("model_A.safetensors")
    state = {key.removeprefix("state."): t for key, t in golden.items() if key.startswith("state.")}
    model = golden_files.model("A", torch.float32)
    assert model.state_dict().keys() == state.keys()
    del state["down_levels.0.0.self_attn.pos_emb.freqs"]
    with pytest.raises(RuntimeError, match="down_levels.0.0.self_attn.pos_emb.freqs"):
        model.load_state_dict(state)


def test_rotary_frequencies_equal_golden() -> None:
    """A fresh model's, which no checkpoint filled in."""
    for name in MODELS:
        golden = golden_files.tensors(f"model_{name}.safetensors")
        fresh = HDiT(golden_files.model(name, torch.float32).config).state_dict()
        keys = [key for key in fresh if key.endswith("pos_emb.freqs")]
        for key in keys:
            torch.testing.assert_close(fresh[key], golden[f"state.{key}"])
        assert keys


def test_param_groups_equal_golden() -> None:
    golden = golden_files.read_json("optim_A.json")["param_groups"]
    model = golden_files.model("A", torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    groups = model.param_groups(golden["base_lr"], golden["mapping_lr_scale"])
    assert len(groups) == len(golden["groups"])
    for group, wanted in zip(groups, golden["groups"], strict=True):
        assert [names[p] for p in group["params"]] == wanted["names"]
        assert group["lr"] == pytest.approx(wanted["lr"])
        assert group.get("weight_decay") == wanted["weight_decay"]
    assert [group["lr"] for group in model.param_groups()] == [group["lr"] for group in groups]


# Parts


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 40), (16, 4)])
def test_positions_are_separable(rows: int, columns: int) -> None:
    """Halving each axis is averaging the four children of the grid; the longer side reaches ±1 at its outer edges."""
    pos_y, pos_x = axial_positions(rows, columns, torch.float64, torch.device("cpu"))
    grid = torch.stack(torch.meshgrid(pos_y, pos_x, indexing="ij"), -1)
    children = grid.view(rows // 2, 2, columns // 2, 2, 2).mean((1, 3))
    halved = torch.stack(torch.meshgrid(halve(pos_y), halve(pos_x), indexing="ij"), -1)
    torch.testing.assert_close(halved, children)
    step = 2 / max(rows, columns)
    assert max(pos_y[-1], pos_x[-1]) == pytest.approx(1 - step / 2)
    for pos in (pos_y, pos_x):
        torch.testing.assert_close(pos.diff(), torch.full_like(pos.diff(), step))
        torch.testing.assert_close(pos, -pos.flip(0))


def small(**changes: Any) -> HDiTConfig:
    config = HDiTConfig(
        levels=(
            Level(1, 32, attention=NeighborhoodAttention(16, 3)),
            Level(2, 32, attention=ShiftedWindowAttention(16, 4)),
            Level(1, 64, attention=GlobalAttention(32)),
        ),
        mapping=Mapping(1, 32),
        image_size=(32, 48),
        patch_size=(2, 2),
        num_classes=4,
    )
    return dataclasses.replace(config, **changes)


def make(config: HDiTConfig, scale: float = 0.1) -> HDiT:
    """A model none of whose layers is at its zero start."""
    model = HDiT(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=scale)
    return model


def arguments(config: HDiTConfig, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    cond = {"mapping_cond": torch.randn(batch, config.mapping_cond_dim, dtype=dtype)} if config.mapping_cond_dim else {}
    return {
        "x": torch.randn(batch, config.in_channels, *config.image_size, dtype=dtype),
        "sigma": torch.rand(batch) + 0.1,
        "class_cond": torch.arange(batch) % config.num_classes,
        **cond,
    }


def test_a_new_model_returns_zeros_and_has_gradients(seed: int) -> None:
    model = HDiT(small())
    out = model(**arguments(small()))
    assert not out.any()
    (out * torch.randn_like(out)).sum().backward()
    assert model.patch_out.proj.weight.grad.any()


def test_every_argument_matters(seed: int) -> None:
    config = small(mapping_cond_dim=5)
    model = make(config).eval()
    args = arguments(config) | {"aug_cond": torch.zeros(2, 9)}
    out = model(**args)
    del args["aug_cond"]
    torch.testing.assert_close(model(**args), out)  # not given is zeros
    others = {
        "x": args["x"].flip(-1),
        "sigma": args["sigma"] * 2,
        "aug_cond": torch.ones(2, 9),
        "class_cond": args["class_cond"] + 1,
        "mapping_cond": args["mapping_cond"] + 1,
    }
    for key, other in others.items():
        assert (model(**args | {key: other}) - out).abs().max() > 1e-4 * out.abs().max(), key
    int32 = args | {"class_cond": args["class_cond"].int()}
    assert torch.equal(model(**int32), model(**args))


def test_samples_of_a_batch_are_independent(seed: int) -> None:
    model, args = make(small()).double().eval(), arguments(small(), 3, torch.float64)
    out = model(**args)
    for i in range(3):
        torch.testing.assert_close(model(**{key: t[i : i + 1] for key, t in args.items()}), out[i : i + 1])


def test_shifted_windows_join_their_neighbours_but_not_opposite_edges(seed: int) -> None:
    """From one token, the two layers of a level (straight, then shifted by 2) reach exactly this part of the grid."""
    config = HDiTConfig(
        levels=(Level(2, 32, attention=ShiftedWindowAttention(16, 4)),),
        mapping=Mapping(1, 32),
        image_size=(16, 24),
        patch_size=(1, 1),
    )
    model = make(config, scale=0.5).double()
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    for (row, column), (rows, columns) in {
        (0, 0): (slice(0, 4), slice(0, 4)),  # its shifted window is the corner's 2x2, inside the window 0…3
        (0, 6): (slice(0, 4), slice(4, 12)),  # shifted window: rows 0…1, columns 6…9, so windows 4…7 and 8…11
        (15, 23): (slice(12, 16), slice(20, 24)),
        (7, 13): (slice(4, 12), slice(8, 16)),  # shifted window: rows 6…9, columns 10…13
    }.items():
        (gradient,) = torch.autograd.grad(model(x, torch.ones(1))[..., row, column].sum(), x)
        seen = gradient.abs().amax((0, 1)) > 0
        wanted = torch.zeros_like(seen)
        wanted[rows, columns] = True
        assert torch.equal(seen, wanted), (row, column)


def test_other_sizes_run(seed: int) -> None:
    model = make(small())
    for size in ((32, 48), (64, 32)):
        args = arguments(small(image_size=size))
        assert model(**args).shape == args["x"].shape


def test_channels_last_images_and_strides_make_no_difference(seed: int) -> None:
    model, args = make(small()).eval(), arguments(small())
    out = model(**args)
    wide = torch.randn(2, 3, 40, 100)
    view = wide[:, :, 4:36, 2:98:2].copy_(args["x"])
    for x in (args["x"].to(memory_format=torch.channels_last), view):
        torch.testing.assert_close(model(**args | {"x": x}), out)


def test_levels_without_attention(seed: int) -> None:
    config = small(levels=(Level(1, 32, attention=NoAttention()), Level(1, 64, attention=GlobalAttention(32))))
    model = make(config)
    assert not any("down_levels" in name and "attn" in name for name, _ in model.named_parameters())
    model(**arguments(config)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_acts_in_training_only(seed: int) -> None:
    config = small(
        levels=tuple(dataclasses.replace(level, dropout=0.5) for level in small().levels),
        mapping=Mapping(1, 32, dropout=0.5),
    )
    model, args = make(config), arguments(config)
    assert not torch.equal(model(**args), model(**args))
    model.eval()
    assert torch.equal(model(**args), model(**args))
    dropouts = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 2 * (2 * 1 + 2 * 2 + 1) + 1  # attention and feed-forward of every layer, and the mapping's


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, seed: int) -> None:
    model, args = make(small()), arguments(small())
    out = model(**args)
    with torch.autocast("cpu", dtype=dtype):
        half = model(**args)
    assert half.dtype == dtype
    error = ((half.float() - out).norm() / out.norm()).item()
    assert 1e-5 < error < (0.08 if dtype == torch.bfloat16 else 0.01)
    half.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_bfloat16_model_keeps_its_positions_and_noise_levels_in_float32(seed: int) -> None:
    model, args = make(small()).eval(), arguments(small())
    wanted = model(**args)
    model, seen = model.bfloat16(), {}

    def keep(module: torch.nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
        out = out if isinstance(out, tuple) else (out,)
        seen.setdefault(type(module).__name__, set()).update(t.dtype for t in (*given, *out))

    for module in model.modules():
        if isinstance(module, (AxialRoPE, FourierFeatures)):
            module.register_forward_hook(keep)
    out = model(**args | {"x": args["x"].bfloat16()})
    assert seen == {"AxialRoPE": {torch.float32}, "FourierFeatures": {torch.float32}}
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).norm() < 0.1 * wanted.norm()


# torch.compile


INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler"),
)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiles_without_a_break(backend: str, seed: int) -> None:
    """aot_eager: every kind of attention, forward and backward; inductor, which takes minutes for that: one level."""
    torch.compiler.reset()
    config = small() if backend == "aot_eager" else small(levels=small().levels[:1])
    model, args = make(config), arguments(config)
    parameters = dict(model.named_parameters())

    def train(model: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = model(**args)
        return out, torch.autograd.grad(out.square().sum(), list(parameters.values()))

    wanted, gradients = train(model)
    out, found = train(torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient, same in zip(parameters, found, gradients, strict=True):
        assert golden_files.max_error(gradient, same) < 1e-3, name


def tiny(**changes: Any) -> HDiTConfig:
    """A model of every kind of layer that compiles and runs fast."""
    levels = (
        Level(1, 16, 16, NeighborhoodAttention(8, 3)),
        Level(2, 16, 16, ShiftedWindowAttention(8, 2)),
        Level(1, 24, 16, GlobalAttention(8)),
    )
    return small(**{"levels": levels, "mapping": Mapping(1, 16), "image_size": (16, 24)} | changes)


def fast() -> HDiTConfig:
    """All of the steps between levels, in the least time."""
    level = Level(1, 16, 16, GlobalAttention(8))
    return tiny(levels=(level, dataclasses.replace(level, width=24)), image_size=(8, 12), mapping_cond_dim=5)


def light() -> HDiTConfig:
    """Two levels that trace fast."""
    return tiny(levels=(Level(1, 16, 16, NoAttention()), Level(1, 16, 16, GlobalAttention(8))), mapping=Mapping(0, 16))


def test_one_graph_for_all_sizes(seed: int) -> None:
    """Also where a default device is set, which runs everything under a torch function mode.

    dynamic=True makes inputs of Python floats, too, and where an operator takes one, all is compiled a second time.
    """
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.device("cpu"), torch.no_grad():
        model = make(light()).eval()
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for batch, height, width in ((2, 32, 48), (3, 48, 64), (4, 64, 32)):
            args = arguments(tiny(image_size=(height, width)), batch)
            for name, dims in (("x", (0, 2, 3)), ("sigma", 0), ("class_cond", 0)):
                torch._dynamo.mark_dynamic(args[name], dims)
            torch.testing.assert_close(compiled(**args), model(**args))
    assert counter.frame_count == 1


def test_neighborhood_attention_compiles_once(seed: int) -> None:
    torch.compiler.reset()
    config, counter = Level(1, 16, 16, NeighborhoodAttention(8, 3)), CompileCounterWithBackend("aot_eager")
    layer = torch.compile(TransformerLayer(config, 8, 0), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, rows, columns in ((2, 4, 6), (3, 10, 8)):
            pos_y, pos_x = axial_positions(rows, columns, torch.float32, torch.device("cpu"))
            layer(torch.randn(batch, rows, columns, 16), pos_y, pos_x, torch.randn(batch, 8))
    assert counter.frame_count == 1


def test_one_graph_for_all_noise_levels(seed: int) -> None:
    """Of numbers: the first call takes its own for a constant, which the second finds to change."""
    torch.compiler.reset()
    config = tiny(levels=(Level(1, 16, 16, NoAttention()),), mapping=Mapping(0, 16), image_size=(4, 4))
    model, args, counter = make(config).eval(), arguments(config), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for level in (0.5, 0.7, 2.4):
            assert torch.equal(compiled(**args | {"sigma": level}), model(**args | {"sigma": level}))
    assert counter.frame_count == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_free_sizes(strict: bool, seed: int) -> None:
    model, args = make(light()).eval(), arguments(light())
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))
    shapes = {"x": {0: batch, 2: 4 * rows, 3: 4 * columns}, "sigma": {0: batch}, "class_cond": {0: batch}}
    with torch.no_grad():
        program = torch.export.export(model, (), args, dynamic_shapes=shapes, strict=strict)
    calls = [str(node.target) for node in program.graph.nodes]
    assert sum("token_merge_forward" in call for call in calls) == 2
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in ((16, 24), (24, 16)):
        args = arguments(tiny(image_size=size), 3)
        torch.testing.assert_close(loaded(**args), model(**args))


# Layers that are not plain


class Doubled(nn.Module):
    """An adapter around a layer of weight W that adds W x, as LoRA adds its product, and has no weight of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, base.in_features, bias=False)
        self.up = nn.Linear(base.in_features, base.out_features, bias=False)
        self.down.weight, self.up.weight = nn.Parameter(torch.eye(base.in_features).double()), base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class QuantizedWeight(Tensor):
    """A weight that stands for twice its numbers where a linear layer asks for it, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [a.as_subclass(Tensor) * (2 if function is F.linear else 1) if isinstance(a, cls) else a for a in args]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def doubled(layer: nn.Linear, way: str) -> nn.Module:
    """The layer, or another in its place, giving twice what it did."""
    if way == "adapter":
        return Doubled(layer)
    if way == "subclass":
        layer.__class__ = DoubledLinear
    elif way == "forward hook":
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    elif way == "forward pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif way == "forward of the instance":
        layer.forward = lambda x: 2 * F.linear(x, layer.weight)
    elif way == "parametrization":
        parametrize.register_parametrization(layer, "weight", Twice())
    elif way == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data *= 2
    elif way == "pruned":
        prune.identity(layer, "weight")
        layer.weight_orig.data *= 2
    else:
        weight = layer.weight.detach().as_subclass(QuantizedWeight)
        del layer.weight
        layer.weight = weight
    return layer


WAYS = ["adapter", "subclass", "forward hook", "forward pre-hook", "forward of the instance", "parametrization"]
WAYS += ["weight norm", "pruned", "quantized weight"]
BETWEEN_LEVELS = ["patch_in.proj", "merges.0.proj", "splits.0.proj", "patch_out.proj"]


def replace(model: HDiT, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_to_a_linear_layer_acts(way: str, seed: int) -> None:
    """On each layer in turn, forward and backward: as if its weight were doubled."""
    model, args = make(fast()).double().eval(), arguments(fast(), dtype=torch.float64)
    args["x"].requires_grad_()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plain = model(**args).detach()
    for name in names if way == "adapter" else [*BETWEEN_LEVELS, "time_in_proj", "mapping_cond_in_proj"]:
        changed, wanted = copy.deepcopy(model), copy.deepcopy(model)
        replace(changed, name, doubled(changed.get_submodule(name), way))
        wanted.get_submodule(name).weight.data *= 2
        outputs = [net(**args) for net in (changed, wanted)]
        for ours, theirs in (outputs, [torch.autograd.grad(out.sum(), args["x"])[0] for out in outputs]):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name} {m}")
        assert (outputs[0] - plain).abs().max() > 1e-4, name


def test_hooks_of_all_modules_and_a_patched_class_act(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = make(fast()).double().eval(), arguments(fast(), dtype=torch.float64)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for name in BETWEEN_LEVELS:
            wanted.get_submodule(name).weight *= 2
    ours = [model.get_submodule(name) for name in BETWEEN_LEVELS]
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: 2 * out if m in ours else None)
    try:
        torch.testing.assert_close(model(**args), wanted(**args), rtol=0, atol=1e-12)
    finally:
        hook.remove()
    linear = nn.Linear.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: linear(self, x) * (2 if self in ours else 1))
        found = model(**args)
    torch.testing.assert_close(found, wanted(**args), rtol=0, atol=1e-12)


def test_backward_hooks_and_biases_act(seed: int) -> None:
    model, args, seen = make(fast()).double(), arguments(fast(), dtype=torch.float64), []
    out = model(**args)
    for name in BETWEEN_LEVELS:
        hook = lambda module, given, wanted, name=name: seen.append(name)  # noqa: E731
        model.get_submodule(name).register_full_backward_hook(hook)
    model(**args | {"x": args["x"].requires_grad_()}).sum().backward()
    assert sorted(seen) == sorted(BETWEEN_LEVELS)
    biased = nn.Linear(16, 12).double()
    biased.weight = model.patch_out.proj.weight
    model.patch_out.proj = biased
    shift = biased.bias.view(2, 2, 3).permute(2, 0, 1).repeat(1, 4, 6)
    torch.testing.assert_close(model(**args), out + shift, rtol=0, atol=1e-12)


class Operators(TorchDispatchMode):
    """Counts calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def test_plain_layers_are_fused_and_equal_called_ones(seed: int) -> None:
    model, args = make(fast()).double(), arguments(fast(), dtype=torch.float64)
    called = copy.deepcopy(model)
    for name in BETWEEN_LEVELS:
        called.get_submodule(name).register_forward_hook(lambda module, args, out: None)
    fused = "hdit_kernels::token_merge_forward", "hdit_kernels::token_split_forward"
    outputs = []
    for net, count in ((model, 2), (called, 0)):
        with Operators() as operators:
            outputs.append(net(**args))
        assert [operators.counts[name] for name in fused] == [count, count]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(outputs[0])
    for out in outputs:
        out.backward(cotangent)
    for (name, p), q in zip(model.named_parameters(), called.parameters(), strict=True):
        assert golden_files.max_error(p.grad, q.grad) < 1e-12, name
    half = arguments(fast())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            one, other = model.float()(**half), called.float()(**half)
        assert one.dtype == other.dtype == dtype
        assert (one - other).float().norm() < 0.05 * one.float().norm()
    half = {key: t.bfloat16() if key in ("x", "mapping_cond") else t for key, t in half.items()}
    one, other = model.bfloat16()(**half), called.bfloat16()(**half)
    assert one.dtype == other.dtype == torch.bfloat16
    assert (one - other).float().norm() < 0.05 * one.float().norm()


def test_plain_feed_forward_blocks_are_fused_and_equal_called_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on any of the four layers, another layer in its place, dropout at work, or gradients where they would take
    longer: then they are called one after the other.
    """
    level = dataclasses.replace(fast().levels[0], dropout=0.1)
    block, cond = make_block(level), torch.randn(2, 8, dtype=torch.float64)
    x = torch.randn(2, 3, 5, level.width, dtype=torch.float64)

    def called(block: nn.Module) -> tuple[Tensor, int]:
        with Operators() as operators:
            return block(x, cond), operators.counts["hdit_kernels::feed_forward_forward"]

    assert called(block.eval())[1] == 0
    monkeypatch.setattr("hdit.model.is_one_kernel", lambda x, d_ff: d_ff == level.d_ff)
    assert called(block)[1] == 1
    monkeypatch.undo()
    with torch.no_grad():
        out, fused = called(block)
        assert fused == 1
        for layer in ("norm", "up_proj", "dropout", "down_proj"):
            hooked, wrapped = copy.deepcopy(block), copy.deepcopy(block)
            hooked.get_submodule(layer).register_forward_hook(lambda module, args, out: None)
            setattr(wrapped, layer, Wrapped(getattr(wrapped, layer)))
            for other in (hooked, wrapped):
                found, fused = called(other)
                assert fused == 0, layer
                torch.testing.assert_close(found, out, rtol=0, atol=1e-12)
        parametrized = copy.deepcopy(block)
        nn.utils.parametrize.register_parametrization(parametrized.up_proj, "weight", nn.Identity())
        assert called(parametrized)[1] == 0
        narrow = copy.deepcopy(block).float()
        with torch.autocast("cpu", torch.bfloat16):  # x stays float32 by the layers
            for dtype, fused in ((torch.float32, 0), (torch.bfloat16, 1)):
                with Operators() as operators:
                    assert narrow(x.to(dtype), cond.float()).dtype == dtype
                assert operators.counts["hdit_kernels::feed_forward_forward"] == fused
        assert called(block.train())[1] == 0
        block.dropout.p = 0.0
        assert called(block)[1] == 1


class Wrapped(nn.Module):
    """As an adapter wraps a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


def make_block(level: Level) -> FeedForwardBlock:
    block = FeedForwardBlock(level, 8).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def test_a_hooked_layer_is_called_in_a_compiled_model(seed: int) -> None:
    """And a number for sigma is taken there."""
    torch.compiler.reset()
    config = dataclasses.replace(fast(), levels=fast().levels[:1])
    model, args = make(config).eval(), arguments(config) | {"sigma": 2.0}
    plain = model(**args)
    model.patch_out.proj.register_forward_hook(lambda module, args, out: 2 * out)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**args), 2 * plain)


@pytest.mark.filterwarnings("ignore")  # deprecated, in use all the same
@pytest.mark.skipif("none" in str(torch.backends.quantized.engine), reason="torch was built without quantized layers")
def test_dynamically_quantized(seed: int) -> None:
    model, args = make(fast()).eval(), arguments(fast())
    wanted = model(**args)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in model.modules())
    error = (model(**args) - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.2


def test_param_groups_of_adapters_and_parametrizations() -> None:
    """What belongs to a layer learns as it does."""
    model = HDiT(tiny())
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {id(p): i for i, group in enumerate(model.param_groups()) for p in group["params"]}
    wanted = {name: groups[id(model.get_submodule(name).weight)] for name in layers}
    for i, name in enumerate(layers):
        layer = model.get_submodule(name)
        way = ("adapter", "parametrization", "weight norm", "pruned")[i % 4]
        replace(model, name, doubled(layer, way))
    groups = {id(p): i for i, group in enumerate(model.param_groups()) for p in group["params"]}
    for name, group in wanted.items():
        assert {groups[id(p)] for p in model.get_submodule(name).parameters()} == {group}, name
    assert sorted(groups) == sorted(map(id, model.parameters()))


# Forms of the arguments


def test_one_noise_level_for_the_batch(seed: int) -> None:
    model, args = make(fast()).eval(), arguments(fast())
    args["sigma"] = torch.full([2], 2.0)
    wanted = model(**args)
    for sigma in (2.0, 2, np.float32(2), torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float16)):
        assert torch.equal(model(**args | {"sigma": sigma}), wanted), sigma


def test_noise_levels_in_half_precision(seed: int) -> None:
    model, args = make(fast()).eval(), arguments(fast())
    sigma = torch.tensor([60000.0, 1e-7], dtype=torch.float16)
    wanted = model(**args | {"sigma": sigma.float()})
    assert torch.equal(model(**args | {"sigma": sigma}), wanted)
    args |= {"sigma": sigma, "x": args["x"].half(), "mapping_cond": args["mapping_cond"].half()}
    half = model.half()(**args)
    assert (half.float() - wanted).norm() < 0.02 * wanted.norm()


def test_an_empty_batch(seed: int) -> None:
    config = tiny(mapping_cond_dim=5)
    for dtype in (torch.float32, torch.bfloat16):
        model = make(config).to(dtype)
        args = {key: t[:0] for key, t in arguments(config).items()}
        args |= {
            "aug_cond": torch.zeros(0, 9),
            "mapping_cond": torch.zeros(0, 5, dtype=dtype),
            "x": args["x"].to(dtype),
        }
        out = model(**args)
        assert out.shape == (0, 3, 16, 24)
        assert out.dtype == dtype
        out.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    model.patch_out.proj.register_forward_hook(lambda module, args, out: out)
    model.splits[0].proj.register_forward_hook(lambda module, args, out: out)
    assert model(**args).shape == out.shape


def test_a_foreign_default_device_makes_no_difference(seed: int) -> None:
    model, args = make(tiny()), arguments(tiny())
    wanted = model(**args)
    wanted.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with torch.device("meta"):
        out = model(**args | {"sigma": args["sigma"]})
        out.sum().backward()
        model(**args | {"sigma": 1.0})
    assert torch.equal(out, wanted)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


# Bad input


SPARSE = torch.zeros(2, 3, 32, 48).to_sparse()
CLASSES = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: expected a torch.Tensor, got NoneType"),
        ({"x": SPARSE}, "x: expected a dense tensor, got a sparse_coo one"),
        ({"x": torch.tensor(1.0)}, r"x: expected shape \[B, 3, H, W\], got \[\]"),
        ({"x": torch.zeros(2, 3, 32)}, r"x: expected shape \[B, 3, H, W\], got \[2, 3, 32\]"),
        ({"x": torch.zeros(2, 1, 32, 48)}, r"x: expected shape \[B, 3, H, W\], got \[2, 1, 32, 48\]"),
        ({"x": torch.zeros(2, 3, 0, 48)}, r"x: expected every size but the batch's to be at least 1, got .*0, 48\]"),
        ({"x": torch.zeros(2, 3, 32, 48, dtype=torch.float64)}, "x: expected float32 like the model, got float64"),
        ({"x": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)}, "x: expected bfloat16, .* or float64, got uint8"),
        ({"x": torch.zeros(2, 3, 32, 48, device="meta")}, "sigma: expected a tensor on meta like x, got one on cpu"),
        ({"x": torch.zeros(2, 3, 36, 48)}, "^x: .*36x48 pixels must be a multiple of 8x8"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "^x: .*window_size 4 of level 1 must divide its grid of 2x2 tokens"),
        ({"sigma": None}, "sigma: expected a torch.Tensor, got NoneType"),
        ({"sigma": [1.0, 2.0]}, "sigma: expected a torch.Tensor, got list"),
        ({"sigma": True}, r"sigma: expected a number of at least 1e-18 and at most 1e.18, got True \(bool\)"),
        ({"sigma": 0.0}, "sigma: expected a number of at least 1e-18 and at most 1e.18, got 0.0"),
        ({"sigma": torch.ones(3)}, r"sigma: expected shape \[2\], got \[3\]"),
        ({"sigma": torch.ones(2, 1)}, r"sigma: expected shape \[2\], got \[2, 1\]"),
        ({"sigma": torch.ones(2, dtype=torch.int64)}, "sigma: expected bfloat16, .* or float64, got int64"),
        ({"sigma": torch.ones(2, device="meta")}, "sigma: expected a tensor on cpu like x, got one on meta"),
        ({"sigma": torch.tensor([1.0, 0.0])}, "sigma: expected finite noise levels above 0, 1e-18 to 1e18, got 0"),
        (
            {"sigma": torch.tensor([float("nan"), 1.0])},
            "sigma: expected finite noise levels above 0, 1e-18 to 1e18, got nan",
        ),
        ({"sigma": torch.tensor(float("inf"))}, "sigma: expected finite noise levels above 0, 1e-18 to 1e18, got inf"),
        ({"aug_cond": torch.zeros(2, 8)}, r"aug_cond: expected shape \[2, 9\], got \[2, 8\]"),
        ({"aug_cond": torch.zeros(2, 9).int()}, "aug_cond: expected bfloat16, .* or float64, got int32"),
        ({"class_cond": None}, "class_cond: expected a torch.Tensor, got NoneType"),
        ({"class_cond": 3}, "class_cond: expected a torch.Tensor, got int"),
        (
            {"class_cond": torch.tensor([0, 4])},
            r"class_cond: expected classes from 0 to 3 \(the last: no class\), got 4",
        ),
        ({"class_cond": torch.tensor([-1, 0])}, r"class_cond: expected classes from 0 to 3 .*, got -1"),
        ({"class_cond": torch.zeros(2)}, "class_cond: expected int64 or int32, got torch.float32"),
        ({"class_cond": CLASSES.to(torch.uint8)}, "class_cond: expected int64 or int32, got torch.uint8"),
        ({"class_cond": CLASSES.to("meta")}, "class_cond: expected a tensor on cpu like x, got one on meta"),
        ({"class_cond": torch.zeros(3, dtype=torch.int64)}, r"class_cond: expected shape \[2\], got \[3\]"),
        ({"mapping_cond": torch.zeros(2, 5)}, "mapping_cond: expected None, since this model takes none, got a tensor"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        HDiT(small())(**arguments(small()) | change)


def test_bad_input_for_other_models() -> None:
    without = HDiT(small(num_classes=0))
    with pytest.raises(ValueError, match="class_cond: expected None, since this model takes none, got a tensor"):
        without(**arguments(small()))
    with pytest.raises(ValueError, match="x: expected a tensor on cpu like the model, got one on meta"):
        without(torch.zeros(2, 3, 32, 48, device="meta"), 1.0)
    vector = HDiT(small(num_classes=0, mapping_cond_dim=5))
    x, sigma = torch.zeros(2, 3, 32, 48), torch.ones(2)
    with pytest.raises(TypeError, match="mapping_cond: expected a torch.Tensor, got NoneType"):
        vector(x, sigma)
    with pytest.raises(ValueError, match=r"mapping_cond: expected shape \[2, 5\], got \[2, 4\]"):
        vector(x, sigma, mapping_cond=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="mapping_cond: expected float32 like mapping_cond_in_proj, got float64"):
        vector(x, sigma, mapping_cond=torch.zeros(2, 5).double())
    neighborhood = HDiT(small(levels=(Level(1, 32, attention=NeighborhoodAttention(16, 5)),), num_classes=0))
    with pytest.raises(ValueError, match="kernel_size 5 of level 0 is larger than its grid of 16x4 tokens"):
        neighborhood(torch.zeros(2, 3, 32, 8), sigma)


def test_bad_arguments_of_the_rest() -> None:
    for config in (None, "flowers-256", small().to_dict()):
        with pytest.raises(TypeError, match="config: expected an HDiTConfig, got"):
            HDiT(config)
    with pytest.raises(ValueError, match="base_lr: expected a number of at least 0, got -1.0"):
        HDiT(tiny()).param_groups(-1.0)
    with pytest.raises(ValueError, match="mapping_lr_scale: expected a number of at least 0, got nan"):
        HDiT(tiny()).param_groups(mapping_lr_scale=float("nan"))
