from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hdit import Denoiser
from tests import golden_files

ENTRY = golden_files.entry("denoiser_A.safetensors")


def run(weighting: str, dtype: torch.dtype) -> tuple[Denoiser, dict[str, Tensor], Tensor]:
    golden = golden_files.tensors("denoiser_A.safetensors", dtype)
    denoiser = Denoiser(golden_files.model("A", dtype), ENTRY["sigma_data"], weighting)
    cond = {"aug_cond": golden["aug_cond"], "class_cond": golden["class_cond"]}
    return denoiser, golden, denoiser.loss(golden["input"], golden["noise"], golden["sigma"], **cond)


@pytest.mark.parametrize("weighting", ENTRY["weightings"])
def test_loss_equals_golden(weighting: str) -> None:
    _, golden, loss = run(weighting, torch.float64)
    torch.testing.assert_close(loss, golden[f"loss.{weighting}"], rtol=1e-6, atol=0)
    _, golden, loss = run(weighting, torch.float32)
    torch.testing.assert_close(loss, golden[f"loss.{weighting}"], rtol=2e-5, atol=0)


def test_gradients_equal_golden() -> None:
    denoiser, golden, loss = run("soft-min-snr", torch.float64)
    loss.mean().backward()
    parameters = dict(denoiser.model.named_parameters())
    names = [name.removeprefix("grad.") for name in golden if name.startswith("grad.")]
    assert len(names) == 4
    for name in names:
        assert golden_files.max_error(parameters[name].grad, golden[f"grad.{name}"]) < 1e-5, name


def test_denoised_and_scalings_equal_golden() -> None:
    denoiser, golden, _ = run("karras", torch.float64)
    sigma = golden["sigma"]
    noised = golden["input"] + golden["noise"] * sigma[:, None, None, None]
    denoised = denoiser(noised, sigma, aug_cond=golden["aug_cond"], class_cond=golden["class_cond"])
    assert golden_files.max_error(denoised, golden["denoised"]) < 1e-5
    for name, scaling in zip(("c_skip", "c_out", "c_in"), denoiser.scalings(sigma), strict=True):
        torch.testing.assert_close(scaling, golden[name], rtol=1e-6, atol=0)


class Constant(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 1e3])
def test_loss_is_the_weighted_error_of_the_denoised_image(sigma: float, seed: int) -> None:
    """EDM, equation 8: with the weight 1 / c_out² the loss on the network's output is the error of D."""
    denoiser = Denoiser(Constant(), 0.5)
    x, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigmas = torch.full([2], sigma, dtype=torch.float64)
    error = (denoiser(x + noise * sigma, sigmas) - x).square().mean((1, 2, 3))
    c_out = denoiser.scalings(sigmas)[1]
    torch.testing.assert_close(denoiser.loss(x, noise, sigmas), error / c_out**2, rtol=1e-8, atol=0)


def test_small_sigma_in_float32_is_not_noise(seed: int) -> None:
    """The target at sigma 1e-4 keeps float32's precision."""
    x, noise, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.full([2], 1e-4)
    denoiser = Denoiser(Constant(), 0.5)
    exact = denoiser.loss(x.double(), noise.double(), sigma.double())
    torch.testing.assert_close(denoiser.loss(x, noise, sigma).double(), exact, rtol=1e-6, atol=0)


def test_half_precision_images_stay_half_precision() -> None:
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    assert Denoiser(Constant(), 0.5)(x, torch.tensor([0.1, 1.0])).dtype == torch.bfloat16


