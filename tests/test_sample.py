from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import HDiT
from hdit._pictures import FORMATS, ImageExport, alone_in, check_grid, picture_or_folder, save
from hdit.checkpoint import Details, load_checkpoint, save_checkpoint
from hdit.data import SUFFIXES
from hdit.sample import SAMPLERS, class_indices, generate, generate_batches, image_grid, main, to_image
from tests.tiny import CONFIG, random_model

UNCONDITIONAL = replace(CONFIG, num_classes=0)


def write_checkpoint(
    path: Path, model: HDiT, ema: HDiT | None = None, class_names: Sequence[str] = "0123456789"
) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    details = Details(model.config.to_dict(), 1, class_names=list(class_names))
    save_checkpoint(path, model, ema or copy.deepcopy(model), optimizer, details)
    return path


@pytest.fixture
def model(seed: int) -> HDiT:
    return random_model()


@pytest.fixture
def checkpoint(tmp_path: Path, seed: int) -> Path:
    return write_checkpoint(tmp_path / "x.safetensors", random_model())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_and_repeats(name: str, seed: int) -> None:
    model, classes = random_model(), [0, 1, 9]
    torch.manual_seed(1)
    first = generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=7))
    assert first.shape == (3, 1, 8, 8) and first.dtype == torch.uint8
    assert not torch.equal(first, generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=8))


def test_samplers_are_those_of_the_library() -> None:
    assert {"euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"} <= SAMPLERS.keys()


def test_an_image_does_not_depend_on_the_batch(seed: int) -> None:
    model, classes = random_model(), [1, 2, 3, 4, 5]
    whole = generate(model, 5, classes, steps=4, batch_size=64).int()
    parts = generate(model, 5, classes, steps=4, batch_size=2).int()
    assert (whole - parts).abs().max() <= 1  # matrix products of other sizes round otherwise
    assert (whole[0] - whole[1]).abs().max() > 10


def test_class_and_guidance_matter(seed: int) -> None:
    model = random_model()

    def one(digit: int, guidance: float) -> torch.Tensor:
        return generate(model, 1, [digit], guidance=guidance, steps=4).int()

    assert not torch.equal(one(3, 1.0), one(4, 1.0))
    assert not torch.equal(one(3, 1.0), one(3, 2.0))
    assert torch.equal(one(3, 0.0), one(4, 0.0))  # no guidance towards either


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model: expected an HDiT, got NoneType"),
        *[({"count": count}, "count: expected an integer") for count in (0, -1, 1.5, "a", None, True, 10**30)],
        ({"classes": None}, "classes: expected one of 10 for each image, got None"),
        ({"classes": [1]}, "classes: expected one for each of 2 images, got 1"),
        ({"classes": 3}, "classes: expected one for each of 2 images, got 3"),
        *[({"classes": classes}, "classes: expected") for classes in ([0, 11], [-1, 0], [0, 1.5], [0, None], "ab")],
        *[({"sampler": name}, "sampler: expected one of") for name in ("magic", None, [])],
        *[({"guidance": scale}, "guidance: expected") for scale in (math.nan, math.inf, 1e39, "a", None)],
        ({"classes": torch.zeros(2, dtype=torch.int64, device="meta")}, "classes: expected one for each of 2 images"),
        *[({"steps": steps}, "steps: expected") for steps in (0, 2.5, None, 10**12)],
        *[({"seed": seed}, "seed: expected") for seed in (1.5, "a", None)],
        *[({"batch_size": size}, "batch_size: expected") for size in (0, 2.5, None, 10**12)],
    ],
)
def test_generate_names_what_does_not_fit(arguments: dict[str, Any], message: str, model: HDiT) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generate(**{"model": model, "count": 2, "classes": [0, 1], "steps": 1} | arguments)


@pytest.mark.parametrize("numbers", [3, None, "ab", [0.5, 1], [-1, 0], torch.arange(2)])
def test_numbers_of_images_are_integers(numbers: Any, model: HDiT) -> None:
    with pytest.raises(TypeError if numbers != [-1, 0] else ValueError, match="numbers: expected"):
        generate_batches(model, numbers, [0, 1], steps=1)


