"""CUDA graphs of a denoiser and of training on a GPU: the same numbers as eager calls, whatever happens in between."""

from __future__ import annotations

import copy
import csv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hdit
from hdit import Denoiser, HDiT
from hdit.checkpoint import load_checkpoint
from hdit.data import Digits
from hdit.ema import ema_update
from hdit.options import Options
from hdit.sample import generate, generate_batches
from hdit.train import CHECKPOINT, train
from hdit_kernels import geglu, reference
from tests.tiny import CONFIG, random_model

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")

pytest.importorskip("triton")
from hdit_kernels.geglu_triton import _geglu_forward_kernel  # noqa: E402
from hdit_kernels.launch import _compiled, compiled_together  # noqa: E402
from tests.test_gpu_operators import kernels_of_the_package  # noqa: E402


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Nothing runs eagerly in silence: a test expects it, or fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "hdit.capture")
        yield


def inputs(batch: int = 3, side: int = 16) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 1, side, side, device=GPU),
        "sigma": torch.rand(batch, device=GPU) + 0.1,
        "class_cond": torch.arange(batch, device=GPU),
    }


def small() -> HDiT:
    torch.manual_seed(0)
    return random_model().to(GPU)


@torch.no_grad()
def compare(captured: Any, eager: Callable[..., Tensor], **arguments: Any) -> None:
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            wanted = eager(**arguments)
            found = [captured(**arguments) for _ in range(2)]
        assert all(torch.equal(each, wanted) for each in found)
    assert captured.reason is None


def test_the_same_images(seed: int) -> None:
    denoiser = Denoiser(small())
    captured = hdit.capture(denoiser, graphs=20)
    for batch, side in ((3, 16), (2, 8), (3, 16)):
        given = inputs(batch, side)
        compare(captured, denoiser, **given)
        for sigma in (0.5, 3.0, torch.tensor(0.7, device=GPU)):
            compare(captured, denoiser, **given | {"sigma": sigma})
    assert captured.memory > 0


def test_results_are_the_callers(seed: int) -> None:
    denoiser = Denoiser(small())
    captured = hdit.capture(denoiser)
    with torch.no_grad():
        one, two = inputs(), inputs()
        first = captured(**one)
        captured(**two)
        assert torch.equal(first, denoiser(**one))


def test_guidance_and_modules_that_a_function_holds(seed: int) -> None:
    denoiser = Denoiser(small())
    guided = hdit.sampling.ClassifierFreeGuidance(denoiser, 2.0, 10)
    captured = hdit.capture(guided)
    compare(captured, guided, **inputs())
    with torch.no_grad():
        denoiser.model.mid_level[0].ff.up_proj.weight.mul_(1.5)
    compare(captured, guided, **inputs())


def step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def captured_step(model: nn.Module) -> None:
    change = hdit.capture_step(
        lambda x: torch._foreach_add_(list(model.parameters()), 0.01), torch.zeros(1, device=GPU)
    )
    with torch.no_grad():
        for _ in range(4):
            change(torch.zeros(1, device=GPU))


def other(model: HDiT) -> HDiT:
    found = copy.deepcopy(model)
    found.load_state_dict(scaled(model))
    return found


def replace_layer(model: HDiT) -> None:
    layer = model.mid_level[0].ff.up_proj
    other = nn.Linear(layer.in_features, layer.out_features, bias=False, device=GPU)
    model.mid_level[0].ff.up_proj = other


def scaled(model: HDiT) -> dict[str, Tensor]:
    return {name: tensor * 1.25 for name, tensor in model.state_dict().items()}


