"""Which launch configuration the portable neighborhood attention kernels take."""

from __future__ import annotations

import itertools

import pytest
import torch

from hdit_kernels.neighborhood_attention import triton_configs_hopper
from hdit_kernels.neighborhood_attention.triton_configs import Config, Table, dkdv_config, dq_config, forward_config

KERNELS = [
    (forward_config, triton_configs_hopper.FORWARD),
    (dq_config, triton_configs_hopper.DQ),
    (dkdv_config, triton_configs_hopper.DKDV),
]
DTYPES = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}


@pytest.mark.parametrize(("configure", "table"), KERNELS)
def test_the_measured_table_is_whole_and_read_as_it_is(configure, table: Table) -> None:
    assert set(table) == set(itertools.product((16, 32), (64, 128)))
    for (bits, head_dim), windows in table.items():
        assert list(windows) == [7, 9, 13, 17, 25]
        for (window, fields), dtype in itertools.product(windows.items(), DTYPES[bits]):
            assert configure("hopper", dtype, head_dim, (window, window)) == Config(*fields)


@pytest.mark.parametrize(("configure", "table"), KERNELS)
@pytest.mark.parametrize(
    ("head_dim", "window", "entry"),
    [
        (8, (1, 1), (64, 7)),
        (64, (8, 7), (64, 9)),
        (65, (10, 10), (128, 13)),
        (96, (14, 14), (128, 17)),
        (128, (18, 18), (128, 25)),
        (128, (99, 99), (128, 25)),  # the largest there are
        (64, (3, 13), (64, 13)),  # of a rectangle the larger side
        (64, (17, 1), (64, 17)),
    ],
)
def test_what_was_not_measured_takes_the_next_larger_entry(configure, table: Table, head_dim, window, entry) -> None:
    for bits, dtypes in DTYPES.items():
        expected = Config(*table[bits, entry[0]][entry[1]])
        assert all(configure("hopper", dtype, head_dim, window) == expected for dtype in dtypes)


@pytest.mark.parametrize("family", ["hopper", "default"])
@pytest.mark.parametrize("configure", [configure for configure, _ in KERNELS])
def test_beyond_the_largest_head_dim_tiles_are_small(configure, family: str) -> None:
    sizes = [configure(family, torch.bfloat16, dim, (7, 7))[:4] for dim in (136, 256, 264)]
    assert sizes == [(4, 8, 1, 16), (4, 8, 1, 16), (4, 4, 1, 16)]
    assert configure(family, torch.float32, 136, (7, 7))[:4] == (4, 4, 1, 16)


@pytest.mark.parametrize("configure", [configure for configure, _ in KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elsewhere_the_tile_with_the_fewest_products_is_taken(configure, dtype: torch.dtype) -> None:
    tiles = [configure("default", dtype, 64, (window, window))[:2] for window in (9, 13, 17)]
    assert tiles == ([(8, 8), (16, 4), (4, 16)] if dtype == torch.bfloat16 else [(4, 8), (8, 4), (4, 8)])
    assert configure("default", dtype, 64, (9, 13)).max_registers is None
