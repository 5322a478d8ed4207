from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdit import (
    HDiT,
    HDiTConfig,
    Level,
    Mapping,
    NoAttention,
    ShiftedWindowAttention,
    config_from_kdiffusion,
    load_kdiffusion,
    presets,
)
from hdit import sample as sampling
from hdit.checkpoint import CheckpointError, Details, load_checkpoint, read_details, resume, save_checkpoint
from hdit.export import main
from hdit.kdiffusion import config_to_kdiffusion
from tests.tiny import CONFIG, random_model

NAMES = list("abcdefghij")
DETAILS = Details(CONFIG.to_dict(), 7, {"data": "/home/me/secret"}, NAMES, ["bad.png"], "fingerprint", {}, 0.5)


@pytest.fixture
def models(seed: int) -> tuple[HDiT, HDiT]:
    """A model and its average."""
    return random_model(), random_model()


@pytest.fixture
def checkpoint(tmp_path: Path, models: tuple[HDiT, HDiT]) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *models, torch.optim.AdamW(models[0].parameters()), DETAILS)
    return path


def export(checkpoint: Path, output: Path, *options: str) -> Path:
    main([str(checkpoint), str(output), *options])
    return output


def same(ours: HDiT, theirs: HDiT) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return ours.config == theirs.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_averaged_weights(checkpoint: Path, tmp_path: Path, models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = export(checkpoint, tmp_path / "new/model.safetensors")
    assert capsys.readouterr().out.strip() == str(output) and os.listdir(output.parent) == [output.name]
    assert same(load_checkpoint(output), models[1])
    assert read_details(output) == Details(CONFIG.to_dict(), 7, class_names=NAMES, only="ema")
    assert "secret" not in str(metadata(output))  # nor anything else of the run
    plain = HDiT(CONFIG)
    plain.load_state_dict(load_file(output))  # other programs find the weights by their names
    assert same(plain, models[1])
    size = sum(t.nbytes for t in models[1].state_dict().values())
    assert size < output.stat().st_size < size + 20_000


def test_trained_weights(checkpoint: Path, tmp_path: Path, models: Any) -> None:
    output = export(checkpoint, tmp_path / "model.safetensors", "--no-ema")
    assert same(load_checkpoint(output), models[0]) and same(load_checkpoint(output, ema=False), models[0])
    details = read_details(output)
    assert details is not None and details.only == "model"
    assert read_details(export(output, tmp_path / "again.safetensors")) == details  # it says still which they are
    assert same(load_checkpoint(tmp_path / "again.safetensors"), models[0])


def test_sampling(checkpoint: Path, tmp_path: Path) -> None:
    """The same pictures, of classes by their names."""
    output, pictures = export(checkpoint, tmp_path / "model.safetensors"), []
    for path in (checkpoint, output):
        picture = path.with_suffix(".png")
        options = ["--classes", "c", "j", "--count", "2", "--steps", "1", "--device", "cpu"]
        sampling.main([str(path), "--output", str(picture), *options])
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]


def test_one_set_is_all_there_is(checkpoint: Path, tmp_path: Path, models: Any, capsys: Any) -> None:
    output = export(checkpoint, tmp_path / "model.safetensors")
    slim = export(checkpoint, tmp_path / "slim.safetensors", "--format", "k-diffusion")
    for path in (output, slim):
        with pytest.raises(CheckpointError, match=f"{path} holds the averaged weights only: leave out --no-ema"):
            load_checkpoint(path, ema=False)
        assert "holds the averaged weights only" in refused(capsys, path, tmp_path / "b.safetensors", "--no-ema")
        with pytest.raises(SystemExit):
            sampling.main([str(path), "--no-ema", "--output", str(tmp_path / "x.png"), "--device", "cpu"])
        assert f"hdit.sample: error: {path} holds the averaged weights only" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="holds weights, but no training to resume"):
            resume(path, *models, torch.optim.AdamW(models[0].parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(checkpoint: Path, tmp_path: Path, models: Any, dtype: torch.dtype) -> None:
    """Parameters are rounded once, buffers stay; half the size, and float32 when it is loaded."""
    name = str(dtype).removeprefix("torch.")
    full, output = export(checkpoint, tmp_path / "full.safetensors"), tmp_path / "half.safetensors"
    for options in ((), ("--format", "k-diffusion")):
        export(checkpoint, output, "--dtype", name, *options, "--overwrite")
        assert output.stat().st_size < 0.7 * full.stat().st_size
        loaded = load_checkpoint(output)
        wanted = models[1].state_dict() | {n: p.to(dtype).float() for n, p in models[1].named_parameters()}
        for name_of, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name_of]), name_of
        assert {t.dtype for t in load_file(output).values()} == {dtype, torch.float32}
        stored = load_file(output)
        assert all(stored[n].dtype == torch.float32 for n, _ in models[1].named_buffers())


