"""The built wheel and sdist: what they hold and ask for, and that a wheel runs where torch is all there is."""

from __future__ import annotations

import ast
import email.message
import email.parser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hdit
import hdit_kernels
from benchmarks.results import ROOT
from tests.oldest import oldest

# Versions that meet a stranger's file and have a known hole in doing so: the first one without it, by Python.
KNOWN_HOLES = [
    ("torch", "3.10", "2.10.0", "torch.load corrupts memory in spite of weights_only (CVE-2026-24747)"),
    ("pillow", "3.10", "12.1.1", "writes out of bounds in decoding tiles (CVE-2026-25990)"),
    ("pillow", "3.11", "13.0.0", "JPEG and TIFF decoders overrun buffers (CVE-2026-112403); 3.10 has no such Pillow"),
]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

HIDDEN = "triton numpy einops safetensors PIL tqdm sklearn matplotlib rich scipy hypothesis benchmarks tests".split()
CLONE_ONLY = ["benchmarks", "tests"]
DEPENDENCIES = {
    "torch",
    "triton",
    "safetensors",
    "PIL",
    "tqdm",
    "numpy",
    "matplotlib",
    "sklearn",
}  # of the wheel's parts

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

# Run in a process of its own: every import of a hidden package finds nothing, as on a machine that never had it.
BARE = """
import importlib.machinery, importlib.util, sys, warnings

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own words about a missing NumPy
assert not any(map(importlib.util.find_spec, HIDDEN))

import torch
import hdit, hdit_kernels

print(hdit.__file__, hdit_kernels.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources to build from."""
    unwanted = shutil.ignore_patterns(
        ".*",
        "golden",
        "results",
        "pictures",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "demo_output",
        "run",
        "runs",
    )
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "source", ignore=unwanted))


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a wheel or an sdist as pip would, without network: setuptools is the one of this environment."""
    (asked,) = re.findall(r'^requires = \["(setuptools.*)"\]$', (source / "pyproject.toml").read_text(), re.MULTILINE)
    if importlib.metadata.version("setuptools") not in Requirement(asked).specifier:
        pytest.fail(f"building needs {asked}: install the extra [test]")
    target.mkdir()
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build("wheel", source, source.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    """Unpacked."""
    with tarfile.open(build("sdist", source, source.parent / "sdist")) as file:
        file.extractall(source.parent / "unpacked", filter="data")
    (folder,) = (source.parent / "unpacked").iterdir()
    return folder


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as file:
        (member,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(file.read(member).decode())


@pytest.fixture(scope="module")
def needs(wheel: Path) -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    return [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]


def run_bare(code: str, wheel: Path, tmp_path: Path, hidden: Sequence[str] = HIDDEN) -> list[str]:
    """Runs code with both packages of the wheel imported and others hidden; returns what it prints."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); HIDDEN = {hidden}\n{BARE}{code}"
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


def test_the_wheel_needs_torch_only(wheel: Path, needs: list[Requirement]) -> None:
    assert [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})] == ["torch"]
    assert metadata(wheel)["Requires-Python"] == ">=3.10"


def test_the_packages_have_the_version_of_the_wheel(wheel: Path) -> None:
    assert hdit.__version__ == hdit_kernels.__version__ == metadata(wheel)["Version"]
    assert wheel.name.split("-")[1] == hdit.__version__


def test_the_sdist_holds_what_a_wheel_is_built_from(sdist: Path, wheel: Path) -> None:
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as file:
        packages = {member for member in file.namelist() if ".dist-info/" not in member}
    files = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert {name for name in found if not name.startswith("hdit_kernels.egg-info/")} == packages | files


