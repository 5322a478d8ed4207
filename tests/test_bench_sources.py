"""benchmarks.sources: which figures an edit makes old."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from benchmarks import scaling, sources
from benchmarks.sources import ENTRIES, NETWORK, OPERATORS, STEP, Sources

NETWORKS = {NETWORK, STEP}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for package in sources.OURS:
        shutil.copytree(sources.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def older(clone: Path) -> set[str]:
    """What the clone runs other sources of than the present ones."""
    return {name for name, digest in sources.present(clone).items() if digest != sources.present()[name]}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_attention_grid_is_of_an_operator() -> None:
    assert scaling.grid_case(64, scaling.api.device())[0].operator in OPERATORS


def test_comments_docstrings_and_formatting_are_no_change(clone: Path) -> None:
    for name in ("hdit_kernels/launch", "hdit_kernels/geglu_triton", "hdit_kernels/norms", "hdit/model"):
        path = clone / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                node.body.insert(0, ast.Expr(ast.Constant("another docstring")))
        text = ast.unparse(tree)  # without any of the old comments
        path.write_text(f"# a comment\n{text}", encoding="utf-8")
    assert older(clone) == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        # what every launcher uses
        ("hdit_kernels/launch.py", "return jit(function", "return jit( function, debug=True", set(ENTRIES)),
        ("hdit_kernels/geglu_triton.py", "1.0 + 0.26 *", "1.0 + 0.25 *", {"geglu", "feed_forward"} | NETWORKS),
        ("hdit_kernels/reference.py", "def geglu(x: Tensor)", "def geglu(x)", {"geglu", "feed_forward"} | NETWORKS),
        # one operator of a file of several
        ("hdit_kernels/norms_triton.py", "def rms_norm_backward(", "def rms_norm_backward(a,", {"rms_norm"} | NETWORKS),
        ("hdit/ema.py", "def ema_update(", "def ema_update(unused, ", {STEP}),
        ("hdit/sampling.py", "def get_sigmas_karras(", "def get_sigmas_karras(unused, ", set()),
    ],
)  # fmt: skip
def test_an_edit_ages_what_runs_it(file: str, old: str, new: str, what: set[str], clone: Path) -> None:
    edit(clone / file, old, new)
    assert older(clone) == what


PACKAGE = {
    "hdit_kernels/__init__.py": "from hdit_kernels.a import one as first\nfrom hdit_kernels import b\n",
    "hdit_kernels/a.py": """
import torch
from hdit_kernels import b as other
if torch:
    SIZE = 1
else:
    SIZE = 2
SIZE += other.EXTRA
def one(x: int) -> int:
    from hdit_kernels.b import late
    return late(x) + SIZE
def two(): return [other]
def outside(): return torch.EXTRA
def module():
    from hdit_kernels import b
    return b
def lazy(): return module().late(1)
def whole(): return getattr(module(), "late")
def size(): return SIZE
other.register("one")
""",
    "hdit_kernels/b.py": """
EXTRA = 3
UNUSED = 4
TABLE = {}
TABLE["a"] = 5
class Late:
    def __call__(self): return TABLE
late = Late()
def register(name): pass
""",
}
ENTRIES_THERE = ("hdit_kernels:first", *(f"hdit_kernels.a:{name}" for name in "two outside lazy whole size".split()))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("SIZE = 2", "SIZE = 7", "first size"),
        ("return late(x)", "return late(2 * x)", "first"),
        ("x: int", "x: float", "first"),
        ("EXTRA = 3", "EXTRA = 4", "first two whole size"),
        ('["a"] = 5', '["a"] = 6', "first two lazy whole"),
        ("UNUSED = 4", "UNUSED = 5", "two whole"),  # which hand on all of the module
        ('register("one")', 'register("two")', "first two outside lazy whole size"),  # whoever imports the module
        ("def register(name)", "def register(key)", "first two outside lazy whole size"),
    ],
)
def test_what_is_reached_by_name_counts(old: str, new: str, what: str, tmp_path: Path) -> None:
    def digests(old: str, new: str) -> list[str]:
        for name, text in PACKAGE.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace(old, new))
        return [Sources(tmp_path).digest(entry) for entry in ENTRIES_THERE]

    changed = [a != b for a, b in zip(digests("", ""), digests(old, new), strict=True)]
    assert changed == [name.partition(":")[2] in what.split() for name in ENTRIES_THERE]


def test_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="hdit_kernels:gone: no such name in"):
        Sources(tmp_path).digest("hdit_kernels:gone")
    assert sources.present(tmp_path) == {}
