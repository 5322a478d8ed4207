from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hdit._runtime import one_line_errors
from hdit.checkpoint import read_details
from hdit.data import BatchOrder, DataError, Digits, ImageFolder, collate, open_images, seed_of
from hdit.train import main
from tests.tiny import CONFIG, write_images


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator) -> Path:
    write_images(tmp_path / "images", generator)
    return tmp_path / "images"


def zipped(folder: Path, inside: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def test_folder(folder: Path) -> None:
    images = ImageFolder(folder, (6, 10), 3)
    assert images.names == [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(4)]
    assert images.class_names == ["cats", "dogs"]
    items = [images[i] for i in range(len(images))]
    assert [label for _, label in items] == [0] * 4 + [1] * 4
    for pixels, _ in items:
        assert pixels.shape == (3, 6, 10) and pixels.dtype == torch.uint8
    assert images[0][0].float().std() > 1  # not blank


@pytest.mark.parametrize("inside", ["", "emoji/"])
def test_zip_is_the_folder(folder: Path, inside: str) -> None:
    ours, theirs = ImageFolder(zipped(folder, inside), (8, 8), 3), ImageFolder(folder, (8, 8), 3)
    assert ours.class_names == theirs.class_names and ours.labels == theirs.labels
    pairs = [(ours[i], theirs[i]) for i in range(len(theirs))]
    assert len(ours) == len(pairs) and all(torch.equal(a, b) for (a, _), (b, _) in pairs)


def test_no_classes_outside_folders(folder: Path) -> None:
    assert ImageFolder(folder / "cats", (8, 8), 3).class_names == []
    os.rename(folder / "dogs" / "0.png", folder / "0.png")
    images = ImageFolder(folder, (8, 8), 3)
    assert images.class_names == [] and images.labels == [0] * 8


def test_hidden_and_other_files_are_passed_over(folder: Path) -> None:
    (folder / "cats" / "._0.png").write_bytes(b"resource fork")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "0.png").write_bytes(b"also")
    (folder / "notes.txt").write_text("not an image")
    images = ImageFolder(folder, (8, 8), 3)
    assert len(images) == 8 and not images.excluded


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_unreadable_images_are_named_and_left_out(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "dogs" / "1.png").read_bytes()
    (folder / "dogs" / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (folder / "cats" / "3.png").write_text("hello")
    (folder / "cats" / "4.png").touch()
    path = folder if kind == "folder" else zipped(folder)
    images = ImageFolder(path, (8, 8), 3)
    bad = ["cats/3.png", "cats/4.png", "dogs/1.png"]
    assert images.excluded == bad and len(images) == 6
    message = capsys.readouterr().err
    assert "skipped 3 of 9 images" in message and all(name in message for name in bad)

    again = ImageFolder(path, (8, 8), 3, excluded=bad)
    assert again.names == images.names and again.fingerprint == images.fingerprint
    assert "skipped" not in capsys.readouterr().err
    assert ImageFolder(path, (8, 8), 3, excluded=bad[1:]).fingerprint != images.fingerprint


def test_many_unreadable_images_are_counted(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, generator)
    for i in range(25):
        (tmp_path / f"bad{i}.png").touch()
    assert len(ImageFolder(tmp_path, (8, 8), 3)) == 8
    message = capsys.readouterr().err
    assert "skipped 25 of 33 images" in message and "and 5 more" in message


def test_damaged_zip_member_is_left_out(folder: Path) -> None:
    path = zipped(folder)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.getinfo("dogs/2.png")
    content = bytearray(path.read_bytes())
    content[damaged.header_offset + 200] ^= 0xFF  # the member's checksum no longer fits
    path.write_bytes(content)
    assert ImageFolder(path, (8, 8), 3).excluded == ["dogs/2.png"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "nowhere", "there is no folder or .zip file"),
        (lambda path: path, "holds no images"),
        (lambda path: _file(path / "x.tar", b"x" * 100), "neither a folder nor a .zip file"),
        (lambda path: _file(path / "x.png", b"hello").parent, "none of the 1 images"),
    ],
)
def test_bad_sources(make, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as error:
        open_images(str(make(tmp_path)), (8, 8), 3)
    assert "\n" not in str(error.value)


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_channels_are_one_or_three(folder: Path) -> None:
    with pytest.raises(DataError, match="1 or 3 channels, but the model takes 4"):
        ImageFolder(folder, (8, 8), 4)
    with pytest.raises(DataError, match="1 or 3 channels, but the model takes 5"):
        open_images("digits", (8, 8), 5)


# What is left out, and how it is said


def test_file_names_reach_the_terminal_escaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("\x1b]0;owned\x07.png", "\u202egnp.exe.png", "two\nlines.png", "\x9b31m.png"):
        (folder / "cats" / name).write_bytes(b"hello")
    os.symlink("nothing", folder / "\x1b[31m")
    images = ImageFolder(folder, (8, 8), 3)
    assert len(images) == 8 and len(images.excluded) == 4
    said = capsys.readouterr().err
    for shown in (
        r"\x1b]0;owned\x07.png",
        r"\u202egnp.exe.png",
        r"two\nlines.png",
        r"\x9b31m.png",
        r"  \x1b[31m: a link",
    ):
        assert shown in said
    assert all(line.isprintable() for line in said.replace("\r", "\n").split("\n"))


def test_errors_reach_the_terminal_escaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "cats/\x1b[2J\u202e\n.png"
    (folder / "cats/0.png").rename(folder / name)
    images = ImageFolder(folder, (8, 8), 3)
    (folder / name).write_bytes(b"hello")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cats/\\x1b\[2J\\u202e\\n.png can no longer be read") as error:
            list(DataLoader(images, num_workers=workers))
        assert str(error.value).isprintable()
    capsys.readouterr()
    with pytest.raises(SystemExit), one_line_errors("hdit.train"):
        raise ValueError("no file \x1b[31mred\udce9\u2028.png")
    assert capsys.readouterr().err == "hdit.train: error: no file \\x1b[31mred\\udce9 .png\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems only have file names in UTF-8")
def test_a_run_with_file_names_that_are_not_utf8(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among the images, the classes and the unreadable; trained on, saved and resumed."""
    write_images(tmp_path / "images", generator)
    for image, name in (("0.png", b"caf\xe9.png"), ("1.png", b"b\xe4d.png")):
        os.rename(tmp_path / "images/cats" / image, os.fsencode(tmp_path / "images/cats") + b"/" + name)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/cats/b\xe4d.png")).write_bytes(b"hello")
    os.rename(tmp_path / "images/cats", os.fsencode(tmp_path / "images") + b"/k\xe4tzchen")
    config = replace(CONFIG, in_channels=3, out_channels=3, num_classes=3).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = ["--output", str(tmp_path / "run"), "--batch-size", "2", "--sample-every", "0", "--device", "cpu"]
    run += ["--workers", "0"]
    main(["--data", str(tmp_path / "images"), "--config", str(tmp_path / "config.json"), "--steps", "1", *run])
    assert r"k\udce4tzchen/b\udce4d.png: not a picture" in capsys.readouterr().err
    details = read_details(tmp_path / "run/checkpoint.safetensors")
    assert details is not None and details.excluded == ["k\udce4tzchen/b\udce4d.png"]
    assert details.class_names == ["dogs", "k\udce4tzchen"]
    main(["--resume", "--steps", "2", *run])


# Labels in dataset.json


@pytest.fixture
def buckets(tmp_path: Path, generator: torch.Generator) -> Path:
    """As EDM's dataset_tool.py writes it."""
    write_images(tmp_path, generator)
    os.rename(tmp_path / "cats", tmp_path / "00000")
    os.rename(tmp_path / "dogs", tmp_path / "00001")
    return tmp_path


def label(buckets: Path, *labels: object) -> None:
    (buckets / "dataset.json").write_text(json.dumps({"labels": labels or None}))


NAMES = [f"0000{bucket}/{i}.png" for bucket in range(2) for i in range(4)]


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of a folder"])
def test_labels_are_those_of_dataset_json(buckets: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    label(buckets, *([name, i % 3] for i, name in enumerate(NAMES)))
    inside = "ffhq/" if kind.endswith("folder") and kind != "folder" else ""
    images = ImageFolder(buckets if kind == "folder" else zipped(buckets, inside), (8, 8), 3)
    assert images.class_names == ["0", "1", "2"] and images.labels == [0, 1, 2, 0, 1, 2, 0, 1]
    assert images.names == [inside + name for name in NAMES] and images[4][1] == 1
    assert "%|" in (said := capsys.readouterr().err) and "dataset.json" not in said


def test_buckets_are_no_classes(buckets: Path) -> None:
    label(buckets)
    images = ImageFolder(buckets, (8, 8), 3)
    assert images.class_names == [] and images.labels == [0] * 8


def test_images_and_labels_that_do_not_fit_are_named(buckets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label(buckets, *([name, i] for i, name in enumerate(NAMES[1:])), ["00000/gone.png", 7])
    (buckets / "00000/dataset.json").write_text("{}")
    images = ImageFolder(buckets, (8, 8), 3)
    assert images.names == NAMES[1:] and images.labels == list(range(7))
    assert images.class_names == [str(i) for i in range(8)]  # all of the file's, whichever images are there
    said = capsys.readouterr().err
    for words in ("00000/0.png: no label", "00000/gone.png: no image", "00000/dataset.json: not at the root"):
        assert words in said

    label(buckets, ["0.png", 1])
    with pytest.raises(DataError, match="dataset.json labels none of the 8 images"):
        ImageFolder(buckets, (8, 8), 3)
    (buckets / "dataset.json").write_text('{"labels": [')
    with pytest.raises(DataError, match="^dataset.json: damaged"):
        ImageFolder(buckets, (8, 8), 3)


# Which images these are


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_fingerprint_shows_what_changed(folder: Path, kind: str) -> None:
    def fingerprint() -> str:
        return ImageFolder(folder if kind == "folder" else zipped(folder), (8, 8), 3, excluded=[]).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    os.utime(folder / "cats/0.png", (1e9, 1e9))  # as after copying
    assert fingerprint() == first
    content = (folder / "cats/0.png").read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    (folder / "cats/0.png").write_bytes(changed)
    assert fingerprint() != first
    (folder / "cats/0.png").write_bytes(content)
    (folder / "dogs/0.png").rename(folder / "dogs/9.png")
    assert fingerprint() != first
    (folder / "dogs/9.png").rename(folder / "dogs/0.png")
    assert fingerprint() == first
    names = [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(4)]
    label(folder, *([name, 0] for name in names))
    labelled = fingerprint()
    label(folder, *([name, int(name == names[0])] for name in names))
    assert len({first, labelled, fingerprint()}) == 3


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match='numpy is needed here: pip install "hdit-kernels'):
        ImageFolder(folder, (8, 8), 3)


def test_digits() -> None:
    digits = open_images("digits", (16, 16), 1)
    assert isinstance(digits, Digits) and len(digits) == 1797 and len(digits.class_names) == 10
    pixels, label = digits[1]
    assert pixels.shape == (1, 16, 16) and label == 1
    assert pixels.min() == 0 and pixels.max() > 240
    assert torch.equal(Digits((8, 8), 3)[1][0], Digits((8, 8), 1)[1][0].expand(3, 8, 8))


def test_digits_beyond_the_memory_are_refused() -> None:
    with pytest.raises(DataError, match="digits of 65536 x 131072 pixels take 28,752 GiB of memory, and there are "):
        open_images("digits", (2**16, 2**17), 1)


# Order


def test_every_epoch_is_a_permutation(seed: int) -> None:
    batches = list(BatchOrder(count=10, batch_size=4, seed=seed, first_step=0, last_step=5))
    order = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("count", 0, ValueError),
        ("batch_size", 2.0, TypeError),
        ("first_step", -1, ValueError),
        ("seed", "a", TypeError),
    ],
)
def test_wrong_arguments_of_the_order_are_named(name: str, value: object, kind: type[Exception]) -> None:
    arguments = {"count": 5, "batch_size": 2, "seed": 0, "first_step": 0, "last_step": 3} | {name: value}
    with pytest.raises(kind, match=f"^{name}: expected an integer of at least"):
        BatchOrder(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_order_continues_from_any_step(seed: int, batch_size: int) -> None:
    whole = list(BatchOrder(23, batch_size, seed, 0, 20))
    for first in (1, 6, 19):
        assert list(BatchOrder(23, batch_size, seed, first, 20)) == whole[first:]
    assert whole != list(BatchOrder(23, batch_size, seed + 1, 0, 20))


def test_workers_do_not_change_the_order(folder: Path) -> None:
    images = ImageFolder(zipped(folder), (8, 8), 3)

    def batches(workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        order = BatchOrder(len(images), 3, seed=1, first_step=2, last_step=10)
        return [(pixels, labels) for pixels, labels in DataLoader(images, batch_sampler=order, num_workers=workers)]

    for (a, b), (c, d) in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("size", [(0, 8), (8.0, 8.0), (8, 8, 8), "8"])
def test_sizes_are_looked_at_first(folder: Path, size: Any) -> None:
    """They were said to be images that can't be read."""
    for source, channels in ((str(folder), 3), ("digits", 1)):
        with pytest.raises((TypeError, ValueError), match="^size: expected"):
            open_images(source, size, channels)
    with pytest.raises(DataError, match=r"1 or 3 channels, but the model takes \[3\]"):
        open_images(str(folder), (8, 8), [3])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_data_sets_go_to_spawned_processes(folder: Path, kind: str) -> None:
    images = ImageFolder(folder if kind == "folder" else zipped(folder), (8, 8), 3)
    sent = pickle.loads(pickle.dumps(images))
    assert all(torch.equal(sent[i][0], images[i][0]) and sent[i][1] == images[i][1] for i in range(len(images)))


def test_image_lost_while_running_is_named_in_one_line(folder: Path) -> None:
    images = ImageFolder(folder, (8, 8), 3)
    (folder / "dogs" / "2.png").unlink()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^dogs/2.png can no longer be read \(.*\): restore or remove it") as error:
            list(DataLoader(images, num_workers=workers))
        assert "\n" not in str(error.value)


def test_seeds_differ() -> None:
    seeds = {seed_of(seed, word, number) for seed in range(4) for word in ("step", "epoch") for number in range(100)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, "step", 2) == seed_of(1, "step", 2)


def test_another_default_device_changes_nothing(folder: Path) -> None:
    images, order = ImageFolder(folder, (8, 8), 3), BatchOrder(8, 3, seed=1, first_step=0, last_step=3)
    expected = [collate([images[i] for i in batch]) for batch in order]
    with torch.device("meta"):
        found = [collate([images[i] for i in batch]) for batch in order]
    for (pixels, labels), (a, b) in zip(found, expected, strict=True):
        assert torch.equal(pixels, a) and torch.equal(labels, b) and labels.dtype == torch.int64
