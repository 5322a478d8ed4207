"""Code that readers copy: Python in the Markdown files and in docstrings.

python -m tests.documented_code runs mypy over all of it, as `make lint` does. It shares the cache of mypy's run over
the packages, without which torch alone takes half a minute.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
PACKAGES = ("hdit", "hdit_kernels", "benchmarks")
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EITHER = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n|^\n)+", re.MULTILINE)


def in_document(path: Path) -> list[str]:
    """The Python blocks of a Markdown file, each below empty lines, so that its lines have the file's numbers."""
    text = path.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in FENCED.finditer(text)]


def in_order(path: Path) -> list[tuple[str, str]]:
    """The Python and shell blocks of a Markdown file, as ("python" or "sh", code)."""
    return EITHER.findall(path.read_text(encoding="utf-8"))


def in_docstrings(path: Path) -> list[str]:
    """The examples in a Python file's docstrings: lines after >>>, and a module's indented lines if they import."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        docstring = ast.get_docstring(node) or ""
        if prompted := doctest.DocTestParser().get_examples(docstring):
            found.append(f"from {module} import *\n" + "".join(example.source for example in prompted))
        elif isinstance(node, ast.Module):
            indented = textwrap.dedent("".join(INDENTED.findall(docstring)))
            found += [indented] if re.search("^(from|import) ", indented, re.MULTILINE) else []
    return found


def everywhere() -> dict[str, str]:
    """All of it, by the name of the file and a number."""
    blocks = {}
    for path in sorted([*ROOT.glob("*.md"), *(p for name in ("docs", *PACKAGES) for p in ROOT.glob(f"{name}/**/*"))]):
        found = {".md": in_document, ".py": in_docstrings}.get(path.suffix, lambda path: [])(path)
        blocks |= {f"{path.relative_to(ROOT).as_posix()} {number}": code for number, code in enumerate(found, 1)}
    return blocks


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser("python -m tests.documented_code", description=__doc__).parse_args(argv)
    with TemporaryDirectory() as folder:
        for name, code in everywhere().items():
            (Path(folder) / f"{re.sub('[^A-Za-z0-9]', '_', name)}.py").write_text(code, encoding="utf-8")
        run = subprocess.run([sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", folder], cwd=ROOT)
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
