"""Parameters and multiply-accumulates of the models, by torch.utils.flop_counter through our operators' formulas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hdit import HDiT, HDiTConfig, presets
from hdit_kernels import na2d
from tests import golden_files

SMALL = golden_files.read_json("flops_small.json")["models"]
FULL = golden_files.read_json("flops_full_size.json")
PRESETS = {
    "imagenet-128": FULL["models"]["imagenet128_ablation"],
    "imagenet-256": FULL["models"]["imagenet256_557M"],
    "ffhq-1024": FULL["models"]["ffhq1024"],
    "flowers-256": FULL["models"]["oxford_flowers_256"],
    **{f"hdit-b4-{size}": scaling["front_equal_width"] for size, scaling in FULL["scaling"].items()},
}


def counts(config: HDiTConfig, device: str) -> tuple[int, int]:
    """Parameters, and FLOPs of one forward pass of one image."""
    with torch.device(device):
        model = HDiT(config)
        cond = {"class_cond": torch.zeros(1, dtype=torch.int64)} if config.num_classes else {}
        x, sigma = torch.zeros(1, config.in_channels, *config.image_size), torch.ones(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, sigma, **cond)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_golden(name: str) -> None:
    golden = PRESETS[name]
    assert counts(presets[name], "meta") == (golden["parameters"], 2 * golden["macs"])


@pytest.mark.parametrize("name", ["imagenet-128", "imagenet-256", "ffhq-1024", "flowers-256"])
def test_preset_configurations_equal_golden(name: str) -> None:
    """Counts could agree by chance: so do the configurations, but for what they can't say."""
    ours, golden = presets[name].to_dict(), golden_files.model_config(PRESETS[name]["config"]).to_dict()
    for config in (ours, golden):
        for level in config["levels"]:
            del level["dropout"]
    assert ours == golden


def test_imagenet_128_is_the_first_of_the_efficiency_family() -> None:
    assert presets["imagenet-128"] == presets["hdit-b4-128"]


@pytest.mark.parametrize("size", [2048, 4096])
def test_each_doubling_adds_one_level(size: int) -> None:
    """Four times as many outer tokens run the same outer levels; the rest of the cost is the smaller model's."""
    half, quarter = (counts(presets[f"hdit-b4-{s}"], "meta")[1] for s in (size // 2, size // 4))
    full = counts(presets[f"hdit-b4-{size}"], "meta")[1]
    assert (full - half) / (half - quarter) == pytest.approx(4, rel=1e-3)
    assert len(presets[f"hdit-b4-{size}"].levels) == len(presets[f"hdit-b4-{size // 2}"].levels) + 1


# Not on the CPU: torch counts nothing for its own CPU attention.
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SMALL)
def test_small_models_equal_golden(name: str, device: str) -> None:
    golden = SMALL[name]
    config = golden_files.model_config(golden["config"])
    assert counts(config, device) == (golden["parameters"], 2 * golden["macs"])


@pytest.mark.parametrize("name", SMALL)
def test_counts_fall_on_the_operators_they_belong_to(name: str) -> None:
    """Linear layers (in merges and splits too), attention to all or in windows, and neighborhood attention."""
    golden = SMALL[name]
    with torch.device("meta"):
        model = HDiT(golden_files.model_config(golden["config"]))
        cond = {"class_cond": torch.zeros(1, dtype=torch.int64)} if model.config.num_classes else {}
        x = torch.zeros(1, model.config.in_channels, *model.config.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, torch.ones(1), **cond)
    found = {"linear": 0, "attention": 0, "neighborhood": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        # On the meta device torch's attention is two batched products.
        kinds = {"aten.bmm": "attention", "hdit_kernels.neighborhood_self_attention_forward": "neighborhood"}
        found[kinds.get(str(operator), "linear")] += flops
    wanted = {
        "linear": golden["macs_linear"],
        "attention": golden["macs_global_or_window_attention"],
        "neighborhood": golden["macs_neighborhood_attention"],
    }
    assert found == {kind: 2 * macs for kind, macs in wanted.items()}


@pytest.mark.parametrize("name", SMALL)
def test_training_costs_about_three_forward_passes(name: str) -> None:
    """Backward: twice a linear layer's forward, 2.5 times an attention's; the first layers need no gradient of x."""
    config = golden_files.model_config(SMALL[name]["config"])
    with torch.device("meta"):
        model = HDiT(config)
        cond = {"class_cond": torch.zeros(1, dtype=torch.int64)} if config.num_classes else {}
        x = torch.zeros(1, config.in_channels, *config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.ones(1), **cond).sum().backward()
    assert 2.9 < counter.get_total_flops() / (2 * SMALL[name]["macs"]) < 3.3


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_additional_keys_count(extra: int, device: str) -> None:
    """Two products of 2 · B·H·W·heads · (Kh·Kw + extra) · D; five of them backward."""
    batch, height, width, heads, dim = shape = (2, 6, 5, 3, 8)
    q, k, v = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
    more: list[torch.Tensor | None] = [None, None]
    if extra:
        more = [torch.zeros(batch, extra, heads, dim, device=device, requires_grad=True) for _ in range(2)]
    product = 2 * batch * height * width * heads * (3 * 5 + extra) * dim
    with FlopCounterMode(display=False) as counter:
        out = na2d(q, k, v, (3, 5), additional_keys=more[0], additional_values=more[1])
        assert isinstance(out, torch.Tensor)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 7 * product


def test_head_dims_count_where_they_take_part() -> None:
    """Forward q·k and p·v; backward q·k, dq and dk of one, dout·v and dv of the other."""
    q, k, v = (torch.zeros(2, 6, 5, 3, dim, device="meta", requires_grad=True) for dim in (8, 8, 20))
    pairs = 2 * 6 * 5 * 3 * 3 * 5
    with FlopCounterMode(display=False) as counter:
        out = na2d(q, k, v, (3, 5))
        assert out.shape == v.shape and counter.get_total_flops() == 2 * pairs * (8 + 20)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (8 + 20 + 3 * 8 + 2 * 20)
