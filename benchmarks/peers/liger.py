"""liger-kernel's Triton kernels: RMSNorm, its modulated form, GEGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer, Tensors, Unsupported

EPS = 1e-6
PEER = Peer("liger-kernel", "liger_kernel", "pip install liger-kernel", needs_gpu=True)


def rms_norm(case: Case) -> Implementation:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)  # not in place: dout stays as it is

    return Implementation(function)


def ada_rms_norm(case: Case) -> Implementation:
    try:
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
    except ImportError as error:
        raise Unsupported("this liger-kernel has no modulated RMSNorm; 0.8.5 has") from error

    def function(x: Tensor, scale: Tensor) -> Tensor:
        return LigerModulatedRMSNormFunction.apply(x, None, scale, None, EPS, 0.0, "llama", False)

    return Implementation(function)


def split_halves(tensors: Tensors) -> Tensors:
    value, gate = tensors["x"].chunk(2, -1)
    return {"gate": gate.contiguous(), "value": value.contiguous()}


def tanh_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate, approximate="tanh")


def geglu(case: Case) -> Implementation:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    def function(gate: Tensor, value: Tensor) -> Tensor:
        return LigerGELUMulFunction.apply(gate, value)

    return Implementation(
        function,
        prepare=split_halves,
        reference=tanh_geglu,
        detail="another function: tanh GELU; value and gate as two tensors, which its backward overwrites",
        overwrites=True,
    )


CONTESTANTS = [Contestant("liger", PEER, {"rms_norm": rms_norm, "ada_rms_norm": ada_rms_norm, "geglu": geglu})]
