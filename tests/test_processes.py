"""Several processes that train one model: started here as torchrun does, by its variables, and joined by gloo."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from hdit import HDiTConfig, data, processes, recipe, training_step
from hdit import run as saving
from hdit import train as training
from hdit.checkpoint import read_details
from hdit.data import BatchOrder
from hdit.demo import ON_GPU
from hdit.train import CHECKPOINT, main
from tests.tiny import CONFIG, write_images

# Forked from one process that has imported everything and run nothing
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hdit.train", "PIL.Image", "safetensors.torch", "sklearn.datasets", "tqdm", __name__])

SURE = replace(CONFIG, levels=(CONFIG.levels[0], replace(CONFIG.levels[1], dropout=0.0)))  # no dropout
THREE = replace(SURE, in_channels=3, out_channels=3, num_classes=3)  # for the images of tests/tiny.py

Act = Callable[[int, Path], None]


def nothing(rank: int, folder: Path) -> None:
    """What a process does before it trains: here nothing."""


def member(rank: int, count: int, port: int, folder: Path, words: list[str], act: Act) -> None:
    """One process, of this rank. Its output and its averaged weights are files in folder."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    processes.FIRST_WORD = 0.5

    def keeping(*arguments: Any) -> Any:
        average = train(*arguments)
        torch.save(average.state_dict(), folder / f"average.{rank}")
        return average

    train, training.train = training.train, keeping
    act(rank, folder)
    main([word.replace("RANK", str(rank)) for word in words])


