"""The two rates that nothing on this machine exceeds, measured in the same run as what is judged by them: bytes of a
device copy (read and written) a second, and FLOPs of a large matrix product a second."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import timing

Ceilings = dict[str, Any]

SIZES = (2**28, 2**30, 2**32)  # bytes of a copied tensor: well past any L2
MATMUL_SIZE = {torch.bfloat16: 8192, torch.float32: 4096}
MATMUL_SIZE_ON_CPU = {torch.bfloat16: 512, torch.float32: 1024}  # some processors take seconds for 1024 in bfloat16
KEY = {"bfloat16": "matmul_bf16_tflop_s", "float16": "matmul_bf16_tflop_s", "float32": "matmul_fp32_tflop_s"}


def measure_ceilings(device: torch.device, on_step: Callable[[str], None] = lambda message: None) -> Ceilings:
    """copy_tb_s and how it was reached, matmul_bf16_tflop_s, matmul_fp32_tflop_s (IEEE); on a GPU also
    matmul_tf32_tflop_s and what the timer makes of little work, copy_32_mib_tb_s and one_kernel_us.

    To be called inside timing.side_stream.
    """
    on_step("measuring the ceilings: copy bandwidth, matrix products")
    rate, way = _copy(device, SIZES if device.type == "cuda" else SIZES[:1])
    found: Ceilings = {"copy_tb_s": rate, "copy_way": way}
    found["matmul_bf16_tflop_s"] = _matmul(device, torch.bfloat16)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        found["matmul_fp32_tflop_s"] = _matmul(device, torch.float32)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            found["matmul_tf32_tflop_s"] = _matmul(device, torch.float32, 8192)
            found["copy_32_mib_tb_s"] = _copy(device, (2**25,))[0]
            one = torch.ones(1, device=device)
            found["one_kernel_us"] = timing.gpu_time(lambda: one.add_(1), device)[0].median
    finally:
        torch.set_float32_matmul_precision(before)
    timing.release(device)
    return found


def floor_us(ceilings: Ceilings, nbytes: int, flops: int, precision: str) -> float:
    """The least time of work that moves nbytes and does flops: the larger of the two floors, microseconds.

    precision: "bfloat16", "float16", "float32" or "float32 tf32". Any of them may be computed in float32, which some
    processors multiply faster.
    """
    key = "matmul_tf32_tflop_s" if precision.endswith("tf32") else KEY[precision]
    rate = max(ceilings[key], ceilings[KEY["float32"]])
    return max(nbytes / (ceilings["copy_tb_s"] * 1e6), flops / (rate * 1e6))


def clocks(device: torch.device) -> dict[str, Any]:
    """What nvidia-smi says of the clocks while the GPU multiplies matrices; None where there is nothing to ask."""
    unknown = {"sm_mhz": None, "memory_mhz": None, "seen": None}
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return unknown
    which = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")).removeprefix("GPU-")
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    query.append(f"--id=GPU-{which}" if which else f"--id={device.index or 0}")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    asked = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 15
    while asked.poll() is None and time.monotonic() < deadline:
        for _ in range(20):
            torch.mm(a, a, out=product)
        timing.synchronize(device)
    if asked.poll() is None:
        asked.kill()
    text = asked.communicate()[0]
    try:
        sm, memory = (int(part) for part in text.strip().splitlines()[0].split(","))
    except (IndexError, ValueError):
        return unknown
    return {"sm_mhz": sm, "memory_mhz": memory, "seen": "nvidia-smi, during matrix products"}


def _copy(device: torch.device, sizes: Sequence[int]) -> tuple[float, str]:
    """TB/s, read and written, of the best way and size (bytes of a tensor)."""
    best = (0.0, "")
    for nbytes in sizes:
        if device.type == "cuda" and 3 * nbytes > torch.cuda.mem_get_info(device)[0]:
            break
        source = torch.randint(2**30, (nbytes // 4,), dtype=torch.int32, device=device)
        target = torch.zeros_like(source)
        for name, time_us in _copy_times(source, target, device).items():
            best = max(best, (2 * nbytes / (time_us * 1e6), f"{name}, {nbytes / 2**20:.0f} MiB"))
        del source, target
    return best


def _copy_times(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Median microseconds by way. In a graph copy_ would become a memcpy node, which can be slower than a kernel."""
    if device.type != "cuda":
        return {"copy_": timing.wall_time(lambda: target.copy_(source), device)[0].median}
    times = {"copy_": timing.queued_time(lambda: target.copy_(source), device).median}
    times["elementwise"] = timing.gpu_time(lambda: torch.bitwise_not(source, out=target), device)[0].median
    if importlib.util.find_spec("triton") is not None:
        from benchmarks import copy_triton

        copy_triton.copy(source, target)
        times["Triton"] = timing.gpu_time(lambda: copy_triton.copy(source, target), device)[0].median
    return times


def _matmul(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """TFLOP/s of a square product of random matrices (zeros would draw less power and run at a higher clock)."""
    on_gpu = device.type == "cuda"
    n = size or (MATMUL_SIZE if on_gpu else MATMUL_SIZE_ON_CPU)[dtype]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def call() -> Any:
        return torch.mm(a, b, out=product)

    found = timing.gpu_time(call, device)[0] if on_gpu else timing.wall_time(call, device)[0]
    return 2 * n**3 / (found.median * 1e6)
