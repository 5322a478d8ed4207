"""A public signature changes only together with tests/public_api.txt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import hdit
import hdit_kernels

pytest.importorskip("griffe", reason="griffe is not installed (a bare GPU machine; CI has it)")
from tests.public_api import FILE, ROOT, public_api  # noqa: E402


def test_no_public_signature_has_changed() -> None:
    """If it should have: python -m tests.public_api, and a line in CHANGELOG.md."""
    assert public_api().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


def test_every_exported_name_is_listed() -> None:
    text = FILE.read_text(encoding="utf-8")
    for package in (hdit, hdit_kernels):
        for name in set(package.__all__) - {"sampling", "densities"}:
            assert f"{package.__name__}.{name}" in text.replace("(", " ").replace(":", " ").split(), name


def test_a_changed_signature_is_noticed(tmp_path: Path) -> None:
    for package in ("hdit", "hdit_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "hdit_kernels" / "geglu.py"
    text = source.read_text(encoding="utf-8")
    assert text.count("def geglu(x: Tensor)") == 1
    source.write_text(text.replace("def geglu(x: Tensor)", "def geglu(x: Tensor, exact: bool = True)"))
    old, new = public_api().splitlines(), public_api(tmp_path).splitlines()
    assert set(old) - set(new) == {"hdit_kernels.geglu(x: Tensor) -> Tensor"}
    assert set(new) - set(old) == {"hdit_kernels.geglu(x: Tensor, exact: bool = True) -> Tensor"}
