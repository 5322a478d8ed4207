"""Every buffer that a launcher allocates starts as NaN, so that an element no kernel wrote is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hdit_kernels import testing


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    with testing.poisoned():
        assert torch.empty(2).isnan().all() and torch.zeros(1).new_empty(2).isnan().all()
        yield
