from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdit import HDiT, HDiTConfig, run, training_step
from hdit import train as training
from hdit._runtime import Stopped
from hdit.checkpoint import CheckpointError, Details, read_details
from hdit.data import DataError, Images, open_images
from hdit.train import CHECKPOINT, NonFiniteLoss, Options, RunError, fit_classes, main, read_config, train
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
    original = training_step.batch_loss
    calls: list[None] = []

    def batch_loss(*arguments: Any) -> Tensor:
        calls.append(None)
        loss = original(*arguments)
        return act(loss) if len(calls) == at else loss

    monkeypatch.setattr(training_step, "batch_loss", batch_loss)


def step_of(output: Path) -> int:
    """How many steps the checkpoint in output has done; it must load whole and hold finite numbers."""
    details = read_details(output / CHECKPOINT)
    assert details is not None
    assert all(tensor.isfinite().all() for tensor in load_file(output / CHECKPOINT).values())
    assert not list(output.glob("*.tmp"))
    return details.step


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    options = replace(OPTIONS, data=str(tmp_path / "images"), steps=3, batch_size=18, workers=0)
    train(THREE, images, options, tmp_path / "a", CPU)
    train(THREE, images, replace(options, workers=2, sample_every=2), tmp_path / "b", CPU)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b" / "samples").iterdir()) == ["00000002.png", "00000003.png"]
    with Image.open(tmp_path / "b" / "samples" / "00000003.png") as image:
        assert image.size == (53, 53) and image.mode == "RGB"


