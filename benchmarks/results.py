"""What every recorded measurement carries: the machine, the versions, and which sources were measured.

Records are JSON files in the folder of the same name; tests/test_docs.py fails when a document quotes one whose
`source_sha256` is not the present one without saying so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
# Of benchmarks/, what a row depends on beside the sources: whose times are taken, of what, how, and for how long.
MEASURING = ("ceilings", "copy_triton", "correctness", "measure", "model", "networks", "scaling", "timing")
MEASURING += ("kernels/*", "peers/*")


def source_hash(root: Path = ROOT) -> str:
    """sha256 over the Python sources of hdit_kernels and hdit: sorted relative paths, each followed by its contents."""
    return _hash(root, [path for name in ("hdit_kernels", "hdit") for path in (root / name).rglob("*.py")])


def measuring_hash(root: Path = ROOT) -> str:
    """The same over the files of benchmarks/ that measure."""
    return _hash(root, measuring_files(root))


def measuring_files(root: Path = ROOT) -> list[Path]:
    return [path for name in MEASURING for path in (root / "benchmarks").glob(f"{name}.py")]


def _hash(root: Path, paths: Iterable[Path]) -> str:
    files = {path.relative_to(root).as_posix(): path for path in paths}
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """The machine and the versions, JSON-able; None stands for what is not there."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        "device_type": "cuda" if on_gpu else "cpu",
        "gpu_uuid": str(torch.cuda.get_device_properties().uuid) if on_gpu and torch.version.cuda else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if on_gpu
        else None,
        "peers": _peers(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _peers() -> dict[str, str]:
    """Versions of the libraries that are compared with, those that are installed."""
    found = {}
    for name, module in (("natten", "natten"), ("liger-kernel", "liger_kernel"), ("quack-kernels", "quack")):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a folder on the path
            with suppress(Exception):  # or it is not there, or can't be imported without a GPU
                found[name] = importlib.import_module(module).__version__
    return found


def write(path: Path | str, data: dict[str, Any]) -> None:
    """Writes data as JSON. Raises ValueError on NaN or infinity."""
    write_text(path, as_json(data))


def as_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_text(path: Path | str, text: str) -> None:
    """A reader, or a crash, never meets half a file. A link stays one: what it points to is written."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _output(*command: str) -> str | None:
    """What a command prints, None if it isn't there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """HEAD's hash, with "-dirty" after it when the tree differs. In a copy without .git: HDIT_COMMIT, or None."""
    if named := os.environ.get("HDIT_COMMIT"):
        return named
    commit, changes = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain")
    return None if commit is None else commit + ("-dirty" if changes else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
