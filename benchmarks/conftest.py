"""For `pytest benchmarks --benchmark-only`: the cases of `python -m benchmarks` through pytest-benchmark."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("pytest_benchmark") else ["test_kernels.py", "test_models.py"]


def pytest_report_header() -> str | None:
    return "NOT run here, for want of pytest-benchmark: every benchmark; pip install it" if collect_ignore else None
