"""Every buffer that a launcher allocates starts as NaN, so that an element no kernel wrote is seen; and Triton's
interpreter does what takes it most time, and changes no result, once or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from unittest import mock

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from hdit_kernels import testing


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """As it is, it patches triton.language anew at every call of every function that a kernel calls, and works out in
    64 bits whether each integer operation overflows, of which it tells nobody unless its option debug is set.
    """
    everything = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})  # patched is what a function sees
    patched, nothing = interpreter._patch_lang(everything), interpreter._LangPatchScope()
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", lambda function: nothing),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        yield
    patched.restore()


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    with testing.poisoned():
        assert torch.empty(2).isnan().all() and torch.zeros(1).new_empty(2).isnan().all()
        yield
