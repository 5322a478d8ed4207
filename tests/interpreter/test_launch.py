"""The sum that the kernels of all families share."""

from __future__ import annotations

import torch

from hdit_kernels import launch
from hdit_kernels.testing import FLOOR


def test_more_parts_than_a_block_holds(seed: int) -> None:
    """The last of them alone in its block; and more columns than one has."""
    partials = torch.randn(2, launch.SUM_CONSTANTS["PARTS"] + 1, launch.SUM_CONSTANTS["BLOCK"] + 1)
    total, summing = launch.sum_launch(partials, torch.empty(2, partials.shape[2]))
    launch.run(summing)
    error = (total.double() - partials.double().sum(1)).abs()
    assert (error <= FLOOR[torch.float32] * partials.abs().sum(1)).all()
