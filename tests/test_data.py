from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hdit.data import BatchOrder, DataError, Digits, ImageFolder, open_images, seed_of, to_tensor
from tests.tiny import write_images


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


# Decoding


def test_crop_is_the_centre() -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 200
    assert (to_tensor(Image.fromarray(pixels), (10, 10), 1) == 200).all()
    assert (to_tensor(Image.fromarray(pixels.T.copy()), (10, 10), 1) == 200).all()


def test_size_is_height_and_width() -> None:
    image = Image.new("L", (40, 20))  # Pillow's order: width, height
    assert to_tensor(image, (20, 40), 3).shape == (3, 20, 40)


def test_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (to_tensor(image, (4, 4), 3) == 255).all()
    assert to_tensor(Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (4, 4), 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled() -> None:
    pixels = np.full((4, 4), 257 * 100, np.uint16)
    assert (to_tensor(Image.fromarray(pixels), (4, 4), 1) == 100).all()


def test_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        turned = to_tensor(image, (8, 8), 3)
    assert (turned[:, :4] == 0).all() and (turned[:, 4:] == 255).all()


def test_digits() -> None:
    digits = open_images("digits", (16, 16), 1)
    assert isinstance(digits, Digits) and len(digits) == 1797 and len(digits.class_names) == 10
    pixels, label = digits[1]
    assert pixels.shape == (1, 16, 16) and label == 1
    assert pixels.min() == 0 and pixels.max() > 240
    assert torch.equal(Digits((8, 8), 3)[1][0], Digits((8, 8), 1)[1][0].expand(3, 8, 8))


# Order


def test_every_epoch_is_a_permutation(seed: int) -> None:
    batches = list(BatchOrder(count=10, batch_size=4, seed=seed, first_step=0, last_step=5))
    order = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


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
