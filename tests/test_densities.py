from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hdit import densities, density_from_kdiffusion
from tests import golden_files

ENTRY = golden_files.entry("sigma_density.safetensors")
GOLDEN = golden_files.tensors("sigma_density.safetensors")
CONFIGS = ENTRY["model_config_per_entry"]


def density(name: str) -> Callable[..., Tensor]:
    return density_from_kdiffusion({"model": {"type": "image_transformer_v2"} | CONFIGS[name]})


@pytest.fixture
def given_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.rand and torch.randn return the golden draws in the dtype asked for."""

    def draws(name: str) -> Callable[..., Tensor]:
        def draw(shape: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            assert list(shape) == [ENTRY["count"]]
            return GOLDEN[name].to(dtype)

        return draw

    monkeypatch.setattr(torch, "rand", draws("u"))
    monkeypatch.setattr(torch, "randn", draws("n"))


@pytest.mark.parametrize("name", CONFIGS)
def test_densities_equal_golden(name: str, given_draws: None) -> None:
    sigma = density(name)([ENTRY["count"]], dtype=torch.float64)
    torch.testing.assert_close(sigma, GOLDEN[f"sigma.{name}"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_densities_in_float32(name: str, given_draws: None) -> None:
    """Off the ends of the distribution, where float32 draws themselves have no digits left."""
    sigma = density(name)([ENTRY["count"]])
    inner = (GOLDEN["u"] > 1e-3) & (GOLDEN["u"] < 1 - 1e-3)
    assert sigma.dtype == torch.float32 and inner.sum() > 100
    torch.testing.assert_close(sigma[inner].double(), GOLDEN[f"sigma.{name}"][inner], rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ENTRY["stratified"])
def test_stratified_equals_golden(name: str, given_draws: None) -> None:
    shape, strata = [ENTRY["count"]], ENTRY["stratified"][name]
    with densities.enable_stratified(strata["group"], strata["groups"]):
        # the uniform density over [1, e) shows the stratified draws themselves
        u = densities.rand_log_uniform(shape, 1.0, torch.e, dtype=torch.float64).log()
        sigma = density(ENTRY["stratified_density"])(shape, dtype=torch.float64)
    torch.testing.assert_close(u, GOLDEN[f"stratified.{name}"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sigma, GOLDEN[f"sigma_stratified.{name}"], rtol=1e-10, atol=0)


def test_stratified_groups_share_the_strata(seed: int) -> None:
    groups, count = 3, 8
    draws = []
    for group in range(groups):
        with densities.enable_stratified(group, groups):
            draws.append(densities.rand_log_uniform([count], 1.0, torch.e).log())
    strata = (torch.cat(draws) * groups * count).floor().sort().values
    assert torch.equal(strata, torch.arange(groups * count).float())


def test_stratified_ends_with_its_context(seed: int) -> None:
    def in_strata() -> bool:
        u = densities.rand_log_uniform([64], 1.0, torch.e).log()
        return torch.equal((u * 64).floor(), torch.arange(64).float())

    with densities.enable_stratified():
        assert in_strata()
        with densities.enable_stratified(disable=True):
            assert not in_strata()
        assert in_strata()
    assert not in_strata()


def test_strata_of_no_draws(seed: int) -> None:
    for group in range(2):
        with densities.enable_stratified(group, 2):
            assert densities.rand_log_normal([0]).shape == (0,)


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_and_range(name: str, seed: int) -> None:
    sigma = density(name)([2, 500])
    assert sigma.shape == (2, 500) and sigma.isfinite().all() and (sigma > 0).all()
    spec = CONFIGS[name]["sigma_sample_density"]
    assert sigma.min() >= spec.get("min_value", 0) * 0.999 and sigma.max() <= spec.get("max_value", 1e9) * 1.001


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "log_normal": partial(densities.rand_log_normal, loc=-1.2, scale=1.2),
    "log_logistic": densities.rand_log_logistic,
    "log_logistic, wide": partial(densities.rand_log_logistic, scale=20.0),
    "log_logistic, bounds": partial(densities.rand_log_logistic, min_value=1e-3, max_value=1e3),
    "log_uniform": partial(densities.rand_log_uniform, min_value=1e-3, max_value=1e3),
    "v_diffusion": densities.rand_v_diffusion,
    "v_diffusion, far bounds": partial(densities.rand_v_diffusion, min_value=1e-3, max_value=1e12),
    "cosine": partial(densities.rand_cosine_interpolated, image_d=64, noise_d_low=32, noise_d_high=64),
    "cosine, far bounds": partial(
        densities.rand_cosine_interpolated, image_d=64, noise_d_low=32, noise_d_high=64, min_value=1e-9, max_value=1e12
    ),
    "split": partial(densities.rand_split_log_normal, loc=0.0, scale_1=1.0, scale_2=1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSITIES)
def test_the_ends_of_the_draws_are_noise_levels(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.rand gives 0 once in 2**24 draws; the last of eight strata of its largest draw rounds to 1."""
    for end in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, *, end=end, dtype, **_: torch.full(shape, end, dtype=dtype))
        for disable in (True, False):
            with densities.enable_stratified(disable=disable):
                sigma = DENSITIES[name]([8], dtype=dtype)
            assert sigma.dtype == dtype and sigma.isfinite().all() and (sigma > 0).all(), (end, disable, sigma)


