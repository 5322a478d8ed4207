"""What an HDiT is made of: one frozen dataclass per part, and the published models as presets.

The hourglass of Crowson et al. 2024 (HDiT, arXiv 2401.11605, section 4): every level but the last is run twice, on the
way down and on the way up, with a 2x2 token merge below it and a token split above; the last level is the middle.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping as MappingABC
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch

from hdit_kernels import checks

# What no model of today comes near. Beyond them, a file of a few bytes could ask for hours or for all memory.
MOST = 2**24  # of any one size
MOST_LEVELS = 32
MOST_LAYERS = 1024
MOST_PARAMETERS = 2**40
LEAST_SIGMA, MOST_SIGMA = 1e-9, 1e9  # float32 holds their fourth powers


def _set(part: object, **values: object) -> None:
    """Sets fields of a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(part, name, value)


def _count(name: str, value: object, minimum: int = 1) -> int:
    count = checks.integer(name, value, minimum)
    if count > MOST:
        got = count if count.bit_length() <= 64 else f"one of {count.bit_length()} bits"
        raise ValueError(f"{name}: expected an integer of at most {MOST}, got {got}")
    return count


def _head_dim(value: object) -> int:
    head_dim = _count("head_dim", value)
    if head_dim % 8:  # head_dim/8 rotary angles an axis
        raise ValueError(f"head_dim: expected a multiple of 8, got {head_dim}")
    return head_dim


def _dropout(value: object) -> float:
    return checks.number("dropout", value, at_least=0, below=1)


