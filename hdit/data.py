"""Images to train on: a folder, a .zip of one, or scikit-learn's digits; and the order in which a run sees them.

A data set here is a torch Dataset of (uint8 image [C, H, W], class index), with the names of its classes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hdit._extras import require
from hdit._runtime import progress

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB"}  # Pillow's name for an image of so many channels
NAMED = 20  # unreadable images named one by one before the rest is only counted


class DataError(ValueError):
    """The data can't be trained on; the message is one line that says what to do.

    (A DataLoader's worker process hands an error on as the text of its traceback, whose last line is the message.)
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


def seed_of(*words: int | str) -> int:
    """A seed for a random number generator, as good as independent of those of all other words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


class Images(Dataset[tuple[Tensor, int]]):
    """What the data sets below have in common.

    class_names: one for each class, in the order of their indices; empty if the images have no classes.
    excluded: names of the images that can't be read and are left out. fingerprint: a digest of which images these are.
    """

    class_names: Sequence[str] = ()
    excluded: Sequence[str] = ()
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError


class ImageFolder(Images):
    """Every image below a folder or in a .zip file, in the order of their names.

    path: the folder or zip file. size: (height, width) to crop (centre) and resize to. channels: 1 (grey) or 3 (RGB).
    excluded: images known to be unreadable (from an earlier run). If not given, every image is decoded once here, in
    threads; those that can't be are left out, named and counted on stderr. So the data is the same in every epoch.

    Classes are the folders that the images lie in, below whatever folders all images share; there are none if an image
    lies outside them or if there is just one. Hidden files and those without an image's suffix are passed over.
    Raises DataError if there is no image, none that can be read, or channels is another number.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: tuple[int, int], channels: int, excluded: Sequence[str] | None = None
    ) -> None:
        if channels not in MODES:
            raise DataError(f"images are read with 1 or 3 channels, but the model takes {channels}: change its config")
        require("PIL.Image", "train")
        self.files = _ZipFiles(Path(path)) if Path(path).is_file() else _FolderFiles(Path(path))
        self.size, self.channels = size, channels
        names = sorted(name for name in self.files.names() if _is_image(name))
        if not names:
            raise DataError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}): pass another folder or .zip")
        self.excluded = self._unreadable(names) if excluded is None else list(excluded)
        left_out = set(self.excluded)
        self.names = [name for name in names if name not in left_out]
        if not self.names:
            raise DataError(f"none of the {len(names)} images in {path} can be read: pass another folder or .zip")
        self.class_names, self.labels = _classes(self.names)
        self.fingerprint = hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        try:
            return self._read(name), self.labels[index]
        except Exception as error:  # as in _unreadable
            raise DataError(f"{name} can no longer be read ({error}): restore or remove it and start again") from error

    def _read(self, name: str) -> Tensor:
        with self.files.open(name) as file, require("PIL.Image", "train").open(file) as image:
            return to_tensor(image, self.size, self.channels)

    def _unreadable(self, names: Sequence[str]) -> list[str]:
        def problem(name: str) -> str | None:
            try:
                self._read(name)
            except Exception as error:  # Pillow's decoders and zipfile raise almost anything on damaged files
                return " ".join(str(error).split()) or type(error).__name__
            return None

        with ThreadPool() as threads:  # Pillow decodes outside the interpreter's lock
            found = threads.imap(problem, names, chunksize=16)
            problems = list(progress(found, desc="checking images", total=len(names), leave=False))
        bad = [(name, problem) for name, problem in zip(names, problems, strict=True) if problem is not None]
        if bad:
            print(f"skipped {len(bad)} of {len(names)} images, which can't be read:", file=sys.stderr)
            for name, reason in bad[:NAMED]:
                print(f"  {name}: {reason}", file=sys.stderr)
            if len(bad) > NAMED:
                print(f"  and {len(bad) - NAMED} more", file=sys.stderr)
        return [name for name, _ in bad]


class Digits(Images):
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged; ten classes. size, channels: as in ImageFolder."""

    class_names = tuple("0123456789")
    fingerprint = "scikit-learn digits"

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        from_array = require("PIL.Image", "train").fromarray
        digits = require("sklearn.datasets", "demo").load_digits()
        pixels = (digits.images * (255 / 16)).round().astype("uint8")
        self.images = torch.stack([to_tensor(from_array(image), size, channels) for image in pixels])
        self.labels = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def open_images(source: str, size: tuple[int, int], channels: int, excluded: Sequence[str] | None = None) -> Images:
    """The data set that source names: "digits", a folder or a .zip file (./digits is a folder of that name)."""
    return Digits(size, channels) if source == "digits" else ImageFolder(source, size, channels, excluded)


class BatchOrder(Sampler[list[int]]):
    """Image indices of the batches first_step, …, last_step - 1 of a run: a pure function of its arguments.

    Epoch e is a permutation drawn from (seed, e), and a batch runs on into the next epoch where one ends, so that every
    image is seen once an epoch. Resuming at any step, with any number of workers, continues the same order.
    """

    def __init__(self, count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
                    order = torch.randperm(self.count, generator=generator).tolist()
                batch.append(order[position % self.count])
            yield batch


def to_tensor(image: Any, size: tuple[int, int], channels: int) -> Tensor:
    """A Pillow image, upright, on white where transparent, cropped (centre) and resized: uint8 [channels, H, W].

    size: (height, width). channels: 1 or 3.
    """
    numpy, pillow, ops = require("numpy", "train"), require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    image = ops.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's convert would clip
        image = pillow.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    image = ops.fit(image.convert(MODES[channels]), (size[1], size[0]), pillow.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(image))
    return (pixels[:, :, None] if channels == 1 else pixels).permute(2, 0, 1).contiguous()


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _classes(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names, and the class index of every image (all 0 without classes)."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    shared = len(os.path.commonprefix(folders))
    found = [parts[shared] if len(parts) > shared else None for parts in folders]
    if None in found:  # also when all images lie in one folder
        return [], [0] * len(names)
    class_names = sorted({name for name in found if name is not None})
    index = {name: i for i, name in enumerate(class_names)}
    return class_names, [index[name] for name in found if name is not None]


class _FolderFiles:
    """The files below a folder, by their paths relative to it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"there is no folder or .zip file {path}: check --data")
        self.path = path

    def names(self) -> list[str]:
        found = (Path(folder, file) for folder, _, files in os.walk(self.path, followlinks=True) for file in files)
        return [path.relative_to(self.path).as_posix() for path in found]

    def open(self, name: str) -> IO[bytes]:
        return open(self.path / name, "rb")


class _ZipFiles:
    """The files in a .zip file. Each process opens it for itself: a file's position is shared across a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = 0
        self._zip: zipfile.ZipFile | None = None
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is neither a folder nor a .zip file: check --data")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": 0, "_zip": None}

    def names(self) -> list[str]:
        return [name for name in self._opened().namelist() if not name.endswith("/")]

    def open(self, name: str) -> IO[bytes]:
        return self._opened().open(name)

    def _opened(self) -> zipfile.ZipFile:
        if self._zip is None or self._process != os.getpid():
            self._process, self._zip = os.getpid(), zipfile.ZipFile(self.path)
        return self._zip