@pytest.mark.parametrize("sizes", [(1e-9, 1e9, 1e-9), (1e9, 1e-9, 1e9), (1e-9, 1.0, 1e9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_of_any_sizes_are_noise_levels(
    sizes: tuple[float, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (0.0, 0.5, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, *, end=end, dtype, **_: torch.full(shape, end, dtype=dtype))
        for low, high in ((1e-30, 1e30), (1e-300, 1e300)):
            sigma = densities.rand_cosine_interpolated([4], *sizes, min_value=low, max_value=high, dtype=dtype)
            assert sigma.isfinite().all() and (sigma > 0).all(), (end, low, sigma)


def test_half_precision_is_rounded_once(seed: int) -> None:
    """Drawn in float32: draws in bfloat16 take 256 values, one of them 0."""
    half = densities.rand_log_normal([2000], dtype=torch.bfloat16)
    torch.manual_seed(seed)
    assert torch.equal(half, densities.rand_log_normal([2000]).bfloat16())


@pytest.mark.parametrize("name", DENSITIES)
def test_the_cpu_under_another_default_device(name: str) -> None:
    with torch.device("meta"):  # what torch.set_default_device does; stands for cuda
        assert DENSITIES[name]([4]).device.type == "cpu"
        with densities.enable_stratified():
            assert DENSITIES[name]([4]).device.type == "cpu"


Wrong = tuple[str, dict[str, Any], str]
COMMON: list[Wrong] = [
    (name, {argument: value}, f"{argument}: expected")
    for name in DENSITIES
    for argument, values in {
        "shape": (None, "8", 8, [2.5], [-1], [None]),
        "device": ("tpu9", 3.5, [], None),
        "dtype": (torch.int64, torch.complex64, "float32", 3),
    }.items()
    for value in values
]
NUMBERS: list[Wrong] = [
    (name, {argument: value}, f"{argument}: expected")
    for name, arguments in {
        "log_normal": ("loc", "scale"),
        "log_logistic, bounds": ("loc", "scale", "min_value", "max_value"),
        "log_uniform": ("min_value", "max_value"),
        "v_diffusion": ("sigma_data", "min_value", "max_value"),
        "cosine": ("image_d", "noise_d_low", "noise_d_high", "sigma_data", "min_value", "max_value"),
        "split": ("loc", "scale_1", "scale_2"),
    }.items()
    for argument in arguments
    for value in (math.nan, -math.inf, "a", None, [1.0], True, *([] if argument == "loc" else [-1.0]))
]
BOUNDS: list[Wrong] = [
    ("log_uniform", {"min_value": 0}, "min_value: expected a number above 0, got 0"),
    ("log_uniform", {"min_value": 5000}, "min_value: expected a number of at most max_value, 1000, got 5000"),
    ("cosine", {"min_value": 5000}, "min_value: expected a number of at most max_value, 1000, got 5000"),
    *[
        ("cosine", {name: value}, f"{name}: expected a number of at least 1e-09 and at most 1e")
        for name in ("image_d", "noise_d_low", "noise_d_high", "sigma_data")
        for value in (1e-300, 1e300)
    ],
    ("v_diffusion", {"sigma_data": 1e300}, "sigma_data: expected a number of at least 1e-09"),
    ("log_uniform", {"shape": [2**63]}, "shape: expected an integer of at most 9,223,372,036,854,775,807, got 9223"),
    ("log_logistic, bounds", {"scale": 0.01, "max_value": math.inf, "min_value": 10}, "bounds nearer to loc"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), [*COMMON, *NUMBERS, *BOUNDS])
def test_errors_name_the_argument(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        DENSITIES[name](**{"shape": [8]} | arguments)


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ((2, 2), "group: expected an integer below groups, 2, got 2"),
        ((-1, 2), "group: expected an integer of at least 0, got -1"),
        ((0.5, 2), "group: expected an integer"),
        ((0, 0), "groups: expected an integer of at least 1, got 0"),
        ((0, 1.5), "groups: expected an integer"),
        ((0, 1, 3), "disable: expected True or False"),
    ],
)
def test_errors_name_the_strata(strata: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        with densities.enable_stratified(*strata):
            pass


def test_strata_need_an_axis() -> None:
    with densities.enable_stratified(), pytest.raises(ValueError, match="shape: expected at least one size"):
        densities.rand_log_normal([])
