from __future__ import annotations

import io
import json
import os
import re
import zipfile
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
from hdit.kdiffusion import USED_ENTRIES
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


# Files of strangers


def refused(path: Path, **options: Any) -> str:
    """The one line with which a file is refused: it names the file and can be printed."""
    with pytest.raises(ValueError) as error:
        load_kdiffusion(path, **options)
    message = str(error.value)
    assert path.name in message and message.isprintable(), message
    return message


def test_damaged_training_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(training_checkpoint(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", bytes(1000), whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "damaged or not a checkpoint" in refused(path)
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=False)  # k-diffusion never wrote such
    assert "damaged or not a checkpoint" in refused(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():  # 100 MB in 100 kB
            new.writestr(record.filename, bytes(10**8) if record.filename.endswith("data.pkl") else old.read(record))
    assert "damaged or not a checkpoint" in refused(path)


def huge(shape: list[int]) -> torch.Tensor:
    return torch.zeros(1).expand(shape)  # one number in the file


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "expected a mapping of tensors in 'model_ema', got NoneType"),
        (5, "expected a mapping of tensors in 'model_ema', got int"),
        ({"a": "b"}, "'a' in 'model_ema' can't be a weight: it: expected a torch.Tensor, got str"),
        ({1: torch.ones(1), "a": torch.ones(2)}, "expected names of tensors in 'model_ema', got 1"),
        ({"a": torch.eye(3).to_sparse()}, "'a' .* expected a dense tensor, got a sparse_coo one"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' .* got complex64"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "'a' .* got int64"),
        ({"a": torch.ones(2, device="meta")}, "'a' .* larger than what the file holds"),
        ({"a": huge([10**6, 10**6])}, "'a' .* larger than what the file holds"),
        ({"a": torch.ones(2)}, "another configuration: expected 8 layers, got 1 tensors"),
        (state() | {"\x1b[2J": torch.ones(2)}, r"another configuration: '\\x1b\[2J' unknown"),
        (
            {f"inner_model.{name}": t for name, t in state().items()},
            "'aug_emb.weight' is missing and 'inner_model.aug_",
        ),
        ({"a": torch.ones(2), "module.a": torch.ones(2)}, "holds 'a' twice"),
    ],
)
def test_states_that_are_none(tmp_path: Path, state: Any, message: str) -> None:
    path = tmp_path / "model.pth"
    torch.save(training_checkpoint(model_ema=state), path)
    assert re.search(message, refused(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(tmp_path: Path, value: float) -> None:
    weights = {name: tensor.clone() for name, tensor in state().items()}
    weights["out_norm.scale"][3] = value
    torch.save(training_checkpoint(model_ema=weights), tmp_path / "model.pth")
    assert "out_norm.scale holds NaN or infinity" in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("content", ["/dev/zero", 5, [1], None])
def test_a_config_in_a_file_is_never_a_path(tmp_path: Path, content: Any) -> None:
    torch.save(training_checkpoint(config=content), tmp_path / "a.pth")
    save_file(state(), tmp_path / "a.safetensors", {"config": json.dumps(content)})
    for name in ("a.pth", "a.safetensors"):
        assert re.search("mapping|no configuration", refused(tmp_path / name))
    with pytest.raises(ValueError, match="a.safetensors.*(mapping|no configuration)"):
        config_from_kdiffusion(tmp_path / "a.safetensors")


def test_sizes_are_compared_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, built = tmp_path / "a.safetensors", []
    monkeypatch.setattr("hdit._weights.HDiT", lambda config: built.append(config))
    levels = {"depths": [1], "widths": [64], "self_attns": None, "dropout_rate": 0}
    for change in (
        {"depths": [10**7]}, {"depths": [1000]}, {"widths": [80_000_000]}, {"widths": [2**20]}, {"mapping_depth": 900},
        {"input_size": [10**30, 4]}, {key: [values] * 10**6 for key, values in {"depths": 1, "widths": 64}.items()},
    ):  # fmt: skip
        save_file({"x": torch.zeros(1)}, path, {"config": json.dumps(changed(FLOWERS, **(levels | change)))})
        assert path.stat().st_size < 20_000_000
        refused(path)
    assert not built


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("inside", ["", "mapping."])
def test_names_of_wrapped_models(tmp_path: Path, prefix: str, inside: str) -> None:
    """As DistributedDataParallel and torch.compile name them, of the model or a part of it."""
    weights = {re.sub(f"^{inside}", inside + prefix, name): tensor for name, tensor in state().items()}
    assert any(prefix in name for name in weights)
    torch.save(training_checkpoint(model_ema=weights), tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors", {"config": json.dumps(kdiffusion_config())})
    assert is_model_a(load_kdiffusion(tmp_path / "a.pth")) and is_model_a(load_kdiffusion(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("path", [None, 3, b"x"])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path: expected a path"):
        load_kdiffusion(path)
    with pytest.raises(TypeError, match="config: expected"):
        config_from_kdiffusion(path)


@pytest.mark.parametrize("config", [3, [], ()])
def test_config_argument(tmp_path: Path, config: Any) -> None:
    torch.save(training_checkpoint(), tmp_path / "a.pth")
    with pytest.raises(TypeError, match="config: expected a mapping or the path of a file, got"):
        load_kdiffusion(tmp_path / "a.pth", config=config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "expected a mapping, got list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model": NaN}', "NaN is no number"),
        ('{"model": {"sigma_max": 1e999}}', "1e999 is too large a number"),
        ('{"model": {}, "model": {}}', "'model' is there twice"),
        ('{"model": ' + "9" * 5000 + "}", "not JSON"),
        ("\xff", "not JSON"),
        (" " * 5 * 2**20, "at most 4,194,304 bytes"),
    ],
)
def test_json_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        config_from_kdiffusion(path)


def test_config_files_are_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe.json", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ValueError, match=f"config: expected a regular file, got {kind}.*{path}"):
            config_from_kdiffusion(path)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        config_from_kdiffusion(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("widths", 3, "model.widths: expected a list, got 3"),
        ("widths", [64, "a", 64], r"model.widths\[1\]: expected an integer of at least 1, got 'a'"),
        ("widths", [128, 100, 512], r"model.widths\[1\]: expected a multiple of head_dim 64, got 100"),
        ("depths", [2, -1, 4], r"model.depths\[1\]: expected an integer of at least 0, got -1"),
        ("d_ffs", [1, 2, 0], r"model.d_ffs\[2\]: expected an integer of at least 1, got 0"),
        ("dropout_rate", [0, 0, 2], r"model.dropout_rate\[2\]: expected a number .*, got 2"),
        ("dropout_rate", {}, r"model.dropout_rate\[0\]: expected a number .*, got {}"),
        ("self_attns", ["neighborhood"] * 3, r"model.self_attns\[0\]: expected a mapping with a type, got 'neigh"),
        ("self_attns", [{"type": "global", "kernel_size": 7}] * 3, r"self_attns\[0\]: .* 'global' .*'kernel_size'"),
        ("self_attns", [{"type": "global", "d_head": 12}] * 3, r"self_attns\[0\].d_head: expected a multiple of 8"),
        ("mapping_width", 33, "model.mapping_width: expected an even number, got 33"),
        ("mapping_dropout_rate", 1, "model.mapping_dropout_rate: expected a number"),
        ("input_channels", None, "model.input_channels: expected an integer"),
        ("input_size", 256, r"model.input_size: expected \(height, width\), got 256"),
        ("sigma_data", "a", "model.sigma_data: expected a number"),
        ("mapping_widht", 512, "model: expected entries of an image_transformer_v2 model, got 'mapping_widht'"),
        ("has_variance", True, "got 'has_variance'"),
    ],
)
def test_each_error_names_its_entry(entry: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"k-diffusion config: .*{message}"):
        config_from_kdiffusion(changed(FLOWERS, **{entry: value}))


def test_data_set_part() -> None:
    for dataset in (3, None, {"num_classes": "a"}, {"num_classes": -1}):
        with pytest.raises((TypeError, ValueError), match="dataset.*: expected"):
            config_from_kdiffusion(FLOWERS | {"dataset": dataset})


def test_entries_that_k_diffusion_adds_to_checkpoints_are_known() -> None:
    off = {"augment_wrapper": False, "has_variance": False, "skip_stages": 0, "d_ffs": None, "mapping_cond_dim": 0}
    assert config_from_kdiffusion(changed(FLOWERS, loss_scales=1, **off)) == hdit.presets["flowers-256"]


def test_used_entries_are_all_that_is_used() -> None:
    """A configuration without the others is the same, one that lacks a used one isn't or can't be read."""
    used = {name for name in USED_ENTRIES if name.startswith("model.")}
    full = changed(
        FLOWERS, d_ffs=[100, 200, 300], mapping_depth=3, mapping_width=128, mapping_d_ff=512, mapping_cond_dim=7,
        mapping_dropout_rate=0.1, sigma_min=0.02, dropout_rate=[0.1] * 3, self_attns=[{"type": "global"}] * 3,
    )  # fmt: skip
    full["dataset"] = {"num_classes": 3}
    wanted = config_from_kdiffusion(full)
    assert config_from_kdiffusion({
        "model": {key: value for key, value in full["model"].items() if f"model.{key}" in used},
        "dataset": full["dataset"],
    }) == wanted  # fmt: skip
    for name in used:
        try:
            found = config_from_kdiffusion(changed(full, **{name.removeprefix("model."): ...}))
        except ValueError:
            continue
        if name != "model.sigma_max":  # 160, as by default
            assert found != wanted, name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosine", "expected a mapping with a type, got 'cosine'"),
        ({"type": ["x"]}, r"unknown density of noise levels \['x'\]"),
        ({"type": "lognormal", "mean": 0, "std": -1}, "std: expected a number above 0, got -1"),
        ({"type": "lognormal", "mean": "a", "std": 1}, "mean: expected a finite number, got 'a'"),
        ({"type": "lognormal", "mean": 0, "std": 1, "scale": 2}, "expected entries of 'lognormal', got 'scale'"),
        ({"type": "loguniform", "min_value": 0, "max_value": 1}, "min_value: expected a number"),
        ({"type": "loguniform", "min_value": 2, "max_value": 1}, "expected min_value below max_value, got 2 and 1"),
        ({"type": "cosine-interpolated", "noise_d_low": 0}, "noise_d_low: expected a number above 0, got 0"),
    ],
)
def test_densities_are_checked(spec: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"k-diffusion config: model.sigma_sample_density.*{message}"):
        density_from_kdiffusion(changed(FLOWERS, sigma_sample_density=spec))