def test_samples_take_no_more_memory_than_training(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, bool]] = []

    def generate(model: HDiT, count: int, classes: Any, *, batch_size: int, capture: bool) -> Tensor:
        sizes.append((batch_size, capture))
        return torch.zeros(count, 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(training, "generate", generate)
    for captured in (True, False):
        options = replace(OPTIONS, steps=1, sample_every=1, capture=captured)
        train(CONFIG, digits, options, tmp_path / str(captured), CPU)
    assert sizes == [(OPTIONS.batch_size, True), (OPTIONS.batch_size, False)]


def test_resume_after_a_crash_repeats_the_lost_steps(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, save_every=3)
    train(CONFIG, digits, options, tmp_path / "whole", CPU)

    class PowerCut(BaseException):
        pass

    def crash(loss: Tensor) -> Tensor:
        raise PowerCut

    with monkeypatch.context() as patch:
        failing(patch, 6, crash)
        with pytest.raises(PowerCut):
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
    with monkeypatch.context() as patch:
        failing(patch, 5, (lambda loss: loss * math.nan) if where == "loss" else BadGradient.apply)
        # Step 4 is not saved: its weights have not shown a finite loss.
        match = r"^step 5: the loss is .*holds step 2: --resume from it with a lower --lr than 0.01"
        with pytest.raises(NonFiniteLoss, match=match):
            train(CONFIG, digits, options, tmp_path, CPU)
    assert step_of(tmp_path) == 2 and len(losses(tmp_path)) == 4
    lower = replace(options, lr=1e-3)
    if where == "loss":  # the advice works
        train(CONFIG, digits, lower, tmp_path, CPU, resuming=True)
        assert step_of(tmp_path) == 6 and len(losses(tmp_path)) == 6
    else:  # and is another one where it would not
        failing(monkeypatch, 1, BadGradient.apply)
        with pytest.raises(NonFiniteLoss, match="holds step 2, whose weights give this with any --lr: start another"):
            train(CONFIG, digits, lower, tmp_path, CPU, resuming=True)


def test_a_scale_out_of_range_counts_as_diverged(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators refuse such weights on a CPU, where a GPU's loss is NaN: they are not saved either."""

    def refuse(loss: Tensor) -> Tensor:
        raise ValueError("scale: expected positive numbers, got -0.3")

    failing(monkeypatch, 5, refuse)
    match = r"^step 5: scale: expected positive .*holds step 2: --resume from it with a lower --lr"
    with pytest.raises(NonFiniteLoss, match=match):
        train(CONFIG, digits, replace(OPTIONS, save_every=2), tmp_path, CPU)
    assert step_of(tmp_path) == 2


def test_weights_that_are_not_finite_after_the_last_loss(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:  # as save_checkpoint does
        calls.append(None)
        raise FloatingPointError("model.x holds NaN or infinity")

    calls: list[None] = []
    train(CONFIG, digits, replace(OPTIONS, steps=2), tmp_path, CPU)
    before = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.setattr(run, "save_checkpoint", refuse)
    match = r"^model.x holds NaN or infinity; .*holds step 2: --resume from it with a lower --lr than 0.01"
    with pytest.raises(NonFiniteLoss, match=match):
        train(CONFIG, digits, replace(OPTIONS, steps=3), tmp_path, CPU, resuming=True)
    assert len(calls) == 1 and (tmp_path / CHECKPOINT).read_bytes() == before
    with pytest.raises(NonFiniteLoss, match="start again with a lower --lr"):
        train(CONFIG, digits, replace(OPTIONS, steps=1), tmp_path / "new", CPU)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send two
        return loss

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        failing(patch, 3, interrupted)
        match = f"stopped by {number.name}; saved .* .step 3., go on with --resume"
        with pytest.raises(Stopped, match=match) as stop:
            train(CONFIG, digits, OPTIONS, tmp_path / "parts", CPU)
        assert stop.value.number == number
    assert signal.getsignal(number) is before
    details = read_details(tmp_path / "parts" / CHECKPOINT)
    assert details is not None and details.step == 3
    train(CONFIG, digits, OPTIONS, tmp_path / "parts", CPU, resuming=True)
    train(CONFIG, digits, OPTIONS, tmp_path / "whole", CPU)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_signals_while_sampling_and_saving(digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)  # it is given up at once

    def save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_checkpoint(*arguments)

    save_checkpoint = run.save_checkpoint
    options = replace(OPTIONS, sample_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_samples", sample)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM; saved .*step 2"):
            train(CONFIG, digits, options, tmp_path, CPU)
    assert step_of(tmp_path) == 2
    options = replace(OPTIONS, save_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", save)
        with pytest.raises(Stopped, match=r"stopped by SIGINT; saved .*step 5"):
            train(CONFIG, digits, options, tmp_path, CPU, resuming=True)
    assert step_of(tmp_path) == 5 and len(losses(tmp_path)) == 5


# What comes from outside: the finished steps are saved first


def test_a_data_worker_s_death(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(loss: Tensor) -> Tensor:
        victim = multiprocessing.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        return loss

    write_images(tmp_path / "images", generator)
    images = open_images(str(tmp_path / "images"), THREE.image_size, 3)
    options = replace(OPTIONS, data=str(tmp_path / "images"), steps=12, workers=2)
    with monkeypatch.context() as patch:
        failing(patch, 2, kill)
        match = r"^a data worker died \(DataLoader worker.*: lower --workers.*; saved .*step \d+.*go on with --resume$"
        with pytest.raises(RunError, match=match):
            train(THREE, images, options, tmp_path / "run", CPU)
    saved = step_of(tmp_path / "run")  # steps go on while there are batches that were read before
    assert 2 <= saved < 12 and len(losses(tmp_path / "run")) == saved
    train(THREE, images, replace(options, workers=0), tmp_path / "run", CPU, resuming=True)
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, 13))


def test_an_image_that_is_gone(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(loss: Tensor) -> Tensor:
        shutil.rmtree(tmp_path / "images")
        return loss

    write_images(tmp_path / "images", generator)
    images = open_images(str(tmp_path / "images"), THREE.image_size, 3)
    failing(monkeypatch, 2, remove)
    options = replace(OPTIONS, data=str(tmp_path / "images"), workers=0)
    with pytest.raises(RunError, match=r"png can no longer be read.*; saved .*step 2., go on with --resume$"):
        train(THREE, images, options, tmp_path / "run", CPU)
    assert step_of(tmp_path / "run") == 2


def test_a_full_disk(digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(28, "No space left on device", "some.file")

    def full_at_the_third(log: run.LossLog, step: int, *values: float) -> float:
        return full() if step == 3 else write(log, step, *values)

    write = run.LossLog.write
    with monkeypatch.context() as patch:  # the log
        patch.setattr(run.LossLog, "write", full_at_the_third)
        with pytest.raises(RunError, match=r"No space left on device: 'some.file'; saved .*step 2., go on"):
            train(CONFIG, digits, OPTIONS, tmp_path / "run", CPU)
    assert step_of(tmp_path / "run") == 2
    options = replace(OPTIONS, save_every=2, sample_every=3)
    with monkeypatch.context() as patch:  # the pictures
        patch.setattr(training, "save_samples", full)
        with pytest.raises(RunError, match=r"No space left on device: 'some.file'; saved .*step 3., go on"):
            train(CONFIG, digits, options, tmp_path / "run", CPU, resuming=True)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with monkeypatch.context() as patch:  # the checkpoint
        patch.setattr(run, "save_checkpoint", full)
        with pytest.raises(RunError, match=r"No space left on device: 'some.file'; saved .*step 3., go on"):
            train(CONFIG, digits, options, tmp_path / "run", CPU, resuming=True)
        with pytest.raises(RunError, match="'some.file'; nothing is saved yet: start again"):
            train(CONFIG, digits, options, tmp_path / "new", CPU)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_an_unknown_error_keeps_its_kind(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(loss: Tensor) -> Tensor:
        raise LookupError("a bug")

    failing(monkeypatch, 3, bug)
    with pytest.raises(LookupError, match="a bug"):
        train(CONFIG, digits, OPTIONS, tmp_path, CPU)
    assert step_of(tmp_path) == 2 and "(step 2), go on with --resume" in capsys.readouterr().err


class OfItsWorker(torch.utils.data.Dataset):
    """The process group, and whether Ctrl-C is held back; the last item is a crash."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, bool]:
        if index == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return os.getpgid(0), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_signals_do_not_reach_the_workers(capfd: pytest.CaptureFixture[str]) -> None:
    def items(*indices: int) -> list[Any]:
        loader = torch.utils.data.DataLoader(
            OfItsWorker(), None, sampler=indices, num_workers=len(indices), worker_init_fn=training.leave_group
        )
        with run.Signals() as signals:
            return list(training.batches(loader, signals))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found = items(0, 1)
    assert len({*(group for group, _ in found), os.getpgid(0)}) == 3
    assert all(held_back for _, held_back in found)  # also before they left the group
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        items(2)
    assert capfd.readouterr().err == ""


def test_labels_are_dropped_now_and_then(digits: Images) -> None:
    seen: list[Tensor] = []

    class Recorder:
        def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
            seen.append(class_cond)
            assert (sigma > 0).all() and x.min() >= -1 and x.max() <= 1
            return sigma

    labels = torch.arange(2000) % 10
    pixels = torch.randint(0, 256, [2000, 1, 8, 8], dtype=torch.uint8)
    training_step.batch_loss(Recorder(), CONFIG, pixels, labels)  # type: ignore[arg-type]
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


def test_what_can_t_be_trained_on_is_named_first(digits: Images, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "images": digits,
        "options": OPTIONS,
        "output": tmp_path,
        "device": CPU,
    }
    larger = replace(CONFIG, image_size=(16, 16))
    for name, wrong, words in (
        ("config", None, "config: expected HDiTConfig, got None"),
        ("options", {}, "options: expected Options, got {}"),
        ("output", str(tmp_path), "output: expected Path, got"),
        ("device", "tpu9", "device: expected a device"),
        ("images", None, "images: expected those to train on"),
        ("config", larger, r"images: expected shape \[1, 16, 16\], got \[1, 8, 8\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            train(**arguments | {name: wrong})
        assert not (tmp_path / CHECKPOINT).exists() and not (tmp_path / "loss.csv").exists()


def test_one_run_a_folder(digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second_run(loss: Tensor) -> Tensor:
        for resuming in (False, True):
            with pytest.raises((RunError, CheckpointError), match="in use by another run|there is no checkpoint"):
                train(CONFIG, digits, OPTIONS, tmp_path, CPU, resuming)
        return loss

    failing(monkeypatch, 2, second_run)
    train(CONFIG, digits, replace(OPTIONS, steps=2), tmp_path, CPU)
    assert step_of(tmp_path) == 2 and len(losses(tmp_path)) == 2


def test_a_finished_run_is_left_as_it_is(digits: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(OPTIONS, steps=1)
    train(CONFIG, digits, options, tmp_path, CPU)
    before = contents(tmp_path)
    capsys.readouterr()
    train(CONFIG, digits, options, tmp_path, CPU, resuming=True)
    assert (
        capsys.readouterr().err == f"hdit.train: {tmp_path / CHECKPOINT} has done 1 of 1 steps: nothing is left to do\n"
    )
    assert contents(tmp_path) == before


def test_a_finished_run_needs_no_data(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Schedulers start a finished run once more, perhaps when its data are gone."""
    write_images(tmp_path / "images", generator)
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(THREE.to_dict()))
    small = ("--batch-size", 2, "--sample-every", 0, "--workers", 0, "--steps", 1)
    command("--data", tmp_path / "images", "--config", config, "--output", run, *small)
    shutil.rmtree(tmp_path / "images")
    before = contents(run)
    capsys.readouterr()
    command("--resume", "--output", run)
    done = f"hdit.train: {run / CHECKPOINT} has done 1 of 1 steps: nothing is left to do\n"
    assert capsys.readouterr() == (f"{run / CHECKPOINT}\n", done) and contents(run) == before
    config.write_text(json.dumps(replace(THREE, sigma_data=0.25).to_dict()))
    message = error_of(capsys, "--resume", "--output", run, "--config", config)
    assert "is of another configuration" in message  # also one of another run
    assert "there is no folder" in error_of(capsys, "--resume", "--output", run, "--steps", 2)
    options = replace(OPTIONS, data=str(tmp_path / "images"), steps=2, batch_size=2)
    with pytest.raises(TypeError, match="images: expected those to train on"):
        train(THREE, None, options, run, CPU, resuming=True)
    assert contents(run) == before


def test_a_checkpoint_of_another_run(digits: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = replace(OPTIONS, steps=1)
    train(CONFIG, digits, options, ours, CPU)
    train(CONFIG, digits, replace(options, seed=1), theirs, CPU)
    shutil.copy(theirs / CHECKPOINT, ours)
    before = contents(ours)
    with pytest.raises(ValueError, match=r"loss.csv has another loss for step 1 than the checkpoint .* of two runs"):
        train(CONFIG, digits, replace(options, steps=2, seed=1), ours, CPU, resuming=True)
    assert contents(ours) == before
    (ours / "loss.csv").unlink()  # as the message says
    train(CONFIG, digits, replace(options, steps=2, seed=1), ours, CPU, resuming=True)
    assert "there are no losses in" in capsys.readouterr().err
    assert [step for step, *_ in losses(ours)] == [2]


def test_another_default_device(digits: Images, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    train(CONFIG, digits, options, tmp_path / "a", CPU)
    torch.set_default_device("meta")  # stands for cuda
    try:
        train(CONFIG, digits, options, tmp_path / "b", CPU)
    finally:
        torch.set_default_device(None)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize(
    "option, values",
    [
        ("data", ["", None, 3]),
        ("steps", [0, -1, 1.5, "8", True, None, 10**20]),
        ("batch_size", [0, -1, 8.0, "8", 10**9]),
        ("lr", [0, -1.0, math.nan, math.inf, 1e30, 1.5, "1e-3", True]),
        ("seed", [1.0, "0", None]),
        ("save_every", [0, "1"]),
        ("sample_every", [-1, 1.0]),
        ("workers", [-1, 10**6, "2"]),
    ],
)
def test_options_are_checked(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"^{option}: expected .*, got"):
            Options(**({"data": "digits"} | {option: value}))
    assert replace(OPTIONS, seed=-3, lr=1.0, workers=0).seed == -3


# What a run needs is looked for before it begins


@pytest.mark.parametrize("package, module", [("safetensors", ".torch"), ("numpy", ""), ("PIL", ".Image"), ("tqdm", "")])
def test_a_missing_package_is_named(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str
) -> None:
    for name in (package, package + module):
        monkeypatch.setitem(sys.modules, name, None)
    message = rf'{package} is needed here: pip install "hdit-kernels\[train\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        train(CONFIG, digits, OPTIONS, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_the_output_is_looked_at(digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> Any:
        return 10**9, 0, 10**5

    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").touch()
    before = contents(tmp_path)
    sampling = replace(OPTIONS, sample_every=1)
    with pytest.raises(OSError, match="file can't be written to .Not a directory.: pass another folder"):
        train(CONFIG, digits, OPTIONS, tmp_path / "file", CPU)
    with pytest.raises(OSError, match="run/samples can't be written to"):
        train(CONFIG, digits, sampling, tmp_path / "run", CPU)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(OSError, match="new needs .* MB of free space, and there are 0.1 MB: make room"):
        train(CONFIG, digits, OPTIONS, tmp_path / "new", CPU)
    assert contents(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["file", "run"]


def test_room_for_two_checkpoints(digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(training, "writable", lambda folder, needed=0: asked.append(needed))
    train(CONFIG, digits, replace(OPTIONS, steps=1), tmp_path, CPU)
    size = (tmp_path / CHECKPOINT).stat().st_size
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / CHECKPOINT).values())
    assert 0.99 * tensors < asked[0] / 2 < size
    train(CONFIG, digits, OPTIONS, tmp_path, CPU, resuming=True)
    assert asked[1] == asked[0] - size


def test_a_model_that_can_t_be_trained(digits: Images, tmp_path: Path) -> None:
    huge = (CONFIG.levels[0], replace(CONFIG.levels[1], width=2**18, d_ff=8))
    for change, words in (
        ({"mapping_cond_dim": 4}, "config: mapping_cond_dim: expected 0, .* got 4"),
        ({"image_size": (2**20, 2**20)}, "config: .* images of 1048576 x 1048576 pixels"),
        ({"in_channels": 5, "out_channels": 5}, "images of 5 channels can't be saved, 1 or 3 can: pass 0"),
        ({"levels": huge}, "GiB of memory|GB of free space"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            train(replace(CONFIG, **change), digits, replace(OPTIONS, sample_every=1), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


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
    resumed = ("--resume", "--output", run, "--steps", 6)
    assert "other images" in error_of(capsys, *resumed)
    shutil.rmtree(tmp_path / "images" / "dogs")  # no classes any more: advice for a new run would not help
    assert "other images" in error_of(capsys, *resumed)
    assert "other images" in error_of(capsys, *resumed, "--data", "digits")
    assert "num_classes 3, but 0 here" in error_of(capsys, *resumed, "--no-class-cond")


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
    for text, words in (("{", "Expecting"), ("[]", "no JSON object"), ('{"widths": 3}', "widths")):
        (tmp_path / "bad.json").write_text(text)
        assert f"--config {tmp_path / 'bad.json'}: " in (message := error(tmp_path / "bad.json")) and words in message
    assert "--data and --config are needed" in error_of(capsys, "--output", run)
    assert "there is no checkpoint" in error_of(capsys, "--output", run, "--resume")
    assert not run.exists()


def test_bad_options_are_one_line(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    needed = ("--data", "digits", "--config", config_file, "--output", run)

    def one_line(name: str, *words: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, needed), *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("hdit.train: error: ") and name in line, line

    for words in (
        "--lr -1", "--lr nan", "--lr inf", "--lr 1e30", "--lr x", "--steps 0", "--steps 1e3", "--steps 100000000000000",
        "--batch-size 0", "--batch-size 1000000000", "--seed x", "--save-every 0", "--sample-every -1", "--workers -1",
        "--workers 100000", "--image-size 0", "--image-size 10", "--data=", "--output=", "--nonsense 1",
    ):  # fmt: skip
        one_line(words.split()[0].rstrip("="), *words.split(), "--device", "cpu")
    for device in ("mps", "meta", "xpu", "nonsense", "cuda:77", ""):
        if device != "mps" or not torch.backends.mps.is_available():
            one_line("--device", "--device", device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2, but RANK, LOCAL_RANK" in error_of(capsys, *needed)
    assert not run.exists()


def test_resuming_tells_what_changed(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["--batch-size", 2, "--lr", 0.01, "--sample-every", 0, "--seed", 3]
    command("--data", "digits", "--config", config_file, "--output", run, "--steps", 1, *small)
    capsys.readouterr()
    command("--resume", "--output", run, "--steps", 2)
    command("--resume", "--output", run, "--steps", 2, "--batch-size", 4, "--seed", 0, "--lr", 0.001, "--workers", 0)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hdit.train: ")]
    assert told == [
        "hdit.train: --steps is 2 now and was 1",
        "hdit.train: --batch-size is 4 now and was 2; the losses and the order of the images are not those of an "
        "unbroken run from here on",
        "hdit.train: --lr is 0.001 now and was 0.01",
        "hdit.train: --seed is 0 now and was 3; the losses are not those of an unbroken run from here on",
        "hdit.train: --workers is 0 now and was 4",
        f"hdit.train: {run / CHECKPOINT} has done 2 of 2 steps: nothing is left to do",
    ]


@pytest.mark.parametrize("options", [{"colour": "red"}, {"batch_size": "8"}, {"data": None}, {"steps": -3}])
def test_damaged_options_of_a_checkpoint(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    details = Details(CONFIG.to_dict(), 1, {"data": "digits"} | options)
    monkeypatch.setattr(training, "read_details", lambda path: details)
    message = error_of(capsys, "--resume", "--output", tmp_path)
    assert str(tmp_path / CHECKPOINT) in message and next(iter(options)) in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": {"sigma_sample_density": {"type": "x"}}}, "sigma_sample_density.type"),
        ({"config": CONFIG.to_dict() | {"mapping_cond_dim": 4}}, "mapping_cond_dim"),
        ({"config": CONFIG.to_dict() | {"image_size": [2**20, 2**20]}}, "GiB of memory"),  # no tensor has its size
    ],
)
def test_what_can_t_be_trained_in_a_checkpoint_names_it(
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    details = replace(Details(CONFIG.to_dict(), 1, {"data": "digits"}), **changes)
    monkeypatch.setattr(training, "read_details", lambda path: details)
    message = error_of(capsys, "--resume", "--output", tmp_path)
    assert message.startswith(f"hdit.train: error: {tmp_path / CHECKPOINT}: ") and words in message


def test_ctrl_c_before_the_first_step(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "open_images", interrupted)
    with pytest.raises(SystemExit) as stop:
        command("--data", "digits", "--config", config_file, "--output", tmp_path / "run")
    assert stop.value.code == 130 and capsys.readouterr().err == "hdit.train: interrupted\n"


def test_ctrl_c_while_torch_is_loaded(tmp_path: Path) -> None:
    loading = "import time, hdit._interrupt\nassert hdit._interrupt._is_program\nprint('loading', flush=True)\n"
    (tmp_path / "torch.py").write_text(f"{loading}time.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(training.__file__).parents[1]}"}
    command = [sys.executable, "-m", "hdit.train"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "hdit.train: interrupted\n"
    assert process.returncode == 130


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
