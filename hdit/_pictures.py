"""Pictures of samples: a grid in one file, or a folder of images, in which an interrupted export goes on."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit.data import MODES
from hdit_kernels import checks

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
    ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
LONGEST = {"JPEG": 65_500, "WEBP": 16_383}  # sides in pixels
MOST_IMAGES = 10_000  # of a grid in one file
MOST_PIXELS = 89_478_485  # of a grid: Pillow warns of larger pictures when it opens them
IN_GRID = 64  # so many images of a folder are shown in the grid beside it
TEXT = "hdit.sample"  # the PNG text chunk that says what an image was drawn with
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def to_image(pixels: Tensor) -> Any:
    """uint8 [C, H, W] with 1 or 3 channels -> a Pillow image."""
    _check_pixels("pixels", pixels, ["C", "H", "W"])
    if pixels.shape[0] not in MODES:
        raise ValueError(f"only images of 1 or 3 channels can be saved, got {pixels.shape[0]}")
    array = pixels.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    return require("PIL.Image", "train").fromarray(array)


def _check_pixels(name: str, pixels: Tensor, shape: list[int | str]) -> None:
    checks.tensor(name, pixels)
    checks.same_dtype(**{"pictures": torch.uint8, name: pixels.dtype})
    checks.shape(name, pixels, shape)
    checks.nonempty(name, pixels, 0)


class Grid:
    """One picture of `count` images, row by row, filled as they come; as square as possible if columns isn't given."""

    def __init__(self, count: int, height: int, width: int, columns: int | None = None, gap: int = 1) -> None:
        self.columns, self.pitch = columns or math.ceil(count**0.5), (height + gap, width + gap)
        rows = math.ceil(count / self.columns)
        self.size = rows * (height + gap) - gap, self.columns * (width + gap) - gap
        self._canvas: Tensor | None = None
        self._shown = 0

    def add(self, images: Tensor) -> None:
        """images: uint8 [N, C, H, W]."""
        if self._canvas is None:
            self._canvas = images.new_zeros(images.shape[1], *self.size)
        for image in images:
            (row, column), (height, width) = divmod(self._shown, self.columns), image.shape[1:]
            y, x = row * self.pitch[0], column * self.pitch[1]
            self._canvas[:, y : y + height, x : x + width] = image
            self._shown += 1

    def picture(self) -> Any:
        """As a Pillow image."""
        assert self._canvas is not None
        return to_image(self._canvas)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 1) -> Any:
    """uint8 [N, C, H, W] -> one Pillow image, row by row; as square as possible if columns isn't given."""
    _check_pixels("images", images, ["N", "C", "H", "W"])
    if columns is not None:
        checks.integer("columns", columns)
    checks.integer("gap", gap, 0)
    count, _, height, width = images.shape
    grid = Grid(count, height, width, columns, gap)
    grid.add(images)
    return grid.picture()


def check_grid(path: Path, count: int, height: int, width: int) -> None:
    """Raises ValueError if a grid of so many images is too large for a picture, or path's format can't hold it."""
    size, kind = Grid(count, height, width).size, FORMATS[path.suffix.lower()]
    if count > MOST_IMAGES:
        raise ValueError(f"--output {path}: at most {MOST_IMAGES:,} images go in a picture; a folder takes any --count")
    shape = f"a grid of {count:,} images has {size[0]:,} x {size[1]:,} pixels"
    if math.prod(size) > MOST_PIXELS:
        what = f"at most {MOST_PIXELS:,} go in a picture"
        raise ValueError(f"--output {path}: {shape}, {what}; a folder takes any --count")
    if max(size) > LONGEST.get(kind, max(size)):
        raise ValueError(f"--output {path}: {shape}, and {kind} takes sides of at most {LONGEST[kind]:,}: pass a .png")


def picture_or_folder(name: str) -> tuple[Path, bool]:
    """What --output means: a path, and whether it is a folder.

    An existing folder, a name that ends in / and one without a suffix are folders; one with a picture's suffix, of any
    case, is a file. Raises ValueError on another suffix, and on a file where a folder is meant.
    """
    if not name:
        raise ValueError("--output: expected a picture's name or a folder, got ''")
    path, slash = Path(name), name.endswith(("/", os.sep))
    if path.is_dir():
        return path, True
    kind = FORMATS.get(path.suffix.lower())
    if kind is not None and not slash:
        image = require("PIL.Image", "train")
        image.init()
        if kind not in image.SAVE:
            raise ValueError(f"--output {name}: this Pillow can't write {path.suffix}; pass a .png")
        return path, False
    if path.exists():
        raise ValueError(f"--output {name}: it is a file and no picture; pass a folder, or a name in .png")
    if path.suffix and not slash:
        known = ", ".join(FORMATS)
        raise ValueError(f"--output {name}: expected a name in {known}, or a folder (end its name with /)")
    return path, True


