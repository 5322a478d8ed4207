"""The Hourglass Diffusion Transformer: model, denoiser, noise levels and samplers. To import it needs torch only."""

from hdit import _interrupt as _interrupt  # first: Ctrl-C while torch loads
from hdit import densities, sampling
from hdit.config import (
    GlobalAttention,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
    presets,
)
from hdit.cuda_graphs import Captured, CapturedStep, capture, capture_step
from hdit.denoiser import Denoiser
from hdit.kdiffusion import config_from_kdiffusion, density_from_kdiffusion, load_kdiffusion
from hdit.model import HDiT
from hdit_kernels import __version__ as __version__

__all__ = [
    "Captured",
    "CapturedStep",
    "Denoiser",
    "GlobalAttention",
    "HDiT",
    "HDiTConfig",
    "Level",
    "Mapping",
    "NeighborhoodAttention",
    "NoAttention",
    "ShiftedWindowAttention",
    "capture",
    "capture_step",
    "config_from_kdiffusion",
    "densities",
    "density_from_kdiffusion",
    "load_kdiffusion",
    "presets",
    "sampling",
]
