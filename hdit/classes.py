"""Which class each image is of: what dataset.json says, as in the data sets of EDM and StyleGAN, or its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from hdit._files import parse_json
from hdit.files import DataError
from hdit_kernels import checks

LABELS = "dataset.json"


def folder_classes(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names, and the class index of every image (all 0 without classes): the folders below those all share."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    shared = len(os.path.commonprefix(folders))
    found = [parts[shared] if len(parts) > shared else None for parts in folders]
    if None in found:  # also when all images lie in one folder
        return [], [0] * len(names)
    class_names = sorted({name for name in found if name is not None})
    index = {name: i for i, name in enumerate(class_names)}
    return class_names, [index[name] for name in found if name is not None]


def find_labels(files: Sequence[str], images: Sequence[str]) -> str | None:
    """The dataset.json at the root of a data set: in a folder that all images lie in, or in one below; None without."""
    shared = os.path.commonprefix([PurePosixPath(name).parent.parts for name in images])
    roots = {"/".join((*shared[:depth], LABELS)) for depth in range(len(shared) + 1)}
    return min(roots.intersection(files), key=len, default=None)


def read_labels(name: str, content: bytes) -> tuple[list[str], dict[str, int]] | None:
    """Class names, and the class index of each image that a dataset.json labels, by its name in the data set.

    name: of the dataset.json in the data set. Labels are numbers from 0 on, of 63 bits, each of which is a class named
    by it, in numeric order; or one-hot vectors, of as many classes as they are long. None if there are none ("labels":
    null).
    Raises DataError if anything else is in it.
    """

    def wrong(what: str) -> DataError:
        return DataError(f"{name}: {what}; mend it, or remove it to take the folders for classes")

    try:  # a file name in it need not be UTF-8 either
        found = parse_json("damaged", content.decode("utf-8-sig", "surrogateescape"))
    except ValueError as error:
        raise wrong(str(error)) from error
    if not isinstance(found, dict) or "labels" not in found:
        raise wrong('expected an object with "labels": [[name, label], ...] or null')
    if found["labels"] in (None, []):
        return None
    by_name: dict[str, Any] = {}
    for entry in found["labels"] if isinstance(found["labels"], list) else [found["labels"]]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise wrong(f"expected [name, label] in labels, got {checks.shown(entry)}")
        if by_name.setdefault(entry[0], entry[1]) != entry[1]:
            raise wrong(f"two labels for {entry[0]}")
    first = next(iter(by_name.values()))
    length = len(first) if isinstance(first, list) else None
    for image, label in by_name.items():
        if not (_is_number(label) if length is None else _is_one_hot(label, length)):
            wanted = "numbers from 0 on, below 2**63" if length is None else f"one-hot vectors of length {length}"
            raise wrong(f"expected labels that are {wanted}, like the first, got {checks.shown(label)} for {image}")
    numbers = {image: label if length is None else label.index(1) for image, label in by_name.items()}
    classes = sorted(set(numbers.values())) if length is None else range(length)
    index = {number: i for i, number in enumerate(classes)}
    folder = name.removesuffix(LABELS)
    return [str(number) for number in classes], {folder + image: index[number] for image, number in numbers.items()}


def _is_number(label: Any) -> bool:
    return type(label) is int and 0 <= label < 2**63  # what EDM's loader takes, too


def _is_one_hot(label: Any, length: int) -> bool:
    if not (isinstance(label, list) and len(label) == length and all(type(entry) in (int, float) for entry in label)):
        return False
    return label.count(1) == 1 and label.count(0) == length - 1