def test_models_that_need_other_images(model: HDiT) -> None:
    for other in (model.half(), model.double(), model.to("meta")):
        with pytest.raises(TypeError, match="model: expected float32 weights, got torch.float"):
            generate(other, 1, [0], steps=1)


def test_generate_without_classes(seed: int) -> None:
    unconditional = random_model(UNCONDITIONAL)
    with pytest.raises(ValueError, match="classes: expected None, the model has none"):
        generate(unconditional, 1, [1])
    with pytest.raises(ValueError, match="guidance: expected 1 for a model without classes, got 2"):
        generate(unconditional, 1, guidance=2.0)


@pytest.mark.parametrize(
    ("spoil", "guidance", "advice"),
    [
        (lambda model: model.patch_out.proj.weight.fill_(math.nan), 1.0, "weights of the model; take an earlier"),
        (lambda model: model.patch_out.proj.weight.mul_(1e20), 1e30, r"lower the guidance of 1e\+30"),
        (lambda model: model.patch_out.proj.weight.fill_(3e38), 1.0, "training went wrong; take an earlier checkpoint"),
    ],
)
def test_images_that_are_not_finite(spoil: Callable[[HDiT], object], guidance: float, advice: str, seed: int) -> None:
    model = random_model()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ValueError, match=f"image 0 is NaN or infinite: .*{advice}"):
        generate(model, 1, [1], steps=2, guidance=guidance)


def test_batches_are_drawn_one_by_one(model: HDiT) -> None:
    """Images of any numbers, in batches, are those of `generate`."""
    whole = generate(model, 6, [0, 1, 2, 3, 4, 5], steps=2)
    batches = generate_batches(model, [1, 4, 5], [1, 4, 5], steps=2, batch_size=2)
    numbers, images = next(batches)
    assert list(numbers) == [1, 4] and (images.int() - whole[[1, 4]].int()).abs().max() <= 1
    numbers, images = next(batches)
    assert list(numbers) == [5] and (images.int() - whole[[5]].int()).abs().max() <= 1


def test_grid_and_images() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 40 + 40
    grid = np.asarray(image_grid(images, columns=2))
    assert grid.shape == (3 * 5 - 1, 2 * 7 - 1, 3)
    assert (grid[5:9, 7:13] == 160).all()  # the fourth: second row, second column
    assert (grid[10:, 7:] == 0).all() and (grid[4] == 0).all()
    assert image_grid(images).size == (3 * 7 - 1, 2 * 5 - 1)
    assert to_image(images[0, :1]).mode == "L"
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_image(torch.zeros(2, 4, 4, dtype=torch.uint8))
    for wrong in (images[:0], images[0], images.float(), [images], None):
        with pytest.raises((TypeError, ValueError), match="images: expected"):
            image_grid(wrong)
    for wrong in (images, images[0].float(), None):
        with pytest.raises((TypeError, ValueError), match="pixels: expected"):
            to_image(wrong)
    for name, values in {"columns": (0, -1, 2.5), "gap": (-5, "a", 0.5)}.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
                image_grid(images, **{name: value})


def test_class_indices() -> None:
    names = ["cat", "dog", *"abcdefgh"]
    assert class_indices(["dog", "0", "9"], CONFIG, names) == [1, 0, 9]
    assert class_indices(["2"], CONFIG, ["2", *"abcdefghi"]) == [0]  # the folder 2, not the third folder
    for word in ("10", "-1", "bird", "\u00b2"):
        with pytest.raises(ValueError, match=rf"there is no class '{word}'; pass some of 0…9 \(cat, dog, a"):
            class_indices([word], CONFIG, names)
    with pytest.raises(ValueError, match="the model has no classes"):
        class_indices(["1"], UNCONDITIONAL, [])


# The command line


