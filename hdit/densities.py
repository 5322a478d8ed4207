"""Random noise levels (sigma) to train at, with the names and signatures of k-diffusion.

Every density turns uniform draws into sigma by its inverse distribution function, so that it can be stratified: inside
`with enable_stratified():` the draws of one batch are spread evenly over the distribution, which lowers the variance of
the loss. All take `shape` (a list of sizes), `device` and `dtype`, and return a tensor of them: positive and finite,
computed in at least float32 and rounded once. `loc` and `scale` are the centre and the scale of log(sigma). All raise
TypeError or ValueError, naming the argument, on what is no such shape, device, floating dtype or number.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hdit_kernels import checks

LARGEST_LOG = 700.0  # exp of more is beyond float64
LARGEST_SIZE = 1e9  # of images and data, the smallest being 1 over it: float32 holds their ratios

_strata: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("strata", default=None)


@contextmanager
def enable_stratified(group: int = 0, groups: int = 1, disable: bool = False) -> Iterator[None]:
    """Stratifies the draws inside: one draw per stratum, the strata dealt out over the groups.

    groups: how many batches share the strata (processes x gradient accumulation steps); group: which of them this is.
    Raises TypeError or ValueError if they aren't integers, or group is not in [0, groups).
    """
    checks.integer("groups", groups)
    if checks.integer("group", group, 0) >= groups:
        raise ValueError(f"group: expected an integer below groups, {groups}, got {group}")
    checks.boolean("disable", disable)
    token = _strata.set(None if disable else (group, groups))
    try:
        yield
    finally:
        _strata.reset(token)


def _check(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> None:
    """What all densities take."""
    checks.sizes("shape", shape)
    checks.device("device", device)
    checks.floating_dtype("dtype", dtype)


def _loc(value: float) -> float:
    return checks.number("loc", value, at_least=-LARGEST_LOG, at_most=LARGEST_LOG)


def _scale(value: float, name: str = "scale") -> float:
    return checks.number(name, value, above=0, at_most=LARGEST_LOG)


def _size(name: str, value: float) -> float:
    return checks.number(name, value, at_least=1 / LARGEST_SIZE, at_most=LARGEST_SIZE)


def _uniform(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Uniform draws in [0, 1) in at least float32, stratified along the last axis inside enable_stratified."""
    dtype = torch.promote_types(dtype, torch.float32)
    u = torch.rand(shape, device=device, dtype=dtype)
    strata = _strata.get()
    if strata is None:
        return u
    if not shape:
        raise ValueError("shape: expected at least one size inside enable_stratified, got []")
    group, groups = strata
    u = (torch.arange(shape[-1], device=device, dtype=dtype) * groups + group + u) / (shape[-1] * groups)
    return u.clamp(max=1 - torch.finfo(dtype).eps / 2)  # the last stratum's may round to 1


def _levels(sigma: Tensor, dtype: torch.dtype, min_value: float = 0.0, max_value: float = math.inf) -> Tensor:
    """sigma in dtype, inside the bounds and dtype's range, so that it is neither 0 nor infinite.

    (In float64 a draw of exactly 0, one in 2**53, may give 0 where the distribution begins there.)
    """
    limits = torch.finfo(dtype)
    smallest = 0.0 if dtype == torch.float64 else limits.smallest_normal
    return sigma.clamp(max(min_value, smallest), min(max_value, limits.max)).to(dtype)


