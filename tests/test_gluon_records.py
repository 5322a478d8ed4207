"""tests.gluon_records: a Gluon kernel that no GPU has passed as it is fails here."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, gluon_records, made_up_runs
from tests.gluon_records import COMMAND, ROOT, Records

FILES = list(gluon_records.hashes())


@pytest.mark.parametrize("file", FILES)
def test_its_kernels_have_passed_on_a_gpu(file: str) -> None:
    records = gluon_records.read()
    assert file not in gluon_records.unproven(records), f"{file} has changed: on an H100 or H200, run {COMMAND}"
    assert records[file]["gpus"] and all(proof["passed"] > 0 for proof in records[file]["gpus"].values())


def test_no_file_and_no_kernel_is_left_out() -> None:
    named = {
        path.relative_to(ROOT).as_posix(): set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
        for path in (ROOT / "hdit_kernels").rglob("*.py")
        if "gluon.jit" in (text := path.read_text(encoding="utf-8"))
    }
    assert {file: found for file, found in named.items() if found} == {
        f: gluon_records.kernels(ROOT / f) for f in FILES
    }
    assert len(FILES) >= 3 and set(gluon_records.read()) == set(FILES)


# What an edit does


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "hdit_kernels", tmp_path / "hdit_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def is_sum(node: ast.AST) -> bool:
    return isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add)


def half(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and ast.unparse(node.right) == "2"


WRONG: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "even windows one off": (
        half,
        lambda node: setattr(node, "left", ast.BinOp(node.left, ast.Sub(), ast.Constant(1))),
    ),
    "a box left out of the sum": (is_sum, lambda node: setattr(node, "op", ast.BitOr())),
    "a sign": (is_sum, lambda node: setattr(node, "op", ast.Sub())),
    "a border": (
        lambda node: isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt),
        lambda node: setattr(node, "ops", [ast.LtE()]),
    ),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_edit_is_not_proven(wrong: str, file: str, clone: Path) -> None:
    """Nor is what imports it; everything else is."""
    records, (fits, change) = gluon_records.read(), WRONG[wrong]
    tree = ast.parse((clone / file).read_bytes())
    found = [node for function in tree.body if is_kernel_code(function) for node in ast.walk(function) if fits(node)]
    if not found:
        pytest.skip("there is no such place in it")
    change(found[0])
    (clone / file).write_text(ast.unparse(tree), encoding="utf-8")
    unproven = gluon_records.unproven(records, clone)
    name = Path(file).stem
    assert unproven == [other for other in FILES if other == file or imports(other, name)]


def is_kernel_code(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef) and bool(statement.decorator_list)


def imports(file: str, name: str) -> bool:
    """Directly or by way of others."""
    texts = {Path(other).stem: (ROOT / other).read_text(encoding="utf-8") for other in FILES}
    reached, waiting = set[str](), [Path(file).stem]
    while waiting:
        if (module := waiting.pop()) not in reached:
            reached.add(module)
            waiting += [other for other in texts if f"neighborhood_attention.{other} import" in texts[module]]
    return name in reached


def test_comments_docstrings_and_other_files_are_no_change(clone: Path) -> None:
    for path in clone.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.relative_to(clone).as_posix() in FILES:
            path.write_text(f"# a comment\n{text}\n# another one\n", encoding="utf-8")
        elif "experimental" not in text and path.name != "__init__.py":
            path.write_text(f"{text}\nADDED = 1\n", encoding="utf-8")
    assert gluon_records.unproven(gluon_records.read(), clone) == []


# What the command writes


def seen(**changes: Any) -> dict[str, Any]:
    launched = {file: dict.fromkeys(gluon_records.kernels(ROOT / file), True) for file in FILES}
    counts = {"passed": 7, "failed": 0, "error": 0, "skipped": 0}
    run = made_up_runs.run("kernels", [])
    return run | {"gpu_tests": {"session": 0, "tests": counts, "launched": launched} | changes}


def test_a_run_of_all_kernels_is_recorded() -> None:
    first, second, third, *_ = FILES
    hashes = gluon_records.hashes()
    before = {file: {"sources": hashes[file], "gpus": {"another": {}}, "ptx": {"3.7": ["a"]}} for file in FILES}
    before[first]["sources"] = "of another syntax"
    before[second]["carried"] = {"from": {}}
    found = gluon_records.recorded(before, seen(), ["python", "-m", "pytest"])
    assert gluon_records.unproven(found) == [] and list(found) == FILES
    assert list(found[first]["gpus"]) == ["Made-up GPU"] and found[first]["ptx"] == {}
    assert list(found[second]["gpus"]) == ["Made-up GPU"] and "carried" not in found[second]
    assert list(found[third]["gpus"]) == ["another", "Made-up GPU"]  # the same syntax passed there
    assert found[second]["ptx"] == found[third]["ptx"] == {"3.7": ["a"]}
    proof = {"torch": "2.11.0+cu130", "triton": "3.6.0", "driver": "580.1", "commit": "0" * 40, "date": "2026-11-23"}
    assert found[first]["gpus"]["Made-up GPU"] == proof | {"command": "python -m pytest", "passed": 7}


def test_launches_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("hdit_kernels.launch", reason="needs Triton")
    from hdit_kernels.geglu_triton import _geglu_forward_kernel

    ran: list[Any] = []
    noted: list[tuple[str, str]] = []
    monkeypatch.setattr(launch, "run", lambda *launches: ran.extend(launches))
    conftest.note_launches(lambda *names: noted.append(names))
    each = launch.Launch(_geglu_forward_kernel, (1, 1, 1), (), (), {})
    launch.run(each, each)
    assert ran == [each, each] and noted == 2 * [("hdit_kernels/geglu_triton.py", "_geglu_forward_kernel")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tests": {"passed": 7, "failed": 1, "error": 0}}, "nothing is recorded: of the GPU tests .*'failed': 1"),
        ({"tests": {"passed": 7, "failed": 0, "error": 1}}, "'error': 1"),
        ({"tests": {"passed": 0, "failed": 0, "error": 0}}, "'passed': 0"),
        ({"launched": {}}, f"the GPU tests launched no .*_kernel.* of {FILES[0]}"),
    ],
)
def test_nothing_is_recorded_unless_all_pass_and_run_every_kernel(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gluon_records.recorded({}, seen(**changes), [])


PTX = {file: [f"{file} {i}" for i in range(2)] for file in FILES}


def renamed() -> Records:
    """Records of other names and syntax, which compiled to PTX."""
    every = gluon_records.read()
    return {f"old/{file}": every[file] | {"sources": "another", "ptx": {"3.7": PTX[file]}} for file in FILES}


def test_a_move_that_compiles_to_the_same_carries_its_record_over() -> None:
    records = renamed()
    found = gluon_records.carried(records, PTX, "3.7")
    assert gluon_records.unproven(found) == [] and list(found) == FILES
    for file in FILES:
        assert found[file]["gpus"] == records[f"old/{file}"]["gpus"] and found[file]["ptx"] == {"3.7": PTX[file]}
        assert found[file]["carried"]["from"] == {f"old/{file}": "another"}
        assert "equal PTX" in found[file]["carried"]["shown_by"]
    together = PTX | {FILES[0]: PTX[FILES[0]] + PTX[FILES[1]]}  # two files that became one
    found = gluon_records.carried(records, together, "3.7")
    assert set(found[FILES[0]]["carried"]["from"]) == {f"old/{file}" for file in FILES[:2]}


@pytest.mark.parametrize("what", ["another digest", "another Triton", "none"])
def test_what_compiles_to_anything_else_is_not_carried_over(what: str) -> None:
    records, first = renamed(), FILES[0]
    new = {"another digest": [PTX[first][0], "new"], "none": []}.get(what, PTX[first])
    found = gluon_records.carried(records, PTX | {first: new}, "3.6" if what == "another Triton" else "3.7")
    assert gluon_records.unproven(found) == (FILES if what == "another Triton" else [first])
    assert found.items() >= records.items()  # kept as long as one is missing


def test_digests_ignore_names_and_see_everything_else() -> None:
    class Function:
        def __init__(self, name: str) -> None:
            self.__name__ = name

    def digest(name: str = "a_kernel", body: str = "add", grid: Any = (1,), values: Any = (2,)) -> str:
        launch = type("Launch", (), {"grid": grid, "values": values})()
        launch.kernel = type("Kernel", (), {"fn": Function(name)})
        launch.compile = lambda target: type(
            "Compiled", (), {"asm": {"ptx": f".entry {name}({name}_0) //{name:>20}\n{body}"}}
        )
        return gluon_records._digest(launch)

    assert digest() == digest("another_kernel")
    assert len({digest(), digest(body="sub"), digest(grid=(2,)), digest(values=(3,))}) == 4