def test_a_wheel_of_the_sdist_is_the_wheel(sdist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(build("wheel", sdist, sdist.parent / "wheel")) as other:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


# The oldest versions allowed


def floors(needs: list[Requirement], package: str, python: str) -> list[Version]:
    """The oldest versions of a package that a Python would be given."""
    return [
        Version(specifier.version)
        for need in needs
        if need.name == package
        for specifier in need.specifier
        if need.marker is None
        or any(need.marker.evaluate({"python_version": python, "extra": extra}) for extra in ("", "train", "test"))
    ]


def test_every_dependency_has_an_oldest_version(needs: list[Requirement]) -> None:
    for need in needs:
        assert need.name == "hdit-kernels" or [s.operator for s in need.specifier] == [">="], need


@pytest.mark.parametrize(("package", "python", "first", "hole"), KNOWN_HOLES)
def test_no_version_with_a_known_hole_is_allowed(
    package: str, python: str, first: str, hole: str, needs: list[Requirement]
) -> None:
    for newer in PYTHONS[PYTHONS.index(python) :]:
        found = floors(needs, package, newer)
        assert found and min(found) >= Version(first), f"{package} on Python {newer}: {hole}"


def test_what_ci_runs_with_is_allowed(needs: list[Requirement]) -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
    assert {Requirement(pin).name for pin in pins} >= {"torch", "triton", "mypy", "ruff"}
    for pin in map(Requirement, pins):
        (version,) = (specifier.version for specifier in pin.specifier if specifier.operator == "==")
        allowing = [need for need in needs if need.name == pin.name]
        assert allowing and all(need.specifier.contains(version) for need in allowing), f"{pin}: {allowing}"


def test_the_oldest_versions_are_named_for_pip(needs: list[Requirement]) -> None:
    made_up = [
        "torch>=2.10",
        'hdit-kernels[train]; extra == "demo"',
        'a>=1.2; python_version < "3.11" and extra == "b"',
    ]
    assert oldest(made_up) == ['a==1.2; python_version < "3.11"', "torch==2.10"]
    for line in oldest(map(str, needs)):
        pin = Requirement(line)
        assert "extra" not in str(pin.marker) and any(
            need.name == pin.name and str(need.specifier).replace(">=", "==") == str(pin.specifier) for need in needs
        )


# Where torch is all there is


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


def test_a_wheel_says_what_there_is_and_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    code = """
import hdit.__main__
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
hdit.__main__.main([])
"""
    (tmp_path / "model.safetensors").touch()
    tqdm, safetensors, *lines = run_bare(code, wheel, tmp_path)
    assert tqdm == 'tqdm is needed here: pip install "hdit-kernels[train]"'
    assert safetensors == 'safetensors is needed here: pip install "hdit-kernels[train]"'
    programs = {line.split()[2] for line in lines if line.startswith("python -m ")}
    files = [path for path in (ROOT / "hdit").glob("[!_]*.py") if '__name__ == "__main__"' in path.read_text()]
    assert programs == {f"hdit.{path.stem}" for path in files} >= {"hdit.demo", "hdit.train", "hdit.sample"}
    assert f"torch   {torch.__version__}" in lines


def test_the_demo_runs_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    """The whole of it, tiny, where there is no clone: exit status 1, as two steps teach nothing."""
    code = """
import dataclasses, pathlib, hdit.demo
levels = (hdit.Level(1, 16, attention=hdit.NoAttention()), hdit.Level(1, 16, attention=hdit.GlobalAttention(8)))
config = dataclasses.replace(hdit.demo.ON_CPU.config, levels=levels, image_size=(8, 8))
hdit.demo.ON_CPU = hdit.demo.Settings(config, 2, 4, 1e-3, 1.0, sampling_steps=1, per_class=1)
hdit.demo.pick_device = lambda: torch.device("cpu")
try:
    hdit.demo.main([])
except SystemExit as error:
    print(error.code)
print(sorted(path.name for path in pathlib.Path("demo_output").glob("*.png")))
"""
    *_, error, pictures = run_bare(code, wheel, tmp_path, CLONE_ONLY)
    assert "of the samples are recognised, 80% are expected" in error
    assert pictures == "['loss.png', 'samples.png']"


def test_nothing_in_a_wheel_imports_what_it_does_not_bring() -> None:
    for package in ("hdit", "hdit_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Import():
                        names |= {alias.name for alias in node.names}
                    case ast.ImportFrom(module=str(name)):
                        names.add(name)
                    case ast.Call(func=ast.Name("require"), args=[ast.Constant(str(name)), *_]):  # of hdit._extras
                        names.add(name)
            others = {name.partition(".")[0] for name in names} - {"hdit", "hdit_kernels"} - sys.stdlib_module_names
            assert others <= DEPENDENCIES, f"{path}: {others - DEPENDENCIES}"


# What stands beside the code


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hdit.__version__}\n" in text and "arXiv:2401.11605" in text


def test_the_workflows_run_what_there_is() -> None:
    """Each is YAML, and what it runs of this repository is there: make's targets and .ci/run."""
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = []
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        commands += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert {need for job in jobs.values() for need in [job.get("needs")] if need} <= set(jobs)
    assert {"bash .ci/run", "make docs", "make test-oldest", "python -m hdit"} <= set(commands)
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= set(targets)
    assert (ROOT / ".ci" / "run").is_file()
