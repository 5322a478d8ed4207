"""Files that may come from strangers: looked at before they are opened, and their JSON is data, never followed."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from hdit_kernels import checks

MOST_JSON = 4 * 2**20  # bytes: a configuration has a few thousand


class CheckpointError(ValueError):
    """A checkpoint can't be used; the message is one line that says what to do."""


def regular_file(name: str, path: object) -> Path:
    """path as a Path, if a regular file lies there: a pipe or a device could be read for ever.

    Raises TypeError, naming the argument, if it is no path, ValueError if no file lies there, OSError if nothing does.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path (str or os.PathLike), got {checks.shown(path)}")
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a path, got an empty one")
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte
        raise ValueError(f"{name}: expected a path, got {checks.shown(path)}") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise CheckpointError(f"{name}: expected a regular file, got a {kind}: {path}")
    return Path(path)


def read_json(name: str, path: object) -> Any:
    """What a .json file of at most 4 MiB holds. Raises as regular_file does, and ValueError, naming the file."""
    path = regular_file(name, path)
    with open(path, "rb") as file:
        text = file.read(MOST_JSON + 1)
    if len(text) > MOST_JSON:
        raise ValueError(f"{name} {path}: expected at most {MOST_JSON:,} bytes of JSON")
    return parse_json(f"{name} {path}", text)


def parse_json(where: str, text: str | bytes) -> Any:
    """JSON to the letter: no NaN or Infinity, no number beyond float64, no entry twice. ValueError says where."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON as expected: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the entry {quoted(key)} is there twice")
        found[key] = value
    return found


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def quoted(name: object) -> str:
    """A name out of a file, for a message: short, and without the control characters that a terminal obeys."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}…"
