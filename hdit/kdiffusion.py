"""Reads the configurations and checkpoints of k-diffusion (its image_transformer_v2 models)."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from collections.abc import Mapping as MappingABC
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit import densities
from hdit._extras import require
from hdit.config import (
    Attention,
    GlobalAttention,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
)
from hdit.model import HDiT

Config = MappingABC[str, Any] | str | PathLike[str]

USED_ENTRIES: frozenset[str] = frozenset(
    {
        *("model.type", "model.input_channels", "model.input_size", "model.patch_size"),
        *("model.depths", "model.widths", "model.d_ffs", "model.self_attns", "model.dropout_rate"),
        *("model.mapping_depth", "model.mapping_width", "model.mapping_d_ff", "model.mapping_dropout_rate"),
        *("model.mapping_cond_dim", "model.sigma_data", "model.sigma_min", "model.sigma_max", "dataset.num_classes"),
    }
)
"""The entries of a k-diffusion configuration that config_from_kdiffusion uses, by their dotted names."""


def config_from_kdiffusion(config: Config) -> HDiTConfig:
    """The model of a k-diffusion configuration: a dict, a .json file, or a .safetensors file that holds one.

    Fills in k-diffusion's defaults: feed-forward width 3 x width, head_dim 64, neighborhood attention of size 7 with
    global attention in the last level, sigma_data 1; and one row more than the data set has classes, for "no class".
    Raises ValueError on a model of another type, on a missing entry and on what HDiTConfig doesn't take.
    """
    config = _read(config)
    model = _model_part(config)
    for key in ("input_channels", "input_size", "patch_size", "depths", "widths"):
        if key not in model:
            raise ValueError(f"k-diffusion config: model.{key} is missing")

    widths, depths = model["widths"], model["depths"]
    count = len(widths)
    d_ffs = model.get("d_ffs") or [None] * count
    attentions = model.get("self_attns") or [{"type": "neighborhood"}] * (count - 1) + [{"type": "global"}]
    dropout = model.get("dropout_rate") or 0.0
    dropouts = dropout if isinstance(dropout, (list, tuple)) else [dropout] * count
    for key, values in (("depths", depths), ("d_ffs", d_ffs), ("self_attns", attentions), ("dropout_rate", dropouts)):
        if len(values) != count:
            raise ValueError(f"k-diffusion config: model.{key} has {len(values)} entries for {count} levels")
    levels = [
        Level(depth, width, d_ff, _attention(attention), dropout)
        for depth, width, d_ff, attention, dropout in zip(depths, widths, d_ffs, attentions, dropouts, strict=True)
    ]

    mapping_width = model.get("mapping_width", 256)
    num_classes = config.get("dataset", {}).get("num_classes", 0)
    sigmas = {key: model[key] for key in ("sigma_min", "sigma_max") if key in model}
    return HDiTConfig(
        levels=tuple(levels),
        mapping=Mapping(
            depth=model.get("mapping_depth", 2),
            width=mapping_width,
            d_ff=model.get("mapping_d_ff") or 3 * mapping_width,
            dropout=model.get("mapping_dropout_rate", 0.0),
        ),
        image_size=model["input_size"],
        in_channels=model["input_channels"],
        patch_size=model["patch_size"],
        num_classes=num_classes + 1 if num_classes else 0,
        mapping_cond_dim=model.get("mapping_cond_dim", 0),
        sigma_data=model.get("sigma_data", 1.0),
        **sigmas,
    )


def density_from_kdiffusion(config: Config) -> Callable[..., Tensor]:
    """The density of noise levels to train at that a k-diffusion configuration names: called as density(shape, …).

    Takes what config_from_kdiffusion takes. Raises ValueError on a missing entry or an unknown density.
    """
    model = _model_part(_read(config))
    try:
        density = model["sigma_sample_density"]
        return _density(density, density["type"], model, model.get("sigma_data", 1.0))
    except KeyError as error:
        raise ValueError(f"k-diffusion config: {error} is missing for the density of noise levels") from error


def load_kdiffusion(path: str | PathLike[str], ema: bool = True, config: Config | None = None) -> HDiT:
    """The model in a k-diffusion checkpoint, in float32 on the CPU, in evaluation mode.

    path: a .safetensors file (weights of the averaged model) or a training checkpoint .pth, read without running code
    from it (weights_only). ema: whether to take the averaged weights of a .pth. config: the k-diffusion configuration,
    where the file holds none. Raises ValueError if the file isn't such a checkpoint, or of another configuration.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = require("safetensors.torch", "train").load_file(path)
        found = config or _safetensors_config(path)
    else:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} is not a checkpoint that can be read safely (weights_only)") from error
        key = "model_ema" if ema else "model"
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise ValueError(f"{path} is not a k-diffusion training checkpoint: it has no {key!r}")
        state, found = checkpoint[key], config or checkpoint.get("config")
    if found is None:
        raise ValueError(f"{path} holds no configuration: pass config=, the k-diffusion .json it was trained with")

    model = HDiT(config_from_kdiffusion(found))
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        ours, theirs = (list(tensors[name].shape) if name in tensors else "nothing" for tensors in (expected, state))
        if ours != theirs:
            raise ValueError(f"{path} is of another configuration: {name} should be {ours} and is {theirs}")
    model.load_state_dict(state)
    return model.eval()


