"""Reads the configurations and checkpoints of k-diffusion (its image_transformer_v2 models)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from hdit import _weights, densities
from hdit._extras import require
from hdit._files import CheckpointError, quoted, read_json, regular_file
from hdit.config import (
    MOST_LEVELS,
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
from hdit_kernels import checks

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

_FOR_TRAINING = {"sigma_sample_density", "loss_config", "loss_weighting", "loss_scales", "augment_prob"}
_OF_OTHER_MODELS = {"augment_wrapper", "has_variance", "skip_stages"}  # k-diffusion writes them into checkpoints, off
_ATTENTIONS: dict[str, type[Attention]] = {
    "global": GlobalAttention,
    "neighborhood": NeighborhoodAttention,
    "shifted-window": ShiftedWindowAttention,
    "none": NoAttention,
}
_ATTENTION_ENTRIES = {
    "global": {"d_head"},
    "neighborhood": {"d_head", "kernel_size"},
    "shifted-window": {"d_head", "window_size"},
    "none": set(),
}


def config_from_kdiffusion(config: Config) -> HDiTConfig:
    """The model of a k-diffusion configuration: a dict, a .json file, or a .safetensors file that holds one.

    Fills in k-diffusion's defaults: feed-forward width 3 x width, head_dim 64, neighborhood attention of size 7 with
    global attention in the last level, sigma_data 1; and one row more than the data set has classes, for "no class".
    What the configuration says of training is left alone (USED_ENTRIES has the names of what is used).
    Raises ValueError or TypeError, naming the entry, on a model of another type, on a missing, wrong or unknown entry
    of the model and on what HDiTConfig doesn't take.
    """
    content, where = _read(config)
    with _naming(f"{where}: "):
        return _config(content)


def config_to_kdiffusion(config: HDiTConfig) -> dict[str, Any]:
    """The k-diffusion configuration of a model, which config_from_kdiffusion reads back; nothing of training is in it.

    Raises ValueError, naming the entry, if k-diffusion has no such model.
    """
    types = {kind: name for name, kind in _ATTENTIONS.items()}
    attentions = [
        {"type": types[type(level.attention)]}
        | {"d_head" if name == "head_dim" else name: size for name, size in asdict(level.attention).items()}
        for level in config.levels
    ]
    made = {
        "model": {
            "type": "image_transformer_v2",
            "input_channels": config.in_channels,
            "input_size": list(config.image_size),
            "patch_size": list(config.patch_size),
            "depths": [level.depth for level in config.levels],
            "widths": [level.width for level in config.levels],
            "d_ffs": [level.d_ff for level in config.levels],
            "self_attns": attentions,
            "dropout_rate": [level.dropout for level in config.levels],
            "mapping_depth": config.mapping.depth,
            "mapping_width": config.mapping.width,
            "mapping_d_ff": config.mapping.d_ff,
            "mapping_dropout_rate": config.mapping.dropout,
            "mapping_cond_dim": config.mapping_cond_dim,
            "sigma_data": config.sigma_data,
            "sigma_min": config.sigma_min,
            "sigma_max": config.sigma_max,
        },
        "dataset": {"num_classes": max(config.num_classes - 1, 0)},
    }
    again = config_from_kdiffusion(made)
    for entry in fields(config):
        theirs, ours = getattr(again, entry.name), getattr(config, entry.name)
        if theirs != ours:
            raise ValueError(f"config: {entry.name}: expected one that k-diffusion has, got {ours} (it has {theirs})")
    return made


def density_from_kdiffusion(config: Config) -> Callable[..., Tensor]:
    """The density of noise levels to train at that a k-diffusion configuration names: called as density(shape, …).

    Takes what config_from_kdiffusion takes. Raises ValueError or TypeError, naming the entry, on a missing, wrong or
    unknown entry and on an unknown density.
    """
    content, where = _read(config)
    with _naming(f"{where}: "):
        return _density(_model_part(content))


def load_kdiffusion(path: str | PathLike[str], ema: bool = True, config: Config | None = None) -> HDiT:
    """The model in a k-diffusion checkpoint, in float32 on the CPU, in evaluation mode.

    path: a .safetensors file (weights of the averaged model) or a training checkpoint .pth, read without running code
    from it (weights_only). Weights of another floating dtype become float32; what DistributedDataParallel and
    torch.compile put before names is left out. ema: whether to take the averaged weights of a .pth. config: the
    k-diffusion configuration, where the file holds none.
    Raises ValueError, naming the file, if it isn't such a checkpoint, or of another configuration, or holds weights
    that aren't finite; OSError if it can't be read.
    """
    checks.boolean("ema", ema)
    if isinstance(path, (str, PathLike)) and Path(path).suffix == ".safetensors":
        require("safetensors", "train")
        file = _weights.Safetensors(regular_file("path", path))
        path, tensors, found = file.path, file.tensors, file.json("config")
    else:
        path = regular_file("path", path)
        checkpoint = _weights.read_pth(path)
        key = "model_ema" if ema else "model"
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise CheckpointError(f"{path} is not a k-diffusion training checkpoint: it has no {key!r}")
        tensors, found = _weights.state_of(path, checkpoint[key], key), checkpoint.get("config")
    if config is not None:
        return _weights.load(path, config_from_kdiffusion(config), tensors)
    if found is None:
        raise CheckpointError(f"{path} holds no configuration: pass config=, the k-diffusion .json it was trained with")
    if not isinstance(found, MappingABC):  # a string would be followed as a path
        raise CheckpointError(f"{path}: expected its config to be a mapping, got {type(found).__name__}")
    try:
        made = config_from_kdiffusion(found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _weights.load(path, made, tensors)


# Reading


def _read(config: Config) -> tuple[MappingABC[str, Any], str]:
    """A configuration, and what to call it in errors."""
    if isinstance(config, MappingABC):
        return config, "k-diffusion config"
    if not isinstance(config, (str, PathLike)):
        raise TypeError(f"config: expected a mapping or the path of a file, got {checks.shown(config)}")
    path = regular_file("config", config)
    if path.suffix == ".safetensors":
        content = _weights.Safetensors(path).json("config")
        if content is None:
            raise CheckpointError(f"{path} holds no configuration in its metadata")
    else:
        content = read_json("config", path)
    if not isinstance(content, MappingABC):
        raise ValueError(f"config {path}: expected a mapping, got {type(content).__name__}")
    return content, str(path)


@contextmanager
def _naming(where: str, names: MappingABC[str, str] | None = None) -> Iterator[None]:
    """Errors "name: …" inside become "<where><name, or what names has for it>: …"."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}{(names or {}).get(name, name)}{colon}{rest}") from error


