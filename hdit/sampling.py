"""Noise schedules, samplers and classifier-free guidance, with the names and signatures of k-diffusion.

A schedule is a 1-D tensor of falling noise levels (sigma) that ends in 0. A sampler takes

    model       called as model(x, sigma, **extra_args) with sigma [B]; returns the denoised x (hdit.Denoiser does)
    x           [B, C, H, W] (or of any shape, batch first), unit normal noise times sigmas[0]
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

Everything here raises TypeError or ValueError, naming the argument, on what doesn't fit, before the model is called;
and if the model or noise_sampler doesn't return a tensor like x. Levels, eta, s_churn, s_tmin, s_noise are 0 to 1e18.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit_kernels import checks

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]

SMALLEST_RHO = 0.1  # sigma**(1 / rho) of less is beyond float32
MOST_STEPS = 2**24  # of a schedule: float32 has no more levels in a ramp
LARGEST_SCALE = 1e38  # of guidance: more is beyond float32


# Schedules


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Evenly spaced in sigma**(1/rho) (EDM, arXiv 2206.00364, equation 5), then 0; n + 1 values, float32."""
    sigma_min, sigma_max = checks.rising("sigma_min", sigma_min, "sigma_max", sigma_max)
    power = 1 / checks.number("rho", rho, at_least=SMALLEST_RHO)
    low, high = sigma_min**power, sigma_max**power
    return _schedule("rho", (high + _ramp(0, 1, n) * (low - high)) ** rho, device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Evenly spaced in log(sigma), then 0; n + 1 values, float32."""
    sigma_min, sigma_max = checks.rising("sigma_min", sigma_min, "sigma_max", sigma_max)
    return _schedule("sigma_min", _ramp(math.log(sigma_max), math.log(sigma_min), n).exp(), device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """A power rho of an even ramp in log(sigma), then 0; n + 1 values, float32."""
    sigma_min, sigma_max = checks.rising("sigma_min", sigma_min, "sigma_max", sigma_max)
    ramp = _ramp(1, 0, n) ** checks.number("rho", rho, at_least=SMALLEST_RHO)
    sigmas = torch.exp(ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min))
    return _schedule("rho", sigmas, device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """The variance-preserving schedule of Song et al. 2021 (EDM, table 1), then 0; n + 1 values, float32."""
    beta_d, beta_min = checks.number("beta_d", beta_d, at_least=0), checks.number("beta_min", beta_min, at_least=0)
    t = _ramp(1, checks.number("eps_s", eps_s, above=0, below=1), n)
    return _schedule("beta_d", torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1), device)


def _ramp(first: float, last: float, n: int) -> Tensor:
    return torch.linspace(first, last, checks.integer("n", n, 1, MOST_STEPS), dtype=torch.float32, device="cpu")


def _schedule(setting: str, sigmas: Tensor, device: torch.device | str) -> Tensor:
    """sigmas, made of numbers of which `setting` may not fit, and 0, on the device."""
    checks.device("device", device)

    def fall(sigmas: Tensor) -> Tensor:
        return checks.positive(sigmas) & (sigmas < torch.cat([sigmas.new_full([1], math.inf), sigmas[:-1]]))

    checks.values(setting, sigmas, fall, "one whose noise levels fall, positive and finite in float32")
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device)


# Guidance


def check_guidance(name: str, value: object) -> float:
    """value, called `name`, as a scale of guidance."""
    return checks.number(name, value, at_least=-LARGEST_SCALE, at_most=LARGEST_SCALE)


class ClassifierFreeGuidance:
    """A denoiser moved away from the unconditional one (Ho & Salimans 2022, arXiv 2207.12598), for any sampler.

    Called as guided(x, sigma, class_cond=…, **cond), it runs denoiser once on a batch twice as large and returns
    D(x; no class) + guidance_scale * (D(x; class) - D(x; no class)): 0 is unconditional, 1 conditional, more is guided.

    null_class: the class index that means "no class" (HDiTConfig.null_class). sigma: [B], or one level for all.
    """

    def __init__(self, denoiser: Model, guidance_scale: float, null_class: int) -> None:
        checks.function("denoiser", denoiser)
        self.denoiser = denoiser
        self.guidance_scale = check_guidance("guidance_scale", guidance_scale)
        self.null_class = checks.integer("null_class", null_class, 0)

    def __call__(self, x: Tensor, sigma: Tensor | float, class_cond: Tensor, **cond: Tensor | None) -> Tensor:
        batch = _batch(x)
        checks.tensor("class_cond", class_cond)
        if class_cond.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"class_cond: expected int32 or int64, got {class_cond.dtype}")
        checks.shape("class_cond", class_cond, [batch])
        classes = torch.cat([torch.full_like(class_cond, self.null_class), class_cond])
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = _twice("sigma", sigma, batch)
        twice = {name: value if value is None else _twice(name, value, batch) for name, value in cond.items()}
        x = torch.cat([x, x])
        denoised = checks.returned("denoiser", self.denoiser(x, sigma, class_cond=classes, **twice), x)
        unconditional, conditional = denoised.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


def _twice(name: str, value: Tensor, batch: int) -> Tensor:
    checks.tensor(name, value)
    checks.shape(name, value, [batch, *value.shape[1:]])
    return torch.cat([value, value])


def _batch(x: Tensor) -> int:
    """How many images x holds, which is checked."""
    checks.tensor("x", x)
    checks.floating(x=x)
    if x.ndim == 0:
        raise ValueError("x: expected shape [B, C, H, W], got []")
    return x.shape[0]


# What the samplers share


def default_noise_sampler(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Independent unit normal noise like x at every call; with a seed, from a generator of its own."""
    _batch(x)
    generator = None if seed is None else torch.Generator(x.device).manual_seed(checks.seed("seed", seed))

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, layout=x.layout, device=x.device, generator=generator)

    return noise_sampler