def test_damage_is_found(checkpoint: Path, tmp_path: Path) -> None:
    output = export(checkpoint, tmp_path / "model.safetensors")
    content = bytearray(output.read_bytes())
    content[-5] ^= 1
    output.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged in "):
        load_checkpoint(output)


# k-diffusion


def kdiffusion_pth(path: Path, models: tuple[HDiT, HDiT]) -> Path:
    """What k-diffusion's train.py saves."""
    state = {"model": models[0].state_dict(), "model_ema": models[1].state_dict(), "step": 3}
    torch.save({"config": config_to_kdiffusion(CONFIG)} | state, path)
    return path


def test_k_diffusion_layout(checkpoint: Path, tmp_path: Path, models: Any, capsys: Any) -> None:
    output = export(checkpoint, tmp_path / "slim.safetensors", "--format", "k-diffusion")
    printed = capsys.readouterr()
    assert "k-diffusion has no place for the names of the 10 classes: left out" in printed.err
    loaded = load_kdiffusion(output)
    assert same(loaded, models[1])
    x, sigma, classes = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 5.0]), torch.tensor([3, 10])
    assert torch.equal(loaded(x, sigma, class_cond=classes), models[1](x, sigma, class_cond=classes))
    # as its sample.py reads it: the configuration in the metadata, and nothing but weights by their names
    assert set(metadata(output)) == {"format", "config"}
    config = json.loads(metadata(output)["config"])
    assert config["dataset"] == {"num_classes": 10} and config["model"]["type"] == "image_transformer_v2"
    needed = {"input_size", "input_channels", "patch_size", "sigma_data", "sigma_min", "sigma_max"}
    assert needed <= config["model"].keys()
    assert load_file(output).keys() == models[1].state_dict().keys()


def test_from_k_diffusion(tmp_path: Path, models: Any) -> None:
    pth = kdiffusion_pth(tmp_path / "model_00000003.pth", models)
    for i, (options, model) in enumerate((((), models[1]), (("--no-ema",), models[0]))):
        ours = export(pth, tmp_path / f"{i}.safetensors", *options)
        assert same(load_checkpoint(ours), model)
        details = read_details(ours)
        assert details is not None and (details.step, details.class_names) == (0, [])
        slim = export(pth, tmp_path / f"slim{i}.safetensors", "--format", "k-diffusion", *options)
        assert same(load_kdiffusion(slim), model)
        assert same(load_checkpoint(export(slim, tmp_path / f"back{i}.safetensors")), model)


@pytest.mark.parametrize("config", [*presets.values(), CONFIG], ids=[*presets, "tiny"])
def test_configurations_go_there_and_back(config: HDiTConfig) -> None:
    assert config_from_kdiffusion(json.loads(json.dumps(config_to_kdiffusion(config)))) == config


def test_every_entry_goes_there_and_back() -> None:
    config = HDiTConfig(
        (Level(1, 32, 40, ShiftedWindowAttention(16, 4), 0.25), Level(2, 24, 50, NoAttention(), 0.5)),
        Mapping(3, 20, 30, 0.125), (16, 24), 2, None, (2, 3), 5, 7, 0.75, 0.5, 99.0,  # type: ignore[arg-type]
    )  # fmt: skip
    default = HDiTConfig((Level(1, 64),))
    equal = [name for name in default.to_dict() if getattr(config, name) == getattr(default, name)]
    assert not equal
    assert config_from_kdiffusion(config_to_kdiffusion(config)) == config


