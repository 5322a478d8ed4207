"""torch.compile of plain PyTorch (eager.py): what one gets without writing a kernel.

Not of the reference, which computes in float32 on purpose: its products would be float32 products. Neighborhood
attention is not among the operators: torch.compile's own way to it is FlexAttention (flex.py).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer, eager


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


_compiled = False  # whether anything was since forget(), whose reset and collection take time


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape.

    What was compiled before is forgotten: past a number of shapes of one function Dynamo runs it uncompiled.
    """
    global _compiled
    _compiled = True
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # so that a backward pass can be repeated
    return torch.compile(function, dynamic=False, fullgraph=True)


def forget() -> None:
    """Frees what compiled functions hold: Dynamo was seen to keep the three inputs of flex_attention in cycles."""
    global _compiled
    if _compiled:
        _compiled = False
        torch._dynamo.reset()
        gc.collect()


def build(case: Case) -> Implementation:
    plain = eager.OPERATORS[case.operator](case).function

    def function(**tensors: Tensor) -> Tensor:
        return plain(**tensors)

    return Implementation(compile(function), detail="plain PyTorch (as eager), fullgraph", compiles=True)


CONTESTANTS = [Contestant("compiled", PEER, dict.fromkeys(eager.OPERATORS, build))]
