"""Checkpoints of hdit.train: one safetensors file with everything that sampling and an exact resume need.

A file of hdit.export has one set of weights only, by their plain names, and the same metadata.

    model.<name>                    the weights (and buffers) being trained
    ema.<name>                      their moving average, which is what one samples with
    optimizer.<quantity>.<name>     the optimizer's state of each parameter
    metadata                        format "pt"; hdit: JSON of a Details, the configuration among it;
                                    crc32: JSON of each tensor's checksum, by its name

No random number generator is stored: data order and noise are functions of the seed and the step (see hdit.train).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit._files import CheckpointError as CheckpointError
from hdit._files import quoted, regular_file
from hdit._weights import Safetensors, Stored, checksum, clean, fit, load, not_finite
from hdit.config import HDiTConfig
from hdit.kdiffusion import load_kdiffusion
from hdit.model import HDiT
from hdit_kernels import checks

MODEL, EMA, OPTIMIZER = "model.", "ema.", "optimizer."
LAST_COUNTED = 2**24  # AdamW counts its steps in float32, where one more than this is the same


class NonFiniteWeights(ArithmeticError):
    """A weight, its average or the optimizer's state is NaN or infinite: there is nothing to be saved."""


@dataclass(frozen=True)
class Details:
    """What a checkpoint says about itself, in its metadata.

    config: HDiTConfig.to_dict(). step: optimizer steps done. options: those of the run. class_names: of the data, empty
    without classes. excluded, data: the unreadable images, and the data set's fingerprint (see hdit.data.Images).
    recipe: Recipe.to_dict(); empty for the default one.
    loss: of the last step, by which a checkpoint and the log of losses beside it are known to be of one run.
    only: in a file of hdit.export, which weights are in it, "ema" or "model"; its step is 0 if nobody knows.
    Raises TypeError or ValueError, naming the entry.
    """

    config: dict[str, Any]
    step: int
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    data: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        for name in ("config", "options", "recipe"):
            entries = getattr(self, name)
            if not isinstance(entries, Mapping) or not all(isinstance(entry, str) for entry in entries):
                raise TypeError(f"{name}: expected a mapping, got {checks.shown(entries)}")
        HDiTConfig.from_dict(self.config)
        checks.integer("step", self.step, 0)
        if self.loss is not None:
            checks.number("loss", self.loss)
        for name in ("class_names", "excluded"):
            words = getattr(self, name)
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TypeError(f"{name}: expected a list of texts, got {checks.shown(words)}")
        if not isinstance(self.data, str):
            raise TypeError(f"data: expected a text, got {checks.shown(self.data)}")
        checks.choice("only", self.only, (None, "ema", "model"))


