"""What of CUDA graphs can be seen without a GPU: calls run eagerly and say why; changes of modules are noticed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hdit
from hdit import Denoiser, HDiT, cuda_graphs, sampling
from hdit._graphs import no_autocast_cache
from hdit.options import Options
from tests.tiny import CONFIG, random_model


def test_a_cpu_runs_eagerly_and_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    denoiser = Denoiser(random_model())
    captured = hdit.capture(denoiser)
    x, cond = torch.randn(2, 1, 8, 8), {"class_cond": torch.tensor([1, 2])}
    for sigma in (torch.tensor([0.5, 2.0]), 0.5):
        assert torch.equal(captured(x, sigma, **cond), denoiser(x, sigma, **cond))
    assert captured.reason == "no CUDA graphs on cpu" and captured.memory == 0
    step = hdit.capture_step(lambda x: x * 2, torch.ones(2))
    assert step.reason == "no CUDA graphs on cpu" and step(torch.ones(2)).tolist() == [2, 2]
    assert [str(w.message) for w in recwarn] == ["hdit.capture: runs eagerly: no CUDA graphs on cpu"] * 2


@pytest.mark.filterwarnings("ignore:hdit.capture")
def test_a_step_is_warmed_up_in_the_settings_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile has one piece of code for each: what is compiled while a graph is made fails."""
    compiled: list[Any] = []
    linear = torch.compile(nn.functional.linear, backend=lambda graph, _: compiled.append(graph) or graph)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, x)

    step = hdit.capture_step(run, torch.ones(2, 2))
    monkeypatch.setattr(step, "_beside", lambda device: contextlib.nullcontext())
    step._warm_up(watch=False)
    assert torch.is_autocast_cache_enabled() and len(compiled) == 1
    with no_autocast_cache():  # as while the graph is made
        run(torch.ones(2, 2))
    assert len(compiled) == 1


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match="function: expected a function or module, got 3"):
        hdit.capture(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="graphs: expected an integer of at least 1, got 0"):
        hdit.capture(torch.sin, graphs=0)
    with pytest.raises(TypeError, match="fixed_weights: expected True or False, got 1"):
        hdit.capture(torch.sin, fixed_weights=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs\[0\]: expected a torch.Tensor, got int"):
        hdit.capture_step(torch.sin, 3)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        step = hdit.capture_step(torch.sin, torch.ones(2))
    with pytest.raises(ValueError, match="inputs: expected tensors like those it was made for"):
        step(torch.ones(3))
    with pytest.raises(TypeError, match="capture: expected True or False, got 1"):
        Options("digits", capture=1)  # type: ignore[arg-type]


def holders(model: HDiT) -> dict[str, Any]:
    denoiser = Denoiser(model)

    class Wrapper:
        def __init__(self) -> None:
            self.parts = {"inner": [denoiser]}

        def __call__(self, x: Any) -> Any:
            return x

        def method(self, x: Any) -> Any:
            return x

    return {
        "module": denoiser,
        "guided": sampling.ClassifierFreeGuidance(denoiser, 2.0, 10),
        "closure": lambda x: denoiser(x, 1.0),
        "partial": functools.partial(denoiser, sigma=1.0),
        "object": Wrapper(),
        "method": Wrapper().method,
        "wrapped": functools.wraps(denoiser.forward)(lambda x: x),
    }


@pytest.mark.parametrize("kind", holders(random_model()))
def test_modules_that_a_function_holds_are_found(kind: str) -> None:
    model = random_model()
    found = cuda_graphs._modules(holders(model)[kind])
    assert {id(module) for module in model.modules()} <= {id(module) for module in found}


def new_layer(model: HDiT) -> None:
    model.mid_level[0].ff.up_proj = nn.Linear(24, 48)


CHANGES: dict[str, Callable[[HDiT], Any]] = {
    "training": lambda model: model.train(),
    "hook": lambda model: model.mid_level.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: model.mid_level.register_forward_pre_hook(lambda *_: None),
    "layer": new_layer,
    "parameter": lambda model: setattr(model.out_norm, "scale", nn.Parameter(torch.ones(16))),
    "assign": lambda model: model.load_state_dict(random_model(CONFIG).state_dict(), assign=True),
    "data": lambda model: setattr(model.out_norm.scale, "data", torch.ones(16)),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_modules_are_noticed(change: str) -> None:
    model = random_model()
    taken = cuda_graphs._Taken(list(model.modules()))
    with torch.no_grad():
        model.out_norm.scale.mul_(2)  # what a graph reads when it runs
    assert not taken.changed()
    CHANGES[change](model)
    assert taken.changed()
