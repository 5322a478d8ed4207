"""torch.compile of the reference: what one gets without writing a kernel.

Neighborhood attention is not among its operators: the reference walks the grid in a Python loop, and torch.compile's
own way to it is FlexAttention (flex.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer

OPERATORS = (
    *("rms_norm", "ada_rms_norm", "ada_layer_norm", "gated_residual", "geglu"),
    *("token_merge", "token_split", "qk_norm_rope"),
)


def _missing() -> str | None:
    """What Inductor needs beside torch: Triton and a C compiler on a GPU, a C++ compiler on a CPU."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton"
        names = [os.environ.get("CC", "cc"), "gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    found = any(map(shutil.which, names))
    return None if found else f"torch.compile needs a compiler, and none of {', '.join(names)} is here"


PEER = Peer("torch.compile", None, "comes with torch", check=_missing)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape.

    What was compiled before is forgotten: past a number of shapes of one function Dynamo runs it uncompiled.
    """
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # so that a backward pass can be repeated
    return torch.compile(function, dynamic=False, fullgraph=True)


def build(case: Case) -> Implementation:
    def function(**tensors: Tensor) -> Tensor:
        return case.reference(**tensors)

    return Implementation(compile(function), detail="the reference, fullgraph", compiles=True)


CONTESTANTS = [Contestant("compiled", PEER, dict.fromkeys(OPERATORS, build))]
