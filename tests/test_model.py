from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
from hdit.model import AxialRoPE, FourierFeatures, axial_positions, halve
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
    return {
        "x": torch.randn(batch, config.in_channels, *config.image_size, dtype=dtype),
        "sigma": torch.rand(batch) + 0.1,
        "class_cond": torch.arange(batch) % config.num_classes,
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
    args = arguments(config) | {"aug_cond": torch.zeros(2, 9), "mapping_cond": torch.randn(2, 5)}
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


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 32)}, r"x must be \[batch, 3, height, width\], got \[2, 3, 32\]"),
        ({"x": torch.zeros(2, 1, 32, 48)}, r"x must be \[batch, 3, height, width\], got \[2, 1, 32, 48\]"),
        ({"x": torch.zeros(2, 3, 32, 48, dtype=torch.float64)}, "x must have the model's dtype torch.float32 .*64"),
        ({"x": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)}, "x must have the model's dtype torch.float32 .*uint8"),
        ({"x": torch.zeros(2, 3, 36, 48)}, "image of 36x48 pixels must be a multiple of 8x8"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "window_size 4 of level 1 must divide its grid of 2x2 tokens"),
        ({"sigma": torch.ones(3)}, r"sigma must be \[2\] and floating point, got \[3\] torch.float32"),
        ({"sigma": torch.ones(2, 1)}, r"sigma must be \[2\] and floating point, got \[2, 1\]"),
        ({"sigma": torch.ones(2, dtype=torch.int64)}, r"sigma must be \[2\] and floating point, got \[2\] torch.int64"),
        ({"aug_cond": torch.zeros(2, 8)}, r"aug_cond must be \[2, 9\], got \[2, 8\]"),
        ({"class_cond": None}, "class_cond must be given exactly if the model has classes, it has 4"),
        ({"class_cond": torch.tensor([0, 4])}, r"class_cond must be in 0…3 \(3: no class\), got \[4\]"),
        ({"class_cond": torch.tensor([-1, 0])}, r"class_cond must be in 0…3 \(3: no class\), got \[-1\]"),
        ({"class_cond": torch.zeros(2)}, r"class_cond must be \[2\], int64 or int32, got \[2\] torch.float32"),
        ({"class_cond": torch.zeros(3, dtype=torch.int64)}, r"class_cond must be \[2\], int64 or int32, got \[3\]"),
        ({"mapping_cond": torch.zeros(2, 5)}, "mapping_cond must be given exactly .* mapping_cond_dim, which is 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDiT(small())(**arguments(small()) | change)


def test_bad_input_for_other_models() -> None:
    without = HDiT(small(num_classes=0))
    with pytest.raises(ValueError, match="class_cond must be given exactly if the model has classes, it has 0"):
        without(**arguments(small()))
    vector = HDiT(small(num_classes=0, mapping_cond_dim=5))
    x, sigma = torch.zeros(2, 3, 32, 48), torch.ones(2)
    with pytest.raises(ValueError, match="mapping_cond must be given exactly .* which is 5"):
        vector(x, sigma)
    with pytest.raises(ValueError, match=r"mapping_cond must be \[2, 5\], got \[2, 4\]"):
        vector(x, sigma, mapping_cond=torch.zeros(2, 4))
    neighborhood = HDiT(small(levels=(Level(1, 32, attention=NeighborhoodAttention(16, 5)),), num_classes=0))
    with pytest.raises(ValueError, match="kernel_size 5 of level 0 is larger than its grid of 16x4 tokens"):
        neighborhood(torch.zeros(2, 3, 32, 8), sigma)