def test_what_k_diffusion_does_not_have(tmp_path: Path, seed: int, capsys: Any) -> None:
    config = replace(CONFIG, num_classes=1)
    checkpoint, model = tmp_path / "x.safetensors", random_model(config)
    save_checkpoint(
        checkpoint, random_model(config), model, torch.optim.AdamW(model.parameters()), Details(config.to_dict(), 1)
    )
    message = refused(capsys, checkpoint, tmp_path / "new/y.safetensors", "--format", "k-diffusion")
    assert not (tmp_path / "new").exists()
    assert "config: num_classes: expected one that k-diffusion has, got 1 (it has 0)" in message
    assert same(load_checkpoint(export(checkpoint, tmp_path / "y.safetensors")), model)


# Errors


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path | str, *options: str) -> str:
    """The one line with which a command is refused; nothing is written."""
    folder = Path(output).parent
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), str(output), *options])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("hdit.export: error: ") and message.count("\n") == 1, message
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors*") if path.is_file()} == before
    return message


def test_existing_files(checkpoint: Path, tmp_path: Path, models: Any, capsys: Any) -> None:
    output = tmp_path / "model.safetensors"
    output.write_bytes(b"precious")
    assert f"OUTPUT: {output} exists: pass another name, or --overwrite" in refused(capsys, checkpoint, output)
    export(checkpoint, output, "--overwrite")
    assert same(load_checkpoint(output), models[1])
    for name in ("link", "hard"):
        link = tmp_path / f"{name}.safetensors"
        link.symlink_to(checkpoint) if name == "link" else link.hardlink_to(checkpoint)
        for path in (link, checkpoint):
            message = refused(capsys, checkpoint, path, "--overwrite")
            assert "expected another file than the checkpoint" in message
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    assert "nowhere.safetensors exists" in refused(capsys, checkpoint, tmp_path / "nowhere.safetensors")


def test_outputs_that_can_not_be(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "file").touch()
    for name, words in (
        ("model.pth", "OUTPUT: expected a name that ends in .safetensors, got "),
        ("model", "OUTPUT: expected a name that ends in .safetensors"),
        ("folder.safetensors", "OUTPUT: expected a regular file, got a folder"),
        ("pipe.safetensors", "OUTPUT: expected a regular file, got a pipe"),
        ("file/x.safetensors", "can't be written to"),
        ("/proc/x.safetensors", "/proc can't be written to"),
    ):
        assert words in refused(capsys, checkpoint, tmp_path / name, "--overwrite")
    assert "ends in .safetensors, got '.'" in refused(capsys, checkpoint, "")


def test_inputs_that_are_none(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out/model.safetensors"
    assert "there is no checkpoint nothing.safetensors" in refused(capsys, Path("nothing.safetensors"), output)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "holds no configuration" in refused(capsys, tmp_path / "x.safetensors", output)
    (tmp_path / "x.pth").write_bytes(b"hello")
    assert "x.pth is damaged or not a checkpoint" in refused(capsys, tmp_path / "x.pth", output)
    assert not output.parent.exists()
    assert "invalid choice: 'int8'" in refused(capsys, Path("x"), output, "--dtype", "int8")


def test_numbers_beyond_float16(checkpoint: Path, tmp_path: Path, models: Any, capsys: Any) -> None:
    with torch.no_grad():
        models[1].out_norm.scale[2] = 1e5
    save_checkpoint(checkpoint, *models, torch.optim.AdamW(models[0].parameters()), DETAILS)
    message = refused(capsys, checkpoint, tmp_path / "x.safetensors", "--dtype", "float16")
    assert "--dtype float16: out_norm.scale holds numbers beyond it: pass another" in message
    export(checkpoint, tmp_path / "x.safetensors", "--dtype", "bfloat16")


@pytest.mark.parametrize("layout", ["hdit", "k-diffusion"])
def test_crash_while_writing(checkpoint: Path, tmp_path: Path, layout: str, monkeypatch: Any, capsys: Any) -> None:
    """The file that was there stays, and nothing is left beside it."""
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    before = sorted(os.listdir(tmp_path))

    def disk_full(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    message = refused(capsys, checkpoint, output, "--overwrite", "--format", layout)
    assert "no space left on device" in message and sorted(os.listdir(tmp_path)) == before


def test_missing_package(checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    message = refused(capsys, checkpoint, tmp_path / "x.safetensors")
    assert 'safetensors is needed here: pip install "hdit-kernels[train]"' in message
