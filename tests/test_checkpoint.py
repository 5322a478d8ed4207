from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdit import HDiT, HDiTConfig
from hdit.checkpoint import (
    CheckpointError,
    Details,
    NonFiniteWeights,
    load_checkpoint,
    read_details,
    resume,
    save_checkpoint,
)
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


# Damaged and made-up files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, torch.Tensor], dict[str, str]]:
    """A checkpoint of two steps: its bytes, tensors and metadata."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    save_checkpoint(path, *trained(), details())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return path.read_bytes(), load_file(path), metadata


def refused(path: Path, use: Callable[[], object]) -> str:
    """The one line with which a file is refused: it names the file and can be printed."""
    with pytest.raises(CheckpointError) as error:
        use()
    message = str(error.value)
    assert str(path) in message and message.isprintable(), message
    return message


def all_refuse(path: Path) -> None:
    refused(path, lambda: load_checkpoint(path))
    refused(path, lambda: read_details(path))
    refused(path, lambda: resume(path, *trained()))


def test_damaged_files(tmp_path: Path, saved: Any, seed: int) -> None:
    path, whole = tmp_path / "x.safetensors", saved[0]
    header = 8 + int.from_bytes(whole[:8], "little")
    for content in (b"", b"hello world, no header", (2**62).to_bytes(8, "little") + b"{}", bytes(1000)):
        path.write_bytes(content)
        all_refuse(path)
    for end in (1, 7, 8, 9, header // 2, header, header + 5, len(whole) - 1):
        path.write_bytes(whole[:end])
        all_refuse(path)
    path.write_bytes(whole + b"\0")
    all_refuse(path)


def test_flipped_bits(tmp_path: Path, saved: Any, seed: int) -> None:
    path, whole = tmp_path / "x.safetensors", saved[0]
    header = 8 + int.from_bytes(whole[:8], "little")
    state, before = trained(), trained()
    before[0].load_state_dict(state[0].state_dict())
    for place in torch.cat([torch.randint(header, [12]), torch.randint(header, len(whole), [6])]).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, []))
        path.write_bytes(damaged)
        try:
            found = read_details(path)
        except CheckpointError:
            found = None
        if found is not None and place < header and found != details():
            continue  # a name of a class or an option: nothing tells
        refused(path, lambda: resume(path, *state))
        assert (
            same(state[0], before[0])
            and not optimizer_tensors(state[0], state[2]).keys() - optimizer_tensors(before[0], before[2]).keys()
        )


PATCH = "model.patch_in.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({PATCH: None}, f"damaged: it has lost '{PATCH}'"),
        ({"model.more": torch.zeros(1)}, "damaged: it has got 'model.more'"),
        ({PATCH: torch.ones(3)}, r"patch_in.proj.weight: expected shape \[16, 4\], got \[3\]"),
        ({PATCH: torch.zeros(16, 4)}, f"damaged in '{PATCH}'"),
        ({PATCH: torch.zeros(16, 4, dtype=torch.int64)}, f"'{PATCH}': expected floating-point numbers, got 'I64'"),
    ],
)
def test_changed_tensors(tmp_path: Path, saved: Any, change: dict[str, Any], message: str, seed: int) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {name: tensor for name, tensor in (saved[1] | change).items() if tensor is not None}
    save_file(tensors, path, saved[2])
    assert re.search(message, refused(path, lambda: resume(path, *trained())))
    assert re.search(message, refused(path, lambda: load_checkpoint(path, ema=False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.exp_avg.mapping.in_norm.scale": None}, "'optimizer.exp_avg.mapping.in_norm.scale' is missing"),
        ({"optimizer.lr.x": torch.zeros(1)}, "'optimizer.lr.x' unknown"),
        ({"optimizer.exp_avg.mapping.in_norm.scale": torch.ones(2)}, r"expected shape \[16\], got \[2\]"),
        ({"optimizer.step.mapping.in_norm.scale": torch.tensor(5.0)}, "expected step 2, as in its metadata, got 5"),
        ({PATCH: torch.full([16, 4], float("nan"))}, f"{PATCH} holds NaN or infinity"),
        ({PATCH: torch.zeros(16, 4, dtype=torch.float16)}, f"{PATCH}: expected torch.float32, got torch.float16"),
    ],
)
def test_state_must_be_whole_without_checksums_too(
    tmp_path: Path, saved: Any, change: dict[str, Any], message: str, seed: int
) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {name: text for name, text in saved[2].items() if name != "crc32"}
    save_file(saved[1], path, metadata)  # as earlier versions wrote it
    resume(path, *trained())
    save_file({name: tensor for name, tensor in (saved[1] | change).items() if tensor is not None}, path, metadata)
    state = trained()
    before = copy.deepcopy(state[0])
    assert re.search(message, refused(path, lambda: resume(path, *state)))
    assert same(state[0], before)


def test_more_steps_than_float32_counts(tmp_path: Path, seed: int) -> None:
    path, state = tmp_path / "x.safetensors", trained()
    for values in state[2].state.values():
        values["step"].fill_(2**24).add_(1)  # and there it stays
    save_checkpoint(path, *state, details(step=2**24 + 5))
    assert resume(path, *trained()).step == 2**24 + 5
    save_checkpoint(path, *trained(), details(step=10**30))
    assert "expected step 1000" in refused(path, lambda: resume(path, *trained()))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("step", "many", "step: expected an integer of at least 0, got 'many'"),
        *(("step", value, "step: expected an integer of at least 0, got") for value in (-3, None, 1.5, True)),
        ("options", [1], "options: expected a mapping"),
        ("class_names", [1, 2], "class_names: expected a list of texts"),
        ("excluded", "bad.png", "excluded: expected a list of texts"),
        ("data", 3, "data: expected a text"),
        ("only", "both", "only: expected one of None, ema, model, got 'both'"),
        ("loss", "low", "loss: expected a finite number"),
        *(("config", value, "config: expected a mapping") for value in ("/dev/zero", 3, None, [1])),
        ("config", CONFIG.to_dict() | {"mapping": {"depth": 10**7}}, "at most 1024 layers in all"),
        ("config", CONFIG.to_dict() | {"mapping": {"width": 200_000}}, "another configuration"),
        ("config", CONFIG.to_dict() | {"colour": 1}, r"unknown entries \['colour'\]"),
        ("colour", "\x1b[31mred", "another version of hdit"),
    ],
)
def test_edited_metadata(tmp_path: Path, saved: Any, entry: str, value: object, message: str, seed: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(saved[1], path, saved[2] | {"hdit": json.dumps(json.loads(saved[2]["hdit"]) | {entry: value})})
    for use in (lambda: load_checkpoint(path), lambda: resume(path, *trained())):
        assert re.search(message, refused(path, use))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", '"/dev/zero"', "[" * 100_000, '{"step": NaN}', '{"step": 1, "step": 1}', '{"step": 1e999}'],
)
def test_metadata_that_is_no_mapping(tmp_path: Path, saved: Any, text: str, seed: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(saved[1], path, saved[2] | {"hdit": text})
    all_refuse(path)
    save_file(saved[1], path, {"config": text})
    refused(path, lambda: load_checkpoint(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_only_files_are_opened(tmp_path: Path, suffix: str, seed: int) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name, kind in (("folder", "a folder"), ("pipe", "a pipe"), ("zero", "a device")):
        path = tmp_path / f"{name}{suffix}"
        assert kind in refused(path, lambda path=path: load_checkpoint(path))  # type: ignore[misc]


# Saving


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, seed: int, value: float, where: str) -> None:
    path, (model, average, optimizer) = tmp_path / "x.safetensors", trained()
    save_checkpoint(path, model, average, optimizer, details())
    before = path.read_bytes()
    bad = {"model": model.mapping.out_norm.scale, "ema": average.mapping.out_norm.scale}
    target = bad[where] if where in bad else optimizer.state[model.mapping.out_norm.scale]["exp_avg_sq"]
    with torch.no_grad():
        target[3] = value
    with pytest.raises(NonFiniteWeights, match=f"at step 3: {where}.*mapping.out_norm.scale holds NaN or infinity"):
        save_checkpoint(path, model, average, optimizer, details(step=3))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_full_disk_is_an_os_error(tmp_path: Path, seed: int) -> None:
    resource = pytest.importorskip("resource")
    path, state = tmp_path / "x.safetensors", trained()
    save_checkpoint(path, *state, details())
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1000, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"{path} can't be written \(.*File too large.*\); .* is kept"):
                save_checkpoint(path, *state, details(step=3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_left_over_of_a_killed_run_is_overwritten(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.safetensors"
    os.mkfifo(tmp_path / "x.safetensors.tmp")  # which would be written to for ever
    save_checkpoint(path, *trained(), details())
    assert read_details(path) == details() and os.listdir(tmp_path) == [path.name]


class Compiled(torch.nn.Module):
    """Names its parameters as torch.compile(model) does."""

    def __init__(self, model: HDiT) -> None:
        super().__init__()
        self._orig_mod, self.config = model, model.config


def test_wrapped_models(tmp_path: Path, seed: int) -> None:
    """Names are the same whether the model, or a part of it, is compiled or not."""
    path, (model, average, optimizer) = tmp_path / "x.safetensors", trained()
    save_checkpoint(path, Compiled(model), average, optimizer, details())  # type: ignore[arg-type]
    with safe_open(path, "pt") as file:
        assert not any("_orig_mod" in name for name in file.keys())
    other = trained()
    resume(path, Compiled(other[0]), *other[1:])  # type: ignore[arg-type]
    assert same(other[0], model) and optimizer_tensors(other[0], other[2]).keys()

    tensors = {name.replace(".mapping.", "._orig_mod.mapping.module."): t for name, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        save_file(tensors, path, {"hdit": file.metadata()["hdit"]})
    assert same(load_checkpoint(path, ema=False), model)


def test_another_optimizer_is_refused(tmp_path: Path, saved: Any, seed: int) -> None:
    model, other = random_model(), torch.nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.AdamW([other])):
        with pytest.raises(TypeError, match="optimizer: expected AdamW over the model's parameters, got another"):
            resume(tmp_path / "x.safetensors", model, copy.deepcopy(model), optimizer)
    with pytest.raises(TypeError, match="ema: expected True or False, got 'no'"):
        load_checkpoint(tmp_path / "x.safetensors", ema="no")  # type: ignore[arg-type]


def test_loaded_model_can_be_trained(tmp_path: Path, seed: int) -> None:
    save_checkpoint(tmp_path / "x.safetensors", *trained(), details())
    model = load_checkpoint(tmp_path / "x.safetensors")
    assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in model.parameters())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    (tmp_path / "x.safetensors").write_bytes(b"")  # the weights are no view of the file
    model(torch.zeros(1, 1, 8, 8), torch.ones(1), class_cond=torch.zeros(1, dtype=torch.long)).sum().backward()
