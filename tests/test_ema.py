from __future__ import annotations

import pytest
import torch
from torch import nn

from hdit.ema import ema_decay, ema_update
from tests import golden_files


@pytest.mark.parametrize("case", golden_files.read_json("optim_A.json")["ema_warmup"])
def test_decay_equals_golden(case: dict) -> None:
    for step, value in case["value_at_step"].items():
        assert ema_decay(int(step), **case["arguments"]) == pytest.approx(value, rel=1e-12), step


def net() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    module.register_buffer("table", torch.randn(5))
    return module


def test_update(seed: int) -> None:
    model, averaged = net(), net()
    before = [p.detach().clone() for p in averaged.parameters()]
    ema_update(model, averaged, 0.9)
    for p, old, new in zip(model.parameters(), before, averaged.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
        assert new.requires_grad and new.grad_fn is None
    assert torch.equal(averaged.table, model.table)
    ema_update(model, averaged, ema_decay(0))  # decay 0: a copy
    for p, new in zip(model.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(new, p)


def test_models_must_match() -> None:
    with pytest.raises(ValueError, match=r"differ in \['0.bias', '0.weight', '1.weight', 'table', 'weight'\]"):
        ema_update(net(), nn.Linear(3, 4, bias=False), 0.9)
