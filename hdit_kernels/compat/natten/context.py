"""NATTEN's switches and questions, of 0.21 and 0.17. Here a table chooses the kernels: switches change nothing, each
says so once, and questions have one answer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

SWITCHES = (
    # 0.21
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
    # 0.17 and before
    "disable_autotuner",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "use_autotuner",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
)
"""They choose among NATTEN's kernels. None changes what is computed, so none has an effect here."""

ANSWERS: dict[str, Any] = {
    # 0.21
    "are_deterministic_algorithms_enabled": True,
    "is_flex_compile_allowed": False,
    "is_flex_compile_backprop_allowed": False,
    "is_kv_parallelism_in_fused_na_enabled": False,
    "is_memory_usage_default": True,
    "is_memory_usage_strict": False,
    "is_memory_usage_unrestricted": False,
    # 0.17 and before
    "has_bfloat": True,
    "has_fna": True,
    "has_fp32_gemm": False,
    "has_fp64_gemm": False,
    "has_fused_na": True,  # on a CPU, too
    "has_gemm": False,
    "has_half": True,
    "has_tf32_gemm": False,
    "is_autotuner_enabled": False,
    "is_autotuner_enabled_for_backward": False,
    "is_autotuner_enabled_for_forward": False,
    "is_autotuner_thorough_for_backward": False,
    "is_autotuner_thorough_for_forward": False,
    "is_fna_enabled": True,
    "is_fused_na_enabled": True,
    "is_gemm_na_enabled": False,
    "is_tf32_in_gemm_na_enabled": False,
    "is_tiled_na_enabled": False,
}
CONFIGS = tuple(
    f"get_{way}configs_for_{backend}"
    for way, backends in {
        "": ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex"),
        "bwd_": ("cutlass", "cutlass_hopper", "cutlass_blackwell"),
    }.items()
    for backend in (f"{b}_{kind}" for b in backends for kind in ("fna", "fmha"))
)
"""Lists of tile shapes to choose from: empty here."""

__all__ = ["has_cuda", *SWITCHES, *ANSWERS, *CONFIGS]

_told: set[str] = set()


def without_effect(name: str) -> None:
    """A warning, once for each name: it steers the speed of NATTEN's own kernels, and nothing here."""
    if name not in _told and not is_dynamo_compiling():
        _told.add(name)
        warnings.warn(
            f"{name}: taken without effect. It chooses among NATTEN's kernels; hdit_kernels chooses its own, "
            "and results do not depend on it",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """For warnings.warn in the function that asks: the frame that called this package."""
    frame, level, package = sys._getframe(1), 1, __name__.partition(".")[0] + "."
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def has_cuda() -> bool:
    return torch.cuda.is_available()


def __getattr__(name: str) -> Callable[..., Any]:
    function = _function(name)
    if function is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function.__name__ = function.__qualname__ = name
    globals()[name] = function  # one function for each name
    return function


def _function(name: str) -> Callable[..., Any] | None:
    if name in SWITCHES:
        return lambda *_, **__: without_effect(f"natten.{name}")
    if name in ANSWERS:
        return lambda *_, **__: ANSWERS[name]
    return (lambda *_, **__: []) if name in CONFIGS else None
