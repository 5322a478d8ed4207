"""The reference HDiT: k-diffusion's image_transformer_v2 (Crowson et al. 2024), run from its own files.

They come from a checkout of https://github.com/crowsonkb/k-diffusion or from an installed package, and are not changed.
Only the model's module and what it needs are imported, under a name of their own: the packages' __init__ ask for the
training dependencies (clean-fid, clip, dctorch, torchsde, …), which no model uses. As shipped, the model compiles its
small functions with torch.compile (K_DIFFUSION_USE_COMPILE=0 stops that) and lets torch._dynamo fall back on errors.
"""

from __future__ import annotations

import configparser
import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from benchmarks.runs import RunError
from hdit.config import Attention, GlobalAttention, HDiTConfig, NeighborhoodAttention, ShiftedWindowAttention

INSTALL = (
    "git clone https://github.com/crowsonkb/k-diffusion, pass --k-diffusion with the clone's folder, "
    "and pip install einops natten"
)
_NAME = "_reference_k_diffusion"
_MODEL = Path("models") / "image_transformer_v2.py"


def check_folder(path: Path | None) -> None:
    """Raises RunError where `path`, as in build, is given and holds no model."""
    if path is None:
        return
    try:
        _package(path)
    except ImportError as error:
        raise RunError(f"--k-diffusion: {error}; expected a clone of crowsonkb/k-diffusion") from error


def available(path: Path | None = None) -> str | None:
    """Why the model can't be built here (in one line), None if it can. path: as in build."""
    try:
        _load(_package(path))
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        return " ".join(str(error).split())
    return None


def version(path: Path | None = None) -> str | None:
    """Of the checkout by its setup.cfg and, of a clone, git; of the installed package. None where nothing says."""
    if path is None:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version("k-diffusion")
        return None
    settings = configparser.ConfigParser()
    settings.read([folder / "setup.cfg" for folder in (path, path.parent)])
    found = settings.get("metadata", "version", fallback=None)
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        if (path / ".git").exists():
            command = ["git", "-C", str(path), "rev-parse", "--short=12", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return "+".join(filter(None, (found, commit))) or None


def build(config: HDiTConfig, path: Path | None = None) -> nn.Module:
    """The reference model of config, freshly initialised: parameter names and forward's arguments are HDiT's.

    path: the folder of a k-diffusion checkout, or its package; an installed package if not given. Raises ImportError if
    there is none, or something that it needs (einops, NATTEN) is missing.
    """
    module = _load(_package(path))

    def attention(kind: Attention) -> Any:
        if isinstance(kind, GlobalAttention):
            return module.GlobalAttentionSpec(kind.head_dim)
        if isinstance(kind, NeighborhoodAttention):
            return module.NeighborhoodAttentionSpec(kind.head_dim, kind.kernel_size)
        if isinstance(kind, ShiftedWindowAttention):
            return module.ShiftedWindowAttentionSpec(kind.head_dim, kind.window_size)
        return module.NoAttentionSpec()

    levels = [
        module.LevelSpec(level.depth, level.width, level.d_ff, attention(level.attention), level.dropout)
        for level in config.levels
    ]
    mapping = config.mapping
    return module.ImageTransformerDenoiserModelV2(
        levels,
        module.MappingSpec(mapping.depth, mapping.width, mapping.d_ff, mapping.dropout),
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        mapping_cond_dim=config.mapping_cond_dim,
    )


def _package(path: Path | None) -> Path:
    """The folder of the package k_diffusion."""
    if path is None:
        spec = importlib.util.find_spec("k_diffusion")
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        where = "is not installed"
    else:
        folders = [path / "k_diffusion", path]
        where = f"is not at {path}"
    for folder in folders:
        if (folder / _MODEL).is_file():
            return folder.resolve()
    raise ImportError(f"k-diffusion's {_MODEL.name} {where}")


@functools.cache
def _load(package: Path) -> ModuleType:
    """The module of the model, with NATTEN's present functions where it looks for earlier ones."""
    for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
        del sys.modules[name]  # of another checkout, or of an import that failed
    top, models = ModuleType(_NAME), ModuleType(f"{_NAME}.models")
    top.__path__, models.__path__ = [str(package)], [str(package / "models")]
    unused = ModuleType("unused")
    top.models, top.sampling, top.utils = models, unused, unused  # type: ignore[attr-defined]
    sys.modules.update({_NAME: top, f"{_NAME}.models": models})

    # layers.py, of which the model takes the Fourier features, imports this for losses that are not measured
    absent = importlib.util.find_spec("dctorch") is None
    if absent:
        stand_in = ModuleType("dctorch")
        stand_in.functional = unused  # type: ignore[attr-defined]
        sys.modules["dctorch"] = stand_in
    try:
        module = importlib.import_module(f"{_NAME}.models.{_MODEL.stem}")
    finally:
        if absent:
            del sys.modules["dctorch"]

    natten = module.natten
    if natten is None:
        raise ImportError("NATTEN is not installed, or failed to import")
    if not hasattr(natten, "has_fused_na"):  # NATTEN >= 0.20 is always fused
        functional = SimpleNamespace(na2d=natten.na2d)
        module.natten = SimpleNamespace(has_fused_na=lambda: True, functional=functional)  # type: ignore[attr-defined]
    return module