def save(picture: Any, path: Path, unfinished: Path | None = None, **options: Any) -> None:
    """Writes a Pillow image under a hidden temporary name, and gives it its own once it is whole.

    unfinished: the folder of the temporary file, on path's file system; path's own if not given. Raises OSError, naming
    path, if that fails.
    """
    temporary = (unfinished or path.parent) / f".{path.name}.tmp"
    try:
        picture.save(temporary, FORMATS[path.suffix.lower()], **options)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class ImageExport:
    """A folder with a PNG for each image, 00000.png and so on, and a grid of the first of them beside it.

    Each file says in a text chunk what it was drawn with. So an export can go on where it stopped, and the images of
    another run are told from this one's.

    settings: of the run, whatever decides what the images are. classes: the class index of each image, None without.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], classes: list[int] | None, count: int) -> None:
        self.path, self.settings, self.classes, self.count = path, dict(settings), classes, count
        self.grid = grid_beside(path)

    def finished(self, overwrite: bool) -> set[int]:
        """The numbers of the images of this run that the folder holds.

        overwrite: whether to delete images of another run. Raises ValueError if there are such images otherwise, or
        anything that is no image of hdit.sample.
        """
        done, others = set(), {}
        for name in sorted(os.listdir(self.path)):
            if name.startswith("."):
                continue
            path, number = self.path / name, _number(name)
            label = _label(path) if number is not None and path.is_file() else None
            if number is None or label is None:
                if number is not None and path.is_file() and path.stat().st_size == 0:  # the machine lost its power
                    continue
                raise ValueError(
                    f"--output {self.path}: it holds {name!r}, which is no image of hdit.sample; pass another folder"
                )
            different = self._difference(label, number)
            if different is not None:
                others[path] = different
            elif _whole(path):
                done.add(number)
        if others and not overwrite:
            path, different = next(iter(others.items()))
            raise ValueError(
                f"--output {self.path}: it holds {path.name} of another run ({different}); pass that run's options to "
                "go on with it, another folder, or --overwrite"
            )
        for path in others:
            path.unlink()
        return done

    def write(self, number: int, pixels: Tensor) -> None:
        """pixels: uint8 [C, H, W]."""
        info = require("PIL.PngImagePlugin", "train").PngInfo()
        info.add_text(TEXT, json.dumps(self._label(number)))
        beside = self.grid.parent  # where a kill may leave half an image
        unfinished = beside if beside.stat().st_dev == self.path.stat().st_dev else None
        save(to_image(pixels), self.path / f"{number:05}.png", unfinished, pnginfo=info)

    def write_grid(self) -> None:
        """Writes the grid beside the folder, of as many of the first images as a picture takes."""
        numpy, image = require("numpy", "train"), require("PIL.Image", "train")
        count = min(self.count, IN_GRID)
        while count > 1 and math.prod(Grid(count, *self.settings["size"]).size) > MOST_PIXELS:
            count -= 1
        grid = Grid(count, *self.settings["size"])
        for number in range(count):
            with image.open(self.path / f"{number:05}.png", formats=["PNG"]) as opened:
                pixels = torch.from_numpy(numpy.array(opened))
            grid.add(pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None])
        save(grid.picture(), self.grid)

    def _label(self, number: int) -> dict[str, Any]:
        return self.settings | {"class": None if self.classes is None else self.classes[number], "number": number}

    def _difference(self, label: Mapping[str, Any], number: int) -> str | None:
        """What tells an image from this run's image of that number, in words."""
        if number >= self.count:
            return f"--count is {self.count} here"
        for name, value in self._label(number).items():
            if label.get(name) != value:
                return f"{name} {label.get(name)!r}, here {value!r}"
        return None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other exports out of a folder, where the system can; raises ValueError if one is at work there."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {folder}: another hdit.sample writes into it; pass another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def grid_beside(folder: Path) -> Path:
    """Where the grid of a folder of images lies: beside it, since the folder holds images only."""
    folder = folder.resolve()
    if not folder.name:
        raise ValueError(f"--output {folder}: expected a folder below it")
    return folder.with_name(f"{folder.name}-grid.png")


def _number(name: str) -> int | None:
    digits = re.fullmatch(r"(\d{5,})\.png", name, re.ASCII)
    number = int(digits[1]) if digits else None
    return number if number is not None and name == f"{number:05}.png" else None


def _label(path: Path) -> dict[str, Any] | None:
    """What an image says it was drawn with; None if it says nothing or is no PNG."""
    image = require("PIL.Image", "train")
    try:
        with image.open(path, formats=["PNG"]) as opened:
            label = json.loads(opened.info[TEXT])
    except (OSError, ValueError, KeyError, SyntaxError, image.DecompressionBombError):
        return None
    return label if isinstance(label, dict) else None


def _whole(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(PNG_END)))
        return file.read() == PNG_END
