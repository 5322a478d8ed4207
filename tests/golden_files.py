"""Reads tests/golden: see its README.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hdit import HDiT, HDiTConfig

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def read_json(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text())


def entry(name: str) -> dict[str, Any]:
    """What index.json says of a file."""
    return read_json("index.json")["files"][name]


def tensors(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file, floating point ones in dtype if given."""
    found = load_file(GOLDEN / name)
    return {key: t.to(dtype) if dtype and t.is_floating_point() else t for key, t in found.items()}


def model_config(config: dict[str, Any]) -> HDiTConfig:
    """Our configuration for a model as index.json and the flops files write it."""
    levels = []
    for level in config["levels"]:
        attention = {"head_dim" if key == "d_head" else key: value for key, value in level["attn"].items()}
        levels.append({"depth": level["depth"], "width": level["width"], "d_ff": level["d_ff"], "attention": attention})
    return HDiTConfig.from_dict(
        {
            "levels": levels,
            "mapping": config["mapping"],
            "image_size": config["image"],
            "in_channels": config["channels"],
            "patch_size": config["patch_size"],
            "num_classes": config.get("num_classes", 0),
        }
    )


def model(name: str, dtype: torch.dtype, device: str = "cpu") -> HDiT:
    """Golden model A, B or F with its weights."""
    file = f"model_{name}.safetensors"
    net = HDiT(model_config(entry(file)["config"])).to(dtype)
    state = {key.removeprefix("state."): t for key, t in tensors(file).items() if key.startswith("state.")}
    net.load_state_dict(state, strict=True)
    return net.to(device)


def max_error(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|, the measure of the golden files; infinity for NaN."""
    found, wanted = found.detach().cpu().double(), wanted.cpu().double()
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return error if error == error else float("inf")
