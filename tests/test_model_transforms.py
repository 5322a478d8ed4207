"""The whole model under torch.func's transforms and differentiated twice."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdit import GlobalAttention, HDiT, HDiTConfig, Level, Mapping, NeighborhoodAttention, ShiftedWindowAttention
from tests.test_model import arguments, make


def config(*levels: Level) -> HDiTConfig:
    return HDiTConfig(levels, Mapping(1, 8), image_size=(8, 8), patch_size=(2, 2), num_classes=4)


NEIGHBORHOOD = config(Level(1, 8, 8, NeighborhoodAttention(8, 3)), Level(1, 8, 8, GlobalAttention(8)))
WINDOWS = config(Level(2, 8, 8, ShiftedWindowAttention(8, 2)))


def double(config: HDiTConfig, batch: int = 2) -> tuple[HDiT, dict[str, Tensor], dict[str, Tensor]]:
    """A float64 model, its parameters without autograd and its arguments."""
    model = make(config).double()
    return model, {n: p.detach() for n, p in model.named_parameters()}, arguments(config, batch, torch.float64)


def loss(model: HDiT, parameters: dict[str, Tensor], args: dict[str, Tensor]) -> Tensor:
    return functional_call(model, parameters, (), args).square().mean()


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradients_of_each_sample(seed: int) -> None:
    """grad, and vmap of grad over the batch, beside backward of each sample."""
    for kind in (NEIGHBORHOOD, WINDOWS):
        model, parameters, args = double(kind, 3)

        def of_sample(parameters: dict[str, Tensor], args: dict[str, Tensor], model: HDiT = model) -> Tensor:
            return loss(model, parameters, {name: t[None] for name, t in args.items()})

        found = vmap(grad(of_sample), in_dims=(None, 0))(parameters, args)
        for i in range(3):
            one = {name: t[i : i + 1] for name, t in args.items()}
            model.zero_grad()
            model(**one).square().mean().backward()
            wanted = {name: p.grad for name, p in model.named_parameters()}
            close({name: gradient[i] for name, gradient in found.items()}, wanted)


def test_vmap_over_images_and_noise_levels(seed: int) -> None:
    model, _, args = double(NEIGHBORHOOD, 4)
    wanted = model(**args)
    stacked = {name: t.view(2, 2, *t.shape[1:]) for name, t in args.items()}
    found = vmap(lambda x, sigma, c: model(x, sigma, class_cond=c))(*stacked.values())
    close(found.flatten(0, 1), wanted)
    levels = torch.tensor([0.3, 2.0])
    found = vmap(lambda sigma: model(args["x"], sigma, class_cond=args["class_cond"]))(levels)
    for out, level in zip(found, levels.tolist(), strict=True):
        close(out, model(**args | {"sigma": torch.tensor(level)}))


def test_an_ensemble(seed: int) -> None:
    models = [make(NEIGHBORHOOD).double().eval() for _ in range(2)]
    args = arguments(NEIGHBORHOOD, dtype=torch.float64)
    base = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(base, (p, b), (), args))(parameters, buffers)
    close(found, torch.stack([model(**args) for model in models]))


def test_jacobian_of_the_noise_level(seed: int) -> None:
    model, _, args = double(WINDOWS)
    sigma = args["sigma"].double()
    with sdpa_kernel(SDPBackend.MATH):
        found = jacrev(lambda s: model(**args | {"sigma": s})[:, :, 0, 0])(sigma)
    step = 1e-6
    for i in range(2):
        moved = [model(**args | {"sigma": sigma + sign * step * torch.eye(2).double()[i]}) for sign in (1, -1)]
        wanted = (moved[0] - moved[1])[:, :, 0, 0] / (2 * step)
        torch.testing.assert_close(found[..., i], wanted, rtol=1e-5, atol=1e-8)


def test_second_derivatives(seed: int) -> None:
    """The gradient of a squared gradient beside central differences, of all parameters and of the image."""
    for kind in (NEIGHBORHOOD, WINDOWS):
        model, parameters, args = double(kind)
        point = [*parameters.values(), args["x"]]

        def gradients(values: list[Tensor], create_graph: bool, model: HDiT = model, args: Any = args) -> list[Tensor]:
            given = {name: value for (name, _), value in zip(model.named_parameters(), values, strict=False)}
            out = loss(model, given, args | {"x": values[-1]})
            return list(torch.autograd.grad(out, values, create_graph=create_graph))

        leaves = [t.clone().requires_grad_() for t in point]
        directions = [torch.randn_like(t) for t in point]
        with sdpa_kernel(SDPBackend.MATH):
            penalty = sum(g.square().sum() for g in gradients(leaves, True))
            found = torch.autograd.grad(penalty, leaves)
        step, ends = 1e-6, []
        for sign in (1, -1):
            moved = [(t + sign * step * d).requires_grad_() for t, d in zip(point, directions, strict=True)]
            ends.append(sum(g.square().sum() for g in gradients(moved, False)))
        wanted = (ends[0] - ends[1]) / (2 * step)
        total = sum((f * d).sum() for f, d in zip(found, directions, strict=True))
        size = sum(f.square().sum() for f in found).sqrt()  # of such a sum, which now and then nearly cancels
        torch.testing.assert_close(total, wanted, rtol=0, atol=1e-5 * size.item())
