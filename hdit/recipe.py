"""How hdit.train trains: optimizer, learning rates, noise levels, loss, class dropout and the average of the weights.

The default is k-diffusion's recipe for HDiT (Crowson et al. 2024, arXiv 2401.11605); a k-diffusion configuration brings
its own. Entries of such files are called by their dotted names, as in optimizer.lr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hdit import processes
from hdit._runtime import autocast
from hdit.config import HDiTConfig
from hdit.data import seed_of
from hdit.denoiser import WEIGHTINGS, Denoiser
from hdit.densities import enable_stratified
from hdit.ema import ema_decay
from hdit.kdiffusion import USED_ENTRIES, density_from_kdiffusion
from hdit_kernels import checks

# The numbers of each kind of learning rate schedule, and the bounds of their values
WARMUP = {"at_least": 0, "below": 1}
LR_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup": WARMUP},
    "inverse": {"warmup": WARMUP, "inv_gamma": {"above": 0}, "power": {"at_least": 0}},
    "exponential": {"warmup": WARMUP, "num_steps": {"above": 0}, "decay": {"above": 0, "at_most": 1}},
}


@dataclass(frozen=True)
class Recipe:
    """Plain data, kept in a run's checkpoint. The names are k-diffusion's.

    lr, betas, eps, weight_decay: of AdamW; the mapping network takes a third of lr. lr_sched: what lr is multiplied by
    from step to step (see lr_factor). max_gradient_norm: longer gradients are clipped to it. loss_weighting: one of
    hdit.denoiser.WEIGHTINGS. sigma_sample_density: the density of noise levels as a k-diffusion configuration has it;
    None for its "cosine-interpolated" with noise_d_low at most the image's side. cond_dropout_rate: share of the labels
    replaced by "no class", for classifier-free guidance. ema_power, ema_max_value: see hdit.ema.ema_decay.
    Raises ValueError or TypeError, naming the entry, on what doesn't fit; check does for the density, of a model.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-3
    lr_sched: Mapping[str, Any] = field(default_factory=lambda: {"type": "constant", "warmup": 0.0})
    max_gradient_norm: float = 1.0
    loss_weighting: str = "soft-min-snr"
    sigma_sample_density: Mapping[str, Any] | None = None
    cond_dropout_rate: float = 0.1
    ema_power: float = 0.75
    ema_max_value: float = 0.9999

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {checks.shown(self.betas)}")
        plain: dict[str, Any] = {
            "lr": checks.number("lr", self.lr, above=0, at_most=1),
            "betas": tuple(checks.number("betas", beta, at_least=0, below=1) for beta in self.betas),
            "eps": checks.number("eps", self.eps, at_least=0),
            "weight_decay": checks.number("weight_decay", self.weight_decay, at_least=0),
            "lr_sched": _checked_schedule(self.lr_sched),
            "max_gradient_norm": checks.number("max_gradient_norm", self.max_gradient_norm, above=0),
            "loss_weighting": checks.choice("loss_weighting", self.loss_weighting, WEIGHTINGS),
            "cond_dropout_rate": checks.number("cond_dropout_rate", self.cond_dropout_rate, at_least=0, at_most=1),
            "ema_power": checks.number("ema_power", self.ema_power, at_least=0),
            "ema_max_value": checks.number("ema_max_value", self.ema_max_value, at_least=0, at_most=1),
        }
        if self.sigma_sample_density is not None:
            plain["sigma_sample_density"] = _mapping("sigma_sample_density", self.sigma_sample_density)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """What to_dict gave, perhaps by way of JSON. Raises ValueError or TypeError, naming the entry."""
        unknown = sorted(_mapping("recipe", values).keys() - {known.name for known in fields(cls)}, key=str)
        if unknown:
            raise ValueError(f"unknown entries {unknown} in a recipe")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"betas": list(self.betas)}

    def difference(self, other: Recipe) -> str | None:
        """The first entry in which other differs, in words; None if it doesn't."""
        ours, theirs = self.to_dict(), other.to_dict()
        different = [name for name in ours if ours[name] != theirs[name]]
        return next((f"{name} {json.dumps(ours[name])}, but {json.dumps(theirs[name])}" for name in different), None)

    def optimizer(self, groups: Iterable[Any], fused: bool = False) -> torch.optim.AdamW:
        """AdamW for HDiT.param_groups(lr), or for parameters that all learn at self.lr and decay.

        fused: as on a GPU, where a step can then be captured.
        """
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused,
            capturable=fused,
        )  # fmt: skip

    def lr_factor(self, step: int) -> float:
        """What every learning rate is multiplied by at update `step`, counted from 0, as k-diffusion's schedules have
        it: "constant", "inverse" (1 + step / inv_gamma)**-power or "exponential" decay**(step / num_steps), each times
        1 - warmup**(step + 1).
        """
        schedule = self.lr_sched
        factor = 1 - schedule["warmup"] ** (step + 1)
        if schedule["type"] == "inverse":
            factor *= (1 + step / schedule["inv_gamma"]) ** -schedule["power"]
        elif schedule["type"] == "exponential":
            factor *= schedule["decay"] ** (step / schedule["num_steps"])
        return factor

    def ema_decay(self, step: int) -> float:
        """The decay of the weights' average at update `step`, counted from 0."""
        return ema_decay(step, self.ema_power, self.ema_max_value)

    def noise_levels(self, config: HDiTConfig, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Noise levels [count] for a batch, stratified."""
        side = max(config.image_size)
        density = self.sigma_sample_density or {"type": "cosine-interpolated", "noise_d_low": min(32, side)}
        model = {
            "type": "image_transformer_v2",
            "input_size": config.image_size,
            "sigma_data": config.sigma_data,
            "sigma_min": config.sigma_min,
            "sigma_max": config.sigma_max,
            "sigma_sample_density": density,
        }
        with enable_stratified():
            return density_from_kdiffusion({"model": model})([count], device=device)

    def check(self, config: HDiTConfig) -> None:
        """Raises ValueError, naming the entry, unless the density makes noise levels for such a model."""
        try:
            sigma = self.noise_levels(config, 64)
        except TypeError as error:
            raise ValueError(str(error)) from error
        checks.values("model.sigma_sample_density", sigma, checks.positive, "one of positive, finite noise levels")


def batch_loss(
    denoiser: Denoiser, config: HDiTConfig, pixels: Tensor, labels: Tensor, recipe: Recipe | None = None
) -> Tensor:
    """The mean loss of a batch: pixels uint8 [B, C, H, W], labels int64 [B]. Random by torch's global generator.

    With several processes (see hdit.processes) the batch is this one's part of a larger one, and each of them, seeded
    alike, takes its part of what a single process would draw; dropout in the model differs from one to another.
    """
    checks.same_dtype(**{"pictures": torch.uint8, "pixels": pixels.dtype})
    recipe = recipe or Recipe()
    x = pixels.float() / 127.5 - 1
    whole = len(x) * processes.count()
    part = processes.part(whole)
    cond: dict[str, Tensor] = {}
    if config.null_class is not None:
        dropped = torch.rand([whole], device=labels.device)[part] < recipe.cond_dropout_rate
        cond["class_cond"] = labels.masked_fill(dropped, config.null_class)
    sigma = recipe.noise_levels(config, whole, x.device)[part]
    noise = torch.randn([whole, *x.shape[1:]], dtype=x.dtype, device=x.device)[part]
    if processes.count() > 1:
        torch.manual_seed(seed_of(torch.initial_seed(), "process", processes.rank()))
    with autocast(x.device):
        return denoiser.loss(x, noise, sigma, **cond).mean()


# k-diffusion's configurations

# What its config.py fills in for image_transformer_v2; it has no density of its own
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"loss_config": "karras", "loss_weighting": "karras", "sigma_sample_density": None},
    "dataset": {"cond_dropout_rate": 0.1},
    "optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 1e-4},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}
# Entries with which it asks for something else than hdit.train does, unless they have this value
NEUTRAL = {
    "model.augment_prob": 0,
    "model.augment_wrapper": False,
    "model.has_variance": False,
    "model.loss_scales": 1,
    "model.skip_stages": 0,
}


def recipe_from_kdiffusion(config: Mapping[str, Any], lr: float | None = None) -> tuple[Recipe, list[str]]:
    """The recipe in a k-diffusion configuration, with its defaults; and a line on each entry that is not used.

    config: one that config_from_kdiffusion takes. lr: a learning rate that the run takes instead of optimizer.lr.
    Raises ValueError or TypeError, naming the entry, on another optimizer than AdamW and on what k-diffusion or Recipe
    doesn't take.
    """
    config = _mapping("config", config)
    part = {name: default | _mapping(name, config.get(name, {})) for name, default in DEFAULTS.items()}
    model, optimizer, ema_sched = part["model"], part["optimizer"], part["ema_sched"]
    checks.choice("optimizer.type", optimizer["type"], ["adamw"])
    checks.choice("ema_sched.type", ema_sched["type"], ["inverse"])
    # The simple loss, the error of the predicted noise, is the network's error times the SNR weight.
    simple = checks.choice("model.loss_config", model["loss_config"], ["karras", "simple"]) == "simple"
    schedule_entries = {"type", *LR_SCHEDULES[_schedule_type(part["lr_sched"])]}
    recipe = Recipe(
        **{name: optimizer[name] for name in ("lr", "betas", "eps", "weight_decay")},
        lr_sched={name: value for name, value in part["lr_sched"].items() if name in schedule_entries},
        loss_weighting="snr" if simple else model["loss_weighting"],
        sigma_sample_density=model["sigma_sample_density"],
        cond_dropout_rate=part["dataset"]["cond_dropout_rate"],
        ema_power=ema_sched["power"],
        ema_max_value=ema_sched["max_value"],
    )

    used = {f"{name}.{entry}" for name, default in DEFAULTS.items() for entry in default}
    used |= USED_ENTRIES | {f"lr_sched.{name}" for name in schedule_entries}
    if simple:
        used.remove("model.loss_weighting")
    if lr not in (None, recipe.lr):
        used.remove("optimizer.lr")
    notes = _not_used(config, used)
    if recipe.sigma_sample_density is None:
        notes.append("model.sigma_sample_density is missing: noise levels are drawn as for hdit's presets")
    return recipe, notes


def _not_used(entries: Mapping[str, Any], used: set[str], prefix: str = "") -> list[str]:
    """A line on each entry whose dotted name is not in used, with its value, shortened and escaped."""
    found = []
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if name in used or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if isinstance(value, Mapping) and any(known.startswith(f"{name}.") for known in used):
            found += _not_used(value, used, f"{name}.")
        else:
            text = json.dumps(value)
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            found.append(f"{json.dumps(name)[1:-1]} {shown} is not used")
    return found


def _schedule_type(given: Mapping[str, Any]) -> str:
    kind: Any = given.get("type")
    return checks.choice("lr_sched.type", kind, LR_SCHEDULES)


def _checked_schedule(given: Any) -> dict[str, Any]:
    found = {"type": _schedule_type(_mapping("lr_sched", given))}
    bounds = LR_SCHEDULES[found["type"]]
    unknown = sorted(given.keys() - {"type", *bounds}, key=str)
    if unknown:
        raise ValueError(f"lr_sched: expected entries of {found['type']!r}, got {unknown}")
    return found | {name: checks.number(f"lr_sched.{name}", given.get(name), **bounds[name]) for name in bounds}


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object of entries, got {checks.shown(value)}")
    return dict(value)
