"""Runs tests/interpreter under Triton's interpreter, which must be chosen before Triton is imported: in two processes,
one for each of pytest-xdist's. (Of a process of each file's own, six seconds were imports.)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the interpreter lane needs Triton: install the extra [test] on Linux")

FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))
ATTENTION = [path for path in FILES if re.search("attention|na2d|tune", path.stem)]  # takes about as long as the rest
REST = [path for path in FILES if path not in ATTENTION]


@pytest.mark.parametrize("files", [ATTENTION, REST], ids=["attention", "rest"])
def test_kernels_under_the_interpreter(files: list[Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[1-9]\d* passed", run.stdout) and "skipped" not in run.stdout, run.stdout