def _read(config: Config) -> MappingABC[str, Any]:
    if isinstance(config, MappingABC):
        return config
    path = Path(config)
    if path.suffix == ".safetensors":
        found = _safetensors_config(path)
        if found is None:
            raise ValueError(f"{path} holds no configuration in its metadata")
        return found
    return json.loads(path.read_text())


def _safetensors_config(path: Path) -> MappingABC[str, Any] | None:
    with require("safetensors", "train").safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["config"]) if "config" in metadata else None


def _model_part(config: MappingABC[str, Any]) -> MappingABC[str, Any]:
    model = config.get("model")
    if not isinstance(model, MappingABC):
        raise ValueError("k-diffusion config: there is no 'model' part")
    if model.get("type") != "image_transformer_v2":
        raise ValueError(f"k-diffusion config: model.type must be 'image_transformer_v2', got {model.get('type')!r}")
    return model


def _attention(spec: MappingABC[str, Any]) -> Attention:
    kind, head_dim = spec.get("type"), spec.get("d_head", 64)
    if kind == "global":
        return GlobalAttention(head_dim)
    if kind == "neighborhood":
        return NeighborhoodAttention(head_dim, spec.get("kernel_size", 7))
    if kind == "shifted-window" and "window_size" in spec:
        return ShiftedWindowAttention(head_dim, spec["window_size"])
    if kind == "none":
        return NoAttention()
    raise ValueError(f"k-diffusion config: unknown or incomplete entry {dict(spec)!r} in model.self_attns")


def _density(
    spec: MappingABC[str, Any], kind: str, model: MappingABC[str, Any], sigma_data: float
) -> Callable[..., Tensor]:
    def either(name: str, other: str) -> float:
        return spec[name] if name in spec else spec[other]

    if kind == "lognormal":
        return partial(densities.rand_log_normal, loc=either("mean", "loc"), scale=either("std", "scale"))
    if kind == "loglogistic":
        return partial(
            densities.rand_log_logistic,
            loc=spec.get("loc", math.log(sigma_data)),
            scale=spec.get("scale", 0.5),
            min_value=spec.get("min_value", 0.0),
            max_value=spec.get("max_value", math.inf),
        )
    if kind == "loguniform":
        low = spec["min_value"] if "min_value" in spec else model["sigma_min"]
        high = spec["max_value"] if "max_value" in spec else model["sigma_max"]
        return partial(densities.rand_log_uniform, min_value=low, max_value=high)
    if kind in ("v-diffusion", "cosine"):
        return partial(
            densities.rand_v_diffusion,
            sigma_data=sigma_data,
            min_value=spec.get("min_value", 1e-3),
            max_value=spec.get("max_value", 1e3),
        )
    if kind == "split-lognormal":
        return partial(
            densities.rand_split_log_normal,
            loc=either("mean", "loc"),
            scale_1=either("std_1", "scale_1"),
            scale_2=either("std_2", "scale_2"),
        )
    if kind == "cosine-interpolated":
        image_d = max(model["input_size"])
        return partial(
            densities.rand_cosine_interpolated,
            image_d=spec.get("image_d", image_d),
            noise_d_low=spec.get("noise_d_low", 32),
            noise_d_high=spec.get("noise_d_high", image_d),
            sigma_data=sigma_data,
            min_value=spec.get("min_value", min(model["sigma_min"], 1e-3)),
            max_value=spec.get("max_value", max(model["sigma_max"], 1e3)),
        )
    raise ValueError(f"k-diffusion config: unknown density of noise levels {kind!r}")