def _two(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected (height, width), got {checks.shown(value)}")
    for side in value:
        _count(name, side)
    return checks.pair(name, value)


@dataclass(frozen=True)
class GlobalAttention:
    """Every token attends to every token. head_dim: width of one head, a multiple of 8."""

    head_dim: int = 64

    def __post_init__(self) -> None:
        _set(self, head_dim=_head_dim(self.head_dim))


@dataclass(frozen=True)
class NeighborhoodAttention:
    """Every token attends to the kernel_size x kernel_size tokens around it (Hassani et al. 2023, arXiv 2204.07143)."""

    head_dim: int = 64
    kernel_size: int = 7

    def __post_init__(self) -> None:
        _set(self, head_dim=_head_dim(self.head_dim), kernel_size=_count("kernel_size", self.kernel_size))


@dataclass(frozen=True)
class ShiftedWindowAttention:
    """Attention inside square windows, which odd layers shift by half (Liu et al. 2021, arXiv 2103.14030).

    window_size: rows and columns of a window; it must divide the grid.
    """

    head_dim: int = 64
    window_size: int = 8

    def __post_init__(self) -> None:
        _set(self, head_dim=_head_dim(self.head_dim), window_size=_count("window_size", self.window_size))


@dataclass(frozen=True)
class NoAttention:
    """Feed-forward blocks only."""


Attention = GlobalAttention | NeighborhoodAttention | ShiftedWindowAttention | NoAttention

_ATTENTION_TYPES: dict[str, type] = {
    "global": GlobalAttention,
    "neighborhood": NeighborhoodAttention,
    "shifted-window": ShiftedWindowAttention,
    "none": NoAttention,
}


@dataclass(frozen=True)
class Level:
    """One level of the hourglass.

    depth: transformer layers in it (twice as many run, down and up, except in the last level); width: channels of a
    token; d_ff: width of the feed-forward block after its gate, 3 x width if not given; attention: what its layers
    attend to; dropout: share in [0, 1) of the attention's and the feed-forward block's inner activations.
    """

    depth: int
    width: int
    d_ff: int = None  # type: ignore[assignment]  # filled in below
    attention: Attention = field(default_factory=NeighborhoodAttention)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        width = _count("width", self.width)
        d_ff = 3 * width if self.d_ff is None else _count("d_ff", self.d_ff)
        _set(self, depth=_count("depth", self.depth, 0), width=width, d_ff=d_ff, dropout=_dropout(self.dropout))
        kinds = tuple(_ATTENTION_TYPES.values())
        if not isinstance(self.attention, kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"attention: expected one of {names}, got {checks.shown(self.attention)}")
        head_dim = getattr(self.attention, "head_dim", 1)
        if width % head_dim:
            raise ValueError(f"width: expected a multiple of head_dim {head_dim}, got {width}")


@dataclass(frozen=True)
class Mapping:
    """The mapping network, which turns noise level, augmentation and class into one conditioning vector.

    width is even (Fourier features come in pairs); d_ff is 3 x width if not given.
    """

    depth: int = 2
    width: int = 256
    d_ff: int = None  # type: ignore[assignment]  # filled in below
    dropout: float = 0.0

    def __post_init__(self) -> None:
        width = _count("width", self.width)
        if width % 2:
            raise ValueError(f"width: expected an even number, got {width}")
        d_ff = 3 * width if self.d_ff is None else _count("d_ff", self.d_ff)
        _set(self, depth=_count("depth", self.depth, 0), width=width, d_ff=d_ff, dropout=_dropout(self.dropout))


@dataclass(frozen=True)
class HDiTConfig:
    """A whole model.

    levels: outermost (finest) first. image_size: (height, width) in pixels trained at; other sizes run too where they
    divide. patch_size: pixels (height, width) of a finest token. num_classes: rows of the class table, 0 for none; the
    last row stands for "no class" (see null_class). mapping_cond_dim: length of an extra conditioning vector or 0.
    sigma_data: standard deviation of the data; sigma_min, sigma_max: noise levels to train and sample in.
    Raises ValueError, naming what doesn't fit.
    """

    levels: tuple[Level, ...]
    mapping: Mapping = field(default_factory=Mapping)
    image_size: tuple[int, int] = (256, 256)
    in_channels: int = 3
    out_channels: int = None  # type: ignore[assignment]  # filled in below
    patch_size: tuple[int, int] = (4, 4)
    num_classes: int = 0
    mapping_cond_dim: int = 0
    sigma_data: float = 0.5
    sigma_min: float = 1e-2
    sigma_max: float = 160.0

    def __post_init__(self) -> None:
        levels = self.levels
        if not isinstance(levels, (tuple, list)):
            raise TypeError(f"levels: expected a tuple of Level, got {checks.shown(levels)}")
        if not 0 < len(levels) <= MOST_LEVELS:
            raise ValueError(f"levels: expected 1 to {MOST_LEVELS} of them, got {len(levels)}")
        for level in levels:
            if not isinstance(level, Level):
                raise TypeError(f"levels: expected a tuple of Level, got {checks.shown(level)} in it")
        if not isinstance(self.mapping, Mapping):
            raise TypeError(f"mapping: expected a Mapping, got {checks.shown(self.mapping)}")
        in_channels = _count("in_channels", self.in_channels)
        out_channels = in_channels if self.out_channels is None else _count("out_channels", self.out_channels)
        if out_channels != in_channels:  # a denoiser mixes what comes out with what went in
            raise ValueError(f"out_channels: expected in_channels {in_channels}, got {out_channels}")
        _set(
            self,
            levels=tuple(levels),
            image_size=_two("image_size", self.image_size),
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=_two("patch_size", self.patch_size),
            num_classes=_count("num_classes", self.num_classes, 0),
            mapping_cond_dim=_count("mapping_cond_dim", self.mapping_cond_dim, 0),
        )
        for name in ("sigma_data", "sigma_min", "sigma_max"):
            sigma = checks.number(name, getattr(self, name), at_least=LEAST_SIGMA, at_most=MOST_SIGMA)
            _set(self, **{name: sigma})
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: expected less than sigma_max {self.sigma_max:g}, got {self.sigma_min:g}")
        try:
            self.grids(*self.image_size)
        except ValueError as error:
            raise ValueError(f"image_size, patch_size and levels must fit: {error}") from error
        if self.layers > MOST_LAYERS:
            raise ValueError(f"levels: expected depths of at most {MOST_LAYERS} layers in all, got {self.layers}")
        if self.parameters > MOST_PARAMETERS:
            raise ValueError(f"levels: expected at most {MOST_PARAMETERS:,} parameters in all, got {self.parameters:,}")

    @property
    def layers(self) -> int:
        """Transformer layers and mapping blocks."""
        *outer, middle = (level.depth for level in self.levels)
        return 2 * sum(outer) + middle + self.mapping.depth

    @property
    def parameters(self) -> int:
        """How many numbers a model of it learns, without building one."""
        cond, first = self.mapping.width, self.levels[0].width

        def layer(level: Level) -> int:
            feed_forward = cond * level.width + 3 * level.width * level.d_ff
            if isinstance(level.attention, NoAttention):
                return feed_forward
            heads = level.width // level.attention.head_dim
            return feed_forward + cond * level.width + 4 * level.width**2 + heads

        *outer, middle = self.levels
        layers = sum(2 * level.depth * layer(level) for level in outer) + middle.depth * layer(middle)
        pairs = zip(self.levels[:-1], self.levels[1:], strict=True)
        between = sum(8 * fine.width * coarse.width + 1 for fine, coarse in pairs)  # merge and split
        ends = 2 * self.in_channels * math.prod(self.patch_size) * first + first  # patches in and out, the last norm
        conditions = cond * (2 * cond + self.num_classes + self.mapping_cond_dim)
        mapping = self.mapping.depth * (3 * cond * self.mapping.d_ff + cond) + 2 * cond
        return layers + between + ends + conditions + mapping

    @property
    def null_class(self) -> int | None:
        """The class index that means "no class" (for classifier-free guidance), None for a model without classes."""
        return self.num_classes - 1 if self.num_classes else None

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Tokens (rows, columns) of each level for an image of height x width pixels.

        Raises ValueError if the image doesn't divide into patches and merges, or a window doesn't fit its level's grid.
        """
        # Messages are built only when needed: every forward pass comes by here.
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, torch.SymInt):  # a free size in torch.export
                checks.integer(name, side)
        merges = len(self.levels) - 1
        step_y, step_x = self.patch_size[0] << merges, self.patch_size[1] << merges
        if height % step_y or width % step_x:
            raise ValueError(
                f"image of {height}x{width} pixels must be a multiple of {step_y}x{step_x} "
                f"(patches of {self.patch_size[0]}x{self.patch_size[1]}, then {merges} merges of 2x2 tokens)"
            )
        grids = []
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        for i, level in enumerate(self.levels):
            kind = level.attention
            if isinstance(kind, NeighborhoodAttention) and kind.kernel_size > min(rows, columns):
                raise ValueError(
                    f"kernel_size {kind.kernel_size} of level {i} is larger than its grid of {rows}x{columns} tokens "
                    f"(image of {height}x{width} pixels)"
                )
            if isinstance(kind, ShiftedWindowAttention) and (rows % kind.window_size or columns % kind.window_size):
                raise ValueError(
                    f"window_size {kind.window_size} of level {i} must divide its grid of {rows}x{columns} tokens "
                    f"(image of {height}x{width} pixels)"
                )
            grids.append((rows, columns))
            rows, columns = rows // 2, columns // 2
        return grids

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold and from_dict reads back."""
        names = {kind: name for name, kind in _ATTENTION_TYPES.items()}
        config = {f.name: getattr(self, f.name) for f in fields(self)}
        config["mapping"] = asdict(self.mapping)
        config["levels"] = [
            asdict(level) | {"attention": {"type": names[type(level.attention)]} | asdict(level.attention)}
            for level in self.levels
        ]
        config["image_size"], config["patch_size"] = list(self.image_size), list(self.patch_size)
        return config

    @classmethod
    def from_dict(cls, config: MappingABC[str, Any]) -> HDiTConfig:
        """The inverse of to_dict. Raises ValueError on an unknown, missing or wrong entry."""
        config = _entries(config, cls, "config")
        if "levels" in config:
            levels = config["levels"]
            if not isinstance(levels, (list, tuple)):
                raise ValueError(f"levels: expected a list, got {checks.shown(levels)}")
            if len(levels) > MOST_LEVELS:
                raise ValueError(f"levels: expected 1 to {MOST_LEVELS} of them, got {len(levels)}")
            config["levels"] = tuple(_level_from_dict(level, f"levels[{i}]") for i, level in enumerate(levels))
        if "mapping" in config:
            config["mapping"] = _build(Mapping, _entries(config["mapping"], Mapping, "mapping"), "mapping")
        return _build(cls, config, "config")


def _entries(values: Any, kind: type, where: str) -> dict[str, Any]:
    """values as a dict with the entries of a dataclass, those that it needs among them."""
    if not isinstance(values, MappingABC):
        raise ValueError(f"{where}: expected a dict, got {checks.shown(values)}")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where}: expected some of {', '.join(known)}, got unknown entries {reprlib.repr(unknown)}")
    for name, needed in known.items():
        if needed and name not in values:
            raise ValueError(f"{where}: expected an entry {name}, which is missing")
    return dict(values)


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    """kind(**values), with an error that says where it is."""
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _level_from_dict(level: Any, where: str) -> Level:
    values = _entries(level, Level, where)
    if "attention" in values:
        attention, inside = values["attention"], f"{where}.attention"
        if not isinstance(attention, MappingABC) or "type" not in attention:
            raise ValueError(f"{inside}: expected a dict with a type, got {checks.shown(attention)}")
        kind = _ATTENTION_TYPES[checks.choice(f"{inside}.type", attention["type"], _ATTENTION_TYPES)]
        rest = {name: value for name, value in attention.items() if name != "type"}
        values["attention"] = _build(kind, _entries(rest, kind, inside), inside)
    return _build(Level, values, where)


