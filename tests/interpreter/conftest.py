"""Every buffer that a launcher allocates starts as NaN, so that an element no kernel wrote is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        buffer = allocate(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    return poison


@pytest.fixture(autouse=True)
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    assert torch.empty(2).isnan().all() and torch.zeros(1).new_empty(2).isnan().all()
