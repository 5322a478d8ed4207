"""Checkpoints of hdit.train: one safetensors file with everything that sampling and an exact resume need.

    model.<name>                    the weights (and buffers) being trained
    ema.<name>                      their moving average, which is what one samples with
    optimizer.<quantity>.<name>     the optimizer's state of each parameter
    metadata                        format "pt"; hdit: JSON of a Details, the configuration among it

No random number generator is stored: data order and noise are functions of the seed and the step (see hdit.train).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit.config import HDiTConfig
from hdit.kdiffusion import load_kdiffusion
from hdit.model import HDiT


class CheckpointError(ValueError):
    """A checkpoint can't be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class Details:
    """What a checkpoint says about itself, in its metadata.

    config: HDiTConfig.to_dict(). step: optimizer steps done. options: those of the run. class_names: of the data, empty
    without classes. excluded, data: the unreadable images, and the data set's fingerprint (see hdit.data.Images).
    recipe: Recipe.to_dict(); empty for the default one.
    """

    config: dict[str, Any]
    step: int
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    data: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | os.PathLike[str], model: HDiT, ema_model: HDiT, optimizer: torch.optim.Optimizer, details: Details
) -> None:
    """Writes a checkpoint atomically: whatever happens, path is the old file or the whole new one, on disk."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema_model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for quantity, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{quantity}.{name}"] = tensor
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, tensors, {"format": "pt", "hdit": json.dumps(asdict(details))})


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name, and gives it its own once it is on disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        require("safetensors.torch", "train").save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(mode)  # an ordinary file's: safetensors would let nobody else read it
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # the new name itself


def read_details(path: str | os.PathLike[str]) -> Details | None:
    """What a checkpoint says about itself, without reading its tensors; None if it isn't one of hdit.train.

    Raises CheckpointError if there is no file, or it is a damaged .safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: check the path")
    if path.suffix != ".safetensors":
        return None
    with _opened(path) as file:
        text = (file.metadata() or {}).get("hdit")
    if text is None:
        return None
    try:
        return Details(**json.loads(text))
    except TypeError as error:
        raise CheckpointError(f"{path} is of another version of hdit ({error}): use that version") from error


def load_checkpoint(path: str | os.PathLike[str], ema: bool = True) -> HDiT:
    """The model in a checkpoint of hdit.train or of k-diffusion, in float32 on the CPU, in evaluation mode.

    ema: whether to take the averaged weights. Raises CheckpointError or ValueError (hdit.load_kdiffusion's) if the file
    is neither.
    """
    path = Path(path)
    details = read_details(path)
    if details is None:
        return load_kdiffusion(path, ema)
    model = HDiT(HDiTConfig.from_dict(details.config))
    model.load_state_dict(_read(path, "ema." if ema else "model."))
    return model.eval()


def resume(path: str | os.PathLike[str], model: HDiT, ema_model: HDiT, optimizer: torch.optim.Optimizer) -> Details:
    """Puts the state in a checkpoint back into a model, its average and its optimizer.

    Raises CheckpointError, changing nothing, if the checkpoint isn't one of hdit.train or is of another configuration.
    """
    path = Path(path)
    details = read_details(path)
    if details is None:
        raise CheckpointError(f"{path} holds weights, but no training to resume: pass a checkpoint of hdit.train")
    different = _difference(details.config, model.config.to_dict())
    if different is not None:
        raise CheckpointError(
            f"{path} is of another configuration ({different} here): "
            "leave the configuration as it was, or start another run"
        )
    model.load_state_dict(_read(path, "model."))
    ema_model.load_state_dict(_read(path, "ema."))

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _read(path, "optimizer.").items():
        quantity, _, name = key.partition(".")
        state.setdefault(order.index(name), {})[quantity] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return details


def _difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """The first entry in which two nested dicts and lists differ, in words; None if they don't."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{name}.{key}", theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else f"{name.lstrip('.')} {json.dumps(theirs)}, but {json.dumps(ours)}"
    return next(filter(None, (_difference(a, b, where) for where, a, b in pairs)), None)


def _opened(path: Path) -> Any:
    safetensors = require("safetensors", "train")
    try:
        return safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}): pass another file") from error


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, by the rest of their names."""
    with _opened(path) as file:
        return {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk (only POSIX can tell for both)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