def _model_part(config: MappingABC[str, Any]) -> MappingABC[str, Any]:
    model = config.get("model")
    if not isinstance(model, MappingABC):
        raise ValueError(f"model: expected a part of that name, got {checks.shown(model)}")
    if model.get("type") != "image_transformer_v2":
        raise ValueError(f"model.type: expected 'image_transformer_v2', got {checks.shown(model.get('type'))}")
    return model


def _list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list, got {checks.shown(value)}")
    return value


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


# The model


def _config(content: MappingABC[str, Any]) -> HDiTConfig:
    model = _model_part(content)
    for key in ("input_channels", "input_size", "patch_size", "depths", "widths"):
        if key not in model:
            raise ValueError(f"model.{key}: expected an entry of that name, which is missing")
    known = {name.removeprefix("model.") for name in USED_ENTRIES} | _FOR_TRAINING
    for key, value in model.items():
        if key not in known and (key not in _OF_OTHER_MODELS or value):
            raise ValueError(f"model: expected entries of an image_transformer_v2 model, got {quoted(key)}")

    widths = _list("model.widths", model["widths"])
    count = len(widths)
    if not 0 < count <= MOST_LEVELS:  # before any is made
        raise ValueError(f"model.widths: expected 1 to {MOST_LEVELS} entries, got {count}")
    neighborhoods = [{"type": "neighborhood"}] * (count - 1)
    dropout = _default(model.get("dropout_rate"), 0.0)
    given = {
        "depths": model["depths"],
        "d_ffs": _default(model.get("d_ffs"), [None] * count),
        "self_attns": _default(model.get("self_attns"), [*neighborhoods, {"type": "global"}]),
        "dropout_rate": dropout if isinstance(dropout, (list, tuple)) else [dropout] * count,
    }
    for key, values in given.items():
        if len(_list(f"model.{key}", values)) != count:
            raise ValueError(f"model.{key}: expected {count} entries, one for each of model.widths, got {len(values)}")
    depths, d_ffs, attentions, dropouts = given.values()
    levels = []
    for i in range(count):
        names = {"depth": "depths", "width": "widths", "d_ff": "d_ffs", "dropout": "dropout_rate"}
        with _naming("model.", {name: f"{entry}[{i}]" for name, entry in names.items()}):
            attention = _attention(attentions[i], f"self_attns[{i}]")
            levels.append(Level(depths[i], widths[i], d_ffs[i], attention, dropouts[i]))

    mapping = {"depth": "depth", "width": "width", "d_ff": "d_ff", "dropout": "dropout_rate"}
    with _naming("model.mapping_", mapping):
        sizes = {name: model[f"mapping_{entry}"] for name, entry in mapping.items() if f"mapping_{entry}" in model}
        made = Mapping(**sizes)
    dataset = content.get("dataset", {})
    if not isinstance(dataset, MappingABC):
        raise TypeError(f"dataset: expected a mapping, got {checks.shown(dataset)}")
    num_classes = checks.integer("dataset.num_classes", dataset.get("num_classes", 0), 0)
    rest = {key: model[key] for key in ("mapping_cond_dim", "sigma_min", "sigma_max") if key in model}
    with _naming("model.", {"in_channels": "input_channels", "image_size": "input_size"}):
        return HDiTConfig(
            levels=tuple(levels),
            mapping=made,
            image_size=model["input_size"],
            in_channels=model["input_channels"],
            patch_size=model["patch_size"],
            num_classes=num_classes + 1 if num_classes else 0,
            sigma_data=model.get("sigma_data", 1.0),
            **rest,
        )


