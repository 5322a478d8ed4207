"""Noise schedules, samplers and classifier-free guidance, with the names and signatures of k-diffusion.

A schedule is a 1-D tensor of falling noise levels (sigma) that ends in 0. A sampler takes

    model       called as model(x, sigma, **extra_args) with sigma [B]; returns the denoised x (hdit.Denoiser does)
    x           [B, C, H, W], unit normal noise times sigmas[0]
    sigmas      the schedule; n + 1 of them make n steps
    extra_args  conditioning for the model, such as {"class_cond": labels}
    callback    called once a step with a dict of x, i, sigma, sigma_hat, denoised
    disable     True: no progress bar; False: a bar (needs tqdm); None: a bar where tqdm is installed, on a terminal

and returns x [B, C, H, W] at the last noise level. Step sizes are computed on the host in double precision, so that a
step costs the GPU a few additions and never waits for it.

Samplers that add noise take noise_sampler(sigma, sigma_next), which returns unit normal noise like x. By default each
step draws its own (default_noise_sampler): the steps don't overlap in time, so this has the distribution of a Brownian
path's increments, and torch.manual_seed makes it reproducible. (k-diffusion's Brownian tree, which keeps one path
whatever the number of steps, can be passed as noise_sampler.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


# Schedules


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Evenly spaced in sigma**(1/rho) (EDM, arXiv 2206.00364, equation 5), then 0; n + 1 values, float32."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho, device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Evenly spaced in log(sigma), then 0; n + 1 values, float32."""
    return _append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n).exp(), device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """A power rho of an even ramp in log(sigma), then 0; n + 1 values, float32."""
    ramp = torch.linspace(1, 0, n) ** rho
    return _append_zero(torch.exp(ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min)), device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """The variance-preserving schedule of Song et al. 2021 (EDM, table 1), then 0; n + 1 values, float32."""
    t = torch.linspace(1, eps_s, n)
    return _append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1), device)


def _append_zero(sigmas: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device)


# Guidance


class ClassifierFreeGuidance:
    """A denoiser moved away from the unconditional one (Ho & Salimans 2022, arXiv 2207.12598), for any sampler.

    Called as guided(x, sigma, class_cond=…, **cond), it runs denoiser once on a batch twice as large and returns
    D(x; no class) + guidance_scale * (D(x; class) - D(x; no class)): 0 is unconditional, 1 conditional, more is guided.

    null_class: the class index that means "no class" (HDiTConfig.null_class).
    """

    def __init__(self, denoiser: Model, guidance_scale: float, null_class: int) -> None:
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.null_class = null_class

    def __call__(self, x: Tensor, sigma: Tensor, class_cond: Tensor, **cond: Tensor | None) -> Tensor:
        twice = {name: value if value is None else torch.cat([value, value]) for name, value in cond.items()}
        classes = torch.cat([torch.full_like(class_cond, self.null_class), class_cond])
        denoised = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), class_cond=classes, **twice)
        unconditional, conditional = denoised.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


# What the samplers share


def default_noise_sampler(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Independent unit normal noise like x at every call; with a seed, from a generator of its own."""
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, layout=x.layout, device=x.device, generator=generator)

    return noise_sampler


class _Steps:
    """Walks over a schedule, yielding (i, sigma, sigma_next) as floats; calls the model and the callback for a step."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ) -> None:
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"sigmas must be 1-D with at least 2 values, got shape {list(sigmas.shape)}")
        self.levels: list[float] = sigmas.tolist()
        if not all(high > low >= 0 for high, low in zip(self.levels[:-1], self.levels[1:], strict=True)):
            raise ValueError(f"sigmas must fall and not go below 0, got {self.levels}")
        self.model, self.sigmas, self.callback, self.disable = model, sigmas, callback, disable
        self.extra_args = extra_args or {}

    def __len__(self) -> int:
        return len(self.levels) - 1

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        steps: Iterable[int] = range(len(self))
        if self.disable is False or (self.disable is None and find_spec("tqdm") is not None):
            steps = require("tqdm.auto", "train").tqdm(steps, disable=self.disable)
        for i in steps:
            yield i, self.levels[i], self.levels[i + 1]

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.model(x, torch.full(x.shape[:1], sigma, dtype=dtype, device=x.device), **self.extra_args)

    def report(self, i: int, x: Tensor, sigma_hat: float, denoised: Tensor) -> None:
        if self.callback is not None:
            sigma = self.sigmas[i]
            values = {"x": x, "i": i, "sigma": sigma, "sigma_hat": torch.full_like(sigma, sigma_hat)}
            self.callback(values | {"denoised": denoised})


def _churn(
    x: Tensor, sigma: float, steps: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Tensor, float]:
    """Adds a little noise before a step: x at the higher level sigma_hat, and sigma_hat (EDM, algorithm 2)."""
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    if gamma == 0.0:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    return x + torch.randn_like(x) * (s_noise * (sigma_hat**2 - sigma**2) ** 0.5), sigma_hat


