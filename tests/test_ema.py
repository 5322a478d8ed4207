from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

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


def test_integers_are_copied(seed: int) -> None:
    """Quantized layers have parameters that can't be averaged; some models have none at all."""

    def quantized(values: list[int]) -> nn.Module:
        module = nn.Linear(3, 4)
        module.register_parameter("integers", nn.Parameter(torch.tensor(values), requires_grad=False))
        return module

    model, averaged = quantized([1, 2]), quantized([5, 6])
    expected = 0.9 * averaged.weight.detach() + 0.1 * model.weight.detach()
    ema_update(model, averaged, 0.9)
    assert averaged.integers.tolist() == [1, 2]
    torch.testing.assert_close(averaged.weight.detach(), expected)
    ema_update(nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False), 0.9)


def test_models_must_match() -> None:
    with pytest.raises(
        ValueError, match=r"averaged_model: .* differs in \['0.bias', '0.weight', '1.weight', 'table', "
    ):
        ema_update(net(), nn.Linear(3, 4, bias=False), 0.9)


@pytest.mark.parametrize("other", [nn.Linear(1, 4), nn.Linear(3, 4).double(), nn.Linear(3, 4, device="meta")])
def test_models_must_match_in_every_tensor(other: nn.Linear) -> None:
    """[4, 1] would be taken for every column of [4, 3]."""
    with pytest.raises(ValueError, match="averaged_model: expected weight to be as in model"):
        ema_update(other, nn.Linear(3, 4), 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(partial(ema_decay, step), "step: expected an integer of at least 0") for step in (-1, 1.5, math.nan, "a")],
        (partial(ema_decay, 10**400), "step: expected an integer of at most"),
        *[(partial(ema_decay, 3, power), "power: expected a number") for power in (-1.0, math.nan, "a", None)],
        *[(partial(ema_decay, 3, 0.5, most), "max_value: expected a number") for most in (-1.0, 2.0, math.nan, None)],
        *[(partial(ema_update, net(), net(), decay), "decay: expected") for decay in (-0.1, 1.1, math.nan, "a", None)],
        (partial(ema_update, None, net(), 0.9), "model: expected a torch.nn.Module, got None"),
        (partial(ema_update, net(), 3, 0.9), "averaged_model: expected a torch.nn.Module, got 3"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
