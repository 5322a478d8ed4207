"""tools/huggingface.py: what it writes can be imported under other names beside hdit_kernels, and computes the same."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import ROOT
from tools import huggingface

BESIDE = """
import importlib, json, pkgutil, sys, warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

folder, loader, device = Path(sys.argv[1]), *sys.argv[2:]


def imported(variant):  # as `kernels` does it
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if loader == "kernels":
    from kernels import get_local_kernel

    copies = [get_local_kernel(folder)]
else:
    copies = [imported(folder / "build" / name) for name in ("torch-cpu", "torch-cuda")]  # as two versions would be
with_triton = find_spec("triton") is not None
for copy in copies:
    for module in pkgutil.walk_packages(copy.__path__, f"{copy.__name__}."):
        if with_triton or "triton" not in module.name and "hopper" not in module.name and "dispatch" not in module.name:
            importlib.import_module(module.name)
assert "hdit_kernels" not in sys.modules

import hdit_kernels

x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
# On a GPU, what auto has Gluon kernels for; in the interpreter, as little as there can be.
small, large = ((1, 3, 3, 1, 16), 3, torch.float32), ((1, 20, 19, 2, 64), 7, torch.bfloat16)
shape, window, dtype = small if device == "cpu" else large
query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
for backend in ("reference", "auto", "triton") if with_triton else ("reference", "auto"):
    results = []
    for package in (hdit_kernels, *copies):
        package.set_backend(backend)
        out = package.na2d(query, key, value, window)
        results.append([package.rms_norm(x, weight), out, *torch.autograd.grad(out.sum(), (query, key, value))])
        assert getattr(torch.ops, package.__name__).na2d_forward
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], found, strict=True))
for copy in copies:  # NATTEN's interface warns where it was called
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sys.modules[f"{copy.__name__}.compat.natten"].na2d(query, key, value, window, kernel_schedule="pp")
    assert [warning.filename for warning in told] == ["<string>"]
print(len(results), "packages agree")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    huggingface.main([str(tmp_path / "layout")])
    return tmp_path / "layout"


def beside(folder: Path, loader: str, device: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [sys.executable, "-c", BESIDE, folder, loader, device]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_two_copies_live_beside_the_package(folder: Path) -> None:
    assert beside(folder, "imported", "cpu") == "3 packages agree\n"


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="needs `pip install kernels`")
def test_hugging_faces_library_loads_it(folder: Path) -> None:
    assert beside(folder, "kernels", "cpu") == "2 packages agree\n"


@pytest.mark.gpu
def test_two_copies_live_beside_the_package_on_a_gpu(folder: Path) -> None:
    assert beside(folder, "imported", "cuda") == "3 packages agree\n"


def test_each_backend_has_all_files_and_their_digests(folder: Path) -> None:
    source = folder / "torch-ext" / "hdit_kernels"
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    modules = [path for path in (ROOT / "hdit_kernels").rglob("*.py")]
    assert there == {path.relative_to(ROOT / "hdit_kernels").as_posix() for path in modules} | {"py.typed"}
    ids = set()
    for backend in ("cpu", "cuda", "metal", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        told = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        assert told["backend"] == {"type": backend} and told["id"].isidentifier()
        assert told["digest"]["files"].keys() == there
        for name, digest in told["digest"]["files"].items():
            content = (variant / name).read_bytes()
            assert content == (source / name).read_bytes()
            assert base64.b64decode(digest) == hashlib.sha256(content).digest()
        ids.add(told["id"])
    assert len(ids) == 4


def test_another_content_has_another_id() -> None:
    copy = huggingface.files()
    changed = copy | {"norms.py": copy["norms.py"] + b"\n"}
    assert huggingface.metadata("cuda", copy)["id"] != huggingface.metadata("cuda", changed)["id"]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("a.py", "from hdit_kernels import b", "from . import b"),
        ("a/b.py", "from hdit_kernels.c.d import (\n    e,\n)", "from ..c.d import (\n    e,\n)"),
        ("a/__init__.py", "def f():\n    from hdit_kernels import b", "def f():\n    from .. import b"),
        ("a.py", "from hdit_kernels_b import c", "from hdit_kernels_b import c"),
        ("a.py", '"""\nfrom hdit_kernels import b\n"""', '"""\nfrom hdit_kernels import b\n"""'),
    ],
)
def test_imports_become_relative(path: str, source: str, expected: str) -> None:
    assert huggingface.relative(source, path) == expected


def test_an_import_without_a_relative_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="a/b.py, line 2: expected from … import …, got import hdit_kernels.c as d"):
        huggingface.relative("\nimport hdit_kernels.c as d\n", "a/b.py")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for path in (tmp_path, mine):
        with pytest.raises(SystemExit) as stop:
            huggingface.main([str(path)])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert told == f"tools.huggingface: error: FOLDER: expected a new or an empty folder, got {path}\n"
    assert list(tmp_path.iterdir()) == [mine] and mine.read_text() == "mine"