def _ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the level to step down to, and the noise to add there, to arrive at sigma_next."""
    sigma_up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


# Samplers of the probability flow ODE


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Euler steps; s_churn and the rest add noise on the way (EDM, algorithm 2 without its correction)."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), s_churn, s_tmin, s_tmax, s_noise)
        denoised = steps.denoise(x, sigma_hat)
        steps.report(i, x, sigma_hat, denoised)
        x = x + (x - denoised) * ((sigma_next - sigma_hat) / sigma_hat)
    return x


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Heun steps, second order, two calls of the model a step (EDM, algorithm 2)."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), s_churn, s_tmin, s_tmax, s_noise)
        denoised = steps.denoise(x, sigma_hat)
        steps.report(i, x, sigma_hat, denoised)
        slope = (x - denoised) / sigma_hat
        x_next = x + slope * (sigma_next - sigma_hat)
        if sigma_next > 0:
            slope_next = (x_next - steps.denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (slope + slope_next) * ((sigma_next - sigma_hat) / 2)
        x = x_next
    return x


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Midpoint steps in log(sigma), two calls of the model a step (DPM-Solver-2, Lu et al. 2022, arXiv 2206.00927)."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), s_churn, s_tmin, s_tmax, s_noise)
        denoised = steps.denoise(x, sigma_hat)
        steps.report(i, x, sigma_hat, denoised)
        slope, middle = (x - denoised) / sigma_hat, (sigma_hat * sigma_next) ** 0.5
        if sigma_next > 0:
            x_middle = x + slope * (middle - sigma_hat)
            slope = (x_middle - steps.denoise(x_middle, middle)) / middle
        x = x + slope * (sigma_next - sigma_hat)
    return x


@torch.no_grad()
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep (Adams-Bashforth on the schedule's uneven steps), one call of the model a step.

    order: how many slopes, this step's and earlier ones', a step extrapolates from. Raises ValueError if below 1.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    slopes: list[Tensor] = []  # newest first
    for i, sigma, _ in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        for j, slope in enumerate(slopes):
            x = x + slope * _multistep_weight(len(slopes), steps.levels, i, j)
    return x


def _multistep_weight(order: int, t: list[float], i: int, j: int) -> float:
    """Integral from t[i] to t[i+1] of the polynomial that is 1 at t[i-j] and 0 at the other t[i], …, t[i-order+1]."""
    coefficients = [1.0]  # of the polynomial in u = tau - t[i], lowest power first
    for k in range(order):
        if k != j:
            root, height = t[i - k] - t[i], t[i - j] - t[i - k]
            shifted, kept = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [(a - root * b) / height for a, b in zip(shifted, kept, strict=True)]
    h = t[i + 1] - t[i]
    return sum(c * h ** (power + 1) / (power + 1) for power, c in enumerate(coefficients))


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): second order from one call of the model a step."""
    return sample_dpmpp_2m_sde(model, x, sigmas, extra_args, callback, disable, eta=0.0)


# Samplers that add noise at every step


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler steps below the next noise level, and back up by adding noise; eta 0 is sample_euler."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or default_noise_sampler(x)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
        x = x + (x - denoised) * ((sigma_down - sigma) / sigma)
        if sigma_next > 0:
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * (s_noise * sigma_up)
    return x


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps (arXiv 2211.01095), two calls of the model a step."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or default_noise_sampler(x)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = (sigma * sigma_down) ** 0.5
            x_middle = torch.lerp(denoised, x, middle / sigma)
            denoised = steps.denoise(x_middle, middle)
        x = torch.lerp(denoised, x, sigma_down / sigma)
        if sigma_next > 0:
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * (s_noise * sigma_up)
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095); eta scales the noise, 0 is the ODE.

    solver_type: "midpoint" or "heun", how the change of the denoised x enters. Raises ValueError on another.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or default_noise_sampler(x)
    denoised_last, h_last = None, 0.0
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        h = math.log(sigma / sigma_next)  # step in t = -log(sigma)
        pull = -math.expm1(-(1 + eta) * h)
        x = torch.lerp(x, denoised, pull)
        if denoised_last is not None:
            weight = pull / 2 if solver_type == "midpoint" else 1 - pull / ((1 + eta) * h)
            x = x + (denoised - denoised_last) * (weight * h / h_last)
        if eta:
            noise_level = sigma_next * (-math.expm1(-2 * eta * h)) ** 0.5
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * (s_noise * noise_level)
        denoised_last, h_last = denoised, h
    return x


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(3M), third order from one call of the model a step; eta scales the noise, 0 is the ODE."""
    steps = _Steps(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or default_noise_sampler(x)
    history: list[tuple[Tensor, float]] = []  # the last two (denoised, h), newest first
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        h = math.log(sigma / sigma_next)  # step in t = -log(sigma)
        h_eta = (1 + eta) * h
        x = torch.lerp(x, denoised, -math.expm1(-h_eta))
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if len(history) == 1:
            ((denoised_1, h_1),) = history
            x = x + (denoised - denoised_1) * (phi_2 * h / h_1)
        elif len(history) == 2:
            (denoised_1, h_1), (denoised_2, h_2) = history
            r_1, r_2 = h_1 / h, h_2 / h
            slope_1, slope_2 = (denoised - denoised_1) / r_1, (denoised_1 - denoised_2) / r_2
            curvature = (slope_1 - slope_2) / (r_1 + r_2)
            x = x + (slope_1 + curvature * r_1) * phi_2 - curvature * (phi_2 / h_eta - 0.5)
        if eta:
            noise_level = sigma_next * (-math.expm1(-2 * eta * h)) ** 0.5
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * (s_noise * noise_level)
        history = [(denoised, h), *history[:1]]
    return x