def run(checkpoint: Path, output: Path | str, *options: Any) -> None:
    main([str(checkpoint), "--output", str(output), "--steps", "1", "--device", "cpu", *map(str, options)])


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path | str, *options: Any) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, output, *options)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("hdit.sample: error: ") and message.count("\n") == 1, message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pictures/grid.png", "PNG"),
        ("x.PNG", "PNG"),
        ("x.jpg", "JPEG"),
        ("x.JPEG", "JPEG"),
        ("x.bmp", "BMP"),
        ("x.tif", "TIFF"),
    ],
)
def test_writes_a_grid(
    name: str, kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / name
    run(checkpoint, picture, "--count", 4)
    with Image.open(picture) as image:
        assert image.size == (17, 17) and image.format == kind
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    assert capsys.readouterr().out.strip() == str(picture)


def test_paths_are_printed_escaped(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\x1b[31m.png", "b\x1b[31m"):
        run(checkpoint, tmp_path / name, "--count", 1)
    printed = capsys.readouterr().out
    assert printed.split() == [f"{tmp_path}/{name}" for name in (r"a\x1b[31m.png", r"b\x1b[31m", r"b\x1b[31m-grid.png")]


def test_every_format_that_is_read_can_be_written() -> None:
    assert FORMATS.keys() == SUFFIXES


def test_writes_images_into_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    run(checkpoint, output, "--count", 3, "--classes", 7, 2, "--guidance", 3, "--batch-size", 2)
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "00001.png", "00002.png"]  # images only
    expected = generate(load_checkpoint(checkpoint), 3, [7, 2, 7], steps=1, guidance=3.0, batch_size=2)
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(output / f"{i:05}.png")), expected[i, 0].numpy())
    grid = tmp_path / "out-grid.png"
    assert np.array_equal(np.asarray(Image.open(grid)), np.asarray(image_grid(expected)))
    assert capsys.readouterr().out.split() == [str(output), str(grid)]


def test_the_grid_of_a_folder_is_bounded(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "out", "--count", 70, "--sampler", "euler")
    assert len(files(tmp_path / "out")) == 70
    with Image.open(tmp_path / "out-grid.png") as image:
        assert image.size == (8 * 9 - 1, 8 * 9 - 1)


def test_the_grid_of_large_images_has_fewer(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdit._pictures.MOST_PIXELS", 17 * 26)
    run(checkpoint, tmp_path / "out", "--count", 9, "--sampler", "euler")
    assert len(files(tmp_path / "out")) == 9
    with Image.open(tmp_path / "out-grid.png") as image:
        assert image.size == (3 * 9 - 1, 2 * 9 - 1)


def interrupted(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Ctrl-C while the batch of that number is drawn."""
    euler, calls = SAMPLERS["euler"], iter(range(100))

    @functools.wraps(euler)
    def stops(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(calls) == batch:
            raise KeyboardInterrupt
        return euler(*arguments, **options)

    monkeypatch.setitem(SAMPLERS, "euler", stops)


def test_an_interrupted_export_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--count", 6, "--batch-size", 2, "--sampler", "euler")
    run(checkpoint, tmp_path / "whole", *options)
    output = tmp_path / "out"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupted(patch, 2)
        with pytest.raises(SystemExit) as stop:
            run(checkpoint, output, *options)
    assert stop.value.code == 130
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"interrupted; 4 of 6 images are in {output}, the same command goes on")
    )
    finished = {name: (output / name).stat().st_mtime_ns for name in files(output)}
    assert list(finished) == ["00000.png", "00001.png", "00002.png", "00003.png"]

    (output / "00001.png").write_bytes(b"")  # what a power failure leaves
    (output / "00002.png").write_bytes((output / "00002.png").read_bytes()[:-5])
    run(checkpoint, output, *options)
    assert "2 of 6 images are there already" in capsys.readouterr().err
    assert files(output) == files(tmp_path / "whole")
    assert [name for name, time in finished.items() if (output / name).stat().st_mtime_ns == time] == [
        "00000.png",
        "00003.png",
    ]

    run(checkpoint, output, *options[:-1], "euler", "--count", 8)  # more of the same
    assert len(files(output)) == 8 and files(output).items() >= files(tmp_path / "whole").items()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", 1), "00000.png of another run (seed 0, here 1)"),
        (("--guidance", 2), "00000.png of another run (guidance 1.0, here 2.0)"),
        (("--sampler", "heun"), "00000.png of another run (sampler 'euler', here 'heun')"),
        (("--steps", 2), "00000.png of another run (steps 1, here 2)"),
        (("--classes", 0, 2), "00001.png of another run (class 1, here 2)"),
        (("--count", 2), "00002.png of another run (--count is 2 here)"),
        (("--no-ema",), "00000.png of another run (model '"),
    ],
)
def test_left_overs_of_another_run(
    change: tuple[Any, ...], words: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "x.safetensors", random_model(), ema=random_model())
    output, options = tmp_path / "out", ("--count", 3, "--sampler", "euler")
    run(checkpoint, output, *options)
    before = files(output)
    capsys.readouterr()
    message = refused(capsys, checkpoint, output, *options, *change)
    assert words in message and "--overwrite" in message
    assert files(output) == before
    run(checkpoint, output, *options, *change, "--overwrite")
    run(checkpoint, tmp_path / "fresh", *options, *change)
    assert files(output) == files(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "cat.png", "00000100.png", "00000.png", "loss.csv"])
def test_a_folder_with_other_files_is_left_alone(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training run's, its samples', and a picture that has no word of this program."""
    output = tmp_path / "out"
    output.mkdir()
    Image.new("L", (8, 8)).save(output / name, "PNG")
    before = files(output)
    for more in ((), ("--overwrite",)):
        assert f"it holds '{name}', which is no image of hdit.sample" in refused(capsys, checkpoint, output, *more)
    assert files(output) == before


def test_one_export_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "out"
    output.mkdir()
    with alone_in(output):
        assert "another hdit.sample writes into it" in refused(capsys, checkpoint, output, "--count", 1)
    run(checkpoint, output, "--count", 1)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path, *arguments: Any, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="x.png can't be written: No space left on device"):
        save(Image.new("L", (8, 8)), tmp_path / "x.png")
    assert files(tmp_path) == {"x.png": b"old"}


def test_an_error_between_images_has_its_own_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ImageExport, "write", full)
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path / "out", "--count", 2, "--sampler", "euler")
    assert capsys.readouterr().err.rpartition("\r")[2] == "hdit.sample: error: [Errno 28] No space left on device\n"