def _attention(spec: object, where: str) -> Attention:
    if not isinstance(spec, MappingABC):
        raise TypeError(f"{where}: expected a mapping with a type, got {checks.shown(spec)}")
    kind: Any = spec.get("type")
    checks.choice(f"{where}.type", kind, _ATTENTIONS)
    for key in spec:
        if key != "type" and key not in _ATTENTION_ENTRIES[kind]:
            raise ValueError(f"{where}: expected entries of {kind!r} attention, got {quoted(key)}")
    if kind == "shifted-window" and "window_size" not in spec:
        raise ValueError(f"{where}.window_size: expected an entry of that name, which is missing")
    sizes = {"head_dim" if key == "d_head" else key: value for key, value in spec.items() if key != "type"}
    with _naming(f"{where}.", {"head_dim": "d_head"}):
        return _ATTENTIONS[kind](**sizes)


# The density of noise levels


class _Numbers:
    """The numbers of a part of a configuration by their names, and which of them nobody asked for."""

    def __init__(self, where: str, entries: MappingABC[str, Any]) -> None:
        self.where, self.entries, self.unused = where, entries, set(entries)

    def __call__(self, *names: str, default: float | None = None, **bounds: Any) -> float:
        """The first of the names that is there, inside the bounds (checks.number's)."""
        for name in names:
            if name in self.entries:
                self.unused.discard(name)
                return checks.number(f"{self.where}.{name}", self.entries[name], **bounds)
        if default is None:
            raise ValueError(f"{self.where}.{names[0]}: expected an entry of that name, which is missing")
        return default


def _density(model: MappingABC[str, Any]) -> Callable[..., Tensor]:
    where = "model.sigma_sample_density"
    spec = model.get("sigma_sample_density")
    if not isinstance(spec, MappingABC) or "type" not in spec:
        raise ValueError(f"{where}: expected a mapping with a type, got {checks.shown(spec)}")
    kind, number, of_model = spec["type"], _Numbers(where, spec), _Numbers("model", model)
    number.unused.remove("type")
    sigma_data = of_model("sigma_data", default=1.0, above=0)
    positive = {"above": 0.0}
    function: Any
    if kind == "lognormal":
        function = densities.rand_log_normal
        arguments = {"loc": number("mean", "loc"), "scale": number("std", "scale", **positive)}
    elif kind == "loglogistic":
        function = densities.rand_log_logistic
        arguments = {
            "loc": number("loc", default=math.log(sigma_data)),
            "scale": number("scale", default=0.5, **positive),
            "min_value": number("min_value", default=0.0, at_least=0),
            "max_value": number("max_value", default=math.inf, infinite=True, **positive),
        }
    elif kind == "loguniform":
        function = densities.rand_log_uniform
        low = number("min_value", **positive) if "min_value" in spec else of_model("sigma_min", **positive)
        high = number("max_value", **positive) if "max_value" in spec else of_model("sigma_max", **positive)
        arguments = {"min_value": low, "max_value": high}
    elif kind in ("v-diffusion", "cosine"):
        function = densities.rand_v_diffusion
        arguments = {
            "sigma_data": sigma_data,
            "min_value": number("min_value", default=1e-3, at_least=0),
            "max_value": number("max_value", default=1e3, **positive),
        }
    elif kind == "split-lognormal":
        function = densities.rand_split_log_normal
        arguments = {
            "loc": number("mean", "loc"),
            "scale_1": number("std_1", "scale_1", **positive),
            "scale_2": number("std_2", "scale_2", **positive),
        }
    elif kind == "cosine-interpolated":
        function = densities.rand_cosine_interpolated
        image_d = max(checks.pair("model.input_size", _list("model.input_size", model.get("input_size"))))
        arguments = {
            "image_d": number("image_d", default=image_d, **positive),
            "noise_d_low": number("noise_d_low", default=32, **positive),
            "noise_d_high": number("noise_d_high", default=image_d, **positive),
            "sigma_data": sigma_data,
            "min_value": number("min_value", default=min(of_model("sigma_min", **positive), 1e-3), **positive),
            "max_value": number("max_value", default=max(of_model("sigma_max", **positive), 1e3), **positive),
        }
    else:
        raise ValueError(f"{where}.type: unknown density of noise levels {checks.shown(kind)}")
    for name in number.unused:
        raise ValueError(f"{where}: expected entries of {kind!r}, got {quoted(name)}")
    low, high = arguments.get("min_value", 0.0), arguments.get("max_value", math.inf)
    if low >= high:
        raise ValueError(f"{where}: expected min_value below max_value, got {low:g} and {high:g}")
    return partial(function, **arguments)