def _hdit_b4(size: int) -> HDiTConfig:
    """HDiT-B/4 at size x size pixels: the hourglass that the paper's scaling figure sets beside DiT-B/4.

    The paper says in one sentence that a neighborhood level is added for each doubling of the resolution; that it goes
    in front, 384 wide and 2 deep, is our reading. At 128 pixels it is the paper's ImageNet-128 model.
    """
    doublings = (size // 128).bit_length() - 1
    return HDiTConfig(
        levels=(
            *(Level(2, 384, attention=NeighborhoodAttention()) for _ in range(1 + doublings)),
            Level(11, 768, attention=GlobalAttention()),
        ),
        mapping=Mapping(depth=1, width=768),
        image_size=(size, size),
        num_classes=1001,
    )


presets: dict[str, HDiTConfig] = {
    "imagenet-128": _hdit_b4(128),
    "imagenet-256": HDiTConfig(
        levels=(
            Level(2, 384, attention=NeighborhoodAttention()),
            Level(2, 768, attention=NeighborhoodAttention()),
            Level(16, 1536, attention=GlobalAttention()),
        ),
        num_classes=1001,
    ),
    "ffhq-1024": HDiTConfig(
        levels=(
            Level(2, 128, attention=NeighborhoodAttention()),
            Level(2, 256, attention=NeighborhoodAttention()),
            Level(2, 384, attention=NeighborhoodAttention()),
            Level(2, 768, attention=GlobalAttention()),
            Level(2, 1024, attention=GlobalAttention()),
        ),
        image_size=(1024, 1024),
    ),
    "flowers-256": HDiTConfig(
        levels=(
            Level(2, 128, attention=NeighborhoodAttention()),
            Level(2, 256, attention=NeighborhoodAttention()),
            Level(4, 512, attention=GlobalAttention(), dropout=0.1),
        ),
    ),
    **{f"hdit-b4-{size}": _hdit_b4(size) for size in (128, 256, 512, 1024, 2048, 4096)},
}
"""The models of the paper (arXiv 2401.11605), k-diffusion's Oxford Flowers model and the HDiT-B/4 family (_hdit_b4)."""
