from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.dit import DiT
from tests import golden_files

SCALING = golden_files.read_json("flops_full_size.json")["scaling"]


@pytest.mark.parametrize("size", SCALING)
def test_parameters_and_cost_equal_golden(size: str) -> None:
    golden = SCALING[size]["dit_b4"]
    with torch.device("meta"):
        model = DiT(int(size))
        x = torch.zeros(1, 3, int(size), int(size))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    assert counter.get_total_flops() == 2 * golden["macs"]
    assert len(model.pos_emb) == golden["tokens"]


def small(seed: int) -> DiT:
    """A DiT none of whose layers is at its zero start."""
    torch.manual_seed(seed)
    model = DiT(16, patch_size=4, width=48, depth=2, heads=3, num_classes=5).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_block_is_adaln_zero(seed: int) -> None:
    """One block against the paper's figure 3 in plain PyTorch."""
    block, x, cond = small(seed).blocks[0], torch.randn(2, 16, 48).double(), torch.randn(2, 48).double()
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.modulation(F.silu(cond))[:, None].chunk(6, -1)

    normal = F.layer_norm(x, [48], eps=1e-6) * (1 + scale_1) + shift_1
    query, key, value = (t.view(2, 16, 3, 16).transpose(1, 2) for t in block.qkv(normal).chunk(3, -1))
    weights = torch.softmax(query @ key.mT / 4, -1)
    wanted = x + gate_1 * block.proj((weights @ value).transpose(1, 2).reshape(2, 16, 48))
    normal = F.layer_norm(wanted, [48], eps=1e-6) * (1 + scale_2) + shift_2
    wanted = wanted + gate_2 * block.down(F.gelu(block.up(normal), approximate="tanh"))
    torch.testing.assert_close(block(x, cond), wanted)


def test_starts_as_zero_and_learns_from_every_input(seed: int) -> None:
    x, t, classes = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0]), torch.tensor([1, 4])
    fresh = DiT(16, width=48, depth=2, heads=3, num_classes=5)
    assert not fresh(x, t, classes).any()

    model = small(seed)
    out = model(x.double(), t.double(), classes)
    assert out.shape == x.shape
    for other in (
        model(x.double().flip(-1), t.double(), classes).flip(-1),  # positions matter
        model(x.double(), t.double() + 100, classes),
        model(x.double(), t.double(), classes.flip(0)),
    ):
        assert (out - other).abs().max() > 1e-3 * out.abs().max()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_patches_come_back_where_they_were() -> None:
    """With blocks that do nothing, each patch of the output depends on the same patch of the input only."""
    model = small(0)
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 1, 5, 10] = 1.0
    t, classes = torch.ones(1).double(), torch.zeros(1, dtype=torch.int64)
    changed = (model(moved, t, classes) - model(x, t, classes)).abs().sum((0, 1)) > 1e-9
    rows, columns = changed.nonzero().T
    assert rows.min() == 4 and rows.max() == 7 and columns.min() == 8 and columns.max() == 11


def test_image_must_divide() -> None:
    with pytest.raises(ValueError, match="image_size 30 must be a multiple of patch_size 4"):
        DiT(30)
