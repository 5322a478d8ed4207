"""The preconditioned denoiser of Karras et al. 2022 (EDM, arXiv 2206.00364, section 5) and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


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

    model: the network, called as model(x, sigma, **cond) and returning a tensor like x. sigma_data: standard deviation
    of the data. weighting: how the loss weighs noise levels, "karras" (EDM's own), "soft-min-snr" or "snr".
    Raises ValueError on another weighting.
    """

    def __init__(self, model: nn.Module, sigma_data: float = 1.0, weighting: str = "karras") -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {list(WEIGHTINGS)}, got {weighting!r}")
        self.model = model
        self.sigma_data = sigma_data
        self.weighting = weighting

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in for sigma, each of its shape (EDM, table 1)."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance**0.5, 1 / variance**0.5

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """Loss of each sample: the mean square error of the network's output, times the weight.

        x [B, C, H, W]: clean images; noise: unit normal noise like x; sigma [B]: noise levels. Returns [B].
        """
        level = sigma[:, None, None, None]
        _, _, c_in = self.scalings(level)
        noised = x + noise * level
        output = self.model((noised * c_in).to(x.dtype), sigma, **cond)
        # (x - c_skip noised) / c_out, written without the difference of nearly equal numbers at small sigma
        target = c_in * (x * (level / self.sigma_data) - noise * self.sigma_data)
        return (output - target).square().flatten(1).mean(1) * WEIGHTINGS[self.weighting](sigma, self.sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """The denoised images for noised images x [B, C, H, W] at noise levels sigma [B]; shape and dtype of x."""
        c_skip, c_out, c_in = self.scalings(sigma[:, None, None, None])
        output = self.model((x * c_in).to(x.dtype), sigma, **cond)
        return (output * c_out + x * c_skip).to(x.dtype)
