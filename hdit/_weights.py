"""Weights in files: what a file holds is compared with a configuration before any of it is read or built."""

from __future__ import annotations

import ctypes
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit._files import CheckpointError, parse_json, quoted
from hdit.config import HDiTConfig
from hdit.model import HDiT
from hdit_kernels import checks

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MAPPED = 2**26  # bytes of a file that count as this process's memory at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. read() gives its values in memory of their own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def clean(name: str) -> str:
    """A tensor's name without what DistributedDataParallel, torch.compile and their like put into it.

    No module of an HDiT has such a name, so they go wherever they stand.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def cleaned(path: Path, tensors: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, stored in tensors:
        if clean(name) in found:
            raise CheckpointError(f"{path} holds {quoted(clean(name))} twice: once as {quoted(name)}")
        found[clean(name)] = stored
    return found


# Kinds of file


class Safetensors:
    """A .safetensors file. metadata: its texts; tensors: what it holds, by clean names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = self._open()
        self.metadata: dict[str, str] = file.metadata() or {}
        slices = [(name, file.get_slice(name)) for name in file.keys()]
        self.tensors = cleaned(path, ((name, self._stored(name, part)) for name, part in slices))
        self._mapped: Any = None
        self._left = 0

    def json(self, name: str) -> Any:
        """What a text of the metadata says, None if there is none. Raises CheckpointError if it isn't JSON."""
        try:
            return (
                parse_json(f"{self.path}: {name} in its metadata", self.metadata[name])
                if name in self.metadata
                else None
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def _open(self) -> Any:
        safetensors = require("safetensors", "train")
        try:
            with open(self.path, "rb"):  # an OSError that names the file
                return safetensors.safe_open(self.path, "pt")
        except safetensors.SafetensorError as error:
            what = quoted(" ".join(str(error).split()))
            raise CheckpointError(
                f"{self.path} is damaged or not a safetensors file ({what}): pass another file"
            ) from error

    def _stored(self, name: str, part: Any) -> Stored:
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {quoted(name)}: expected floating-point numbers, got {quoted(dtype)}")
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        return Stored(shape, DTYPES[dtype], lambda: self._read(name, size))

    def _read(self, name: str, size: int) -> Tensor:
        if self._left <= 0:  # what was mapped before is let go
            self._mapped = None
            self._mapped, self._left = self._open(), MAPPED
        self._left -= size
        try:
            return self._mapped.get_tensor(name).clone()
        except require("safetensors", "train").SafetensorError as error:
            raise CheckpointError(f"{self.path} was changed while it was read") from error


def read_pth(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped from the file. No code of it is run (weights_only).

    Raises CheckpointError unless it is such a file, whole and as large as what is in it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
        # torch.save compresses nothing; a record that does can have any size.
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
            raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of torch's readers
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint that can be read safely (torch.save's own kind, weights_only)"
        ) from error


def state_of(path: Path, state: object, what: str) -> dict[str, Stored]:
    """The tensors of a state dict out of a file, by clean names. Raises CheckpointError if it holds anything else."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected a mapping of tensors in {what!r}, got {type(state).__name__}")
    left = path.stat().st_size
    found = []
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: expected names of tensors in {what!r}, got {quoted(name)}")
        try:
            checks.floating(**{"it": tensor})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {quoted(name)} in {what!r} can't be a weight: {error}") from error
        left -= tensor.numel() * tensor.itemsize
        if tensor.device.type != "cpu" or left < 0:  # no values in the file, or the same ones again and again
            raise CheckpointError(f"{path}: {quoted(name)} in {what!r} is larger than what the file holds of it")
        found.append((name, Stored(tuple(tensor.shape), tensor.dtype, tensor.detach().clone)))
    return cleaned(path, found)


# What is in them


def fit(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Stored]) -> None:
    """CheckpointError, naming a tensor, unless a file has the tensors that a model of its configuration has."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    words = [f"{quoted(name)} is missing" for name in missing[:1]] + [f"{quoted(name)} unknown" for name in unknown[:1]]
    if words:
        raise CheckpointError(f"{path} is of another configuration: {' and '.join(words)}")
    for name, tensor in sorted(expected.items()):
        shape, wanted = list(found[name].shape), list(tensor.shape)
        if shape != wanted:
            raise CheckpointError(f"{path} is of another configuration: {name}: expected shape {wanted}, got {shape}")


def load(path: Path, config: HDiTConfig, tensors: Mapping[str, Stored]) -> HDiT:
    """A model with the weights in a file, in float32 on the CPU, in evaluation mode; made once they fit."""
    if config.layers > len(tensors):  # which building a model takes long for
        raise CheckpointError(
            f"{path} is of another configuration: expected {config.layers} layers, got {len(tensors)} tensors"
        )
    with torch.device("meta"):
        model = HDiT(config)
    fit(path, model.state_dict(), tensors)
    state = {name: stored.read().float() for name, stored in tensors.items()}
    name = not_finite(state)
    if name is not None:
        raise CheckpointError(f"{path}: {name} holds NaN or infinity: take an earlier checkpoint")
    model.load_state_dict(state, assign=True)
    return model.eval()


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of the tensors that holds NaN or infinity; None if none does. Waits once for a GPU."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    for names in groups.values():
        # The least and the greatest tell, in one pass and without a tensor of flags; NaN is both.
        ends = torch.stack([end for name in names for end in torch.aminmax(tensors[name].detach())])
        good = ends.isfinite().view(-1, 2).all(1).tolist()
        if not all(good):
            return names[good.index(False)]
    return None


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes, its name, dtype and shape."""
    start = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    if not tensor.numel():
        return start
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), start)
