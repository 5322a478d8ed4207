from __future__ import annotations

import json

import pytest

from hdit.classes import find_labels, folder_classes, read_labels
from hdit.files import DataError


def read(labels: object, name: str = "dataset.json") -> tuple[list[str], dict[str, int]] | None:
    return read_labels(name, json.dumps({"labels": labels}).encode())


def test_folders_are_classes_below_those_that_all_share() -> None:
    assert folder_classes(["x/b/0.png", "x/a/c/0.png"]) == (["a", "b"], [1, 0])
    assert folder_classes(["x/0.png", "x/a/0.png"]) == folder_classes(["a/0.png", "a/1.png"]) == ([], [0, 0])


def test_the_labels_file_is_at_the_root() -> None:
    images = ["x/00000/0.png", "x/00001/1.png"]
    assert find_labels(["dataset.json", *images], images) == "dataset.json"
    assert find_labels(["x/dataset.json", *images], images) == "x/dataset.json"
    assert find_labels(["x/dataset.json", "dataset.json", *images], images) == "dataset.json"
    assert find_labels(["x/00000/dataset.json", "x/dataset.json.gz", *images], images) is None
    assert find_labels(["dataset.json", images[0]], images[:1]) == "dataset.json"  # one bucket


def test_numbers_are_classes_in_numeric_order() -> None:
    assert read([["0.png", 2], ["1.png", 0], ["2.png", 1]]) == (["0", "1", "2"], {"0.png": 2, "1.png": 0, "2.png": 1})
    assert read([["0.png", 10], ["1.png", 9], ["2.png", 10]]) == (["9", "10"], {"0.png": 1, "1.png": 0, "2.png": 1})
    assert read([["0.png", 0]], "x/dataset.json") == (["0"], {"x/0.png": 0})
    assert read([["0.png", 2**63 - 1]]) == (["9223372036854775807"], {"0.png": 0})


def test_one_hot_vectors_are_classes() -> None:
    assert read([["0.png", [0, 0, 1.0]], ["1.png", [1, 0, 0]]]) == (["0", "1", "2"], {"0.png": 2, "1.png": 0})


def test_there_may_be_no_labels() -> None:
    assert read(None) is None and read([]) is None


def test_names_that_are_not_utf8() -> None:
    _, labels = read_labels("dataset.json", b'\xef\xbb\xbf{"labels": [["caf\xe9.png", 0]], "more": 1}') or ([], {})
    assert labels == {"caf\udce9.png": 0}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("text", r"expected \[name, label\] in labels, got 'text'"),
        ({"0.png": 1}, r"expected \[name, label\] in labels"),
        ([["0.png"]], r"expected \[name, label\] in labels"),
        ([[1, "0.png"]], r"expected \[name, label\] in labels"),
        ([["0.png", 1], ["0.png", 2]], "two labels for 0.png"),
        ([["0.png", -1]], r"numbers from 0 on, below 2\*\*63, like the first, got -1 \(int\) for 0.png"),
        ([["0.png", True]], "numbers from 0 on"),
        ([["0.png", 0], ["1.png", 2**63]], r"got 9223372036854775808 \(int\) for 1.png"),
        ([["0.png", 10**4000]], r"got 10{17}\.\.\.0{19} \(int\) for 0.png"),
        ([["0.png", 1.5]], "numbers from 0 on"),
        ([["0.png", "cat"]], "numbers from 0 on"),
        (
            [["0.png", 0], ["1.png", None]],
            r"below 2\*\*63, like the first, got None \(NoneType\) for 1.png",
        ),
        ([["0.png", 0], ["1.png", [0, 1]]], "numbers from 0 on"),
        ([["0.png", [0, 1]], ["1.png", 0]], "one-hot vectors of length 2"),
        ([["0.png", [0, 1]], ["1.png", [0, 1, 0]]], "one-hot vectors of length 2"),
        ([["0.png", [0.5, 0.5]]], r"one-hot vectors of length 2, like the first, got \[0.5, 0.5\] \(list\) for 0.png"),
        ([["0.png", [1, 1]]], "one-hot vectors"),
        ([["0.png", []]], "one-hot vectors"),
        ([["0.png", ["a", 1]]], "one-hot vectors"),
        ([["0.png", [False, True]]], "one-hot vectors"),
    ],
)
def test_other_labels_are_refused(labels: object, words: str) -> None:
    with pytest.raises(DataError, match=f"^dataset.json: .*{words}.*; mend it, or remove it"):
        read(labels)


TWICE = b'{"labels": [["0.png", 0]], "labels": null}'


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x89PNG", b"[" * 100_000, b"1" * 10_000, b"[]", b"{}", b"null", TWICE]
)
def test_damaged_files_are_one_line(content: bytes) -> None:
    with pytest.raises(DataError, match="^dataset.json: (damaged: .*JSON|expected an object with)") as error:
        read_labels("dataset.json", content)
    assert str(error.value).isprintable()
