"""The table in CONTRIBUTING.md that leads from an operator to its files is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import hdit_kernels
from hdit_kernels import reference

ROOT = Path(__file__).parent.parent
NOT_OPERATORS = {"get_backend", "set_backend"}


def rows() -> dict[str, list[list[str]]]:
    """Of each operator, the files in each column."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| operator | public function |"))) + 2
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        operator, *cells = [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")]
        found[operator[0]] = cells
    return found


ROWS = rows()


def test_every_operator_has_a_row() -> None:
    assert set(ROWS) == set(hdit_kernels.__all__) - NOT_OPERATORS


@pytest.mark.parametrize("operator", ROWS)
def test_its_files_are_there_and_about_it(operator: str) -> None:
    public, kernels, tests, cases, lanes, benchmark = ROWS[operator]
    for path in (*public, *kernels, *tests, *cases, *lanes, *benchmark):
        assert (ROOT / path).is_file(), path
    module = public[0].removesuffix(".py").replace("/", ".")
    assert getattr(hdit_kernels, operator) is getattr(importlib.import_module(module), operator)
    assert callable(getattr(reference, operator))
    assert operator in importlib.import_module(cases[0].removesuffix(".py").replace("/", ".")).OPERATORS
    for path in (*tests, *benchmark, lanes[0]):
        assert re.search(rf"\b{operator}", (ROOT / path).read_text(encoding="utf-8")), path
