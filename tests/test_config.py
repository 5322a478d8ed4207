from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from hdit import (
    GlobalAttention,
    HDiT,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
    presets,
)
from hdit._memory import require_memory
from hdit.model import MappingBlock, TransformerLayer
from tests.tiny import CONFIG, random_model


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
        in_channels=2,
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
        (lambda: Level(1, 100), "width: expected a multiple of head_dim 64, got 100"),
        (lambda: Level(-1, 64), "depth: expected an integer of at least 0, got -1"),
        (lambda: Level(1, 64.0), "width: expected an integer of at least 1, got 64.0"),
        (lambda: Level(1, 64, dropout=1.0), "dropout: expected a number of at least 0 and below 1, got 1.0"),
        (lambda: Level(1, 64, attention="global"), "attention: expected one of .*GlobalAttention.*, got 'global'"),
        (lambda: NeighborhoodAttention(12), "head_dim: expected a multiple of 8, got 12"),
        (lambda: NeighborhoodAttention(64, 0), "kernel_size: expected an integer of at least 1, got 0"),
        (lambda: ShiftedWindowAttention(64, True), "window_size: expected an integer of at least 1, got True"),
        (lambda: Mapping(1, 33), "width: expected an even number, got 33"),
        (lambda: HDiTConfig(()), "levels: expected 1 to 32 of them, got 0"),
        (lambda: HDiTConfig(LEVELS, image_size=(256,)), r"image_size: expected .*\(rows, columns\), got \(256,\)"),
        (lambda: HDiTConfig(LEVELS, num_classes=-1), "num_classes: expected an integer of at least 0, got -1"),
        (lambda: HDiTConfig(LEVELS, sigma_min=2.0, sigma_max=1.0), "sigma_min: expected less than sigma_max 1, got 2"),
        (lambda: HDiTConfig(LEVELS, sigma_data=0.0), "sigma_data: expected a number of at least 1e-09 .*, got 0.0"),
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
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [1]}, r"config: expected some of levels, .*, got unknown entries \['widths'\]"),
        (
            {"levels": [{"depth": 1, "width": 64, "heads": 2}]},
            r"levels\[0\]: expected some of .*, got unknown entries \['heads'\]",
        ),
        ({"levels": [{"depth": 1}]}, r"levels\[0\]: expected an entry width, which is missing"),
        ({"levels": [{"depth": 1, "width": 60}]}, r"levels\[0\]: width: expected a multiple of head_dim 64, got 60"),
        (
            {"levels": [{"depth": 1, "width": 64, "attention": {"type": "local"}}]},
            r"levels\[0\].attention.type: expected one of global, .*, got 'local'",
        ),
        (
            {"levels": [{"depth": 1, "width": 64, "attention": {"type": "global", "kernel_size": 7}}]},
            r"levels\[0\].attention: expected some of head_dim, got unknown entries \['kernel_size'\]",
        ),
        ({"levels": 3}, "levels: expected a list, got 3"),
        ({"mapping": [1, 2]}, r"mapping: expected a dict, got \[1, 2\]"),
        ({"patch_size": 4}, r"config: patch_size: expected \(height, width\), got 4"),
    ],
)
def test_from_dict_is_strict(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDiTConfig.from_dict(presets["flowers-256"].to_dict() | change)


def test_from_dict_needs_levels() -> None:
    with pytest.raises(ValueError, match="levels, which is missing"):
        HDiTConfig.from_dict({})


@pytest.mark.parametrize("name", ["flowers-256", "ffhq-1024"])
def test_parameters_are_counted(name: str) -> None:
    kinds = (NoAttention(), ShiftedWindowAttention(8, 2), GlobalAttention(8))
    levels = tuple(Level(i + 1, 32, d_ff=50 + i, attention=kind) for i, kind in enumerate(kinds))
    odd = HDiTConfig(levels, Mapping(3, 18, 7), (48, 64), 2, patch_size=(2, 4), num_classes=5, mapping_cond_dim=7)
    for config in (presets[name], odd):
        with torch.device("meta"):
            model = HDiT(config)
        assert config.parameters == sum(parameter.numel() for parameter in model.parameters())
        layers = [module for module in model.modules() if isinstance(module, (TransformerLayer, MappingBlock))]
        assert config.layers == len(layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(1, 80_000_000), "width: expected an integer of at most 16777216, got 80000000"),
        (lambda: Level(10**30, 64), "depth: expected an integer of at most .*, got one of 100 bits"),
        (
            lambda: HDiTConfig((Level(10**7, 64),)),
            "levels: expected depths of at most 1024 layers in all, got 10000002",
        ),
        (lambda: HDiTConfig(LEVELS, Mapping(10**7)), "at most 1024 layers in all"),
        (lambda: HDiTConfig(LEVELS * 10**6), "levels: expected 1 to 32 of them, got 2000000"),
        (lambda: HDiTConfig((Level(1, 2**20),)), "expected at most 1,099,511,627,776 parameters in all, got 14,294,"),
        (lambda: HDiTConfig(LEVELS, Mapping(1, 2**21)), "parameters in all"),
        (lambda: HDiTConfig(LEVELS, in_channels=3, out_channels=1), "out_channels: expected in_channels 3, got 1"),
        (lambda: HDiTConfig(LEVELS, sigma_max=float("inf")), "sigma_max: expected a number .*, got inf"),
        (lambda: HDiTConfig(LEVELS, sigma_data=float("nan")), "sigma_data: expected a number .*, got nan"),
        (lambda: HDiTConfig(LEVELS, sigma_max=1e300), "sigma_max: expected a number .* at most 1e\\+09, got 1e\\+300"),
        (lambda: HDiTConfig(LEVELS, sigma_min=True), "sigma_min: expected a number .*, got True"),
        (lambda: HDiTConfig(LEVELS, image_size=8), r"image_size: expected \(height, width\), got 8"),
        (lambda: HDiTConfig(LEVELS, patch_size=(4.0, 4)), "patch_size: expected an integer .*, got 4.0"),
        (lambda: HDiTConfig("ab"), "levels: expected a tuple of Level, got 'ab'"),
        (lambda: HDiTConfig((LEVELS[0], None)), "levels: expected a tuple of Level, got None"),
        (lambda: HDiTConfig(LEVELS, mapping={}), "mapping: expected a Mapping, got {}"),
        (lambda: HDiTConfig(LEVELS).grids(8.0, 8), "height: expected an integer of at least 1, got 8.0"),
        (lambda: HDiTConfig(LEVELS).grids(8, 0), "width: expected an integer of at least 1, got 0"),
        (lambda: Level(1, 64, dropout="a"), "dropout: expected a number .*, got 'a'"),
        (lambda: HDiTConfig.from_dict([1]), r"config: expected a dict, got \[1\]"),
        (lambda: HDiTConfig.from_dict({"levels": [{}] * 10**6}), "levels: expected 1 to 32 of them, got 1000000"),
        (lambda: HDiTConfig.from_dict({"levels": [{1: 2}]}), r"levels\[0\]: expected some of .* unknown entries \[1\]"),
    ],
)
def test_each_error_names_its_field(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_numpy_integers_are_taken() -> None:
    level = Level(np.int64(1), np.int32(64), attention=NeighborhoodAttention(np.int64(32), np.int64(3)))
    config = HDiTConfig((level,), image_size=(np.int64(16), 16), num_classes=np.uint8(3), sigma_max=np.float32(80))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config == HDiTConfig.from_dict(config.to_dict())


def test_memory_for_a_model_and_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    config = HDiTConfig((Level(1, 2**18),))  # 16 TiB
    with pytest.raises(ValueError, match="^it: expected what .* GiB of memory can hold, got 893,"):
        require_memory("it", config, cpu, 1, training=True)
    huge = HDiTConfig((Level(1, 64),), image_size=(2**20, 2**20))  # no parameter more, but an image of 12 TiB
    with pytest.raises(ValueError, match="1 images of 1048576 x 1048576 pixels at a time"):
        require_memory("it", huge, cpu, 1, training=False)
    require_memory("it", presets["flowers-256"], cpu, 1, training=True)

    config = HDiTConfig((Level(1, 64),), image_size=(64, 64), in_channels=1)
    pixels, tokens = 64 * 64, 16 * 16
    for training, copies, activations in ((False, 1, 64 * tokens), (True, 5, (64 + 6 * 64 + 3 * 192) * tokens)):
        need = 4 * (copies * config.parameters + 3 * (pixels + activations))
        monkeypatch.setattr("hdit._memory.memory", lambda device, need=need: need)
        require_memory("it", config, cpu, 3, training)
        with pytest.raises(ValueError, match="^it: expected"):
            require_memory("it", config, cpu, 4, training)


def test_memory_for_training_is_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Beside the tensors that autograd keeps, each counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model, images = random_model(), 5
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(images, 1, 8, 8), torch.ones(images), class_cond=torch.zeros(images, dtype=torch.int64))
    assert out.grad_fn is not None  # which holds them
    taken = sum(size for address, size in kept.items() if address not in parameters)
    needs: list[float] = []
    monkeypatch.setattr("hdit._memory.memory", lambda device: needs[0])
    for share, fits in ((1.0, True), (0.5, False)):
        needs[:] = [20 * CONFIG.parameters + share * taken]
        with nullcontext() if fits else pytest.raises(ValueError, match="^it: expected what"):
            require_memory("it", CONFIG, torch.device("cpu"), images, training=True)