CHANGES: dict[str, Callable[[HDiT], Any]] = {
    "optimizer": step,
    "captured step": captured_step,
    "in place": lambda model: model.requires_grad_(False).mid_level[0].self_attn.qkv_proj.weight.mul_(2.0),
    "load_state_dict": lambda model: model.load_state_dict(scaled(model)),
    "assign": lambda model: model.load_state_dict(scaled(model), assign=True),
    "a layer": replace_layer,
    "average": lambda model: ema_update(other(model), model, 0.5),
    "norm": lambda model: model.requires_grad_(False).out_norm.scale.mul_(2.0),
    "through .data": lambda model: model.mid_level[0].ff.up_proj.weight.data.mul_(2.0),
    "foreach": lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 1.25),
    "tensor": lambda model: setattr(model.out_norm.scale, "data", model.out_norm.scale.data * 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_replays(change: str, seed: int) -> None:
    model = small()
    denoiser = Denoiser(model)
    captured = hdit.capture(denoiser)
    given = inputs()
    compare(captured, denoiser, **given)
    with torch.no_grad():
        before = denoiser(**given)
    CHANGES[change](model)
    compare(captured, denoiser, **given)
    with torch.no_grad():
        assert not torch.equal(before, denoiser(**given))


def test_fixed_weights_change_by_renew(seed: int) -> None:
    denoiser = Denoiser(small())
    captured = hdit.capture(denoiser, fixed_weights=True)
    given = inputs()
    compare(captured, denoiser, **given)
    with torch.no_grad():
        denoiser.model.mid_level[0].ff.up_proj.weight.mul_(2.0)
        with torch.autocast("cuda", torch.bfloat16):
            assert not torch.equal(captured(**given), denoiser(**given))
    captured.renew()
    compare(captured, denoiser, **given)
    new_weights = {name: tensor * 1.25 for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(new_weights, assign=True)
    compare(captured, denoiser, **given)
    assert all(type(layer.weight) is nn.Parameter for layer in denoiser.modules() if isinstance(layer, nn.Linear))


def test_sampling_takes_weights_that_change_between_batches(seed: int) -> None:
    images = {}
    for capture in (True, False):
        model = small()
        batches = generate_batches(model, range(4), [0, 1, 2, 3], steps=3, batch_size=2, capture=capture)
        images[capture] = [next(batches)[1]]
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.2)
        images[capture] += [batch for _, batch in batches]
    assert torch.equal(torch.cat(images[True]), torch.cat(images[False]))


def test_dropout_is_the_eager_one(seed: int) -> None:
    model = small().train()
    captured = hdit.capture(model)
    given = inputs()
    with torch.no_grad():
        for call in range(3):
            torch.manual_seed(call)
            wanted = [model(**given) for _ in range(2)]
            torch.manual_seed(call)
            assert all(torch.equal(captured(**given), each) for each in wanted)
        assert not torch.equal(*wanted)
    model.eval()
    compare(captured, model, **given)
    torch.manual_seed(0)
    with torch.no_grad():
        wanted = [model.train()(**given) for _ in range(2)]
        torch.manual_seed(0)
        model.eval()
        captured(**given)
        model.train()  # noticed before the graph draws
        assert all(torch.equal(captured(**given), each) for each in wanted)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x.sum().item(), "waits for the GPU"),
        (lambda x: x[x > 0], "waits for the GPU"),
        (lambda x: x * torch.ones(3, 1, 16, 16).to(GPU), "waits for the GPU"),
    ],
    ids=["item", "mask", "copy"],
)
def test_what_waits_runs_eagerly(function: Any, reason: str, seed: int) -> None:
    calls = []
    captured = hdit.capture(lambda x: calls.append(1) or function(x))
    x = inputs()["x"]
    with pytest.warns(UserWarning, match=reason):
        found = captured(x)
    assert torch.equal(found, function(x)) and reason in captured.reason
    before = len(calls)
    assert torch.equal(captured(x), function(x))  # said once, and tried once
    assert len(calls) == before + 1
    torch.randn(3, device=GPU)  # the generator still works
    compare(hdit.capture(lambda x: x + 1), lambda x: x + 1, x=x)


def test_other_reasons(seed: int) -> None:
    model = small()
    given = inputs()
    captured = hdit.capture(model)
    with pytest.warns(UserWarning, match="under torch.no_grad"):
        captured(**given).sum().backward()
    compare(captured, model, **given)

    captured = hdit.capture(lambda x: x + 1, graphs=2)
    for size in (1, 2):
        captured(torch.ones(size, device=GPU))
    with pytest.warns(UserWarning, match="than the 2 graphs that are kept"):
        assert captured(torch.ones(3, device=GPU)).tolist() == [2, 2, 2]
    assert captured(torch.ones(2, device=GPU)).tolist() == [2, 2] and captured.reason is None

    captured, seen = hdit.capture(model), []
    compare(captured, model, **given)
    handle = model.mid_level.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), pytest.warns(UserWarning, match="a forward hook of a Level"):
        captured(**given)
    assert seen == [1]
    handle.remove()
    compare(captured, model, **given)


