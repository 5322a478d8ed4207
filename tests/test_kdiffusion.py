from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hdit
from hdit import (
    GlobalAttention,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
    config_from_kdiffusion,
    density_from_kdiffusion,
    load_kdiffusion,
)
from tests import golden_files

# In the words of k-diffusion's configs/config_oxford_flowers.json, config_oxford_flowers_shifted_window.json and
# config_mnist_transformer.json
FLOWERS = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [256, 256],
        "patch_size": [4, 4],
        "depths": [2, 2, 4],
        "widths": [128, 256, 512],
        "self_attns": [
            {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
            {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
            {"type": "global", "d_head": 64},
        ],
        "loss_config": "karras",
        "loss_weighting": "soft-min-snr",
        "dropout_rate": [0.0, 0.0, 0.1],
        "mapping_dropout_rate": 0.0,
        "augment_prob": 0.0,
        "sigma_data": 0.5,
        "sigma_min": 1e-2,
        "sigma_max": 160,
        "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "huggingface", "location": "nelorth/oxford-flowers", "image_key": "image"},
    "optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-3},
}
MNIST = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 1,
        "input_size": [28, 28],
        "patch_size": [4, 4],
        "depths": [8],
        "widths": [256],
        "dropout_rate": 0.05,
        "augment_prob": 0.12,
        "sigma_data": 0.6162,
        "sigma_min": 1e-2,
        "sigma_max": 80,
    },
    "dataset": {"type": "mnist", "location": "data", "num_classes": 10, "cond_dropout_rate": 0.1},
}


def changed(config: dict[str, Any], **model: Any) -> dict[str, Any]:
    return config | {"model": {k: v for k, v in (config["model"] | model).items() if v is not ...}}


def test_flowers_is_the_preset() -> None:
    assert config_from_kdiffusion(FLOWERS) == hdit.presets["flowers-256"]


def test_classes_dropout_and_one_global_level() -> None:
    config = config_from_kdiffusion(MNIST)
    assert config == HDiTConfig(
        levels=(Level(8, 256, d_ff=768, attention=GlobalAttention(64), dropout=0.05),),
        mapping=Mapping(2, 256, 768),
        image_size=(28, 28),
        in_channels=1,
        num_classes=11,
        sigma_data=0.6162,
        sigma_max=80.0,
    )
    assert config.null_class == 10


def test_defaults() -> None:
    config = config_from_kdiffusion(changed(FLOWERS, self_attns=..., dropout_rate=..., sigma_data=...))
    wanted = [NeighborhoodAttention(64, 7), NeighborhoodAttention(64, 7), GlobalAttention(64)]
    assert [level.attention for level in config.levels] == wanted
    assert [level.d_ff for level in config.levels] == [384, 768, 1536]
    assert [level.dropout for level in config.levels] == [0.0] * 3
    assert config.sigma_data == 1.0


