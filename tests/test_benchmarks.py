"""benchmarks.results: what every recorded measurement carries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results


def sources(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return results.source_hash(root)


def test_source_hash_is_that_of_names_and_contents(tmp_path: Path) -> None:
    files = {"hdit_kernels/a.py": "1", "hdit_kernels/deep/b.py": "2", "hdit/c.py": "3"}
    digest = sources(tmp_path / "one", files)
    assert sources(tmp_path / "same", dict(reversed(files.items()))) == digest
    assert sources(tmp_path / "content", files | {"hdit/c.py": "4"}) != digest
    assert sources(tmp_path / "more", files | {"hdit/d.py": ""}) != digest
    renamed = {"hdit_kernels/a.py": "1", "hdit_kernels/deep/b.py": "2", "hdit/z.py": "3"}
    assert sources(tmp_path / "renamed", renamed) != digest
    moved = files | {"hdit_kernels/a.py": "12", "hdit_kernels/deep/b.py": ""}
    assert sources(tmp_path / "moved", moved) != digest


def test_source_hash_is_not_that_of_other_files(tmp_path: Path) -> None:
    files = {"hdit_kernels/a.py": "1", "hdit/c.py": "3"}
    digest = sources(tmp_path / "one", files)
    others = {"hdit/py.typed": "", "tests/a.py": "", "benchmarks/b.py": "", "hdit/__pycache__/c.cpython-311.pyc": ""}
    assert sources(tmp_path / "two", files | others) == digest


def test_environment_names_the_machine() -> None:
    environment = json.loads(json.dumps(results.environment()))
    assert environment["torch"] == torch.__version__
    assert environment["device"]
    assert environment["device_type"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    results.write(path, {"value": 1.5})
    with pytest.raises(ValueError):
        results.write(path, {"value": math.nan})
    with pytest.raises(TypeError):
        results.write(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "far" / "file.json"
    file.write_text("old")
    link.symlink_to(file)
    results.write(link, {"value": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"value": 1}


def test_write_leaves_no_temporary_file_when_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(results.os, "replace", replace)
    with pytest.raises(OSError, match="disk gone"):
        results.write(tmp_path / "result.json", {})
    assert not list(tmp_path.iterdir())
