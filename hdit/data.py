"""Images to train on: a folder, a .zip of one, or scikit-learn's digits; and the order in which a run sees them.

A data set here is a torch Dataset of (uint8 image [C, H, W], class index), with the names of its classes.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hdit._extras import require
from hdit._memory import memory
from hdit._runtime import printable, progress
from hdit.classes import LABELS, find_labels, folder_classes, read_labels
from hdit.files import DataError, FolderFiles, ZipFiles
from hdit.images import MODES, SUFFIXES, is_image, open_image, to_tensor
from hdit_kernels import checks

NAMED = 20  # files that are left out and named one by one before the rest is only counted

T = TypeVar("T")


def seed_of(*words: int | str) -> int:
    """A seed for a random number generator, as good as independent of those of all other words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


class Images(Dataset[tuple[Tensor, int]]):
    """What the data sets below have in common.

    class_names: one for each class, in the order of their indices; empty if the images have no classes.
    excluded: names of the images that can't be read and are left out. fingerprint: a digest of which images these are,
    of their classes, and of a part of their contents.
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

    Classes are the labels in a dataset.json at the data set's root (see hdit.classes). Without one they are the folders
    that the images lie in, below whatever folders all images share; there are none if an image lies outside them or if
    there is just one. Hidden files and those without an image's suffix are passed over. Links to folders are followed,
    each folder is entered once. What else is left out is named on stderr.
    Raises DataError if there is no image, none that can be read, the dataset.json is damaged, or channels is another
    number.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: tuple[int, int], channels: int, excluded: Sequence[str] | None = None
    ) -> None:
        _check_channels(channels)
        for package in ("numpy", "PIL.Image"):  # rather than once for each image
            require(package, "train")
        self.files = ZipFiles(Path(path)) if Path(path).is_file() else FolderFiles(Path(path))
        self.size, self.channels = checks.pair("size", size), channels
        files = self.files.names()
        _report(f"left out of {path}", self.files.passed_over)
        names = sorted(name for name in files if is_image(name))
        if not names:
            raise DataError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}): pass another folder or .zip")
        labels = self._labels(files, names)
        if labels is not None:
            names = [name for name in names if name in labels[1]]
        self.excluded = self._unreadable(names) if excluded is None else list(excluded)
        left_out = set(self.excluded)
        self.names = [name for name in names if name not in left_out]
        if not self.names:
            raise DataError(f"none of the {len(names)} images in {path} can be read: pass another folder or .zip")
        if labels is None:
            self.class_names, self.labels = folder_classes(self.names)
        else:
            self.class_names, self.labels = labels[0], [labels[1][name] for name in self.names]
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        try:
            return self._read(name), self.labels[index]
        except Exception as error:  # as in _unreadable
            raise DataError(f"{name} can no longer be read ({error}): restore or remove it and start again") from error

    def _read(self, name: str) -> Tensor:
        with self.files.open(name) as file, open_image(file) as image:
            return to_tensor(image, self.size, self.channels)

    def _labels(self, files: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, int]] | None:
        """Class names, and the class index of each of the images that a dataset.json labels; None without one."""
        source = find_labels(files, names)
        others = [name for name in files if f"/{name}".endswith(f"/{LABELS}") and name != source]
        _report("not used", [(name, "not at the root of the data, above all images") for name in others])
        if source is None:
            return None
        try:
            with self.files.open(source) as file:
                content = file.read()
        except Exception as error:
            raise DataError(f"{source} can't be read ({error}): restore or remove it") from error
        labels = read_labels(source, content)
        if labels is None:
            return [], dict.fromkeys(names, 0)
        known = set(names)
        _report(f"labelled in {source}, but not there", [(name, "no image") for name in labels[1] if name not in known])
        unlabelled = [(name, "no label") for name in names if name not in labels[1]]
        if len(unlabelled) == len(names):
            raise DataError(f"{source} labels none of the {len(names)} images: mend it, or remove it")
        _report(f"left out, since {source} doesn't label them", unlabelled)
        return labels

    def _unreadable(self, names: Sequence[str]) -> list[str]:
        def problem(name: str) -> str | None:
            try:
                self._read(name)
            except Exception as error:  # Pillow's decoders and zipfile raise almost anything on damaged files
                return " ".join(str(error).split()) or type(error).__name__
            return None

        problems = _in_threads(problem, names, "checking images")
        bad = [(name, problem) for name, problem in zip(names, problems, strict=True) if problem is not None]
        _report(f"skipped {len(bad)} of {len(names)} images, which can't be read", bad)
        return [name for name, _ in bad]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(ascii(list(self.class_names)).encode())
        try:
            signatures = _in_threads(self.files.signature, self.names, "sampling images")
        except OSError as error:
            raise DataError(f"an image can no longer be read ({error}): restore it") from error
        for entry in zip(self.names, self.labels, signatures, strict=True):
            digest.update(ascii(entry).encode())  # ASCII, whatever is in a name
        return digest.hexdigest()


class Digits(Images):
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged; ten classes. size, channels: as in ImageFolder.

    Raises DataError if channels is another number, or the memory can't hold them.
    """

    class_names = tuple("0123456789")
    fingerprint = "scikit-learn digits"

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        _check_channels(channels)
        size = checks.pair("size", size)
        digits = require("sklearn.datasets", "demo").load_digits()
        need = 2 * len(digits.images) * channels * math.prod(size)  # one by one, and then stacked
        if need > (there := memory(torch.device("cpu"))):
            what = f"digits of {size[0]} x {size[1]} pixels take {need / 2**30:,.0f} GiB of memory"
            raise DataError(f"{what}, and there are {there / 2**30:.0f}: pass a smaller --image-size")
        from_array = require("PIL.Image", "train").fromarray
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
    image is seen once an epoch. Resuming at any step, with any number of workers, continues the same order. part: which
    of each batch's indices to give, as one of several processes.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, first_step: int, last_step: int, part: slice = slice(None)
    ) -> None:
        self.count, self.batch_size = checks.integer("count", count), checks.integer("batch_size", batch_size)
        self.seed = checks.integer("seed", seed, minimum=-(2**63))
        self.steps = range(checks.integer("first_step", first_step, 0), checks.integer("last_step", last_step, 0))
        self.part = part

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, "epoch", epoch))
                    order = torch.randperm(self.count, generator=generator, device="cpu").tolist()
                batch.append(order[position % self.count])
            yield batch[self.part]


def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of a data set's items: uint8 [B, C, H, W] and int64 [B], on the CPU whatever torch's default device."""
    pixels, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels, device="cpu")


def _check_channels(channels: int) -> None:
    if channels not in tuple(MODES):
        raise DataError(f"images are read with 1 or 3 channels, but the model takes {channels}: change its config")


def _in_threads(function: Callable[[str], T], names: Sequence[str], desc: str) -> list[T]:
    """function of each name, in order. Pillow decodes, and files are read, outside the interpreter's lock."""
    with ThreadPool() as threads:
        found = threads.imap(function, names, chunksize=16)
        return list(progress(found, desc=desc, total=len(names), leave=False))


def _report(headline: str, left_out: Sequence[tuple[str, str]]) -> None:
    """Says on stderr what is left out, and why; nothing if there is nothing."""
    if left_out:
        lines = [f"{headline}:", *(f"  {name}: {reason}" for name, reason in left_out[:NAMED])]
        if len(left_out) > NAMED:
            lines.append(f"  and {len(left_out) - NAMED} more")
        print(*map(printable, lines), sep="\n", file=sys.stderr)
