"""How Hopper's neighborhood attention is cut into programs. Its kernels run on a GPU only: test_gpu_operators.py."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the launchers need Triton: install the extra [test] on Linux")

from hdit_kernels.neighborhood_attention import hopper_backward, hopper_plan  # noqa: E402 (imports triton)

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdit_kernels.launch.multiprocessors", lambda device: 132)


def window_start(query: int, window: int, length: int) -> int:
    return min(max(query - window // 2, 0), length - window)


@pytest.mark.parametrize("window", range(1, hopper_plan.WIDEST + 1))
def test_every_row_is_in_one_tile_and_every_key_in_its_slots(window: int) -> None:
    """What hopper_device.strip_of_program makes of a plan, for all heights and ways to cut."""
    blocks = hopper_plan.rows_of_next(window)
    # columns: too many for one wave of strips, a wave of two strips each, so few that every tile has a place
    for height, columns in itertools.product(range(window, 300), (1000, 132, 6)):
        shape = (1, height, 8 * columns, 1, 64)
        (_, programs, _), integers, _ = hopper_plan.plan_strips(shape, (), (window, window), DEVICE, (2,))
        strips, shortest, longer, serpentine = integers[3:7]
        assert serpentine == (columns < 1000 and height >= hopper_plan.TILE and window % 2)
        rows = []
        for strip in range(programs):
            tile = strip * shortest + min(strip, longer)
            count = 1 if strip == strips else shortest + (strip < longer)
            first = tile * hopper_plan.TILE
            if up := serpentine and strip % 2 and strip < strips:
                first = height - first - count * hopper_plan.TILE  # rows from below, as the kernel counts them
            key_y = min(first - window // 2, height - window)
            for y in range(first, first + count * hopper_plan.TILE, hopper_plan.TILE):
                queries = range(y, min(y + hopper_plan.TILE, height))
                rows += [height - 1 - query for query in queries] if up else queries
                # the tile's own slot of eight rows, and the blocks of the next
                low, high = key_y + (y - first), key_y + (y - first) + hopper_plan.TILE + sum(blocks.values())
                for query in queries:
                    start = window_start(query, window, height)
                    assert low <= start and start + window <= high, (height, query)
            reach = hopper_plan.LONGEST + 2 if columns < 1000 else hopper_plan.MIN_REACH  # what 32-bit offsets rely on
            assert high - first <= reach * hopper_plan.TILE
        assert sorted(rows) == list(range(height)), height


def test_columns_fit_into_a_row_of_keys() -> None:
    for window, width in itertools.product(range(1, hopper_plan.WIDEST + 1), range(9, 60)):
        for x in range(0, width, hopper_plan.TILE):
            last = min(x + hopper_plan.TILE, width) - 1
            assert window_start(last, window, width) + window - window_start(x, window, width) <= 16


@pytest.mark.parametrize(
    ("shape", "programs", "strips"),
    [
        ((4, 256, 256, 2), (2,), (1, True)),  # 256 programs of 32 tiles, all in flight at once
        ((4, 264, 256, 2), (2,), (11, False)),  # as many would be longer than the longest
        ((1, 256, 256, 2), (2,), (4, True)),  # 256 programs of eight tiles
        ((1, 256, 256, 2), (2, 3), (4, True)),
        ((1, 256, 256, 2), (3,), (6, True)),
        ((1, 256, 256, 4), (2, 3), (2, True)),
        ((1, 256, 256, 3), (2, 3), (4, True)),  # two a multiprocessor would leave a quarter of the places empty
        ((1, 512, 512, 2), (2,), (2, True)),
        ((1, 1024, 1024, 2), (2, 3), (43, False)),
        ((32, 32, 32, 12), (2, 3), (1, False)),  # columns of four tiles
        ((8, 64, 64, 6), (2,), (3, False)),  # more columns than places
        ((8, 64, 64, 6), (2, 3), (1, True)),
        ((1, 64, 64, 2), (2, 3), (8, True)),  # a place for every tile
        ((1, 128, 128, 2), (2, 3), (8, True)),
        ((1, 56, 320, 1), (2,), (4, True)),  # the places for six would not make them shorter than two tiles
        ((1, 128, 296, 1), (2,), (6, True)),  # those for seven not shorter than three
        ((4, 128, 128, 8), (2,), (5, False)),
        ((1, 8, 9, 1), (2,), (1, True)),
        ((1, 5, 9, 1), (2,), (0, False)),
        ((1, 16, 8 * 300, 1), (2,), (1, False)),
    ],
)
def test_strips_down(shape: tuple[int, int, int, int], programs: tuple[int, ...], strips: tuple[int, bool]) -> None:
    batch, height, width, heads = shape
    columns, tiles = batch * heads * -(-width // hopper_plan.TILE), height // hopper_plan.TILE
    assert hopper_plan.strips_down(columns, tiles, 3, hopper_plan.LONGEST, 132, programs) == strips


@pytest.mark.parametrize(
    ("shape", "strips"),
    [
        ((1, 256, 256, 2), (4, True)),  # eight tiles each
        ((4, 128, 128, 4), (4, False)),  # one wave has strips of 16
        ((1, 64, 64, 2), (8, True)),  # a place for every tile
        ((1, 120, 256, 2), (4, True)),
    ],
)
def test_length_and_longest_strip(shape: tuple[int, int, int, int], strips: tuple[int, bool]) -> None:
    """Where one wave has longer ones, strips have about `length` tiles."""
    batch, height, width, heads = shape
    columns, tiles = batch * heads * -(-width // hopper_plan.TILE), height // hopper_plan.TILE
    assert hopper_plan.strips_down(columns, tiles, 4, 8, 132, (2,)) == strips


@pytest.mark.parametrize(("head_dim", "window", "strips"), [(64, 7, 11), (64, 9, 1), (32, 7, 11), (32, 9, 1)])
def test_strips_of_dq(head_dim: int, window: int, strips: int) -> None:
    """Long ones at windows 8 and 9 only."""
    q = torch.empty(4, 256, 256, 2, head_dim, dtype=torch.bfloat16, device="meta")
    stats = torch.empty(1, 4, 256, 256, 2, device="meta")
    dq, _ = hopper_backward.backward_launches(q, q, q, q, q, q, q, None, q, stats, (window, window), 0.125, 0.18)
    assert dq.grid[1] == strips


def test_one_wave_counts_the_gpu_s_multiprocessors() -> None:
    assert hopper_plan.strips_down(256, 32, 3, 32, 114, (2,)) == (
        11,
        False,
    )  # an H100 PCIe has no place for 256 at once


def test_long_strips_stay_within_reach() -> None:
    """Of rows of 7 Mi elements, 36 tiles are less than 2**31, enough for strips of 32; of 8 Mi, 31 are."""
    shape, stride = (4, 256, 256, 2, 64), (2**31, 2**23, 128, 64, 1)
    assert hopper_plan.plan_strips(shape, ((0, 7 * 2**20, 128, 64, 1),), (7, 7), DEVICE, (2,))[1][3] == 1
    assert hopper_plan.within_reach(shape, (stride,))
    assert hopper_plan.plan_strips(shape, (stride,), (7, 7), DEVICE, (2,))[1][3] == 11


@pytest.mark.parametrize("reach", range(hopper_plan.MIN_REACH, 37))
def test_no_offset_overflows(reach: int) -> None:
    """Columns may be as far apart as rows: the furthest key that a strip reads is 18 rows beyond its tiles."""
    row = (2**31 - 1) // (hopper_plan.TILE * reach) // 8 * 8
    stride = (0, row, row, 128, 1)
    assert hopper_plan.tiles_in_reach((1, 8, 8, 1, 128), (stride,)) == reach
    longest = 0
    for tiles in range(3, 81):
        shape = (1, tiles * hopper_plan.TILE, 8 * 132, 1, 128)  # two strips are one wave
        assert hopper_plan.within_reach(shape, (stride,))
        _, integers, _ = hopper_plan.plan_strips(shape, (stride,), (9, 9), DEVICE, (2,))
        longest = max(longest, integers[4] + (integers[5] > 0))
    assert longest == min(32, reach - 3)
    assert (hopper_plan.TILE * longest + 18) * row + 128 < 2**31


def test_plan() -> None:
    """Four whole tiles down, a strip each; five rows left in another."""
    stride = (2**20, 29 * 96, 96, 32, 1)
    grid, integers, constants = hopper_plan.plan_strips((2, 37, 29, 3, 32), (stride, stride), (7, 5), DEVICE, (2,))
    assert grid == (3 * 4, 5, 2)
    assert integers == [37, 29, 3, 4, 1, 0, 1, 7, 5] + 2 * [2**17, 29 * 12, 12, 4]
    assert constants == {"D": 32, "num_warps": 4, "MORE": 4, "LAST": 2}
    assert hopper_plan.plan_strips((2, 37, 29, 3, 32), (stride,), (13, 5), DEVICE)[1:] == (
        [37, 29, 3, 4, 1, 0, 13, 5, 2**17, 29 * 12, 12, 4],  # no `serpentine` of kernels that don't walk
        {"D": 32, "num_warps": 4},
    )


def test_strips_that_run_at_once_are_walked_down_and_up() -> None:
    shape = (1, 256, 256, 2, 64)
    for window, serpentine in (((7, 7), 1), ((8, 7), 0), ((7, 8), 1)):
        assert hopper_plan.plan_strips(shape, (), window, DEVICE, (2, 3))[1][3:7] == [4, 8, 0, serpentine]
    assert hopper_plan.plan_strips((1, 1024, 1024, 2, 64), (), (7, 7), DEVICE, (2, 3))[1][6] == 0


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, "forward backward"),
        ({"window": (9, 3)}, "forward backward"),
        ({"window": (10, 3)}, "backward_wide"),
        ({"window": (3, 13)}, "backward_wide"),
        ({"window": (14, 3)}, ""),
        ({"window": (3, 3), "dilation": (1, 2)}, ""),
        ({"dtype": torch.float32}, ""),
        ({"head_dim": 32}, "forward backward"),
        ({"head_dim": 128}, "forward"),
        ({"head_dim": 128, "window": (11, 11)}, ""),
        ({"head_dim": 96}, ""),
        ({"offset": 4}, ""),  # 8 bytes off
        ({"gap": 4}, ""),
        ({"gap": 8}, "forward backward"),
    ],
    ids=str,
)
def test_takes(change: dict, takes: str) -> None:
    settings = {"window": (7, 7), "dilation": (1, 1), "dtype": torch.bfloat16, "head_dim": 64, "offset": 0, "gap": 0}
    settings |= change
    dim = settings["head_dim"]
    storage = torch.zeros(settings["offset"] + 14 * 14 * 2 * (dim + settings["gap"]), dtype=settings["dtype"])
    grid = storage[settings["offset"] :].view(1, 14, 14, 2, -1)[..., :dim]
    found = []
    for kernel in ("FORWARD", "BACKWARD", "BACKWARD_WIDE"):
        tensors = (grid,) * (4 if kernel == "BACKWARD_WIDE" else 3)
        if hopper_plan.takes(getattr(hopper_plan, kernel), tensors, settings["window"], settings["dilation"]):
            found.append(kernel.lower())
    assert " ".join(found) == takes


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 1, 3, 4)], ids=str)  # the written rows are as long anyway
def test_offsets_of_a_strip_stay_within_32_bits(order: tuple[int, ...]) -> None:
    shape = (1, 2**20, 16, 2, 64) if order[1] == 2 else (1, 16, 2**20, 2, 64)
    wide = torch.empty(shape, dtype=torch.bfloat16, device="meta").permute(order)
    assert not hopper_plan.within_reach(wide.shape, (wide.stride(),))
    short = wide[:, :, :1000].contiguous()
    assert hopper_plan.within_reach(short.shape, (short.stride(),))
    assert not hopper_plan.within_reach(short.shape, (short.stride(), (2**31, 2**28, 128, 64, 1)))  # any of the tensors


def test_axes_of_the_grid_have_an_end() -> None:
    stride = (64 * 64, 64, 64, 64, 1)
    for batch, height, takes in ((65535, 8, True), (65536, 8, False), (1, 8 * 65534 + 7, True), (1, 8 * 65535, False)):
        assert hopper_plan.within_reach((batch, height, 8, 1, 64), (stride,)) is takes


def test_other_versions_of_triton_take_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = torch.zeros(1, 9, 9, 2, 64, dtype=torch.bfloat16)
    for version, known in (("3.5.1", False), ("3.6.0", True), ("3.7.1", True), ("3.60.0", False)):
        monkeypatch.setattr("triton.__version__", version)
        hopper_plan.gluon_known.cache_clear()
        assert hopper_plan.takes(hopper_plan.FORWARD, (grid,) * 3, (7, 7), (1, 1)) is known
    hopper_plan.gluon_known.cache_clear()