def test_everything_said() -> None:
    kinds = [
        {"type": "shifted-window", "d_head": 32, "window_size": 8},
        {"type": "none"},
        {"type": "neighborhood", "d_head": 128},
    ]
    mapping = {"mapping_depth": 3, "mapping_width": 128, "mapping_d_ff": 512, "mapping_dropout_rate": 0.2}
    levels = {"self_attns": kinds, "d_ffs": [100, 200, 300], "dropout_rate": 0}
    config = config_from_kdiffusion(changed(FLOWERS, **levels, **mapping, mapping_cond_dim=7))
    assert config.mapping == Mapping(3, 128, 512, 0.2) and config.mapping_cond_dim == 7
    assert [level.d_ff for level in config.levels] == [100, 200, 300]
    wanted = [ShiftedWindowAttention(32, 8), NoAttention(), NeighborhoodAttention(128, 7)]
    assert [level.attention for level in config.levels] == wanted
    assert [level.dropout for level in config.levels] == [0, 0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed(FLOWERS, type="image_v1"),
            "k-diffusion config: model.type: expected 'image_trans.*, got 'image_v1'",
        ),
        (changed(FLOWERS, type=...), "model.type: expected 'image_transformer_v2', got None"),
        ({"levels": []}, "model: expected a part of that name, got None"),
        (changed(FLOWERS, widths=...), "model.widths: expected an entry of that name"),
        (changed(FLOWERS, depths=[2, 2]), "model.depths: expected 3 entries, one for each of model.widths, got 2"),
        (changed(FLOWERS, dropout_rate=[0.1]), "model.dropout_rate: expected 3 entries, .*, got 1"),
        (
            changed(MNIST, self_attns=[{"type": "linear"}]),
            r"model.self_attns\[0\].type: expected .*, got 'linear'",
        ),
        (changed(MNIST, self_attns=[{"type": "shifted-window"}]), r"model.self_attns\[0\].window_size: .* missing"),
        (changed(FLOWERS, input_size=[100, 100]), "100x100 pixels must be a multiple of 16x16"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_kdiffusion(config)


def test_density_needs_to_be_known() -> None:
    with pytest.raises(ValueError, match="model.sigma_sample_density: expected a mapping with a type, got None"):
        density_from_kdiffusion(MNIST)
    with pytest.raises(ValueError, match="unknown density of noise levels 'normal'"):
        density_from_kdiffusion(changed(MNIST, sigma_sample_density={"type": "normal"}))
    with pytest.raises(ValueError, match="model.sigma_sample_density.mean: .* missing"):
        density_from_kdiffusion(changed(MNIST, sigma_sample_density={"type": "lognormal"}))


# Checkpoints: golden model A as k-diffusion would have written it


def kdiffusion_config() -> dict[str, Any]:
    config = golden_files.entry("model_A.safetensors")["config"]
    model = {
        "type": "image_transformer_v2",
        "input_channels": config["channels"],
        "input_size": config["image"],
        "patch_size": config["patch_size"],
        "depths": [level["depth"] for level in config["levels"]],
        "widths": [level["width"] for level in config["levels"]],
        "d_ffs": [level["d_ff"] for level in config["levels"]],
        "self_attns": [level["attn"] for level in config["levels"]],
        "sigma_data": 0.5,
        **{f"mapping_{key}": value for key, value in config["mapping"].items()},
    }
    return {"model": model, "dataset": {"num_classes": config["num_classes"] - 1}}


def state() -> dict[str, torch.Tensor]:
    return golden_files.model("A", torch.float32).state_dict()


def is_model_a(model: hdit.HDiT) -> bool:
    """It gives the golden output."""
    golden = golden_files.tensors("model_A.safetensors")
    out = model(golden["x"], golden["sigma"], golden["aug_cond"], golden["class_cond"])
    return not model.training and golden_files.max_error(out, golden["output"]) < 1e-5


def test_config_in_files(tmp_path: Path) -> None:
    config = kdiffusion_config()
    wanted = golden_files.model("A", torch.float32).config
    (tmp_path / "a.json").write_text(json.dumps(config))
    save_file(state(), tmp_path / "a.safetensors", metadata={"config": json.dumps(config)})
    for given in (config, tmp_path / "a.json", str(tmp_path / "a.json"), tmp_path / "a.safetensors"):
        assert config_from_kdiffusion(given) == wanted


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state(), path, metadata={"config": json.dumps(kdiffusion_config())})
    assert is_model_a(load_kdiffusion(path))
    half = {name: t.half() for name, t in state().items()}  # as convert_for_inference.py does by default
    save_file(half, path, metadata={"config": json.dumps(kdiffusion_config())})
    for name, t in load_kdiffusion(path).state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, half[name].float()), name

    save_file(state(), path)
    with pytest.raises(ValueError, match="holds no configuration: pass config="):
        load_kdiffusion(path)
    with pytest.raises(ValueError, match="holds no configuration in its metadata"):
        config_from_kdiffusion(path)
    assert is_model_a(load_kdiffusion(str(path), config=kdiffusion_config()))


def training_checkpoint(**change: Any) -> dict[str, Any]:
    """What k-diffusion's train.py saves."""
    return {
        "config": kdiffusion_config(),
        "model": {name: torch.zeros_like(t) for name, t in state().items()},
        "model_ema": state(),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]}]},
        "ema_sched": {"power": 0.75, "last_epoch": 3},
        "epoch": 0,
        "step": 3,
        "gns_stats": None,
        "ema_stats": {"loss": 0.5},
        "demo_gen": torch.Generator().get_state(),
        "elapsed": 1.5,
    } | change


def test_training_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model_00000003.pth"
    torch.save(training_checkpoint(), path)
    assert is_model_a(load_kdiffusion(path))
    raw = load_kdiffusion(path, ema=False)
    assert not any(p.any() for p in raw.parameters())

    checkpoint = training_checkpoint()
    del checkpoint["config"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="holds no configuration: pass config="):
        load_kdiffusion(path)
    assert is_model_a(load_kdiffusion(path, config=kdiffusion_config()))


def test_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(training_checkpoint(), path)
    other = kdiffusion_config()
    other["model"]["d_ffs"] = [64, 96, 128]
    with pytest.raises(ValueError, match=r"mid_level.0.ff.down_proj.weight: .* \[64, 128\], got \[64, 96\]"):
        load_kdiffusion(path, config=other)
    other = kdiffusion_config()
    other["dataset"]["num_classes"] = 0
    with pytest.raises(ValueError, match=r"another configuration: 'class_emb.weight' unknown"):
        load_kdiffusion(path, config=other)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/nonexistent/touched"),))


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(training_checkpoint(epoch=Payload()), path)
    with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
        load_kdiffusion(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a k-diffusion training checkpoint: it has no 'model_ema'"):
        load_kdiffusion(path)


def test_missing_safetensors_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hdit-kernels\[train\]"'):
        load_kdiffusion(tmp_path / "a.safetensors")
