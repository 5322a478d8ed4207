"""The commands that CONTRIBUTING.md and its like name: each can be run alone, and takes its own arguments only."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented_code import ROOT

DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = re.findall(r"`([^`\n]+)`", "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS))
PYTEST = re.compile(r"((?:[A-Z_]+=\S+ )*)(?:\S*python -m )?pytest (.+)")

# What takes long to import is imported once; each lane is a process of its own beside that, its arguments in sys.argv.
EACH_ALONE = """
import json, os, sys
import hypothesis, pytest, triton, hdit_kernels

for environment, arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.environ.update(environment)
        sys.argv = ["pytest", *arguments]
        status = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended with", status, *arguments, flush=True)
"""


def lanes() -> list[tuple[dict[str, str], list[str]]]:
    """(environment, arguments) of every pytest command in the documents."""
    found = []
    for settings, arguments in (match.groups() for match in map(PYTEST.fullmatch, COMMANDS) if match):
        lane = dict(setting.split("=") for setting in settings.split()), shlex.split(arguments)
        found += [lane] if lane not in found else []
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_documented_lane_starts_alone() -> None:
    named = [" ".join(arguments) for _, arguments in lanes()]
    assert {"tests/test_geglu.py", "tests/test_interpreter.py", "tests/test_aot.py", "-m gpu"} <= set(named), named
    wanted = []
    for environment, arguments in lanes():
        names_some = any((ROOT / argument).exists() for argument in arguments)
        few = [] if names_some else ["tests/test_demo.py"]  # the run that this is part of collects all of them
        wanted.append((environment, [*arguments, *few, "--collect-only", "-qq"]))
    wanted.append(({}, ["tests/test_demo.py", "-qq", "-k", "missing_package and PIL"]))  # and one that runs something
    run = subprocess.run(
        [sys.executable, "-c", EACH_ALONE],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=500,
    )
    ended = re.findall(r"^ended with (\d+) (.*)$", run.stdout, re.MULTILINE)
    assert len(ended) == len(wanted), run.stderr
    # where there is no GPU, pytest has deselected all of a lane's tests, and says so with 5
    wrong = [line for status, line in ended if status not in ("0", "5" if line.startswith("-m gpu") else "0")]
    assert not wrong, f"{wrong}\n{run.stdout[-4000:]}{run.stderr[-2000:]}"


def test_every_documented_make_target_is_there() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(r"^make ([a-z][a-z-]*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {words[1] for words in map(str.split, COMMANDS) if words[:1] == ["make"] and len(words) > 1} | set(shown)
    assert {"demo", "test", "test-oldest", "lint"} <= named <= set(targets)


PROGRAMS = [
    path
    for folder in ("hdit", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "\ndef main(" in path.read_text(encoding="utf-8") and not path.name.startswith("test_")
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_takes_its_arguments_from_its_caller(path: Path) -> None:
    """main(argv=None), and argv is what is parsed: or a test would have the program parse pytest's own arguments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert len(main.args.args) == 1 and [ast.unparse(default) for default in main.args.defaults] == ["None"]
    parsed = [
        ast.unparse(call.args[0]) if call.args else "nothing"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parse_args"
    ]
    assert parsed == [main.args.args[0].arg]


def test_the_programs_are_found() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in PROGRAMS}
    assert {
        "hdit/train.py",
        "hdit/sample.py",
        "hdit/demo.py",
        "hdit/export.py",
        "hdit/__main__.py",
        "benchmarks/__main__.py",
        "tests/sanitize.py",
    } <= found