def run(
    count: int, folder: Path, *words: object, act: Act = nothing, config: HDiTConfig = SURE, patience: float = 60
) -> list[int | None]:
    """Trains with so many processes, the run's files in folder / "run"; returns their exit statuses.

    RANK in a word is each process's own. patience: seconds until those that hang are killed.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    settings = ["--output", folder / "run", "--device", "cpu", "--workers", 0, "--sample-every", 0, *words]
    if "--resume" not in words:
        settings = ["--data", "digits", "--config", folder / "config.json", "--lr", 0.001, *settings]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has it, too
    every = [
        FORKS.Process(target=member, args=(rank, count, store.port, folder, [*map(str, settings)], act))
        for rank in range(count)
    ]
    for process in every:
        process.start()
    for process in every:
        process.join(patience)
        process.kill()
    return [process.exitcode for process in every]


def losses(folder: Path) -> list[list[float]]:
    with open(folder / "run" / "loss.csv", newline="") as file:
        return [[float(row[name]) for name in ("step", "loss", "gradient_norm")] for row in csv.DictReader(file)]


def said(folder: Path, rank: int) -> list[str]:
    """The lines on a process's stderr that are hdit.train's."""
    lines = (folder / f"err.{rank}").read_text().splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("hdit.train: ")]


def step_of(folder: Path) -> int:
    details = read_details(folder / "run" / CHECKPOINT)
    assert details is not None
    return details.step


# The same run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of one process, under torchrun's variables."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(1, folder, "--steps", 20, "--batch-size", 8) == [0]
    return folder


def assert_same_losses(ours: Path, theirs: Path) -> None:
    assert [row[0] for row in losses(ours)] == [row[0] for row in losses(theirs)]
    for a, b in zip(losses(ours), losses(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert losses(ours)[0] == pytest.approx(losses(theirs)[0], rel=1e-6)  # nothing has added up yet


def sampling(rank: int, folder: Path) -> None:
    training.save_samples = lambda model, path, options: (folder / f"sampled.{rank}").touch()  # type: ignore[assignment]


@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_process(alone: Path, tmp_path: Path, count: int) -> None:
    settings = ("--steps", 20, "--batch-size", 8, "--save-every", 10, "--sample-every", 12)
    # Each is told another folder, and only the first makes its own.
    statuses = run(count, tmp_path, *settings, "--output", tmp_path / "runRANK", act=sampling)
    assert statuses == [0] * count
    written = [f"{kind}.{rank}" for kind in ("average", "err", "out") for rank in range(count)]
    assert sorted(os.listdir(tmp_path)) == sorted(["config.json", "run0", "sampled.0", *written])
    assert (tmp_path / "out.0").read_text() == f"{tmp_path / 'run0' / CHECKPOINT}\n"
    assert f"1,797 images, 10 classes, on {count} processes, this one on cpu" in (tmp_path / "err.0").read_text()
    assert not any((tmp_path / f"{kind}.{rank}").read_text() for kind in ("out", "err") for rank in range(1, count))

    (tmp_path / "run0").rename(tmp_path / "run")
    assert_same_losses(tmp_path, alone)
    first, *others = (torch.load(tmp_path / f"average.{rank}") for rank in range(count))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_another_number_of_processes_goes_on(alone: Path, tmp_path: Path) -> None:
    assert run(2, tmp_path, "--steps", 6, "--batch-size", 8) == [0, 0]
    assert run(1, tmp_path, "--resume", "--steps", 13) == [0]
    assert run(2, tmp_path, "--resume", "--steps", 20) == [0, 0]
    assert_same_losses(tmp_path, alone)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert run(2, tmp_path, "--resume") == [0, 0]
    assert said(tmp_path, 0)[-1].endswith("has done 20 of 20 steps: nothing is left to do") and not said(tmp_path, 1)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_draws_are_parts_of_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, [12, 1, 8, 8], dtype=torch.uint8)
    labels = torch.arange(12) % 10
    often = recipe.Recipe(cond_dropout_rate=0.5)

    class Recorder:
        def loss(self, *drawn: Tensor, class_cond: Tensor) -> Tensor:
            seen.append([*drawn, class_cond, torch.rand(20)])  # the last as dropout does
            return drawn[0]

    def step(rank: int, count: int) -> list[Tensor]:
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)
        torch.manual_seed(5)
        part = processes.part(12)
        recipe.batch_loss(Recorder(), CONFIG, pixels[part], labels[part], often)  # type: ignore[arg-type]
        return seen.pop()

    seen: list[list[Tensor]] = []
    whole, parts = step(0, 1), [step(rank, 3) for rank in range(3)]
    for expected, *found in zip(whole[:-1], *(part[:-1] for part in parts), strict=True):
        assert torch.equal(torch.cat(found), expected)
    masks = [part[-1] for part in parts]
    assert not any(torch.equal(a, b) for a, b in zip(masks, masks[1:] + masks[:1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step(1, 3), parts[1], strict=True))

    order = list(BatchOrder(50, 12, 0, 0, 9))
    slices = [list(BatchOrder(50, 12, 0, 0, 9, slice(first, first + 4))) for first in (0, 4, 8)]
    assert [sum(batch, []) for batch in zip(*slices, strict=True)] == order


# What ends it


def at_step_3(act: Callable[[Tensor], Tensor]) -> None:
    original, calls = training_step.batch_loss, []

    def batch_loss(*arguments: Any) -> Tensor:
        calls.append(None)
        loss = original(*arguments)
        return act(loss) if len(calls) == 3 else loss

    training_step.batch_loss = batch_loss


def send(number: int) -> Callable[[Tensor], Tensor]:
    def act(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return loss

    return act


def one_is_told_to_stop(rank: int, folder: Path) -> None:
    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        save_checkpoint(*arguments)

    def wait() -> None:
        original()
        assert step_of(folder) == 3

    if rank == 0:
        save_checkpoint, saving.save_checkpoint = saving.save_checkpoint, slowly
    else:
        at_step_3(send(signal.SIGTERM))
        original, processes._wait = processes._wait, wait  # torchrun kills all when one has ended
        data.ImageFolder._unreadable = None  # type: ignore[assignment, method-assign]  # the first tells what it found


def test_a_signal_to_one_stops_all(tmp_path: Path, generator: torch.Generator) -> None:
    write_images(tmp_path / "images", generator)
    (tmp_path / "images" / "cats" / "bad.png").write_text("hello")
    words = ("--data", tmp_path / "images", "--batch-size", 2)
    stopped = 128 + signal.SIGTERM
    assert run(2, tmp_path, *words, act=one_is_told_to_stop, config=THREE) == [stopped, stopped]
    (line,) = said(tmp_path, 0) + said(tmp_path, 1)
    saved = tmp_path / "run" / CHECKPOINT
    assert line == f"hdit.train: stopped by SIGTERM; saved {saved} (step 3), go on with --resume"
    assert step_of(tmp_path) == 3 and len(losses(tmp_path)) == 3
    details = read_details(saved)
    assert details is not None and details.excluded == ["cats/bad.png"]


def sampling_is_interrupted(rank: int, folder: Path) -> None:
    def save_samples(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 30)  # it is given up at once

    training.save_samples = save_samples


def test_a_signal_while_the_first_draws_samples(tmp_path: Path) -> None:
    words = ("--batch-size", 2, "--sample-every", 2)
    assert run(2, tmp_path, *words, act=sampling_is_interrupted) == [130, 143]  # to the other no signal came
    (line,) = said(tmp_path, 0) + said(tmp_path, 1)
    assert "stopped by SIGINT; saved" in line and step_of(tmp_path) == 4 == len(losses(tmp_path))


def the_first_dies(rank: int, folder: Path) -> None:
    if rank == 0:
        at_step_3(send(signal.SIGKILL))


def another_dies(rank: int, folder: Path) -> None:
    if rank < 2:
        at_step_3(send(signal.SIGKILL if rank else signal.SIGTERM))  # torchrun sends the others that


def test_a_process_s_death(tmp_path: Path) -> None:
    gone = "hdit.train: error: another process of this run ended, or can't be reached"
    assert run(3, tmp_path, "--batch-size", 3, act=another_dies) == [2, -signal.SIGKILL, 2]
    assert said(tmp_path, 0) == [f"{gone}; saved {tmp_path / 'run' / CHECKPOINT} (step 2), go on with --resume"]
    assert not said(tmp_path, 2) and step_of(tmp_path) == 2
    assert run(2, tmp_path, "--resume", "--batch-size", 2, act=the_first_dies) == [-signal.SIGKILL, 2]
    assert said(tmp_path, 1) == [gone] and step_of(tmp_path) == 2


def one_has_nan(rank: int, folder: Path) -> None:
    if rank == 1:
        at_step_3(lambda loss: loss * math.nan)


def test_one_process_s_nan_is_everyone_s(tmp_path: Path) -> None:
    assert run(2, tmp_path, "--batch-size", 2, "--save-every", 1, act=one_has_nan) == [2, 2]
    (line,) = said(tmp_path, 0) + said(tmp_path, 1)
    assert line.startswith("hdit.train: error: step 3: the loss is nan") and "holds step 1: --resume" in line


def test_what_can_t_be_is_said_once(tmp_path: Path) -> None:
    assert run(2, tmp_path, "--batch-size", 3) == [2, 2]
    (line,) = said(tmp_path, 0) + said(tmp_path, 1)
    assert line == "hdit.train: error: --batch-size: expected a multiple of 2, the number of processes, got 3"
    assert run(2, tmp_path, "--batch-size", 0) == [2, 2]
    (line,) = said(tmp_path, 0) + said(tmp_path, 1)
    assert line.startswith("hdit.train: error: argument --batch-size: must be at least 1")
    assert not (tmp_path / "run").exists()
    assert run(2, tmp_path, "--help") == [0, 0]
    assert "--batch-size" in (tmp_path / "out.0").read_text() and not (tmp_path / "out.1").read_text()


def test_what_one_process_finds_is_said_by_it(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(json.dumps(SURE.to_dict()))
    assert run(2, tmp_path, "--batch-size", 2, "--config", tmp_path / "RANK.json") == [2, 2]
    assert [line.partition("; ")[0] for line in said(tmp_path, 0)] == [
        "hdit.train: error: another process of this run ended, or can't be reached"
    ]
    (line,) = said(tmp_path, 1)
    assert f"there is no file {tmp_path / '1.json'}" in line
    assert run(2, tmp_path, "--batch-size", 2, "--seed", "RANK") == [2, 2]
    (line,) = said(tmp_path, 1)
    assert line == "hdit.train: error: options: expected what the first process has, got other ones in process 1"
    assert not (tmp_path / "run" / CHECKPOINT).exists()


# Where it runs


def test_variables_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with processes.joined():
        assert processes.count() == 1 and processes.is_first() and processes.device("cpu").type == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    missing = "^WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start all processes by torchrun$"
    with pytest.raises(ValueError, match=missing), processes.joined():
        pass

    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert processes.device() == processes.device("cuda") == torch.device("cuda:2") and chosen == [2, 2]
    assert processes.device("cpu") == torch.device("cpu")
    for name in ("cuda:1", "mps", "nonsense"):
        with pytest.raises(ValueError, match=f"^--device {name}: expected cpu, or nothing: each of 4 processes takes"):
            processes.device(name)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="^LOCAL_RANK: expected less than 3, the number of GPUs here, got 3: start"):
        processes.device()


# On GPUs


@pytest.mark.gpu
def test_losses_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    levels = tuple(replace(level, dropout=0.0) for level in ON_GPU.config.levels)
    config = replace(ON_GPU.config, levels=levels, mapping=replace(ON_GPU.config.mapping, dropout=0.0))
    words = ("--device", "cuda", "--steps", 20, "--batch-size", 16)
    for count in (1, 2):  # kernels are compiled
        assert (
            run(count, tmp_path / str(count), *words, config=config, patience=300) == [0] * count
        )  # kernels are compiled
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=0.02)  # of bfloat16
    assert two[0] == pytest.approx(one[0], rel=2e-3)
    assert said(tmp_path / "2", 0) == [
        "hdit.train: several processes: steps and samples are not captured as CUDA graphs"
    ]
    averages = [torch.load(tmp_path / "2" / f"average.{rank}", map_location="cpu") for rank in range(2)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
