from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hdit import Denoiser
from tests import golden_files

ENTRY = golden_files.entry("denoiser_A.safetensors")


def run(weighting: str, dtype: torch.dtype) -> tuple[Denoiser, dict[str, Tensor], Tensor]:
    golden = golden_files.tensors("denoiser_A.safetensors", dtype)
    denoiser = Denoiser(golden_files.model("A", dtype), ENTRY["sigma_data"], weighting)
    cond = {"aug_cond": golden["aug_cond"], "class_cond": golden["class_cond"]}
    return denoiser, golden, denoiser.loss(golden["input"], golden["noise"], golden["sigma"], **cond)


@pytest.mark.parametrize("weighting", ENTRY["weightings"])
def test_loss_equals_golden(weighting: str) -> None:
    _, golden, loss = run(weighting, torch.float64)
    torch.testing.assert_close(loss, golden[f"loss.{weighting}"], rtol=1e-6, atol=0)
    _, golden, loss = run(weighting, torch.float32)
    torch.testing.assert_close(loss, golden[f"loss.{weighting}"], rtol=2e-5, atol=0)


def test_gradients_equal_golden() -> None:
    denoiser, golden, loss = run("soft-min-snr", torch.float64)
    loss.mean().backward()
    parameters = dict(denoiser.model.named_parameters())
    names = [name.removeprefix("grad.") for name in golden if name.startswith("grad.")]
    assert len(names) == 4
    for name in names:
        assert golden_files.max_error(parameters[name].grad, golden[f"grad.{name}"]) < 1e-5, name


def test_denoised_and_scalings_equal_golden() -> None:
    denoiser, golden, _ = run("karras", torch.float64)
    sigma = golden["sigma"]
    noised = golden["input"] + golden["noise"] * sigma[:, None, None, None]
    denoised = denoiser(noised, sigma, aug_cond=golden["aug_cond"], class_cond=golden["class_cond"])
    assert golden_files.max_error(denoised, golden["denoised"]) < 1e-5
    for name, scaling in zip(("c_skip", "c_out", "c_in"), denoiser.scalings(sigma), strict=True):
        torch.testing.assert_close(scaling, golden[name], rtol=1e-6, atol=0)


class Constant(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 1e3])
def test_loss_is_the_weighted_error_of_the_denoised_image(sigma: float, seed: int) -> None:
    """EDM, equation 8: with the weight 1 / c_out² the loss on the network's output is the error of D."""
    denoiser = Denoiser(Constant(), 0.5)
    x, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigmas = torch.full([2], sigma, dtype=torch.float64)
    error = (denoiser(x + noise * sigma, sigmas) - x).square().mean((1, 2, 3))
    c_out = denoiser.scalings(sigmas)[1]
    torch.testing.assert_close(denoiser.loss(x, noise, sigmas), error / c_out**2, rtol=1e-8, atol=0)


def test_small_sigma_in_float32_is_not_noise(seed: int) -> None:
    """The target at sigma 1e-4 keeps float32's precision."""
    x, noise, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.full([2], 1e-4)
    denoiser = Denoiser(Constant(), 0.5)
    exact = denoiser.loss(x.double(), noise.double(), sigma.double())
    torch.testing.assert_close(denoiser.loss(x, noise, sigma).double(), exact, rtol=1e-6, atol=0)


def test_half_precision_images_stay_half_precision() -> None:
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    assert Denoiser(Constant(), 0.5)(x, torch.tensor([0.1, 1.0])).dtype == torch.bfloat16


def test_unknown_weighting() -> None:
    with pytest.raises(ValueError, match=r"weighting must be one of .*'soft-min-snr'.*, got 'min-snr'"):
        Denoiser(Constant(), 0.5, "min-snr")
