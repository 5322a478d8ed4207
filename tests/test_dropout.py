"""Dropout in the blocks of the network: where it acts, how often, and not in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hdit import (
    GlobalAttention,
    HDiT,
    HDiTConfig,
    Level,
    Mapping,
    NeighborhoodAttention,
    NoAttention,
    ShiftedWindowAttention,
)
from hdit.config import Attention
from hdit.model import FeedForwardBlock, MappingBlock, SelfAttentionBlock

RATE, WIDTH = 0.25, 16
ATTENTIONS = [GlobalAttention(8), NeighborhoodAttention(8, 3), ShiftedWindowAttention(8, 4)]
CASES = ["feed-forward", "mapping", *ATTENTIONS]


def block(case: str | Attention) -> tuple[nn.Module, nn.Linear, tuple[Tensor, ...]]:
    """A block, its last projection, as wide inside as outside, and its inputs."""
    cond = torch.randn(6, WIDTH, dtype=torch.float64)
    x = torch.randn(6, 8, 8, WIDTH, dtype=torch.float64)
    pos = torch.linspace(-1, 1, 8, dtype=torch.float64)
    module: nn.Module
    if case == "mapping":
        module = MappingBlock(WIDTH, WIDTH, RATE).double()
        return module, module.down_proj, (torch.randn(400, WIDTH, dtype=torch.float64),)
    if case == "feed-forward":
        module = FeedForwardBlock(Level(1, WIDTH, WIDTH, NoAttention(), RATE), WIDTH).double()
        return module, module.down_proj, (x, cond)
    assert not isinstance(case, (str, NoAttention))
    module = SelfAttentionBlock(Level(1, WIDTH, attention=case, dropout=RATE), case, WIDTH, 1).double()
    return module, module.out_proj, (x, pos, pos, cond)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropout_before_the_last_projection(case: str | Attention, seed: int) -> None:
    module, projection, inputs = block(case)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    projection.weight.data.copy_(mixing)

    def inner() -> Tensor:
        """What goes into the projection: its output, which is added to the input, turned back."""
        with torch.no_grad():
            return (module(*inputs) - inputs[0]) @ mixing

    module.eval()
    whole = inner()
    assert torch.equal(whole, inner()) and (whole.abs() > 1e-12).all()
    module.train()
    share = inner() / whole
    kept = share > 0.5
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / (1 - RATE)), rtol=1e-6, atol=0)
    assert share[~kept].abs().max() < 1e-6
    bound = 5 * math.sqrt(RATE * (1 - RATE) / kept.numel())
    assert abs(1 - kept.double().mean().item() - RATE) < bound
    assert not torch.equal(share, inner() / whole)  # others the next time


def test_rates_of_the_configuration_reach_their_blocks() -> None:
    levels = (Level(1, 16, attention=ATTENTIONS[1], dropout=0.125), Level(2, 24, attention=ATTENTIONS[0], dropout=0.5))
    model = HDiT(HDiTConfig(levels, Mapping(2, 16, dropout=0.25), (8, 8), patch_size=(2, 2)))
    found = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    rates = {"down_levels": 0.125, "up_levels": 0.125, "mid_level": 0.5, "mapping": 0.25}
    assert found == {name: rates[name.partition(".")[0]] for name in found}
    assert len(found) == 2 * 1 + 2 * 1 + 2 * 2 + 2
