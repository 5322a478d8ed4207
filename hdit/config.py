"""What an HDiT is made of: one frozen dataclass per part, and the published models as presets.

The hourglass of Crowson et al. 2024 (HDiT, arXiv 2401.11605, section 4): every level but the last is run twice, on the
way down and on the way up, with a 2x2 token merge below it and a token split above; the last level is the middle.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_count(name: str, value: object, minimum: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _check(ok, f"{name} must be an integer >= {minimum}, got {value!r}")


def _check_head_dim(head_dim: int) -> None:
    _check_count("head_dim", head_dim)
    _check(head_dim % 8 == 0, f"head_dim must be a multiple of 8 (head_dim/8 rotary angles an axis), got {head_dim}")


def _check_dropout(dropout: float) -> None:
    _check(0.0 <= dropout < 1.0, f"dropout must be in [0, 1), got {dropout!r}")


def _check_pair(name: str, value: tuple[int, int]) -> None:
    _check(len(value) == 2, f"{name} must be (height, width), got {value!r}")
    for side in value:
        _check_count(name, side)


@dataclass(frozen=True)
class GlobalAttention:
    """Every token attends to every token. head_dim: width of one head, a multiple of 8."""

    head_dim: int = 64

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)


@dataclass(frozen=True)
class NeighborhoodAttention:
    """Every token attends to the kernel_size x kernel_size tokens around it (Hassani et al. 2023, arXiv 2204.07143)."""

    head_dim: int = 64
    kernel_size: int = 7

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_count("kernel_size", self.kernel_size)


@dataclass(frozen=True)
class ShiftedWindowAttention:
    """Attention inside square windows, which odd layers shift by half (Liu et al. 2021, arXiv 2103.14030).

    window_size: rows and columns of a window; it must divide the grid.
    """

    head_dim: int = 64
    window_size: int = 8

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_count("window_size", self.window_size)


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
        _check_count("depth", self.depth, minimum=0)
        _check_count("width", self.width)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 3 * self.width)
        _check_count("d_ff", self.d_ff)
        _check_dropout(self.dropout)
        kinds = tuple(_ATTENTION_TYPES.values())
        names = [kind.__name__ for kind in kinds]
        _check(isinstance(self.attention, kinds), f"attention must be one of {names}, got {self.attention!r}")
        head_dim = getattr(self.attention, "head_dim", 1)
        _check(self.width % head_dim == 0, f"width {self.width} must be a multiple of head_dim {head_dim}")


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
        _check_count("mapping depth", self.depth, minimum=0)
        _check_count("mapping width", self.width)
        _check(self.width % 2 == 0, f"mapping width must be even, got {self.width}")
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 3 * self.width)
        _check_count("mapping d_ff", self.d_ff)
        _check_dropout(self.dropout)


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
        for name in ("levels", "image_size", "patch_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        _check(len(self.levels) > 0, "levels must hold at least one Level")
        _check_pair("image_size", self.image_size)
        _check_pair("patch_size", self.patch_size)
        _check_count("in_channels", self.in_channels)
        _check_count("out_channels", self.out_channels)
        _check_count("num_classes", self.num_classes, minimum=0)
        _check_count("mapping_cond_dim", self.mapping_cond_dim, minimum=0)
        _check(self.sigma_data > 0, f"sigma_data must be positive, got {self.sigma_data!r}")
        sigmas = f"sigma_min {self.sigma_min!r} and sigma_max {self.sigma_max!r}"
        _check(0 < self.sigma_min < self.sigma_max, f"0 < sigma_min < sigma_max must hold, got {sigmas}")
        self.grids(*self.image_size)

    @property
    def null_class(self) -> int | None:
        """The class index that means "no class" (for classifier-free guidance), None for a model without classes."""
        return self.num_classes - 1 if self.num_classes else None

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Tokens (rows, columns) of each level for an image of height x width pixels.

        Raises ValueError if the image doesn't divide into patches and merges, or a window doesn't fit its level's grid.
        """
        # Messages are built only when needed: every forward pass comes by here.
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
        """The inverse of to_dict. Raises ValueError on an unknown, missing or badly typed entry."""
        config = dict(config)
        if "levels" in config:
            _check(isinstance(config["levels"], (list, tuple)), f"levels must be a list, got {config['levels']!r}")
            levels = [_level_from_dict(level, f"levels[{i}]") for i, level in enumerate(config["levels"])]
            config["levels"] = tuple(levels)
        if "mapping" in config:
            config["mapping"] = _build(Mapping, config["mapping"], "mapping")
        return _build(cls, config, "config")


def _build(kind: type, values: Any, where: str) -> Any:
    """kind(**values), with an error that says where an unknown or missing entry is."""
    _check(isinstance(values, MappingABC), f"{where} must be a dict, got {values!r}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    _check(not unknown, f"{where} has unknown entries {unknown}, expected some of {sorted(known)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _level_from_dict(values: Any, where: str) -> Level:
    _check(isinstance(values, MappingABC), f"{where} must be a dict, got {values!r}")
    values = dict(values)
    if "attention" in values:
        attention = values["attention"]
        known = isinstance(attention, MappingABC) and attention.get("type") in _ATTENTION_TYPES
        _check(known, f"{where}.attention must be a dict with type one of {list(_ATTENTION_TYPES)}, got {attention!r}")
        attention = dict(attention)
        values["attention"] = _build(_ATTENTION_TYPES[attention.pop("type")], attention, f"{where}.attention")
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