def test_a_kill_leaves_images_only(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an image lies beside the folder, and is gone once the export goes on."""
    output, png = tmp_path / "new" / "out", Image.Image.save

    def looks(self: Image.Image, path: Path, *arguments: Any, **options: Any) -> None:
        assert path.parent == output.parent and path.suffix == ".tmp"
        png(self, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", looks)
    output.mkdir(parents=True)
    (output.parent / ".00001.png.tmp").write_bytes(b"half")
    run(checkpoint, output, "--count", 2)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out-grid.png"]


def test_unconditional_model(tmp_path: Path, seed: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "x.safetensors", random_model(UNCONDITIONAL), class_names=[])
    run(checkpoint, tmp_path / "x.png", "--count", 1)
    assert (tmp_path / "x.png").exists()


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(*arguments: Any, **options: Any) -> torch.Tensor:
        raise AssertionError("an image is drawn before the error")

    for name in SAMPLERS:
        monkeypatch.setitem(SAMPLERS, name, draws)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "10"], "there is no class '10'; pass some of 0…9"),
        (["--classes", "9" * 5000], "there is no class '9999"),
        (["--device", "tpu7"], "there is no device 'tpu7'"),
        (["--guidance", "nan"], "--guidance: expected a number of at least -1e+38 and at most 1e+38, got nan"),
        (["--guidance=-inf"], "--guidance: expected a number of at least -1e+38 and at most 1e+38, got -inf"),
        (["--guidance", "a"], "--guidance"),
        (["--seed", str(2**64)], "--seed: expected an integer below 2**64"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1" + "0" * 12], "--steps: must be at most 16,777,216, got 1000"),
        (["--count", "1" + "0" * 12], "--count: must be at most 10,000,000, got 1000"),
        (["--batch-size", "1" + "0" * 12], "--batch-size: must be at most 10,000,000, got 1000"),
        (["--guidance", "1e39"], "--guidance: expected a number of at least -1e+38 and at most 1e+38"),
        (["--output", ""], "--output: expected a picture's name or a folder, got ''"),
        (["--output", "x.xyz"], "--output x.xyz: expected a name in .png, .jpg"),
        (["--output", "/"], "--output /: expected a folder below it"),
        (["--output", "file"], "--output file: it is a file and no picture"),
        (["--output", "file/x.png"], "file can't be written to (Not a directory)"),
        (["--output", "file/x"], "file/x can't be written to (Not a directory)"),
        (["--output", "/proc/x.png"], "/proc can't be written to"),
        (["--count", "1000000"], "at most 10,000 images go in a picture; a folder takes any --count"),
        (["--count", "20000", "--output", "x.jpg"], "a folder takes any --count"),
        (["--overwrite"], "--overwrite: it is for a folder"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    arguments: list[str],
    words: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_drawn: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(capsys, checkpoint, "samples.png", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "made.v1").mkdir()
    assert picture_or_folder(f"{tmp_path}/made.v1")[1] and picture_or_folder(f"{tmp_path}/new.v1/")[1]


@pytest.mark.parametrize("package", ["numpy", "PIL", "tqdm", "safetensors"])
def test_a_missing_package_is_named_first(
    package: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_drawn: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    message = refused(capsys, checkpoint, tmp_path / "out")
    assert f'{package} is needed here: pip install "hdit-kernels[train]"' in message


def test_images_that_cannot_be_saved_are_refused_first(
    tmp_path: Path, seed: int, nothing_drawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "x.safetensors", random_model(replace(CONFIG, in_channels=4, out_channels=4))
    )
    assert "have 4 channels, only 1 or 3 can be saved" in refused(capsys, checkpoint, tmp_path / "out")


def test_the_images_before_nan_are_kept(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))
    monkeypatch.setitem(SAMPLERS, "euler", lambda denoise, x, *a, **_: x * (math.nan if next(calls) == 1 else 0))
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, tmp_path / "out", "--count", 6, "--batch-size", 2, "--sampler", "euler")
    assert stop.value.code == 2 and "image 2 is NaN or infinite" in capsys.readouterr().err
    assert list(files(tmp_path / "out")) == ["00000.png", "00001.png"]


def test_images_beyond_all_memory_are_refused_first(
    tmp_path: Path, seed: int, nothing_drawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tensor in a file has the size of an image: its metadata can ask for any."""
    model = random_model()
    model.config = replace(CONFIG, image_size=(2**17, 2**17))
    checkpoint = write_checkpoint(tmp_path / "x.safetensors", model)
    message = refused(capsys, checkpoint, tmp_path / "out", "--count", 3)
    assert f"{checkpoint}: expected what " in message and "3 images of 131072 x 131072 pixels at a time" in message
    with pytest.raises(ValueError, match="^model: expected what .*, got .* 2 images of 131072 x 131072 pixels"):
        generate(model, 3, [0, 1, 2], batch_size=2)
    model.config = CONFIG
    monkeypatch.setattr("hdit._memory.memory", lambda device: 4 * (CONFIG.parameters + 2 * (64 + 16 * 16)))
    checkpoint = write_checkpoint(tmp_path / "x.safetensors", model)
    assert "3 images of 8 x 8 pixels" in refused(capsys, checkpoint, tmp_path / "out", "--count", 3)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nothing.safetensors")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "there is no checkpoint" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "count", "size", "words"),
    [
        ("x.png", 1600, (256, 256), "a grid of 1,600 images has 10,279 x 10,279 pixels, at most 89,478,485 go in a"),
        ("x.webp", 4, (64, 9000), "a grid of 4 images has 129 x 18,001 pixels, and WEBP takes sides of at most 16,383"),
    ],
)
def test_grids_too_large(name: str, count: int, size: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_grid(Path(name), count, *size)
    check_grid(Path("x.png"), 64, 1024, 1024)
