from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hdit import (
    GlobalAttention,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
    presets,
)


def test_defaults() -> None:
    config = HDiTConfig(levels=(Level(2, 128), Level(4, 256, attention=GlobalAttention())))
    assert config.levels[0] == Level(2, 128, d_ff=384, attention=NeighborhoodAttention(64, 7), dropout=0.0)
    assert config.mapping == Mapping(depth=2, width=256, d_ff=768)
    assert (config.image_size, config.patch_size, config.in_channels, config.out_channels) == ((256, 256), (4, 4), 3, 3)
    assert (config.num_classes, config.null_class, config.mapping_cond_dim) == (0, None, 0)
    assert dataclasses.replace(config, num_classes=11).null_class == 10


@pytest.mark.parametrize("name", presets)
def test_presets_survive_json(name: str) -> None:
    config = presets[name]
    assert HDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(HDiTConfig.from_dict(config.to_dict()))


def test_every_kind_of_attention_survives_json() -> None:
    kinds = (ShiftedWindowAttention(32, 4), NoAttention(), NeighborhoodAttention(16, 3), GlobalAttention(8))
    config = HDiTConfig(
        levels=tuple(Level(1, 32, attention=kind, dropout=0.1) for kind in kinds),
        mapping=Mapping(1, 32, dropout=0.2),
        image_size=(64, 96),
        in_channels=1,
        out_channels=2,
        patch_size=(2, 4),
        num_classes=3,
        mapping_cond_dim=5,
        sigma_data=0.7,
        sigma_min=0.02,
        sigma_max=80.0,
    )
    assert HDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_grids() -> None:
    kinds = (NeighborhoodAttention(), ShiftedWindowAttention(64, 4), GlobalAttention())
    config = HDiTConfig(
        levels=tuple(Level(1, 64, attention=kind) for kind in kinds),
        image_size=(64, 96),
        patch_size=(2, 4),
    )
    assert config.grids(64, 96) == [(32, 24), (16, 12), (8, 6)]
    assert config.grids(32, 64) == [(16, 16), (8, 8), (4, 4)]


LEVELS = (Level(1, 64), Level(1, 64, attention=GlobalAttention()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(1, 100), "width 100 must be a multiple of head_dim 64"),
        (lambda: Level(-1, 64), "depth must be an integer >= 0, got -1"),
        (lambda: Level(1, 64.0), "width must be an integer >= 1, got 64.0"),
        (lambda: Level(1, 64, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: Level(1, 64, attention="global"), "attention must be one of .*GlobalAttention.*, got 'global'"),
        (lambda: NeighborhoodAttention(12), "head_dim must be a multiple of 8 .*, got 12"),
        (lambda: NeighborhoodAttention(64, 0), "kernel_size must be an integer >= 1, got 0"),
        (lambda: ShiftedWindowAttention(64, True), "window_size must be an integer >= 1, got True"),
        (lambda: Mapping(1, 33), "mapping width must be even, got 33"),
        (lambda: HDiTConfig(()), "levels must hold at least one Level"),
        (lambda: HDiTConfig(LEVELS, image_size=(256,)), r"image_size must be \(height, width\), got \(256,\)"),
        (lambda: HDiTConfig(LEVELS, num_classes=-1), "num_classes must be an integer >= 0, got -1"),
        (lambda: HDiTConfig(LEVELS, sigma_min=2.0, sigma_max=1.0), "sigma_min 2.0 and sigma_max 1.0"),
        (lambda: HDiTConfig(LEVELS, sigma_data=0.0), "sigma_data must be positive, got 0.0"),
        (
            lambda: HDiTConfig(LEVELS, image_size=(260, 256)),
            "260x256 pixels must be a multiple of 8x8 .*4x4, then 1 merge",
        ),
        (lambda: HDiTConfig(LEVELS, image_size=(64, 16)), "kernel_size 7 of level 0 is larger than its grid of 16x4"),
        (
            lambda: HDiTConfig((Level(1, 64, attention=ShiftedWindowAttention(64, 8)),), image_size=(32, 48)),
            "window_size 8 of level 0 must divide its grid of 8x12 tokens",
        ),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [1]}, r"config has unknown entries \['widths'\]"),
        ({"levels": [{"depth": 1, "width": 64, "heads": 2}]}, r"levels\[0\] has unknown entries \['heads'\]"),
        ({"levels": [{"depth": 1}]}, r"levels\[0\]: .*missing.*'width'"),
        ({"levels": [{"depth": 1, "width": 60}]}, r"levels\[0\]: width 60 must be a multiple of head_dim 64"),
        (
            {"levels": [{"depth": 1, "width": 64, "attention": {"type": "local"}}]},
            r"levels\[0\].attention .* .*'local'",
        ),
        (
            {"levels": [{"depth": 1, "width": 64, "attention": {"type": "global", "kernel_size": 7}}]},
            r"levels\[0\].attention has unknown entries \['kernel_size'\]",
        ),
        ({"levels": 3}, "levels must be a list, got 3"),
        ({"mapping": [1, 2]}, r"mapping must be a dict, got \[1, 2\]"),
        ({"patch_size": 4}, "config: "),
    ],
)
def test_from_dict_is_strict(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDiTConfig.from_dict(presets["flowers-256"].to_dict() | change)


def test_from_dict_needs_levels() -> None:
    with pytest.raises(ValueError, match="missing.*'levels'"):
        HDiTConfig.from_dict({})
