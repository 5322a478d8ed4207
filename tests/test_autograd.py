"""Derivatives of every operator beyond the ordinary backward pass: second and third ones, torch.func and vmap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import hdit_kernels
from hdit_kernels import reference


class Operation(NamedTuple):
    """An operator and the same in plain PyTorch, as functions of the tensors that have a gradient."""

    call: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


ANGLES = [torch.linspace(-2, 3, 2 * n, dtype=torch.float64).view(n, 2, 1) for n in (4, 3)]


def positive_scale(function: Callable[..., Any]) -> Callable[..., Any]:
    """The scale of queries and keys is positive."""

    def of_packed(qkv: Tensor, scale: Tensor) -> Any:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        return function(qkv, scale.square() + 0.5, *(a.to(qkv.device, wide) for a in ANGLES))

    return of_packed


GRID, PACKED, ROWS = (2, 4, 3, 2, 8), (2, 4, 3, 3, 2, 8), (2, 3, 5)
NA2D = {"kernel_size": (3, 2), "scale": 0.7}


def na2d_with_all(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor, function: Any) -> Any:
    settings = {"stride": (2, 1), "dilation": (1, 1), "is_causal": (False, True)}
    return function(q, k, v, **NA2D, **settings, additional_keys=extra_k, additional_values=extra_v)


OPERATIONS = {
    "rms_norm": Operation(hdit_kernels.rms_norm, reference.rms_norm, (ROWS, (5,))),
    "ada_rms_norm": Operation(hdit_kernels.ada_rms_norm, reference.ada_rms_norm, (ROWS, (2, 5))),
    "ada_layer_norm": Operation(hdit_kernels.ada_layer_norm, reference.ada_layer_norm, (ROWS, (2, 5), (2, 5))),
    "gated_residual": Operation(hdit_kernels.gated_residual, reference.gated_residual, (ROWS, ROWS, (2, 5))),
    "geglu": Operation(hdit_kernels.geglu, reference.geglu, ((2, 3, 6),)),
    "feed_forward": Operation(hdit_kernels.feed_forward, reference.feed_forward, ((2, 3, 4), (2, 4), (6, 4), (4, 3))),
    "token_merge": Operation(hdit_kernels.token_merge, reference.token_merge, ((2, 4, 2, 3), (5, 12))),
    "token_split": Operation(hdit_kernels.token_split, reference.token_split, ((2, 2, 1, 5), (12, 5))),
    "token_split_skip": Operation(
        lambda x, weight, skip, fac: hdit_kernels.token_split(x, weight, (2, 2), skip, fac),
        lambda x, weight, skip, fac: reference.token_split(x, weight, (2, 2), skip, fac),
        ((2, 2, 1, 5), (12, 5), (2, 4, 2, 3), (1,)),
    ),
    "qk_norm_rope": Operation(
        positive_scale(hdit_kernels.qk_norm_rope), positive_scale(reference.qk_norm_rope), (PACKED, (2,))
    ),
    "neighborhood_self_attention": Operation(
        positive_scale(lambda *tensors: hdit_kernels.neighborhood_self_attention(*tensors, kernel_size=3)),
        positive_scale(lambda *tensors: reference.neighborhood_self_attention(*tensors, kernel_size=(3, 3))),
        (PACKED, (2,)),
    ),
    "na2d": Operation(
        lambda q, k, v: hdit_kernels.na2d(q, k, v, **NA2D),
        lambda q, k, v: reference.na2d(q, k, v, **NA2D)[0],
        (GRID, GRID, GRID),
    ),
    "na2d_lse": Operation(
        lambda *tensors: na2d_with_all(*tensors, lambda *t, **s: hdit_kernels.na2d(*t, **s, return_lse=True)),
        lambda *tensors: na2d_with_all(*tensors, reference.na2d),
        (GRID, (*GRID[:3], 1, 8), (*GRID[:3], 1, 16), (2, 2, 1, 8), (2, 2, 1, 16)),
    ),
}

each_operation = pytest.mark.parametrize("name", OPERATIONS)


def drawn(name: str, *batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*batch, *shape, dtype=torch.float64).to(dtype) for shape in OPERATIONS[name].shapes)


def energy(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """A number with derivatives of every order, in which inputs go round the operator as in a residual block."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    bent = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)
    return bent + sum(t.pow(3).sum() for t in tensors)


