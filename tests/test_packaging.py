"""The built wheel: what it holds, and that it runs where torch is all there is."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.results import ROOT

HIDDEN = "triton numpy einops safetensors PIL tqdm sklearn matplotlib rich scipy hypothesis benchmarks".split()

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # the second: hdit.demo would restart itself

# Run in a process of its own: every import of a hidden package finds nothing, as on a machine that never had it.
BARE = f"""
import importlib.machinery, importlib.util, sys, warnings

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {HIDDEN}:
            return None
        return super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own words about a missing NumPy
assert not any(map(importlib.util.find_spec, {HIDDEN}))

import torch
import hdit, hdit_kernels

print(hdit.__file__, hdit_kernels.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without network: setuptools is the one of this environment."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.fail("building needs setuptools >= 77: install the extra [test]")
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".*", "golden", "build", "*.egg-info", "__pycache__", "demo_output", "run", "runs"
    )
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--no-index", "--wheel-dir", str(folder / "built"), str(folder / "source")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = (folder / "built").glob("*.whl")
    return built


def run_bare(code: str, wheel: Path, tmp_path: Path) -> list[str]:
    """Runs code with both packages of the wheel imported; returns what it prints."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{BARE}{code}"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *packages, rest = run.stdout.split("\n", 2)
    assert all(path.startswith(str(tmp_path / "site")) for path in packages), packages
    return rest.splitlines()


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("hdit", "hdit_kernels")
        for pattern in ("*.py", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert {"hdit/py.typed", "hdit_kernels/py.typed"} < wanted
    with zipfile.ZipFile(wheel) as file:
        found = set(file.namelist())
    assert {member for member in found if ".dist-info/" not in member} == wanted
    assert any(member.endswith("LICENSE") for member in found)


def test_the_wheel_needs_torch_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(metadata).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [need for need in needs if "extra ==" not in need] == ["torch>=2.9"]
    assert "Requires-Python: >=3.10" in lines


def test_operators_run_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    code = """
qkv = torch.randn(3, 1, 9, 11, 2, 16, requires_grad=True)
out = hdit_kernels.na2d(*qkv, kernel_size=5)
out.sum().backward()
assert qkv.grad.isfinite().all()
hdit_kernels.geglu(torch.randn(4, 32))
print(list(out.shape))
"""
    assert run_bare(code, wheel, tmp_path) == ["[1, 9, 11, 2, 16]"]


def test_a_model_runs_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    code = """
levels = (hdit.Level(1, 32, attention=hdit.NeighborhoodAttention(16, 3)), hdit.Level(1, 64))
config = hdit.HDiTConfig(levels=levels, mapping=hdit.Mapping(1, 32), image_size=(56, 56), num_classes=3)
denoiser = hdit.Denoiser(hdit.HDiT(config), config.sigma_data)
x, sigma = torch.randn(2, 3, 56, 56), torch.tensor([0.5, 2.0])
classes = torch.tensor([0, 2])
denoiser.loss(x, torch.randn_like(x), sigma, class_cond=classes).sum().backward()
sigmas = hdit.sampling.get_sigmas_karras(2, config.sigma_min, config.sigma_max)
out = hdit.sampling.sample_euler(denoiser, x, sigmas, {"class_cond": classes})
print(list(out.shape))
"""
    assert run_bare(code, wheel, tmp_path) == ["[2, 3, 56, 56]"]


def test_every_module_can_be_imported_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """But for the kernels, whose modules are written in Triton."""
    code = """
import importlib, pkgutil
for package in (hdit, hdit_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, error.name)
"""
    found = [line.split() for line in run_bare(code, wheel, tmp_path)]
    assert {missing for _, missing in found} == {"triton"}
    assert all(module.startswith("hdit_kernels.") for module, _ in found)


def test_what_is_missing_names_its_extra(wheel: Path, tmp_path: Path) -> None:
    code = """
x, sigmas = torch.zeros(1, 3, 8, 8), torch.tensor([1.0, 0.0])
uses = {
    "tqdm": lambda: hdit.sampling.sample_euler(lambda x, sigma: x, x, sigmas, disable=False),
    "safetensors": lambda: hdit.load_kdiffusion("model.safetensors"),
}
for package, use in uses.items():
    try:
        use()
        print(package, "was not asked for")
    except ModuleNotFoundError as error:
        print(error)
"""
    (tmp_path / "model.safetensors").touch()
    assert run_bare(code, wheel, tmp_path) == [
        'tqdm is needed here: pip install "hdit-kernels[train]"',
        'safetensors is needed here: pip install "hdit-kernels[train]"',
    ]


def test_the_demo_says_that_it_needs_the_repository(wheel: Path, tmp_path: Path) -> None:
    code = """
import contextlib, io, hdit.demo
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        hdit.demo.main()
except SystemExit as error:
    print(error.code)
print(said.getvalue(), end="")
"""
    status, line = run_bare(code, wheel, tmp_path)
    assert status == "2"
    assert "runs in a clone of the repository" in line and 'pip install -e ".[demo]"' in line