def test_errors_are_those_of_the_function(seed: int) -> None:
    captured = hdit.capture(Denoiser(small()))
    with torch.no_grad(), pytest.raises(ValueError, match="x: image of 9x9 pixels must be"):
        captured(**inputs(side=9))
    compare(captured, captured.__wrapped__, **inputs())


def test_steps_are_the_eager_ones(seed: int) -> None:
    def run(captured: bool) -> tuple[list[Tensor], nn.Module]:
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(GPU)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True, capturable=True)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        call = hdit.capture_step(step, torch.empty(4, 8, device=GPU)) if captured else step
        losses = []
        for index in range(8):
            torch.manual_seed(index)
            losses.append(call(torch.randn(4, 8, device=GPU)))
        if captured:
            assert call.reason is None and call.memory > 0
        return losses, layer

    (wanted, eager), (found, layer) = run(False), run(True)
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    for one, other in zip(eager.parameters(), layer.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_waits_runs_eagerly(seed: int) -> None:
    seen = []
    step = hdit.capture_step(lambda x: seen.append(x.sum().item()) or x * 2, torch.ones(2, device=GPU))
    for number in range(4):
        if number == 1:
            with pytest.warns(UserWarning, match="waits for the GPU"):
                assert step(torch.full((2,), 1.0, device=GPU)).tolist() == [2, 2]
        else:
            assert step(torch.full((2,), float(number), device=GPU)).tolist() == [2 * number] * 2
    assert seen == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="inputs: expected tensors like"):
        step(torch.ones(3, device=GPU))


def losses(folder: Path) -> list[str]:
    with open(folder / "loss.csv", newline="") as file:
        return [",".join(row) for row in csv.reader(file)]


def test_training_captured_eager_and_resumed(tmp_path: Path, seed: int) -> None:
    """Bit for bit, with dropout on, since the same kernels run."""
    config = replace(CONFIG, image_size=(16, 16))
    images = Digits(config.image_size, 1)
    eager = Options("digits", steps=9, batch_size=8, save_every=9, sample_every=0, capture=False)
    captured = replace(eager, capture=True)
    runs = {
        "eager": [eager],
        "captured": [captured],
        "resumed": [replace(captured, steps=5), captured],
        "first eager": [replace(eager, steps=4), captured],
    }
    for name, parts in runs.items():
        for part, options in enumerate(parts):
            train(config, images, options, tmp_path / name, GPU, resuming=part > 0)
        assert losses(tmp_path / name) == losses(tmp_path / "eager"), name
    weights = [load_checkpoint(tmp_path / name / CHECKPOINT).state_dict() for name in runs]
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:]), name


def test_samples_are_the_eager_ones(seed: int) -> None:
    model = small()
    for sampler in ("dpmpp_2m", "dpmpp_3m_sde", "euler_ancestral"):
        options: dict[str, Any] = {"sampler": sampler, "steps": 6, "batch_size": 4, "guidance": 1.5}
        classes = [0, 1, 2, 3, 4, 5]
        wanted = generate(model, 6, classes, capture=False, **options)
        assert torch.equal(generate(model, 6, classes, **options), wanted)


def test_kernels_are_compiled_together(seed: int) -> None:
    """Of a network in bfloat16, whose kernels other tests need, too: on disk, it may be, and out of sight here."""
    model, given = small(), inputs()
    x = torch.randn(5, 24, device=GPU, dtype=torch.float16)
    for function in kernels_of_the_package():
        function.device_caches.clear()
    _compiled.clear()
    with compiled_together():
        with torch.autocast("cuda", torch.bfloat16):
            model(**given).sum().backward()
        out = geglu(x)
    compiled = _geglu_forward_kernel.device_caches[0][0]
    after = len(compiled)
    assert out.shape == (5, 12) and after >= 2
    assert torch.allclose(geglu(x), reference.geglu(x), atol=1e-2)
    assert len(compiled) == after  # found, not compiled anew