def tower(function: Callable[..., Any], tensors: tuple[Tensor, ...], order: int) -> list[tuple[Tensor, ...]]:
    """Gradients of energy, of the sum of their squares, and so on."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    value, found = energy(function, *leaves), []
    for _ in range(order):
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        found.append(gradients)
        value = sum((g**2).sum() for g in gradients)  # type: ignore[assignment]
    return found


def close(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@each_operation
def test_second_derivatives_beside_a_residual(name: str, seed: int) -> None:
    operation, tensors = OPERATIONS[name], drawn(name)
    for found, wanted in zip(tower(operation.call, tensors, 2), tower(operation.plain, tensors, 2), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("name", ["geglu", "rms_norm", "token_split_skip", "na2d"])
def test_third_derivatives(name: str, seed: int) -> None:
    operation, tensors = OPERATIONS[name], drawn(name)
    close(tower(operation.call, tensors, 3)[-1], tower(operation.plain, tensors, 3)[-1])


@pytest.mark.parametrize("name", ["rms_norm", "token_split_skip", "qk_norm_rope", "na2d"])
def test_gradgradcheck(name: str, seed: int) -> None:
    """Against differences, which need no reference."""
    leaves = tuple(t.requires_grad_() for t in drawn(name))
    assert torch.autograd.gradgradcheck(OPERATIONS[name].call, leaves, fast_mode=True, rtol=1e-4, atol=1e-5)


@each_operation
def test_a_penalty_on_a_sum(name: str, seed: int) -> None:
    """The gradient of a plain sum depends on the input, too, which autograd can't see from the incoming gradient."""

    def penalty(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        value = sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        total = sum(g.pow(2).sum() for g in gradients)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    tensors = drawn(name)
    close(penalty(OPERATIONS[name].call), penalty(OPERATIONS[name].plain))


def test_a_tensor_in_several_places(seed: int) -> None:
    """The figure of a user's report: x + na2d(x, x, x, 3), differentiated twice."""

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((x + function(x)).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    start = torch.randn(1, 5, 4, 2, 8, dtype=torch.float64)
    plain = second(lambda x: reference.na2d(x, x, x, (3, 3))[0])
    close(second(lambda x: hdit_kernels.na2d(x, x, x, 3)), plain)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
def test_second_derivatives_of_some_inputs(asked: tuple[int, ...], seed: int) -> None:
    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_(i in asked) for i, t in enumerate(tensors)]
        chosen = [leaves[i] for i in asked]
        gradients = torch.autograd.grad(energy(function, *leaves), chosen, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), chosen)

    tensors = drawn("na2d")
    close(second(OPERATIONS["na2d"].call), second(OPERATIONS["na2d"].plain))


def test_second_derivatives_in_half_precision_and_under_autocast(seed: int) -> None:
    for name, dtype in (("rms_norm", torch.bfloat16), ("na2d", torch.float16), ("token_merge", torch.bfloat16)):
        operation, exact = OPERATIONS[name], drawn(name)
        wanted = tower(operation.plain, tuple(t.to(dtype).double() for t in exact), 2)[-1]
        with torch.autocast("cpu", dtype):
            found = tower(operation.call, tuple(t.to(dtype) for t in exact), 2)[-1]
        assert all(f.dtype == dtype for f in found)
        for f, w in zip(found, wanted, strict=True):
            assert (f.double() - w).norm() <= 0.05 * w.norm()


def test_hvp_of_functional(seed: int) -> None:
    """torch.autograd.functional.hvp differentiates for the incoming gradient."""
    x, v = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    _, found = torch.autograd.functional.hvp(lambda x: hdit_kernels.geglu(x).sum(), x, v)
    _, wanted = torch.autograd.functional.hvp(lambda x: reference.geglu(x).sum(), x, v)
    close(found, wanted)


# torch.func


