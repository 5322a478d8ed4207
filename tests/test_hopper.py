"""How Hopper's neighborhood attention is cut into programs. Its kernels run on a GPU only: test_gpu_operators.py."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the launchers need Triton: install the extra [test] on Linux")

from hdit_kernels.neighborhood_attention import hopper  # noqa: E402 (imports triton)


def window_start(query: int, window: int, length: int) -> int:
    return min(max(query - window // 2, 0), length - window)


@pytest.mark.parametrize("window", range(1, hopper.WIDEST + 1))
def test_every_row_is_in_one_tile_and_every_key_in_its_slots(window: int) -> None:
    """What hopper_forward.strip_of_program computes, for all heights and lengths of strips."""
    boxes = hopper.rows_of_next(window)
    for height, tiles in itertools.product(range(window, 70), (1, 2, 3, 4, 8)):
        strips = -(-(height // hopper.TILE) // tiles) + (height % hopper.TILE > 0)
        rows = []
        for strip in range(strips):
            tile = strip * tiles
            count = min(tiles, height // hopper.TILE - tile)
            if count <= 0:
                tile, count = height // hopper.TILE, 1
            first = tile * hopper.TILE
            key_y = min(first - window // 2, height - window)
            for y in range(first, first + count * hopper.TILE, hopper.TILE):
                queries = range(y, min(y + hopper.TILE, height))
                rows += queries
                # the tile's own slot of eight rows, and the boxes of the next
                low, high = key_y + (y - first), key_y + (y - first) + hopper.TILE + sum(boxes.values())
                for query in queries:
                    start = window_start(query, window, height)
                    assert low <= start and start + window <= high, (height, tiles, query)
        assert rows == list(range(height)), (height, tiles)


def test_columns_fit_into_a_row_of_keys() -> None:
    for window, width in itertools.product(range(1, hopper.WIDEST + 1), range(9, 60)):
        for x in range(0, width, hopper.TILE):
            last = min(x + hopper.TILE, width) - 1
            assert window_start(last, window, width) + window - window_start(x, window, width) <= 16


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((4, 256, 256, 2), 3),
        ((32, 32, 32, 12), 4),  # columns of four tiles
        ((1, 256, 256, 2), 8),  # 256 programs, all in flight at once
        ((1, 64, 64, 2), 3),  # too few of eight tiles to fill the GPU
        ((1, 5, 9, 1), 3),
    ],
)
def test_tiles_of_a_strip(shape: tuple[int, int, int, int], tiles: int) -> None:
    assert hopper.tiles_of_a_strip(*shape) == tiles


def test_programs_of_a_grid() -> None:
    programs, cut = hopper.strips(2, 37, 29, 3)  # four whole tiles down in one strip, five rows left in another
    assert cut == {"tiles": 4, "strips": 2, "tiles_x": 4}
    assert programs == 2 * 3 * 2 * 4


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, True),
        ({"window": (9, 3)}, True),
        ({"window": (10, 3)}, False),
        ({"dilation": (1, 2)}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 32}, True),
        ({"head_dim": 128}, False),
        ({"offset": 4}, False),  # 8 bytes off
        ({"gap": 4}, False),
        ({"gap": 8}, True),
    ],
    ids=str,
)
def test_takes(change: dict, takes: bool) -> None:
    settings = {"window": (7, 7), "dilation": (1, 1), "dtype": torch.bfloat16, "head_dim": 64, "offset": 0, "gap": 0}
    settings |= change
    dim = settings["head_dim"]
    storage = torch.zeros(settings["offset"] + 9 * 9 * 2 * (dim + settings["gap"]), dtype=settings["dtype"])
    grid = storage[settings["offset"] :].view(1, 9, 9, 2, -1)[..., :dim]
    assert hopper.takes(grid, grid, grid, settings["window"], settings["dilation"]) is takes


def test_offsets_of_a_strip_stay_within_32_bits() -> None:
    wide = torch.empty(1, 16, 2**20, 2, 64, dtype=torch.bfloat16, device="meta")
    assert not hopper.takes(wide, wide, wide, (7, 7), (1, 1))


def test_other_versions_of_triton_take_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = torch.zeros(1, 9, 9, 2, 64, dtype=torch.bfloat16)
    for version, known in (("3.5.1", False), ("3.6.0", True), ("3.7.1", True), ("3.60.0", False)):
        monkeypatch.setattr("triton.__version__", version)
        hopper.gluon_known.cache_clear()
        assert hopper.takes(grid, grid, grid, (7, 7), (1, 1)) is known
    hopper.gluon_known.cache_clear()
