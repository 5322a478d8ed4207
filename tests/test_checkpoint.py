from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hdit import HDiT, HDiTConfig
from hdit.checkpoint import CheckpointError, Details, load_checkpoint, read_details, resume, save_checkpoint
from tests.tiny import CONFIG, random_model


def trained(config: HDiTConfig = CONFIG) -> tuple[HDiT, HDiT, torch.optim.Optimizer]:
    """A model after two steps, another one as its average, and its optimizer."""
    model, average = random_model(config), random_model(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3))
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, average, optimizer


def details(config: HDiTConfig = CONFIG, step: int = 2) -> Details:
    return Details(config.to_dict(), step, {"data": "digits", "lr": 0.1}, ["a", "b"], ["bad.png"], "fingerprint")


def same(ours: HDiT, theirs: HDiT) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def optimizer_tensors(model: HDiT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {f"{name} {quantity}": tensor for name, values in state.items() for quantity, tensor in values.items()}


def test_round_trip(tmp_path: Path, seed: int) -> None:
    path, (model, average, optimizer) = tmp_path / "x.safetensors", trained()
    save_checkpoint(path, model, average, optimizer, details())
    assert read_details(path) == details()
    assert same(load_checkpoint(path), average) and same(load_checkpoint(path, ema=False), model)
    assert not load_checkpoint(path).training and load_checkpoint(path).config == CONFIG

    other_model, other_average, other_optimizer = trained()
    assert not same(other_model, model)
    assert resume(path, other_model, other_average, other_optimizer) == details()
    assert same(other_model, model) and same(other_average, average)
    expected, found = optimizer_tensors(model, optimizer), optimizer_tensors(other_model, other_optimizer)
    assert expected.keys() == found.keys() and len(expected) == 3 * len(list(model.parameters()))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_config_is_in_the_metadata(tmp_path: Path, seed: int) -> None:
    save_checkpoint(tmp_path / "x.safetensors", *trained(), details())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert HDiTConfig.from_dict(json.loads(metadata["hdit"])["config"]) == CONFIG


def test_others_may_read_it(tmp_path: Path, seed: int) -> None:
    (tmp_path / "ordinary").touch()
    save_checkpoint(tmp_path / "x.safetensors", *trained(), details())
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_crash_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (model, average, optimizer) = tmp_path / "x.safetensors", trained()
    save_checkpoint(path, model, average, optimizer, details(step=2))
    before = path.read_bytes()

    def disk_full(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(before[: len(before) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", disk_full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(path, model, average, optimizer, details(step=3))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]

    save_checkpoint(path, model, average, optimizer, details(step=3))
    assert path.read_bytes() != before and os.listdir(tmp_path) == [path.name]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    save_checkpoint(tmp_path / "x.safetensors", *trained(), details())
    assert events == ["sync x.safetensors.tmp", "rename", f"sync {tmp_path.name}"]


def test_checkpoint_of_another_config_is_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, *trained(), details())
    levels = (CONFIG.levels[0], replace(CONFIG.levels[1], dropout=0.2))  # the same tensors, another model
    model, average, optimizer = trained(replace(CONFIG, levels=levels))
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=r"another configuration \(levels\[1\]\.dropout 0.1, but 0.2 here\)"):
        resume(path, model, average, optimizer)
    assert same(model, before)
    wider = replace(CONFIG, num_classes=5)
    with pytest.raises(CheckpointError, match="num_classes 11, but 5 here"):
        resume(path, *trained(wider))
    deeper = replace(CONFIG, levels=(CONFIG.levels[0], *CONFIG.levels[1:] * 2))
    with pytest.raises(CheckpointError, match="levels "):
        resume(path, *trained(deeper))


def test_other_files_are_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nothing.safetensors")

    save_checkpoint(tmp_path / "x.safetensors", *trained(), details())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "x.safetensors").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(damaged)

    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="holds no configuration"):
        load_checkpoint(weights)
    with pytest.raises(CheckpointError, match="no training to resume"):
        resume(weights, *trained())

    future = tmp_path / "future.safetensors"
    save_file({"x": torch.zeros(1)}, future, {"hdit": json.dumps({"config": {}, "step": 1, "colour": "red"})})
    with pytest.raises(CheckpointError, match="another version of hdit"):
        load_checkpoint(future)


def test_kdiffusion_checkpoints_load_too(tmp_path: Path, seed: int) -> None:
    kdiffusion = {
        "type": "image_transformer_v2", "input_channels": 1, "input_size": [8, 8], "patch_size": [2, 2],
        "depths": [1, 1], "widths": [16, 16], "mapping_width": 16, "sigma_min": 0.01, "sigma_max": 80,
        "self_attns": [{"type": "neighborhood", "d_head": 8, "kernel_size": 3}, {"type": "global", "d_head": 8}],
    }  # fmt: skip
    from hdit import config_from_kdiffusion

    config = {"model": kdiffusion, "dataset": {"num_classes": 3}}
    model = random_model(config_from_kdiffusion(config))
    save_file(model.state_dict(), tmp_path / "k.safetensors", {"config": json.dumps(config)})
    assert same(load_checkpoint(tmp_path / "k.safetensors"), model)
    assert read_details(tmp_path / "k.safetensors") is None
