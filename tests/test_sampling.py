from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hdit import Denoiser, sampling
from tests import golden_files

ENTRY = golden_files.entry("samplers.safetensors")
GOLDEN = golden_files.tensors("samplers.safetensors")
# dpmpp_sde draws noise for overlapping spans of time, so it needs a Brownian path as its default: not one of ours.
RUNS = {name: run for name, run in ENTRY["runs"].items() if hasattr(sampling, run["function"])}
SAMPLERS = sorted({run["function"] for run in RUNS.values()})


def gauss(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of normal data."""
    constants, s = ENTRY["denoisers"]["gauss"], sigma[:, None, None, None]
    mean = torch.tensor(constants["mean"], dtype=x.dtype)[:, None, None]
    return mean + (x - mean) * constants["sd"] ** 2 / (constants["sd"] ** 2 + s**2)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of a mixture of two normal distributions at +a and -a."""
    constants, s = ENTRY["denoisers"]["mixture"], sigma[:, None, None, None]
    a, t = constants["a"], constants["s"] ** 2 + s**2
    return constants["s"] ** 2 / t * x + s**2 / t * a * torch.tanh(a * x / t)


class GivenNoise:
    """The golden files' noise, one tensor a call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.noise, self.calls = GOLDEN["noise"].to(dtype), 0

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        self.calls += 1
        return self.noise[self.calls - 1]


def test_golden_runs_of_every_required_sampler_are_there() -> None:
    required = {"euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"}
    assert {f"sample_{name}" for name in required} <= set(SAMPLERS)
    assert len(RUNS) == 52  # 13 of 14 settings x 2 denoisers x 2 schedules


@pytest.mark.parametrize("name", ENTRY["schedules"])
def test_schedules_equal_golden(name: str) -> None:
    schedule = ENTRY["schedules"][name]
    sigmas = getattr(sampling, schedule["function"])(**schedule["arguments"])
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 0 and len(sigmas) == schedule["arguments"]["n"] + 1
    torch.testing.assert_close(sigmas, GOLDEN[f"sigmas.{name}"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RUNS)
def test_samplers_equal_golden(name: str, dtype: torch.dtype) -> None:
    run = RUNS[name]
    noise, steps = GivenNoise(dtype), []
    arguments = run["arguments"] | ({"noise_sampler": noise} if run["noise_calls"] else {})
    final = getattr(sampling, run["function"])(
        {"gauss": gauss, "mixture": mixture}[run["denoiser"]],
        GOLDEN[f"x0.{run['schedule']}"].to(dtype),
        GOLDEN[f"sigmas.{run['schedule']}"].to(dtype),
        callback=lambda info: steps.append(info["x"]),
        disable=True,
        **arguments,
    )
    assert final.dtype == dtype and noise.calls == run["noise_calls"]
    if dtype == torch.float64:
        assert golden_files.max_error(final, GOLDEN[f"final.{name}"]) < 1e-12
        if run["denoiser"] == "mixture":
            golden_steps = GOLDEN[f"steps.{name}"]
            assert len(steps) == len(golden_steps)
            for step, golden_step in zip(steps, golden_steps, strict=True):
                assert golden_files.max_error(step, golden_step) < 2e-7  # stored as float32
    else:
        assert golden_files.max_error(final, GOLDEN[f"final.{name}"]) < 3 * run["float32_vs_float64"]


def class_model(calls: list[int]) -> Callable[..., Tensor]:
    """A denoiser that pulls towards its class's number; class 3 is "no class"."""

    def model(x: Tensor, sigma: Tensor, class_cond: Tensor, shift: Tensor) -> Tensor:
        calls.append(len(x))
        s = sigma[:, None, None, None]
        target = torch.tensor([1.0, -2.0, 0.5, 0.0])[class_cond] + shift
        return (x + s**2 * target[:, None, None, None]) / (1 + s**2)

    return model


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_is_conditional_at_1_and_unconditional_at_0(sampler: str, seed: int) -> None:
    calls: list[int] = []
    model, sample = class_model(calls), getattr(sampling, sampler)
    x, sigmas = torch.randn(4, 3, 4, 5) * 10, sampling.get_sigmas_karras(6, 0.02, 10.0)
    classes, none = torch.tensor([0, 1, 2, 0]), torch.full([4], 3)
    shift = torch.rand(4)

    def run(denoiser: Callable[..., Tensor], class_cond: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return sample(denoiser, x, sigmas, extra_args={"class_cond": class_cond, "shift": shift}, disable=True)

    conditional, unconditional = run(model, classes), run(model, none)
    assert set(calls) == {4}
    calls.clear()
    guided = {scale: run(sampling.ClassifierFreeGuidance(model, scale, 3), classes) for scale in (0.0, 1.0, 2.5)}
    assert set(calls) == {8}  # one call on twice the batch
    torch.testing.assert_close(guided[1.0], conditional)
    torch.testing.assert_close(guided[0.0], unconditional)
    # The denoiser is affine in its target, and so is everything the sampler makes of it.
    torch.testing.assert_close(guided[2.5], unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", "ABF")
def test_a_denoiser_around_the_model_samples(name: str, seed: int) -> None:
    net = golden_files.model(name, torch.float32).eval()
    denoiser = Denoiser(net, net.config.sigma_data)
    sigmas = sampling.get_sigmas_karras(3, 0.1, 10.0)
    x = torch.randn(1, net.config.in_channels, *net.config.image_size) * sigmas[0]
    denoise = denoiser
    extra_args = {}
    if net.config.num_classes:
        denoise = sampling.ClassifierFreeGuidance(denoiser, 1.5, net.config.null_class)
        extra_args = {"class_cond": torch.tensor([2])}
    out = sampling.sample_dpmpp_2m_sde(denoise, x, sigmas, extra_args=extra_args, disable=True)
    assert out.shape == x.shape and out.isfinite().all() and not out.requires_grad


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "sde" in name or "ancestral" in name])
def test_default_noise_is_reproducible_and_matters(sampler: str) -> None:
    sample = getattr(sampling, sampler)
    x, sigmas = torch.ones(2, 1, 4, 4) * 5, sampling.get_sigmas_karras(5, 0.02, 5.0)

    def run(**kwargs: object) -> Tensor:
        return sample(mixture, x, sigmas, disable=True, **kwargs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    own = [run(noise_sampler=sampling.default_noise_sampler(x, seed=7)) for _ in range(2)]
    assert torch.equal(*own) and not torch.equal(own[0], first)


def test_sde_samples_have_the_distribution_of_the_data(seed: int) -> None:
    """With the exact denoiser of N(mean, sd), many small SDE steps from pure noise end in N(mean, sd)."""
    sigmas = sampling.get_sigmas_karras(40, 0.005, 80.0)
    x = torch.randn(4000, 3, 1, 1) * sigmas[0]
    out = sampling.sample_dpmpp_3m_sde(gauss, x, sigmas, disable=True)[:, :, 0, 0]
    constants = ENTRY["denoisers"]["gauss"]
    torch.testing.assert_close(out.mean(0), torch.tensor(constants["mean"]), rtol=0, atol=0.05)
    torch.testing.assert_close(out.std(0), torch.full([3], constants["sd"]), rtol=0.08, atol=0)


@pytest.mark.parametrize("sampler", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn_adds_noise_only_between_its_bounds(sampler: str, seed: int) -> None:
    sample = getattr(sampling, sampler)
    x, sigmas = torch.randn(2, 1, 4, 4) * 10, sampling.get_sigmas_karras(8, 0.02, 10.0)
    levels: list[tuple[float, float]] = []
    plain = sample(mixture, x, sigmas, disable=True)
    churned = sample(
        mixture, x, sigmas, s_churn=4.0, s_tmin=0.1, s_tmax=5.0, disable=True,
        callback=lambda info: levels.append((float(info["sigma"]), float(info["sigma_hat"]))),
    )  # fmt: skip
    assert not torch.equal(churned, plain)
    gamma = min(4.0 / 8, 2**0.5 - 1)
    for sigma, sigma_hat in levels:
        assert sigma_hat == pytest.approx(sigma * (1 + gamma) if 0.1 <= sigma <= 5.0 else sigma)
    assert {sigma < sigma_hat for sigma, sigma_hat in levels} == {True, False}


X, SIGMAS, NAN, INF = torch.zeros(2, 3, 4, 4), torch.tensor([5.0, 1.0, 0.0]), math.nan, math.inf
SETTINGS: dict[str, tuple[Any, ...]] = {
    "order": (0, -1, 1.5, "a", None),
    "solver_type": ("rk4", None, 3, []),
    "noise_sampler": (3, lambda a, b: None, lambda a, b: torch.zeros(1, 1, 1, 1)),
    "s_tmax": (-1.0, NAN, "a", None, 1j),
} | {name: (-1.0, NAN, INF, 1e300, "a", None, [1.0], True) for name in ("eta", "s_noise", "s_churn", "s_tmin")}
COMMON: dict[str, tuple[Any, ...]] = {
    "model": (None, 3, dict, lambda x, s: None, lambda x, s: x[:, :1], lambda x, s: 0.0, lambda x, s: x.long()),
    "x": (None, 3, [1.0], X.numpy(), X.long(), X.to(torch.complex64), X.to_sparse(), torch.tensor(1.0)),
    "sigmas": (
        None, 5.0, "karras", [5.0, 0.0], torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([]), SIGMAS[None],
        SIGMAS.flip(0), torch.tensor([2.0, 2.0, 0.0]), torch.tensor([2.0, -1.0]), torch.tensor([NAN, 1.0]),
        torch.tensor([INF, 1.0]),
        torch.tensor([1e300, 1.0], dtype=torch.float64), SIGMAS.long(), SIGMAS.to(torch.complex64), SIGMAS.to("meta"),
    ),
    "extra_args": (3, "x", [1]), "callback": (3, "x"), "disable": (1, "yes", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_errors_name_the_argument(name: str) -> None:
    sample = getattr(sampling, name)
    known = inspect.signature(sample).parameters
    for argument, values in (COMMON | {name: values for name, values in SETTINGS.items() if name in known}).items():
        for value in values:
            arguments = {"model": gauss, "x": X, "sigmas": SIGMAS, "disable": True} | {argument: value}
            with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
                sample(**arguments)
    assert known.keys() <= COMMON.keys() | SETTINGS.keys()


SCHEDULES = {name: vars(sampling)[name] for name in sorted(vars(sampling)) if name.startswith("get_sigmas_")}


@pytest.mark.parametrize("name", SCHEDULES)
def test_errors_name_the_schedule_s_argument(name: str) -> None:
    known = inspect.signature(SCHEDULES[name]).parameters
    right = {"n": 5, "sigma_min": 0.01, "sigma_max": 80.0}
    numbers = (-1.0, NAN, INF, "a", None, [1.0], True)
    wrong: dict[str, tuple[Any, ...]] = {
        "n": (0, -1, 2.5, 2.0, NAN, "a", None, True, 10**13), "device": ("tpu9", 3.5, [], None),
        "sigma_min": (*numbers, 0.0, 100.0), "sigma_max": (*numbers, 0.0), "rho": (*numbers, 0.0, 1e-300),
        "beta_d": (*numbers, 1e6), "beta_min": numbers, "eps_s": (*numbers, 0.0, 2.0),
    }  # fmt: skip
    for argument in known:
        for value in wrong[argument]:
            with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
                SCHEDULES[name](**{key: value for key, value in right.items() if key in known} | {argument: value})


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_ends_at_the_denoised_image(name: str, seed: int) -> None:
    sigmas = SCHEDULES[name](1) if name == "get_sigmas_vp" else SCHEDULES[name](1, 0.01, 80.0)
    assert len(sigmas) == 2 and sigmas[1] == 0
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64) * sigmas[0]
    expected = gauss(x, sigmas[:1])
    for sampler in SAMPLERS:
        torch.testing.assert_close(getattr(sampling, sampler)(gauss, x, sigmas, disable=True), expected)


def test_the_cpu_under_another_default_device() -> None:
    with torch.device("meta"):  # what torch.set_default_device does; stands for cuda
        for name, schedule in SCHEDULES.items():
            assert schedule(*((5,) if name == "get_sigmas_vp" else (5, 0.01, 80.0))).device.type == "cpu"
        for name in SAMPLERS:
            assert getattr(sampling, name)(lambda x, sigma: x / 2, X, SIGMAS, disable=True).device.type == "cpu"
        assert sampling.default_noise_sampler(X, seed=3)(SIGMAS[0], SIGMAS[1]).device.type == "cpu"


LABELS = torch.tensor([0, 1])


def guided(x: Any = X, sigma: Any = SIGMAS[:2], class_cond: Any = LABELS, **cond: Any) -> Tensor:
    return sampling.ClassifierFreeGuidance(class_model([]), 2.0, 3)(x, sigma, class_cond=class_cond, **cond)


GUIDANCE = sampling.ClassifierFreeGuidance
CALLS: list[tuple[Callable[[], object], str]] = [
    *[(partial(GUIDANCE, value, 2.0, 3), "denoiser: expected") for value in (None, 3, dict)],
    *[
        (partial(GUIDANCE, gauss, value, 3), "guidance_scale: expected")
        for value in (NAN, INF, "a", None, [1.0, 2.0], 1e39)
    ],
    *[(partial(GUIDANCE, gauss, 2.0, value), "null_class: expected") for value in (-1, 1.5, NAN, "a", None)],
    *[(partial(guided, x=value), "x: expected") for value in (None, 3, X.long(), torch.tensor(1.0))],
    *[(partial(guided, sigma=value), "sigma: expected") for value in (SIGMAS, SIGMAS[None])],
    *[
        (partial(guided, class_cond=value), "class_cond: expected")
        for value in (None, 3, [0, 1], torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]))
    ],
    *[(partial(guided, shift=value), "shift: expected") for value in (3, [0.0], torch.zeros(3), torch.tensor(0.0))],
    (
        partial(GUIDANCE(lambda x, sigma, class_cond: x[:2], 2.0, 3), X, 1.0, class_cond=torch.tensor([0, 1])),
        "denoiser: ",
    ),
    *[(partial(sampling.default_noise_sampler, value), "x: expected") for value in (None, 3, [1.0], X.long())],
    *[(partial(sampling.default_noise_sampler, X, value), "seed: expected") for value in (1.5, "a", True, 2**64, NAN)],
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_errors_of_guidance_and_noise(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("sigma", [2.0, torch.tensor(2.0)])
def test_guidance_takes_one_level_for_all(sigma: Tensor | float) -> None:
    denoiser = Denoiser(golden_files.model("A", torch.float32).eval(), 0.5)
    config = denoiser.model.config
    guided = sampling.ClassifierFreeGuidance(denoiser, 2.0, config.null_class)
    x, classes = torch.ones(2, config.in_channels, *config.image_size), torch.tensor([0, 1])
    assert torch.equal(guided(x, sigma, class_cond=classes), guided(x, torch.full([2], 2.0), class_cond=classes))


def test_progress_bar_needs_tqdm_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tqdm the default runs without a bar, and disable=False says what to install."""
    import sys

    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    x, sigmas = torch.zeros(1, 3, 2, 2), torch.tensor([1.0, 0.0])
    sampling.sample_euler(gauss, x, sigmas)
    with pytest.raises(ModuleNotFoundError, match=r"hdit-kernels\[train\]"):
        sampling.sample_euler(gauss, x, sigmas, disable=False)
