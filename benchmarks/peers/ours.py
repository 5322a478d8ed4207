"""hdit_kernels itself."""

from __future__ import annotations

import torch

import hdit_kernels
from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer

PEER = Peer("hdit_kernels", None, 'pip install "hdit-kernels[bench]"')


def build(case: Case) -> Implementation:
    on_gpu = torch.cuda.is_available()
    return Implementation(case.ours, detail=None if on_gpu else "CPU: the reference in plain PyTorch")


CONTESTANTS = [Contestant("ours", PEER, dict.fromkeys(hdit_kernels.__all__, build))]
