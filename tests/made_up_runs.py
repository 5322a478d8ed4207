"""Run files as benchmarks/SCHEMA.md has them, with figures made up: for the tests of plots, reports and comparisons."""

from __future__ import annotations

import re
from typing import Any

from benchmarks import sources

ENVIRONMENT = {
    "device": "Made-up GPU",
    "device_type": "cuda",
    "python": "3.12.3",
    "platform": "Linux",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "hip": None,
    "driver": "580.1",
}
COPY, MATMUL = 4.0, 750.0  # TB/s, TFLOP/s


def stats(median: float, spread: float = 0.01) -> dict[str, Any]:
    """p20 and p80 at 1 - spread and 1 + spread of the median."""
    return {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread), "repeats": 50}


def row(case: str, contestant: str, gpu: float | None, wall: float | None, **changes: Any) -> dict[str, Any]:
    """A row, its kind aside, whose status is ok where there is a time; gpu, wall: medians in microseconds or Stats."""
    found: dict[str, Any] = {
        "case": case,
        "family": "norms",
        "operator": case.partition(" ")[0],
        "settings": {},
        "contestant": contestant,
        "detail": None,
        "pass": "forward",
        "status": "ok" if gpu or wall else "not measured",
        "reason": None,
        "gpu_us": gpu if gpu is None or isinstance(gpu, dict) else stats(gpu),
        "wall_us": wall if wall is None or isinstance(wall, dict) else stats(wall, 0.05),
        "bytes": 400_000_000,
        "flops": 0,
        "floor_us": 100.0,
        "ratio_to_floor": None,
        "error": None,
        "allowed_error": None,
        "peak_bytes": None,
    }
    found |= changes
    if found["gpu_us"] and found["floor_us"]:
        found["ratio_to_floor"] = found["gpu_us"]["median"] / found["floor_us"]
    return found


def run(kind: str, rows: list[dict[str, Any]], date: str = "2026-11-23", **environment: Any) -> dict[str, Any]:
    """Of one session, of sources that are no longer."""
    session = {
        "command": ["python", "-m", "benchmarks", kind],
        "commit": "0" * 40,
        "date": date,
        "gpu_uuid": "one",
        "sources": dict.fromkeys(sources.ENTRIES, "0" * 16),
        "measuring": "0" * 16,
        "clocks": {"sm_mhz": 1980, "memory_mhz": 3201, "seen": "nvidia-smi while timing"},
        "ceilings": {"copy_tb_s": COPY, "matmul_bf16_tflop_s": MATMUL},
    }
    rows = [{"kind": kind, "session": 0} | row for row in rows]
    return {"schema": 2, "environment": ENVIRONMENT | environment, "sessions": [session], "rows": rows}


def kernels() -> dict[str, Any]:
    """na2d with two cases and every peer, one of which fails and one of which is missing; rms_norm with one case."""
    found = []
    for case, gigabytes in (("na2d 4x256x256x2x64 k7 bfloat16", 0.268), ("na2d 32x32x32x12x64 k7 bfloat16", 0.201)):
        sides = map(int, re.findall(r"\d+", case)[1:6])
        shape = dict(zip(("batch", "height", "width", "heads", "head_dim"), sides, strict=True))
        for direction, factor in (("forward", 1), ("forward+backward", 3)):
            floor = factor * gigabytes * 1e9 / (COPY * 1e6)
            work = {
                "family": "neighborhood_attention",
                "settings": shape | {"kernel_size": 7, "dtype": "bfloat16"},
                "pass": direction,
                "floor_us": floor,
                "bytes": int(factor * gigabytes * 1e9),
                "flops": int(24.5 * factor * gigabytes * 1e9),
            }
            times = {"ours": 1.3, "natten hopper-fna": 6.1, "natten cutlass-fna": 5.2, "flex": 12.5, "compiled": 41.0}
            for contestant, ratio in times.items():
                detail = "tile (8, 8)" if "natten" in contestant else None
                found.append(row(case, contestant, floor * ratio, floor * ratio + 40, detail=detail, **work))
            lost = {"status": "failed", "reason": "query.grad: error 3.1e-01, allowed 4.1e-03"}
            found.append(row(case, "sdpa", None, None, **work, **lost))
    norm = {"flops": 0, "floor_us": 25.0, "bytes": 100_000_000}
    found.append(row("rms_norm 131072x128 bfloat16", "ours", stats(26.5, 0.02), 40, **norm))
    found.append(row("rms_norm 131072x128 bfloat16", "compiled", stats(27.0, 0.03), 55, **norm))
    gone = {"status": "unavailable", "reason": "quack is not installed: pip install quack-kernels"}
    found.append(row("rms_norm 131072x128 bfloat16", "quack", None, None, **norm, **gone))
    return run("kernels", found)


