from __future__ import annotations

import csv
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdit import HDiT, HDiTConfig
from hdit import train as training
from hdit.checkpoint import CheckpointError, read_details
from hdit.data import DataError, Images, open_images
from hdit.train import CHECKPOINT, NonFiniteLoss, Options, Stopped, fit_classes, main, read_config, train
from tests.tiny import CONFIG, write_images

CPU = torch.device("cpu")
OPTIONS = Options("digits", steps=6, batch_size=4, lr=1e-2, save_every=100, sample_every=0)
THREE = replace(CONFIG, in_channels=3, out_channels=3, num_classes=3)  # for the images of tests/tiny.py


@pytest.fixture(scope="module")
def digits() -> Images:
    return open_images("digits", CONFIG.image_size, 1)


def losses(run: Path) -> list[tuple[int, float, float]]:
    with open(run / "loss.csv", newline="") as file:
        return [(int(row["step"]), float(row["loss"]), float(row["gradient_norm"])) for row in csv.DictReader(file)]


def same_tensors(ours: Path, theirs: Path) -> bool:
    a, b = load_file(ours), load_file(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def failing(monkeypatch: pytest.MonkeyPatch, at: int, act: Any) -> None:
    """Has act(loss) decide the loss of step `at`, counted in this process."""
    original = training.batch_loss
    calls: list[None] = []

    def batch_loss(*arguments: Any) -> Tensor:
        calls.append(None)
        loss = original(*arguments)
        return act(loss) if len(calls) == at else loss

    monkeypatch.setattr(training, "batch_loss", batch_loss)


def test_it_learns(digits: Images, tmp_path: Path) -> None:
    train(CONFIG, digits, replace(OPTIONS, steps=60, batch_size=16), tmp_path, CPU)
    log = losses(tmp_path)
    assert [step for step, *_ in log] == list(range(1, 61))
    first, last = (sum(loss for _, loss, _ in part) / len(part) for part in (log[:5], log[-10:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("steps_before", [1, 4])
def test_resume_is_exact(digits: Images, tmp_path: Path, seed: int, steps_before: int) -> None:
    options = replace(OPTIONS, seed=seed)
    average = train(CONFIG, digits, options, tmp_path / "whole", CPU)
    train(CONFIG, digits, replace(options, steps=steps_before), tmp_path / "parts", CPU)
    torch.manual_seed(0)  # another state of the generators, as a new process has
    resumed = train(CONFIG, digits, options, tmp_path / "parts", CPU, resuming=True)

    assert (tmp_path / "parts" / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()
    assert same_tensors(tmp_path / "parts" / CHECKPOINT, tmp_path / "whole" / CHECKPOINT)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), average.parameters(), strict=True))
    other = replace(options, seed=seed + 1)
    train(CONFIG, digits, other, tmp_path / "other", CPU)
    assert losses(tmp_path / "other")[0] != losses(tmp_path / "whole")[0]


def test_workers_and_sample_grids_change_nothing(tmp_path: Path, generator: torch.Generator) -> None:
    write_images(tmp_path / "images", generator)
    images = open_images(str(tmp_path / "images"), THREE.image_size, 3)
    options = replace(OPTIONS, data=str(tmp_path / "images"), steps=3, workers=0)
    train(THREE, images, options, tmp_path / "a", CPU)
    train(THREE, images, replace(options, workers=2, sample_every=2), tmp_path / "b", CPU)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b" / "samples").iterdir()) == ["00000002.png", "00000003.png"]
    with Image.open(tmp_path / "b" / "samples" / "00000003.png") as image:
        assert image.size == (53, 53) and image.mode == "RGB"


def test_resume_after_a_crash_repeats_the_lost_steps(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, save_every=3)
    train(CONFIG, digits, options, tmp_path / "whole", CPU)

    def crash(loss: Tensor) -> Tensor:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        failing(patch, 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(CONFIG, digits, options, tmp_path / "parts", CPU)
    assert len(losses(tmp_path / "parts")) == 5  # each on disk at once
    with open(tmp_path / "parts" / "loss.csv", "a") as file:
        file.write("6,0.1")  # the power went while it was written
    details = read_details(tmp_path / "parts" / CHECKPOINT)
    assert details is not None and details.step == 3
    train(CONFIG, digits, options, tmp_path / "parts", CPU, resuming=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_weights_and_keeps_the_checkpoint(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
            return dx * math.nan

    options = replace(OPTIONS, save_every=2)
    failing(monkeypatch, 5, (lambda loss: loss * math.nan) if where == "loss" else BadGradient.apply)
    with pytest.raises(NonFiniteLoss, match=r"^step 5: the loss is .*holds step 4: --resume from it with a lower --lr"):
        train(CONFIG, digits, options, tmp_path, CPU)
    details = read_details(tmp_path / CHECKPOINT)
    assert details is not None and details.step == 4
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / CHECKPOINT).values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        failing(patch, 3, interrupted)
        with pytest.raises(Stopped, match=number.name):
            train(CONFIG, digits, OPTIONS, tmp_path / "parts", CPU)
    assert signal.getsignal(number) is before
    details = read_details(tmp_path / "parts" / CHECKPOINT)
    assert details is not None and details.step == 3
    train(CONFIG, digits, OPTIONS, tmp_path / "parts", CPU, resuming=True)
    train(CONFIG, digits, OPTIONS, tmp_path / "whole", CPU)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


class ProcessGroups(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return os.getpgid(0)


def test_signals_to_the_group_do_not_reach_the_workers() -> None:
    loader = torch.utils.data.DataLoader(ProcessGroups(), num_workers=2, worker_init_fn=training._leave_group)
    groups = [int(group) for group in loader]
    assert len({*groups, os.getpgid(0)}) == 3


def test_labels_are_dropped_now_and_then(digits: Images) -> None:
    seen: list[Tensor] = []

    class Recorder:
        def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
            seen.append(class_cond)
            assert (sigma > 0).all() and x.min() >= -1 and x.max() <= 1
            return sigma

    labels = torch.arange(2000) % 10
    pixels = torch.randint(0, 256, [2000, 1, 8, 8], dtype=torch.uint8)
    training.batch_loss(Recorder(), CONFIG, pixels, labels)  # type: ignore[arg-type]
    dropped = seen[0] == 10
    assert 100 < dropped.sum() < 320  # 200 expected, 13 the standard deviation
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_a_run_is_not_overwritten_nor_made_up(digits: Images, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        train(CONFIG, digits, options, tmp_path, CPU, resuming=True)
    train(CONFIG, digits, options, tmp_path, CPU)
    with pytest.raises(CheckpointError, match="exists: pass --resume"):
        train(CONFIG, digits, options, tmp_path, CPU)
    with pytest.raises(CheckpointError, match="has done 1 of 1 steps: pass a larger --steps"):
        train(CONFIG, digits, options, tmp_path, CPU, resuming=True)


# Configurations and classes


def test_read_config(tmp_path: Path) -> None:
    assert read_config("flowers-256").image_size == (256, 256)
    (tmp_path / "ours.json").write_text(json.dumps(CONFIG.to_dict()))
    assert read_config(str(tmp_path / "ours.json")) == CONFIG
    theirs = {"type": "image_transformer_v2", "input_channels": 3, "input_size": [32, 32], "patch_size": [4, 4]}
    theirs |= {"depths": [2, 2], "widths": [64, 128], "self_attns": [{"type": "global"}] * 2}
    (tmp_path / "theirs.json").write_text(json.dumps({"model": theirs, "dataset": {"num_classes": 9}}))
    assert read_config(str(tmp_path / "theirs.json")).num_classes == 10


def test_fit_classes(digits: Images, tmp_path: Path, generator: torch.Generator) -> None:
    write_images(tmp_path, generator)
    images = open_images(str(tmp_path / "cats"), (8, 8), 3)
    assert fit_classes(CONFIG, digits, None) == CONFIG
    assert fit_classes(THREE, digits, True).num_classes == 11
    assert fit_classes(CONFIG, digits, False).num_classes == 0
    assert fit_classes(replace(CONFIG, num_classes=0), digits, None).num_classes == 0
    with pytest.raises(DataError, match="the model has 2 classes, the data 10: pass --class-cond"):
        fit_classes(THREE, digits, None)
    with pytest.raises(DataError, match="--class-cond: the images have no classes"):
        fit_classes(THREE, images, True)


# The command line


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_dict()))
    return path


def command(*words: object) -> None:
    main([*map(str, words), "--device", "cpu"])


def test_command_line_trains_and_resumes(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", generator)
    (tmp_path / "images" / "cats" / "bad.png").write_text("hello")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(replace(THREE, num_classes=0).to_dict()))
    run, small = tmp_path / "run", ["--batch-size", 2, "--sample-every", 0, "--workers", 0, "--lr", 0.01]
    command("--data", tmp_path / "images", "--config", config, "--output", run, "--class-cond", "--steps", 2, *small)
    captured = capsys.readouterr()
    assert captured.out.strip() == str(run / CHECKPOINT)
    assert "skipped 1 of 9 images" in captured.err and "8 images, 2 classes" in captured.err
    details = read_details(run / CHECKPOINT)
    assert details is not None
    assert details.class_names == ["cats", "dogs"] and details.excluded == ["cats/bad.png"]
    assert HDiTConfig.from_dict(details.config) == THREE

    command("--resume", "--output", run, "--steps", 4)
    assert "skipped" not in capsys.readouterr().err
    again = read_details(run / CHECKPOINT)
    assert again is not None and again.step == 4 and again.options == details.options | {"steps": 4}
    whole = tmp_path / "whole"
    command("--data", tmp_path / "images", "--config", config, "--output", whole, "--class-cond", "--steps", 4, *small)
    assert losses(run) == losses(whole)

    (tmp_path / "images" / "dogs" / "3.png").unlink()
    assert "other images" in error_of(capsys, "--resume", "--output", run, "--steps", 6)


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr with which the command fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "images, " not in line]
    assert stop.value.code == 2
    message = lines[-1]
    assert message.startswith("hdit.train: error: ")
    assert not any("Traceback" in line for line in lines)
    return message


def test_bad_input_is_one_line(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()

    def error(config: object = config_file, *words: object, data: object = "digits") -> str:
        return error_of(capsys, "--data", data, "--config", config, "--output", run, *words)

    assert "holds no images" in error(data=empty)
    assert "there is no folder or .zip file" in error(data=tmp_path / "nowhere")
    assert "there is no file big, and the presets are imagenet-128" in error("big")
    assert "image of 10x10 pixels must be a multiple of 4x4" in error(config_file, "--image-size", 10)
    assert "is larger than its grid of 2x2 tokens" in error(config_file, "--image-size", 4)
    assert "pass --class-cond" in error("imagenet-128")
    for text, words in (("{", "Expecting"), ("[]", "no JSON object"), ('{"widths": 3}', "unknown entries ['widths']")):
        (tmp_path / "bad.json").write_text(text)
        assert f"--config {tmp_path / 'bad.json'}: " in (message := error(tmp_path / "bad.json")) and words in message
    assert "--data and --config are needed" in error_of(capsys, "--output", run)
    assert "there is no checkpoint" in error_of(capsys, "--output", run, "--resume")
    assert not run.exists()


def test_exploding_training_is_one_line(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--steps", 50, "--batch-size", 2, "--lr", 1e30, "--sample-every", 0]
    message = error_of(capsys, "--data", "digits", "--config", config_file, "--output", run, *options)
    assert "the loss is" in message and "start again with a lower --lr than 1e+30" in message


def test_resuming_with_another_config_is_one_line(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = ["--steps", 1, "--batch-size", 2, "--sample-every", 0]
    command("--data", "digits", "--config", config_file, "--output", run, *small)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(replace(CONFIG, sigma_data=0.25).to_dict()))
    message = error_of(capsys, "--output", run, "--resume", "--steps", 2, "--config", other)
    assert "is of another configuration (sigma_data 0.5, but 0.25 here)" in message
    message = error_of(capsys, "--output", run, "--resume", "--steps", 2, "--image-size", 16)
    assert "image_size[0] 8, but 16 here" in message
    command("--output", run, "--resume", "--steps", 2, "--config", config_file)


def test_ctrl_c_exits_with_its_status(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    failing(monkeypatch, 2, interrupted)
    with pytest.raises(SystemExit) as stop:
        command("--data", "digits", "--config", config_file, "--output", tmp_path / "run", "--batch-size", 2)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; saved" in capsys.readouterr().err


# On a GPU


def gpu_config() -> HDiTConfig:
    from hdit.demo import ON_GPU

    return ON_GPU.config


@pytest.mark.gpu
def test_a_training_step_on_the_gpu(tmp_path: Path) -> None:
    config = gpu_config()
    images = open_images("digits", config.image_size, 1)
    options = replace(OPTIONS, steps=1, batch_size=16)
    gpu, cpu = (train(config, images, options, tmp_path / name, torch.device(name)) for name in ("cuda", "cpu"))
    assert isinstance(gpu, HDiT) and next(gpu.parameters()).is_cuda and not next(cpu.parameters()).is_cuda
    ((_, loss, norm),) = losses(tmp_path / "cuda")
    assert math.isfinite(loss) and math.isfinite(norm) and norm > 0
    assert all(parameter.isfinite().all() for parameter in gpu.parameters())


@pytest.mark.gpu
def test_resume_on_the_gpu(tmp_path: Path) -> None:
    config, device = gpu_config(), torch.device("cuda")
    images = open_images("digits", config.image_size, 1)
    options = replace(OPTIONS, steps=6, batch_size=16, lr=1e-3)
    train(config, images, options, tmp_path / "whole", device)
    train(config, images, replace(options, steps=3), tmp_path / "parts", device)
    train(config, images, options, tmp_path / "parts", device, resuming=True)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [row[0] for row in parts] == [1, 2, 3, 4, 5, 6]
    # Our kernels are deterministic; torch's own attention backward in the global level need not be.
    for (_, a, _), (_, b, _) in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=2e-3)