def save_checkpoint(
    path: str | os.PathLike[str], model: HDiT, ema_model: HDiT, optimizer: torch.optim.Optimizer, details: Details
) -> None:
    """Writes a checkpoint atomically: whatever happens, path is the old file or the whole new one, on disk.

    Raises NonFiniteWeights if there is NaN or infinity in it, and OSError, naming the file, if it can't be written.
    """
    tensors = {f"{MODEL}{clean(name)}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"{EMA}{clean(name)}": tensor for name, tensor in ema_model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for quantity, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{quantity}.{clean(name)}"] = tensor
    write_weights(path, tensors, details)


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], details: Details) -> None:
    """Writes tensors with their checksums and what they are. How, and errors: as in save_checkpoint."""
    name_of_bad = not_finite(tensors)
    if name_of_bad is not None:
        raise NonFiniteWeights(f"{path} is not written at step {details.step}: {name_of_bad} holds NaN or infinity")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt", "hdit": json.dumps(asdict(details)), "crc32": json.dumps(checksums)}
    write_safetensors(path, tensors, metadata)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name, and gives it its own once it is on disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    safetensors = require("safetensors.torch", "train")
    try:
        temporary.unlink(missing_ok=True)  # of a killed run
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(mode)  # an ordinary file's: safetensors would let nobody else read it
        _sync(temporary)
        os.replace(temporary, path)
    except (OSError, require("safetensors", "train").SafetensorError) as error:  # the second on a full disk
        raise OSError(f"{path} can't be written ({error}); what was there before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # the new name itself


def read_details(path: str | os.PathLike[str]) -> Details | None:
    """What a checkpoint says about itself, without reading its tensors; None if it isn't one of hdit.train.

    Raises CheckpointError, naming the file, if there is none, or it is damaged, or says what can't be.
    """
    path = _existing(path)
    return _details(Safetensors(path)) if path.suffix == ".safetensors" else None


def load_checkpoint(path: str | os.PathLike[str], ema: bool = True) -> HDiT:
    """The model in a checkpoint of hdit.train or of k-diffusion, in float32 on the CPU, in evaluation mode.

    Files of hdit.export are taken, too. ema: whether to take the averaged weights; a file that holds another set alone
    gives that. Raises CheckpointError or another ValueError, naming the file, if it is neither, or damaged, or holds
    other tensors than a model of its configuration, or the averaged weights alone where ema is False.
    """
    checks.boolean("ema", ema)
    path = _existing(path)
    if path.suffix != ".safetensors":
        return load_kdiffusion(path, ema)
    file = Safetensors(path)
    details = _details(file)
    if not ema and (details is None or details.only == "ema"):
        raise CheckpointError(f"{path} holds the averaged weights only: leave out --no-ema (ema=False)")
    if details is None:
        return load_kdiffusion(path)
    tensors = _checked(file)
    weights = tensors if details.only else _part(tensors, EMA if ema else MODEL)
    return load(path, HDiTConfig.from_dict(details.config), weights)


def resume(path: str | os.PathLike[str], model: HDiT, ema_model: HDiT, optimizer: torch.optim.Optimizer) -> Details:
    """Puts the state in a checkpoint back into a model, its average and its AdamW optimizer.

    Raises CheckpointError, changing nothing, if the checkpoint isn't one of hdit.train, is of another configuration or
    damaged, or lacks a part of the state.
    """
    known = {id(parameter) for parameter in model.parameters()}
    of_model = all(id(p) in known for group in optimizer.param_groups for p in group["params"])
    if not isinstance(optimizer, torch.optim.AdamW) or not of_model:
        raise TypeError(
            f"optimizer: expected AdamW over the model's parameters, got another {type(optimizer).__name__}"
        )
    path = _existing(path)
    file = Safetensors(path) if path.suffix == ".safetensors" else None
    details = None if file is None else _details(file)
    if file is None or details is None or details.only:
        raise CheckpointError(f"{path} holds weights, but no training to resume: pass a checkpoint of hdit.train")
    different = _difference(details.config, model.config.to_dict())
    if different is not None:
        raise CheckpointError(
            f"{path} is of another configuration ({different} here): "
            "leave the configuration as it was, or start another run"
        )
    tensors = _checked(file)
    targets = {f"{MODEL}{clean(name)}": tensor for name, tensor in model.state_dict().items()}
    targets |= {f"{EMA}{clean(name)}": tensor for name, tensor in ema_model.state_dict().items()}
    names = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    trained = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    expected = targets | (_adamw_state(trained) if details.step else {})
    fit(path, expected, tensors)
    for name, stored in tensors.items():
        if stored.dtype != expected[name].dtype:
            raise CheckpointError(f"{path}: {name}: expected {expected[name].dtype}, got {stored.dtype}")
        values = stored.read()  # also sees to the checksum
        if not_finite({name: values}):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: take an earlier checkpoint")
        if name.startswith(f"{OPTIMIZER}step.") and values != min(details.step, LAST_COUNTED):
            raise CheckpointError(f"{path}: {name}: expected step {details.step}, as in its metadata, got {values:g}")

    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name].read())
    state: dict[int, dict[str, Tensor]] = {}
    order = list(trained)
    for key, stored in _part(tensors, OPTIMIZER).items():
        quantity, _, name = key.partition(".")
        state.setdefault(order.index(name), {})[quantity] = stored.read()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return details


def _adamw_state(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes of AdamW's state, by their names in a checkpoint."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found |= {f"{OPTIMIZER}{quantity}.{name}": parameter for quantity in ("exp_avg", "exp_avg_sq")}
        found[f"{OPTIMIZER}step.{name}"] = torch.empty((), dtype=torch.float32, device="meta")
    return found


def _existing(path: str | os.PathLike[str]) -> Path:
    try:
        return regular_file("path", path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: check the path") from None


def _details(file: Safetensors) -> Details | None:
    if "hdit" not in file.metadata:
        return None
    entries = file.json("hdit")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file.path}: expected a mapping in its metadata, got {checks.shown(entries)}")
    known = {entry.name: entry.default is MISSING and entry.default_factory is MISSING for entry in fields(Details)}
    for name in entries:
        if name not in known:
            raise CheckpointError(
                f"{file.path} is of another version of hdit (it has {quoted(name)}): use that version"
            )
    for name, needed in known.items():
        if needed and name not in entries:
            raise CheckpointError(f"{file.path}: expected {name!r} in its metadata, which is missing")
    try:
        return Details(**entries)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its metadata: {error}") from error


def _checked(file: Safetensors) -> dict[str, Stored]:
    """The tensors of a file, each of which is compared with its checksum when it is read, where the file has some."""
    if "crc32" not in file.metadata:  # written before there were any
        return file.tensors
    checksums = file.json("crc32")
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{file.path}: expected a mapping of checksums, got {checks.shown(checksums)}")
    for name in sorted(checksums.keys() ^ file.tensors.keys()):
        what = "lost" if name in checksums else "got"
        raise CheckpointError(f"{file.path} is damaged: it has {what} {quoted(name)}: take an earlier checkpoint")

    def checked(name: str, stored: Stored) -> Stored:
        def read() -> Tensor:
            values = stored.read()
            if checksum(name, values) != checksums[name]:
                raise CheckpointError(f"{file.path} is damaged in {quoted(name)}: take an earlier checkpoint")
            return values

        return Stored(stored.shape, stored.dtype, read)

    return {name: checked(name, stored) for name, stored in file.tensors.items()}


def _part(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors whose names begin with prefix, by the rest of their names."""
    return {name[len(prefix) :]: stored for name, stored in tensors.items() if name.startswith(prefix)}


def _difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """The first entry in which two nested dicts and lists differ, in words; None if they don't."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{name}.{key}", theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else f"{name.lstrip('.')} {json.dumps(theirs)}, but {json.dumps(ours)}"
    return next(filter(None, (_difference(a, b, where) for where, a, b in pairs)), None)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk (only POSIX can tell for both)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