@each_operation
def test_grad_vjp_and_vmap(name: str, seed: int) -> None:
    """torch.func.grad, vjp and per-sample gradients, as of plain PyTorch."""
    operation, tensors = OPERATIONS[name], drawn(name)
    positions = tuple(range(len(tensors)))

    def gradients(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.func.grad(lambda *t: energy(function, *t), argnums=positions)

    close(gradients(operation.call)(*tensors), gradients(operation.plain)(*tensors))

    _, pull = torch.func.vjp(operation.call, *tensors)
    outputs, plain_pull = torch.func.vjp(operation.plain, *tensors)
    cotangents = tuple(map(torch.randn_like, outputs)) if isinstance(outputs, tuple) else torch.randn_like(outputs)
    close(pull(cotangents), plain_pull(cotangents))

    several = drawn(name, 3)
    in_turn = [gradients(operation.plain)(*(t[i] for t in several)) for i in range(3)]
    close(torch.vmap(gradients(operation.call))(*several), tuple(map(torch.stack, zip(*in_turn, strict=True))))
    close(torch.vmap(operation.call)(*several), torch.vmap(operation.plain)(*several))


def test_per_sample_gradients_of_shared_weights(seed: int) -> None:
    x, weight = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)

    def per_sample(function: Callable[..., Tensor]) -> Tensor:
        return torch.vmap(torch.func.grad(lambda w, x: energy(function, x, w)), in_dims=(None, 0))(weight, x)

    close(per_sample(hdit_kernels.token_merge), per_sample(reference.token_merge))


def test_compositions_of_transforms(seed: int) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)

    def of_vmap(function: Callable[..., Tensor]) -> Tensor:
        return torch.func.grad(lambda w: torch.vmap(lambda row: function(row * w))(x).square().sum())(x[0])

    for transform in (
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jacrev(torch.func.grad(lambda x: f(x).sin().sum()))(x),
        lambda f: torch.vmap(torch.func.jacrev(f))(x),
        of_vmap,
    ):
        close(transform(hdit_kernels.geglu), transform(reference.geglu))
    small = torch.randn(1, 3, 2, 1, 8, dtype=torch.float64)
    close(
        torch.func.jacrev(lambda x: hdit_kernels.na2d(x, x, x, 2))(small),
        torch.func.jacrev(lambda x: reference.na2d(x, x, x, (2, 2))[0])(small),
    )


def test_autograd_around_transforms(seed: int) -> None:
    """A leaf of autograd inside torch.func, and a tensor that has left its transform."""
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    left: list[Tensor] = []

    def function(y: Tensor) -> Tensor:
        left.append(y * 2)
        return hdit_kernels.geglu(y * x).sum()

    gradient = torch.func.grad(function)(torch.ones_like(x))
    (found,) = torch.autograd.grad(gradient.square().sum(), x)
    plain = torch.func.grad(lambda y: reference.geglu(y * x).sum())(torch.ones_like(x))
    close(found, torch.autograd.grad(plain.square().sum(), x)[0])
    close(hdit_kernels.geglu(left[0]).detach(), reference.geglu(2 * torch.ones_like(x)))


def test_forward_mode_is_refused(seed: int) -> None:
    x = torch.randn(2, 6)
    for call in (
        lambda: torch.func.jvp(hdit_kernels.geglu, (x,), (x,)),
        lambda: torch.func.hessian(lambda x: hdit_kernels.geglu(x).sum())(x),
    ):
        with pytest.raises(NotImplementedError, match="hdit_kernels: no derivatives in forward mode"):
            call()


def test_vmap_over_nothing(seed: int) -> None:
    x = torch.randn(3, 0, 6)
    assert torch.vmap(hdit_kernels.geglu, in_dims=1)(x).shape == (0, 3, 3)
    gradient = torch.func.grad(lambda x, weight: hdit_kernels.rms_norm(x, weight).sum(), argnums=(0, 1))
    found = torch.vmap(gradient, in_dims=(1, None))(x, torch.ones(6))
    assert [g.shape for g in found] == [(0, 3, 6), (0, 6)]


# torch.compile


def compiled(function: Callable[..., Any], backend: str = "eager", fullgraph: bool = True) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=fullgraph)


