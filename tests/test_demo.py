from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demo as clone_demo
from hdit import _runtime, demo
from hdit.checkpoint import read_details
from hdit.data import Digits
from hdit.demo import ON_CPU, ON_GPU, Settings, digits_demo, main, recognised
from hdit.train import CHECKPOINT
from tests.tiny import CONFIG

TINY = Settings(CONFIG, steps=3, batch_size=4, lr=1e-3, guidance=2.0, sampling_steps=2, per_class=2)


@pytest.mark.parametrize("earlier", [False, True])
def test_digits_end_to_end(tmp_path: Path, earlier: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if earlier:  # a demonstration can be repeated
        digits_demo(tmp_path, replace(TINY, steps=2), torch.device("cpu"))
    share = digits_demo(tmp_path, TINY, torch.device("cpu"))
    assert 0 <= share < 0.6  # three steps teach nothing
    details = read_details(tmp_path / "digits" / CHECKPOINT)
    assert details is not None and details.step == 3 and details.class_names == list("0123456789")
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (480, 96)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image))) > 20
    assert f"{share:.0%} of the 20 samples are taken for the digit that was asked for" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [ON_CPU, ON_GPU])
def test_the_judge_knows_digits(settings: Settings) -> None:
    digits = Digits(settings.config.image_size, 1)
    samples, classes = digits.images[:200], digits.labels[:200]
    share, accuracy = recognised(digits, samples, classes)
    assert accuracy > 0.97 and share > 0.97
    assert recognised(digits, samples, [(digit + 1) % 10 for digit in classes])[0] < 0.05
    assert recognised(digits, torch.zeros_like(samples), classes)[0] < 0.2


def test_pixels_have_the_configured_deviation() -> None:
    for settings in (ON_CPU, ON_GPU):
        pixels = Digits(settings.config.image_size, 1).images.float() / 127.5 - 1
        assert pixels.std().item() == pytest.approx(settings.config.sigma_data, abs=0.01)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole demonstration in an empty folder, with a scaling report of no measurements and the tiny model."""

    def report(directory: Path, budget_seconds: float) -> None:
        assert budget_seconds <= 60
        Image.new("L", (8, 8)).save(directory / "scaling.png")

    monkeypatch.setattr(clone_demo, "report", report)
    monkeypatch.setattr(demo, "ON_CPU", TINY)
    monkeypatch.setattr(demo, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo_output"


@pytest.mark.parametrize(
    ("program", "pictures"),
    [(main, ("samples.png", "loss.png")), (clone_demo.main, ("scaling.png", "samples.png", "loss.png"))],
    ids=["hdit", "benchmarks"],
)
def test_main_fails_on_unreadable_digits(
    program: Callable[..., None], pictures: tuple[str, ...], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"only \d+% of the samples are recognised, 80% are expected"):
        program([])
    assert {path.name for path in quick.glob("*.png")} == set(pictures)
    printed = capsys.readouterr().out
    for name in pictures:
        assert str(quick / name) in printed and (quick / name).is_file()
    assert f"torch   {torch.__version__}" in printed


def test_an_unknown_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--nonsense"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "hdit.demo: error: unrecognized arguments: --nonsense (see --help)\n"


def test_main_succeeds_on_readable_digits(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "recognised", lambda *arguments: (0.8, 0.99))
    main([])


@pytest.mark.parametrize("package", ["safetensors", "PIL", "tqdm", "numpy", "matplotlib", "sklearn", "rich"])
def test_a_missing_package_is_named_before_anything_is_measured(
    quick: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for program in [clone_demo.main, *([main] if package != "rich" else [])]:
        with pytest.raises(SystemExit, match="2"):
            program([])
        out, err = capsys.readouterr()
        assert err.endswith(f'.demo: error: {package} is needed here: pip install "hdit-kernels[demo]"\n')
        assert not out and not quick.exists()


def test_an_output_that_cant_be_written_is_named_before_anything_is_measured(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "loss.png").mkdir(parents=True)
    for program, name in ((main, "hdit"), (clone_demo.main, "benchmarks")):
        with pytest.raises(SystemExit, match="2"):
            program([])
        assert capsys.readouterr() == ("", f"{name}.demo: error: can't write demo_output/loss.png: it is a folder\n")
    (quick / "loss.png").rmdir()
    (quick / "scaling.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        clone_demo.main([])
    assert "can't write demo_output/scaling.png: it is a folder" in capsys.readouterr().err


# What is said about the machine


@pytest.fixture
def hidden_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an NVIDIA driver whose GPU torch doesn't see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_runtime, "_driver", lambda: "570.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_says_that_torch_is_a_cpu_build(hidden_gpu: pytest.MonkeyPatch) -> None:
    hidden_gpu.setattr(torch.version, "cuda", None)
    hidden_gpu.setattr(torch.version, "hip", None)
    lines = _runtime.environment()
    assert lines[2] == "driver  570.1"
    assert lines[-1].startswith("There is a GPU, but torch can't use it: torch") and "built without CUDA" in lines[-1]


def test_says_that_the_gpu_is_hidden(hidden_gpu: pytest.MonkeyPatch) -> None:
    hidden_gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _runtime.unusable_gpu() == "CUDA_VISIBLE_DEVICES hides it"
    with pytest.raises(ValueError, match="--device cuda: CUDA_VISIBLE_DEVICES hides it; pass --device cpu"):
        _runtime.pick_device("cuda")


def test_says_what_torch_says(hidden_gpu: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system\nis too old")

    hidden_gpu.setattr(torch.version, "cuda", "13.0")
    hidden_gpu.setattr(torch.cuda, "init", init)
    assert _runtime.unusable_gpu() == "The NVIDIA driver on your system is too old"


def test_says_nothing_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_runtime, "_driver", lambda: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert _runtime.unusable_gpu() is None
    assert _runtime.environment()[-1].startswith("device  CPU, ")


@pytest.mark.gpu
def test_digits_on_the_gpu(tmp_path: Path) -> None:
    """In 400 of its 2,000 steps, since the host's time for each is most of the GPU suite's."""
    assert digits_demo(tmp_path, replace(ON_GPU, steps=400), torch.device("cuda")) >= 0.8
