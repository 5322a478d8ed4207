"""compute-sanitizer's memcheck finds nothing in a small case of each kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(
    not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer, which comes with the CUDA toolkit"
)
def test_memcheck(seed: int, record) -> None:
    run = subprocess.run(
        [
            "compute-sanitizer",
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "tests.sanitize",
            str(seed),
        ],
        cwd=Path(__file__).parent.parent,
        env=os.environ
        | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor its own allocation: no neighbours to run into
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0 and "ERROR SUMMARY: 0 errors" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    ran = [line.split()[1].rstrip(":") for line in run.stdout.splitlines() if line.startswith("ran ")]
    record("sanitizer", "memcheck", "bfloat16", dict(errors=0, operators=list(dict.fromkeys(ran))))
