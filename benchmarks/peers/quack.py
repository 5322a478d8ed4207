"""quack's CuTe kernels: RMSNorm."""

from __future__ import annotations

import importlib

from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer

EPS = 1e-6
PEER = Peer("quack", "quack", "pip install quack-kernels", needs_gpu=True)


def rms_norm(case: Case) -> Implementation:
    quack = importlib.import_module("quack")

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return quack.rmsnorm(x, weight, eps=EPS)

    return Implementation(function, compiles=True)


CONTESTANTS = [Contestant("quack", PEER, {"rms_norm": rms_norm})]
