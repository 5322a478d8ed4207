from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.parametrize(("group", "groups"), [(2, 2), (-1, 2), (0, 0)])
def test_bad_strata(group: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"group must be in \[0, groups\), got group {group} of {groups} groups"):
        with densities.enable_stratified(group, groups):
            pass


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_and_range(name: str, seed: int) -> None:
    sigma = density(name)([2, 500])
    assert sigma.shape == (2, 500) and sigma.isfinite().all() and (sigma > 0).all()
    spec = CONFIGS[name]["sigma_sample_density"]
    assert sigma.min() >= spec.get("min_value", 0) * 0.999 and sigma.max() <= spec.get("max_value", 1e9) * 1.001