def rand_log_normal(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-normal (Karras et al. 2022, arXiv 2206.00364, table 1: loc -1.2, scale 1.2)."""
    _check(shape, device, dtype)
    u = _uniform(shape, device, dtype) * (1 - 2e-7) + 1e-7  # keeps the quantile finite
    # Rounded to float32, as in torch.distributions.Normal, which k-diffusion takes the quantile from.
    centre = torch.tensor(_loc(loc), dtype=torch.float32, device="cpu")
    spread = torch.tensor(_scale(scale), dtype=torch.float32, device="cpu")
    return _levels((centre + spread * torch.erfinv(2 * u - 1) * math.sqrt(2)).exp(), dtype)


def rand_log_logistic(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    min_value: float = 0.0,
    max_value: float = float("inf"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-logistic, truncated to [min_value, max_value]. Computed in float64: its tails need it."""
    _check(shape, device, dtype)
    loc, scale = _loc(loc), _scale(scale)
    low, high = checks.rising("min_value", min_value, "max_value", max_value, zero=True, infinite=True)
    min_cdf, max_cdf = (_logistic_cdf(bound, loc, scale) for bound in (low, high))
    if min_cdf == max_cdf and low < high:
        raise ValueError(
            f"min_value: expected bounds nearer to loc, got [{low:g}, {high:g}], which hold next to nothing"
        )
    u = min_cdf + (max_cdf - min_cdf) * _uniform(shape, device, torch.float64)
    return _levels((u.logit() * scale + loc).exp(), dtype, low, high)


def _logistic_cdf(sigma: float, loc: float, scale: float) -> float:
    """The distribution function of log(sigma)."""
    if sigma == 0:
        return 0.0
    return 1 / (1 + math.exp(min((loc - math.log(sigma)) / scale, LARGEST_LOG)))


def rand_log_uniform(
    shape: Sequence[int],
    min_value: float,
    max_value: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-uniform between min_value and max_value."""
    _check(shape, device, dtype)
    low, high = map(math.log, checks.rising("min_value", min_value, "max_value", max_value))
    return _levels((low + (high - low) * _uniform(shape, device, dtype)).exp(), dtype)


def _tan(angle: Tensor) -> Tensor:
    """The tangent of angles between 0 and a right angle, positive also where one has been rounded to an end."""
    limits = torch.finfo(angle.dtype)
    return torch.tan(angle.clamp(limits.smallest_normal, math.pi / 2 - limits.eps))


def rand_v_diffusion(
    shape: Sequence[int],
    sigma_data: float = 1.0,
    min_value: float = 0.0,
    max_value: float = float("inf"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosine schedule with uniform time (v-diffusion, Salimans & Ho 2022), truncated to [min_value, max_value]."""
    _check(shape, device, dtype)
    sigma_data = _size("sigma_data", sigma_data)
    low, high = checks.rising("min_value", min_value, "max_value", max_value, zero=True, infinite=True)
    first, last = math.atan(low / sigma_data), math.atan(high / sigma_data)
    angle = first + (last - first) * _uniform(shape, device, dtype)
    return _levels(_tan(angle) * sigma_data, dtype, low, high)


def rand_cosine_interpolated(
    shape: Sequence[int],
    image_d: float,
    noise_d_low: float,
    noise_d_high: float,
    sigma_data: float = 1.0,
    min_value: float = 1e-3,
    max_value: float = 1e3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosine schedule interpolated between two shifts for size (simple diffusion, Hoogeboom et al., arXiv 2301.11093).

    image_d: side of the image in pixels; noise_d_low, noise_d_high: sides of the images whose noise levels the schedule
    takes where there is much noise and where there is little.
    """
    _check(shape, device, dtype)
    image_d, sigma_data = _size("image_d", image_d), _size("sigma_data", sigma_data)
    low, high = checks.rising("min_value", min_value, "max_value", max_value)
    ratio_low = _size("noise_d_low", noise_d_low) / image_d
    ratio_high = _size("noise_d_high", noise_d_high) / image_d
    t = _uniform(shape, device, dtype)  # from the most noise to the least

    def log_sigma(ratio: float) -> Tensor:
        first, last = math.atan(high / sigma_data * ratio), math.atan(low / sigma_data * ratio)
        return torch.log(_tan(first + t * (last - first)) / ratio)

    log_ratio = torch.lerp(log_sigma(ratio_low), log_sigma(ratio_high), t)
    return _levels(torch.exp(log_ratio) * sigma_data, dtype, low, high)


def rand_split_log_normal(
    shape: Sequence[int],
    loc: float,
    scale_1: float,
    scale_2: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-normal with scale_1 below its mode and scale_2 above; drawn directly, so never stratified."""
    _check(shape, device, dtype)
    loc, scale_1, scale_2 = _loc(loc), _scale(scale_1, "scale_1"), _scale(scale_2, "scale_2")
    wide = torch.promote_types(dtype, torch.float32)
    n = torch.randn(shape, device=device, dtype=wide).abs()
    u = torch.rand(shape, device=device, dtype=wide)
    left = u < scale_1 / (scale_1 + scale_2)
    return _levels(torch.where(left, loc - n * scale_1, loc + n * scale_2).exp(), dtype)
