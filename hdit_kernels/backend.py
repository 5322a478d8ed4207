"""Which implementation the operators run: `set_backend`, or the environment variable HDIT_KERNELS_BACKEND.

- "auto" (default): kernels for tensors on a GPU, Hopper's own where they can; the reference elsewhere, and for float64.
- "triton": the portable kernels, never those in Gluon. Where no kernel can run (a tensor that is not on a GPU while
  Triton's interpreter is off, float64, no Triton), a call is an error.
- "reference": plain PyTorch on any device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

from torch import Tensor

from hdit_kernels import checks

VARIABLE = "HDIT_KERNELS_BACKEND"
NAMES = ("auto", "triton", "reference")

chosen: str = checks.choice(VARIABLE, os.environ.get(VARIABLE, "auto"), NAMES)


def set_backend(backend: str) -> str:
    """Makes every operator's later calls run on `backend`; returns the one before.

    Derivatives beyond the first are always the reference's. A captured CUDA graph keeps what it was captured with.

    Raises ValueError: backend is none of "auto", "triton" and "reference".
    """
    global chosen
    before, chosen = chosen, checks.choice("backend", backend, NAMES)
    return before


def get_backend() -> str:
    """The name of the present backend."""
    return chosen


@functools.cache
def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_kernels_run(tensors: Sequence[Tensor]) -> None:
    """RuntimeError, naming the backend "triton", where no kernel can take these tensors."""
    expected = 'the backend "triton" (HDIT_KERNELS_BACKEND or set_backend): expected'
    if not triton_available():
        raise RuntimeError(f"{expected} Triton to be installed")
    for tensor in tensors:
        if tensor.element_size() == 8:
            raise RuntimeError(f"{expected} bfloat16, float16 or float32, got float64")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"{expected} tensors on a GPU (or TRITON_INTERPRET=1), got one on {tensor.device}")