def scaling(**environment: Any) -> dict[str, Any]:
    """HDiT measured at all sizes, DiT to 1024², and at its largest batch; attention over four grids."""
    found = []
    for size in (64, 128, 256, 512, 1024, 2048, 4096):
        pixels = size * size
        flops = {"HDiT-B/4": int(3e10 + 1.35e6 * pixels), "DiT-B/4": int(1.2e7 * pixels + 142.5 * pixels**2)}
        for contestant, count in flops.items():
            for direction, factor in (("forward", 1), ("step", 3)):
                common = {
                    "family": "model",
                    "operator": "model",
                    "settings": {"size": size, "batch": 1, "largest": False},
                    "pass": direction,
                    "flops": count * factor,
                    "parameters": 130_000_000,
                    "floor_us": factor * count / (MATMUL * 1e6),
                }
                microseconds = 900 + factor * count / (0.4 * MATMUL * 1e6)
                case = f"model {size}x{size} batch 1"
                if contestant == "DiT-B/4" and size > 1024:
                    lost = {
                        "status": "out of memory" if size > 2048 else "not measured",
                        "reason": "about 900 s needed",
                    }
                    found.append(row(case, contestant, None, None, **common, **lost))
                else:
                    common["peak_bytes"] = int(6e8 + 900 * factor * pixels)
                    found.append(row(case, contestant, microseconds, microseconds + 2500, **common))
            if size <= 1024:
                batch = max(1, 2**20 // pixels) * (8 if contestant == "HDiT-B/4" else 4)
                common["settings"] = {"size": size, "batch": batch, "largest": True}
                common |= {"pass": "step", "peak_bytes": int(1.2e11), "flops": batch * 3 * count}
                common["detail"] = "limited by memory"
                case = f"model {size}x{size} largest batch"
                found.append(row(case, contestant, batch * microseconds, batch * microseconds + 2500, **common))
    for grid in (32, 128, 512, 1024):
        tokens = grid * grid
        for contestant, microseconds in {
            "ours": 3 + 5e-4 * tokens,
            "natten hopper-fna": 8 + 2.6e-3 * tokens,
            "flex": 15 + 5e-3 * tokens,
            "sdpa": 5 + 1.1e-6 * tokens**2,
        }.items():
            flops = 512 * tokens * (tokens if contestant == "sdpa" else 49)
            common = {"family": "attention", "operator": "attention", "flops": flops, "floor_us": 3.4e-4 * tokens}
            settings = {"grid": grid, "batch": 1, "heads": 2, "head_dim": 64, "kernel_size": 7, "dtype": "bfloat16"}
            case = f"attention {grid}x{grid}"
            if contestant == "sdpa" and grid > 512:
                lost = {"status": "not measured", "reason": "about 90 s needed"}
                found.append(row(case, contestant, None, None, settings=settings, **common, **lost))
            else:
                found.append(row(case, contestant, microseconds, microseconds + 30, settings=settings, **common))
    return run("scaling", found, **environment)


def models(kind: str = "model") -> dict[str, Any]:
    found = []
    for preset, batch in (("flowers-256", 32), ("imagenet-256", 16)):
        for direction, factor in (("step", 3),) if kind == "train" else (("forward", 1), ("forward+backward", 3)):
            common = {
                "family": "model",
                "operator": preset,
                "settings": {"preset": preset, "batch": batch, "precision": "bfloat16 autocast"},
                "pass": direction,
                "flops": factor * 745 * 10**9,
                "parameters": 22_400_000,
                "floor_us": factor * 993.0,
            }
            case = f"{preset} batch {batch}"
            found.append(row(case, "ours", 4000 * factor, 4200 * factor, peak_bytes=2 * 2**30, **common))
            found.append(
                row(case, "k-diffusion", 10570 * factor, 30000 * factor, peak_bytes=5 * 2**30, kernels=521, **common)
            )
            lost = {"status": "out of memory", "reason": "CUDA out of memory"}
            found.append(row(case, "k-diffusion, compiled", None, None, **common, **lost))
    return run(kind, found)


def captured(run: dict[str, Any]) -> dict[str, Any]:
    """The run with captured times of its networks, as benchmarks/captured.py has them: of k-diffusion the reason."""
    rows = []
    for found in run["rows"]:
        if found["family"] == "model" and found["status"] == "ok" and found["pass"] != "forward+backward":
            if found["contestant"] == "k-diffusion":
                words = [found["detail"], "not captured: an operation in it waits for the GPU"]
                found = found | {"detail": "; ".join(filter(None, words))}
            else:
                found = found | {"captured_us": stats(found["gpu_us"]["median"] + 200)}
        rows.append(found)
    return run | {"rows": rows}
