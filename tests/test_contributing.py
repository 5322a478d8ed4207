"""What CONTRIBUTING.md says of the kernels' files is true: its table, and who imports whom."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

import hdit_kernels
from hdit_kernels import reference

ROOT = Path(__file__).parent.parent
NOT_OPERATORS = {"get_backend", "merge_attentions", "set_backend"}


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


# Between modules of hdit_kernels


def imports() -> dict[str, tuple[set[str], set[str]]]:
    """Of each module, those of the package that it imports: at its top, and inside functions."""
    modules = {}
    for path in (ROOT / "hdit_kernels").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top, inside = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hdit_kernels"):
                names = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules) or {node.module}
                (top if node in tree.body else inside).update(names)
        found[name] = top, inside
    return found


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: top | inside for name, (top, inside) in imports().items() if name != "hdit_kernels"}
    order = graphlib.TopologicalSorter({name: needs - {"hdit_kernels"} for name, needs in graph.items()})
    assert len(list(order.static_order())) >= len(graph) > 20  # raises CycleError


def test_imports_inside_functions_are_of_what_needs_triton() -> None:
    """The launchers of each family, and Hopper's kernels, which dispatch.py alone knows."""
    for name, (_, inside) in imports().items():
        for imported in inside:
            last = imported.rpartition(".")[2]
            of_hopper = last.startswith("hopper_") and name.endswith(".dispatch")
            assert last.endswith("_triton") or last == "dispatch" or of_hopper, f"{name} imports {imported}"
