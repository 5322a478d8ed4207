"""benchmarks.results: what every recorded measurement carries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results


def test_environment_names_the_machine() -> None:
    environment = json.loads(json.dumps(results.environment()))
    assert environment["torch"] == torch.__version__
    assert environment["device"]
    assert environment["device_type"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_file_has_a_line_for_each_item(tmp_path: Path) -> None:
    results.write(tmp_path / "a.json", {"rows": [{"µs": 0.5, "bytes": 123}, {"samples": [2.0, 3]}], "none": []})
    text = '{\n"rows":[\n{"µs":0.5,"bytes":123},\n{"samples":[2.0,3]}\n],\n"none":[]\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text


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