class Level(nn.Module):
    """A network that looks at the level it is given."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1] and sigma.dtype in (torch.float32, torch.float64)
        return x * (sigma.log() / 4)[:, None, None, None].to(x.dtype)


@pytest.mark.parametrize("weighting", ENTRY["weightings"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", [2e-3, 0.5, 300.0, 8e3])
def test_half_precision_sigma(dtype: torch.dtype, level: float, weighting: str, seed: int) -> None:
    """300² and (2e-3)⁴ are beyond float16: computed in float32, denoised and loss are as with sigma in float64."""
    denoiser = Denoiser(Level(), 0.5, weighting)
    sigma = torch.tensor([level, level * 1.2], dtype=dtype)
    clean, noise = torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    noised = (clean.double() + noise.double() * sigma.double()[:, None, None, None]).to(dtype)

    exact = denoiser(noised.double(), sigma.double())
    denoised = denoiser(noised, sigma)
    assert denoised.dtype == dtype
    assert ((denoised.double() - exact).norm() / exact.norm()).item() < (4e-3 if dtype == torch.float16 else 3e-2)

    exact_loss = denoiser.loss(clean.double(), noise.double(), sigma.double())
    loss = denoiser.loss(clean, noise, sigma)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=4e-3 if dtype == torch.float16 else 3e-2, atol=0)
    assert [scaling.dtype for scaling in denoiser.scalings(sigma)] == [torch.float32] * 3


@pytest.mark.parametrize("level", [0.5, 2, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_one_level_for_all(level: Tensor | float, seed: int) -> None:
    denoiser = Denoiser(Level(), 0.5)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma = torch.full([2], float(level), dtype=getattr(level, "dtype", None) if torch.is_tensor(level) else None)
    assert torch.equal(denoiser(x, level), denoiser(x, sigma))
    assert torch.equal(denoiser.loss(x, noise, level), denoiser.loss(x, noise, sigma))


def test_compiles_whole(seed: int) -> None:
    denoiser = Denoiser(Level(), 0.5)
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    for call, arguments in ((denoiser, (x, 0.5)), (denoiser.loss, (x, x, sigma))):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_one_graph_for_all_noise_levels(seed: int) -> None:
    """Of numbers: the first call takes its own for a constant, which the second finds to change."""
    torch.compiler.reset()
    denoiser, x, counter = Denoiser(Level(), 0.5), torch.randn(2, 3, 4, 4), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(denoiser, fullgraph=True, backend=counter)
    for level in (0.5, 0.7, 2.4, 3.1):
        assert torch.equal(compiled(x, level), denoiser(x, level))
    assert counter.frame_count == 2


def test_exports_with_a_free_batch(seed: int) -> None:
    denoiser, batch = Denoiser(Level(), 0.5), torch.export.Dim("batch")
    example = (torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0]))
    exported = torch.export.export(denoiser, example, dynamic_shapes=({0: batch}, {0: batch})).module()
    x, sigma = torch.randn(5, 3, 4, 4), torch.rand(5) + 0.1
    torch.testing.assert_close(exported(x, sigma), denoiser(x, sigma))


def test_functorch(seed: int) -> None:
    denoiser = Denoiser(nn.Conv2d(3, 3, 1), 0.5)
    denoiser.model.forward = lambda x, sigma, conv=denoiser.model.forward: conv(x)
    parameters, x, sigma = dict(denoiser.named_parameters()), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])

    def loss(parameters: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        return torch.func.functional_call(denoiser, parameters, (x, sigma)).square().sum()

    whole = torch.func.grad(loss)(parameters, x, sigma)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], sigma[:, None])
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient)


X, LEVELS = torch.zeros(2, 3, 4, 4), torch.tensor([0.5, 2.0])
NO_TENSORS = (None, 3, "x", [1.0], X.numpy())
NOT_IMAGES = (X[0], X[None], X.flatten(), X.long(), X.bool(), X.to(torch.complex64), X.to_sparse())
NOT_LEVELS = (LEVELS[None], LEVELS[:1], LEVELS[:, None, None, None], LEVELS.long(), LEVELS.to("meta"), LEVELS.numpy())
NO_LEVELS = (-LEVELS, LEVELS * 0, LEVELS * math.nan, LEVELS * math.inf, -1.0, 0, math.nan, math.inf, "a", None, True)
NO_LEVELS += (1e-300, 1e300, LEVELS.double() * 1e-300, LEVELS.double() * 1e300)  # beyond float32


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("x", value) for value in (*NO_TENSORS, *NOT_IMAGES)],
        *[("noise", value) for value in (*NO_TENSORS, *NOT_IMAGES, X[:1], X[:, :1], X.to("meta"))],
        *[("sigma", value) for value in (*NOT_LEVELS, *NO_LEVELS)],
    ],
)
def test_errors_name_the_tensor(argument: str, value: Any) -> None:
    denoiser, arguments = Denoiser(Constant(), 0.5), {"x": X, "noise": X, "sigma": LEVELS}
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
        denoiser.loss(**arguments | {argument: value})
    if argument != "noise":
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
            denoiser(**{"x": X, "sigma": LEVELS} | {argument: value})


@pytest.mark.parametrize("output", [None, 0.0, X[:, :1], X[:1], X.flatten(), X.long(), X.to("meta")])
def test_the_model_must_return_what_it_is_given(output: Any) -> None:
    """A model of 3 channels in and 1 out would be broadcast."""
    denoiser = Denoiser(lambda x, sigma: output, 0.5)  # type: ignore[arg-type]
    for call in (lambda: denoiser(X, LEVELS), lambda: denoiser.loss(X, X, LEVELS)):
        with pytest.raises((TypeError, ValueError), match="^model: expected it to return"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[((model,), "model: expected a function or module") for model in (None, 3, "m", Constant)],
        *[
            ((Constant(), value), "sigma_data: expected a number of at least 1e-09")
            for value in (0, -1, math.nan, math.inf, 1e300, "a")
        ],
        ((Constant(), 0.5, "min-snr"), "weighting: expected one of karras, soft-min-snr, snr, got 'min-snr'"),
        ((Constant(), 0.5, None), "weighting: expected one of"),
        ((Constant(), 0.5, []), "weighting: expected one of"),
    ],
)
def test_errors_name_the_setting(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Denoiser(*arguments)
