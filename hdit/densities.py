"""Random noise levels (sigma) to train at, with the names and signatures of k-diffusion.

Every density turns uniform draws into sigma by its inverse distribution function, so that it can be stratified: inside
`with enable_stratified():` the draws of one batch are spread evenly over the distribution, which lowers the variance of
the loss. All take `shape` (a list of sizes), `device` and `dtype`, and return a tensor of them. `loc` and `scale` are
the centre and the scale of log(sigma).
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_strata: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("strata", default=None)


@contextmanager
def enable_stratified(group: int = 0, groups: int = 1, disable: bool = False) -> Iterator[None]:
    """Stratifies the draws inside: one draw per stratum, the strata dealt out over the groups.

    groups: how many batches share the strata (processes x gradient accumulation steps); group: which of them this is.
    Raises ValueError if group is not in [0, groups).
    """
    if not 0 <= group < groups:
        raise ValueError(f"group must be in [0, groups), got group {group} of {groups} groups")
    token = _strata.set(None if disable else (group, groups))
    try:
        yield
    finally:
        _strata.reset(token)


def _uniform(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Uniform draws in [0, 1), stratified along the last axis inside enable_stratified."""
    u = torch.rand(shape, device=device, dtype=dtype)
    strata = _strata.get()
    if strata is None:
        return u
    group, groups = strata
    count = shape[-1] * groups
    return (torch.arange(group, count, groups, device=device, dtype=dtype) + u) / count


def rand_log_normal(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-normal (Karras et al. 2022, arXiv 2206.00364, table 1: loc -1.2, scale 1.2)."""
    u = _uniform(shape, device, dtype) * (1 - 2e-7) + 1e-7  # keeps the quantile finite
    return torch.distributions.Normal(loc, scale).icdf(u).exp()


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
    bounds = torch.tensor([min_value, max_value], device=device, dtype=torch.float64)
    min_cdf, max_cdf = torch.sigmoid((bounds.log() - loc) / scale)
    u = min_cdf + (max_cdf - min_cdf) * _uniform(shape, device, torch.float64)
    return (u.logit() * scale + loc).exp().to(dtype)


def rand_log_uniform(
    shape: Sequence[int],
    min_value: float,
    max_value: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-uniform between min_value and max_value."""
    low, high = math.log(min_value), math.log(max_value)
    return (low + (high - low) * _uniform(shape, device, dtype)).exp()


def rand_v_diffusion(
    shape: Sequence[int],
    sigma_data: float = 1.0,
    min_value: float = 0.0,
    max_value: float = float("inf"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosine schedule with uniform time (v-diffusion, Salimans & Ho 2022), truncated to [min_value, max_value]."""
    low, high = math.atan(min_value / sigma_data), math.atan(max_value / sigma_data)
    return torch.tan(low + (high - low) * _uniform(shape, device, dtype)) * sigma_data


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
    t = _uniform(shape, device, dtype)  # from the most noise to the least

    def log_sigma(noise_d: float) -> Tensor:
        ratio = noise_d / image_d
        first, last = math.atan(max_value / sigma_data * ratio), math.atan(min_value / sigma_data * ratio)
        return torch.log(torch.tan(first + t * (last - first)) / ratio)

    return torch.exp(torch.lerp(log_sigma(noise_d_low), log_sigma(noise_d_high), t)) * sigma_data


def rand_split_log_normal(
    shape: Sequence[int],
    loc: float,
    scale_1: float,
    scale_2: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-normal with scale_1 below its mode and scale_2 above; drawn directly, so never stratified."""
    n = torch.randn(shape, device=device, dtype=dtype).abs()
    u = torch.rand(shape, device=device, dtype=dtype)
    left = u < scale_1 / (scale_1 + scale_2)
    return torch.where(left, loc - n * scale_1, loc + n * scale_2).exp()