class _Steps:
    """What samplers share: the checks of their arguments, the walk over the schedule, and the calls of the model, the
    callback and the noise sampler. Iterating yields (i, sigma, sigma_next) as floats.

    settings: the sampler's numbers of 0 to 1e18, by name; s_tmax may be infinite.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
        settings: Mapping[str, float] | None = None,
        noise_sampler: NoiseSampler | None = None,
    ) -> None:
        checks.function("model", model)
        _batch(x)
        if extra_args is not None and not isinstance(extra_args, Mapping):
            raise TypeError(f"extra_args: expected a dict of the model's arguments, got {checks.shown(extra_args)}")
        if callback is not None:
            checks.function("callback", callback)
        checks.boolean("disable", disable, optional=True)
        if noise_sampler is not None:
            checks.function("noise_sampler", noise_sampler)
        for name, value in (settings or {}).items():
            most = math.inf if name == "s_tmax" else checks.LARGEST_LEVEL
            checks.number(name, value, at_least=0, at_most=most, infinite=True)
        self.levels = _falling(sigmas)
        self.model, self.sigmas, self.callback, self.disable = model, sigmas, callback, disable
        self.extra_args = extra_args or {}
        self.noise_sampler = noise_sampler or default_noise_sampler(x)

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
        level = torch.full(x.shape[:1], sigma, dtype=dtype, device=x.device)
        return checks.returned("model", self.model(x, level, **self.extra_args), x)

    def report(self, i: int, x: Tensor, sigma_hat: float, denoised: Tensor) -> None:
        if self.callback is not None:
            sigma = self.sigmas[i]
            values = {"x": x, "i": i, "sigma": sigma, "sigma_hat": torch.full_like(sigma, sigma_hat)}
            self.callback(values | {"denoised": denoised})

    def noise(self, i: int, x: Tensor) -> Tensor:
        """Unit normal noise like x, for step i."""
        return checks.returned("noise_sampler", self.noise_sampler(self.sigmas[i], self.sigmas[i + 1]), x)


def _falling(sigmas: Tensor) -> list[float]:
    """The levels of a schedule. The sampler's one wait for the GPU, if that is where it lies."""
    checks.tensor("sigmas", sigmas)
    checks.floating(sigmas=sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: expected 1-D with at least 2 values, got shape {list(sigmas.shape)}")
    if sigmas.is_meta:
        raise ValueError("sigmas: expected values, got a tensor on meta")
    levels: list[float] = sigmas.tolist()
    if not all(checks.LARGEST_LEVEL >= high > low >= 0 for high, low in zip(levels[:-1], levels[1:], strict=True)):
        wanted = f"values of at most {checks.LARGEST_LEVEL:g} that fall and don't go below 0"
        raise ValueError(f"sigmas: expected {wanted}, got {reprlib.repr(levels)}")
    return levels


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
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, churn)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), **churn)
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
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, churn)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), **churn)
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
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, churn)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = _churn(x, sigma, len(steps), **churn)
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
    checks.integer("order", order)
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
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, {"eta": eta, "s_noise": s_noise}, noise_sampler)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.report(i, x, sigma, denoised)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
        x = x + (x - denoised) * ((sigma_down - sigma) / sigma)
        if sigma_next > 0:
            x = x + steps.noise(i, x) * (s_noise * sigma_up)
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
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, {"eta": eta, "s_noise": s_noise}, noise_sampler)
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
            x = x + steps.noise(i, x) * (s_noise * sigma_up)
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
    checks.choice("solver_type", solver_type, ("midpoint", "heun"))
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, {"eta": eta, "s_noise": s_noise}, noise_sampler)
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
            x = x + steps.noise(i, x) * (s_noise * noise_level)
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
    steps = _Steps(model, x, sigmas, extra_args, callback, disable, {"eta": eta, "s_noise": s_noise}, noise_sampler)
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
            x = x + steps.noise(i, x) * (s_noise * noise_level)
        history = [(denoised, h), *history[:1]]
    return x