@each_operation
def test_second_derivatives_of_a_compiled_part(name: str, seed: int) -> None:
    operation, tensors = OPERATIONS[name], drawn(name)
    found = tower(compiled(operation.call), tensors, 2)
    for order, wanted in zip(found, tower(operation.plain, tensors, 2), strict=True):
        close(order, wanted)


def second(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of a gradient's square, for an input that goes round the function."""

    def of(x: Tensor) -> Tensor:
        first = torch.func.grad(lambda x: (x[:, :3] + function(x)).square().sum())
        return torch.func.grad(lambda x: first(x).square().sum())(x)

    return of


def second_by_autograd(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((x[:, :3] + function(x)).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_inside_and_around_a_compiled_part(backend: str, seed: int) -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    wanted = second(reference.geglu)(x)
    close(compiled(second(hdit_kernels.geglu), backend)(x), wanted)
    close(second(compiled(hdit_kernels.geglu, backend, fullgraph=False))(x), wanted)


def test_second_derivatives_across_a_break(seed: int) -> None:
    """Dynamo goes on at torch.autograd.grad, and then meets the backward passes as frames of their own."""
    x = torch.randn(2, 6, dtype=torch.float64)
    found = compiled(lambda x: second_by_autograd(hdit_kernels.geglu, x), fullgraph=False)(x)
    close(found, second_by_autograd(reference.geglu, x))


def test_aot_autograd_refuses_a_second_derivative(seed: int) -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_by_autograd(compiled(hdit_kernels.geglu, "aot_eager"), x)


def test_a_compiled_part_has_no_forward_mode(seed: int) -> None:
    x = torch.randn(2, 6)
    with pytest.raises(Exception, match="hdit_kernels: no derivatives in forward mode"):
        compiled(lambda x: torch.func.jvp(hdit_kernels.geglu, (x,), (x,)))(x)


def test_a_compiled_operator_takes_a_tensor_in_several_places(seed: int) -> None:
    x = torch.randn(1, 5, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    found = compiled(lambda x: hdit_kernels.na2d(x, x, x, 3))(x)
    wanted = reference.na2d(x, x, x, (3, 3))[0]
    close(found, wanted)
    close(torch.autograd.grad(found.square().sum(), x), torch.autograd.grad(wanted.square().sum(), x))


# What an ordinary backward pass costs


@each_operation
def test_an_ordinary_backward_pass_never_differentiates_the_reference(name: str, seed: int) -> None:
    leaves = [t.requires_grad_() for t in drawn(name)]
    value = energy(OPERATIONS[name].call, *leaves)
    with mock.patch("hdit_kernels.autograd._second_order", side_effect=AssertionError):
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        again = torch.autograd.grad(value, leaves, create_graph=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, again, strict=True))


@each_operation
def test_an_empty_batch_gives_empty_results_and_zero_gradients(name: str) -> None:
    shared = {
        "rms_norm": (1,),
        "feed_forward": (2, 3),
        "token_merge": (1,),
        "token_split": (1,),
        "token_split_skip": (1, 3),
    }
    shared |= {"qk_norm_rope": (1,), "neighborhood_self_attention": (1,)}
    kept = shared.get(name, ())
    leaves = [(t if i in kept else t[:0]).requires_grad_() for i, t in enumerate(drawn(name))]
    outputs = OPERATIONS[name].call(*leaves)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.shape[0] == 0 and output.numel() == 0
    gradients = torch.autograd.grad(energy(OPERATIONS[name].call, *leaves), leaves, create_graph=True)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        close(gradient, 3 * leaf.square())  # of energy's own term only
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    zeros = torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    assert all(not g.any() and g.shape == t.shape for g, t in zip(zeros, leaves, strict=True))


def test_dynamo_is_imported_by_those_who_compile_only() -> None:
    """It takes as long as importing torch; and knows of the operators as soon as it is: else a second derivative of
    what the backend "eager" compiled would be wrong.
    """
    script = """
import importlib.util, sys, torch, hdit, hdit_kernels
assert "torch._dynamo" not in sys.modules
importlib.util.find_spec("torch._dynamo")  # a mere look
x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
def second(function):
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]
def squares(x):
    return hdit_kernels.geglu(x).square().sum()
assert torch.equal(second(torch.compile(squares, backend="eager", fullgraph=True)), second(squares))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
