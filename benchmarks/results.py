"""What every recorded measurement carries: the machine, its versions, and the session that measured.

Records are JSON files in the folder of the same name, one a GPU: SCHEMA.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import sources
from benchmarks.sources import ROOT

# What a row depends on beside the sources: whose times are taken, of what, how, and for how long.
MEASURING = ("captured", "ceilings", "copy_triton", "correctness", "measure", "model", "networks", "scaling", "timing")
MEASURING = (*(f"benchmarks/{name}" for name in (*MEASURING, "kernels/*", "peers/*")), "hdit_kernels/testing")


def measuring_hash() -> str:
    """Of the syntax of the files that measure."""
    return sources.syntax(*measuring_files())


def measuring_files() -> list[Path]:
    return sorted(path for name in MEASURING for path in ROOT.glob(f"{name}.py"))


def environment() -> dict[str, Any]:
    """The machine and the versions, JSON-able; None stands for what is not there."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        "device_type": "cuda" if on_gpu else "cpu",
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
    }


def origin() -> dict[str, Any]:
    """When, at which commit and on which card."""
    nvidia = torch.cuda.is_available() and torch.version.cuda
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu_uuid": str(torch.cuda.get_device_properties().uuid) if nvidia else None,
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
    """Compact: a line for each entry, and for each item of one that is a list."""

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))

    def text(value: Any) -> str:
        return f"[\n{_lines(map(line, value))}\n]" if isinstance(value, list) and value else line(value)

    return f"{{\n{_lines(f'{line(name)}:{text(value)}' for name, value in data.items())}\n}}\n"


_lines = ",\n".join


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
