"""The preconditioned denoiser of Karras et al. 2022 (EDM, arXiv 2206.00364, section 5) and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hdit.config import LEAST_SIGMA, MOST_SIGMA
from hdit.model import filled
from hdit_kernels import checks


def _karras(sigma: Tensor, sigma_data: float) -> Tensor:
    """The weight of EDM's table 1, which cancels the output scaling: every noise level counts alike."""
    return sigma.new_ones(sigma.shape)


def _soft_min_snr(sigma: Tensor, sigma_data: float) -> Tensor:
    """A smooth min-SNR (Crowson et al. 2024, arXiv 2401.11605; after Hang et al. 2023, arXiv 2303.09556)."""
    return (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2


def _snr(sigma: Tensor, sigma_data: float) -> Tensor:
    return sigma_data**2 / (sigma**2 + sigma_data**2)


WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "karras": _karras,
    "soft-min-snr": _soft_min_snr,
    "snr": _snr,
}


class Denoiser(nn.Module):
    """Wraps a network F into a denoiser D(x; sigma) = c_skip x + c_out F(c_in x, sigma) (EDM, equation 7).

    model: the network, called as model(x, sigma, **cond) with sigma [B] and returning a tensor like x. sigma_data:
    standard deviation of the data. weighting: how the loss weighs noise levels, "karras" (EDM's own), "soft-min-snr" or
    "snr". Whatever depends on sigma is computed in at least float32, and reaches the model so.
    Raises TypeError or ValueError on a model that can't be called, a sigma_data that isn't positive and finite, or
    another weighting.
    """

    def __init__(self, model: nn.Module, sigma_data: float = 1.0, weighting: str = "karras") -> None:
        super().__init__()
        checks.function("model", model)
        self.model = model
        self.sigma_data = checks.number("sigma_data", sigma_data, at_least=LEAST_SIGMA, at_most=MOST_SIGMA)
        self.weighting = checks.choice("weighting", weighting, WEIGHTINGS)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in for sigma, each of its shape, in at least float32 (EDM, table 1)."""
        sigma = _wide(sigma)
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance**0.5, 1 / variance**0.5

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        """Loss of each sample: the mean square error of the network's output, times the weight.

        x [B, C, H, W]: clean images; noise: unit normal noise like x; sigma: positive noise levels [B], or one for all.
        Returns [B] in at least float32. Raises TypeError or ValueError on tensors of other shapes, dtypes or devices,
        on noise levels (where they lie on a CPU) that aren't positive and finite, and if the model doesn't return a
        tensor like x.
        """
        _check(x, noise, sigma)
        sigma = _levels(sigma, x)
        level = sigma[:, None, None, None]
        _, _, c_in = self.scalings(level)
        noised = x + noise * level
        output = checks.returned("model", self.model((noised * c_in).to(x.dtype), sigma, **cond), x)
        # (x - c_skip noised) / c_out, written without the difference of nearly equal numbers at small sigma
        target = c_in * (x * (level / self.sigma_data) - noise * self.sigma_data)
        return (output - target).square().flatten(1).mean(1) * WEIGHTINGS[self.weighting](sigma, self.sigma_data)

    def forward(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        """The denoised images for noised images x [B, C, H, W] at noise levels sigma; shape and dtype of x.

        sigma and errors: as for the loss.
        """
        _check(x, x, sigma)
        sigma = _levels(sigma, x)
        c_skip, c_out, c_in = self.scalings(sigma[:, None, None, None])
        output = checks.returned("model", self.model((x * c_in).to(x.dtype), sigma, **cond), x)
        return (output * c_out + x * c_skip).to(x.dtype)


def _check(x: Tensor, noise: Tensor, sigma: Tensor | float) -> None:
    levels = sigma if isinstance(sigma, Tensor) else None
    checks.floating(x=x, noise=noise, **({} if levels is None else {"sigma": levels}))
    checks.shape("x", x, ["B", "C", "H", "W"])
    checks.shape("noise", noise, x.shape)
    if levels is None:
        checks.number("sigma", sigma, at_least=checks.SMALLEST_LEVEL, at_most=checks.LARGEST_LEVEL)
    elif levels.ndim:
        checks.shape("sigma", levels, x.shape[:1])


def _levels(sigma: Tensor | float, x: Tensor) -> Tensor:
    """A noise level for each image of x: sigma as [B], in at least float32."""
    if not isinstance(sigma, Tensor):
        return filled(x.shape[:1], sigma, torch.promote_types(x.dtype, torch.float32), x.device)
    checks.values("sigma", sigma, checks.noise_level, "positive and finite noise levels, 1e-18 to 1e18")
    return _wide(sigma) if sigma.ndim else _wide(sigma).expand(x.shape[0])


def _wide(sigma: Tensor) -> Tensor:
    """sigma in at least float32: the square of 300 is beyond float16."""
    return sigma if sigma.dtype in (torch.float32, torch.float64) else sigma.float()
