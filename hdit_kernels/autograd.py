"""How an operator joins autograd: forward and backward kernels as one differentiable function, to any order.

`differentiable` makes two `autograd.Function`s. `Forward` runs the forward kernel; its backward runs the backward
kernel, through `Gradients` where the gradient may be differentiated again (create_graph=True, torch.func).
`Gradients` runs the same kernel, and its own backward differentiates the plain PyTorch reference, twice: rarely needed,
so no kernel is written for it, and its memory is that of the reference under autograd. Both define setup_context and a
vmap rule, so torch.func.grad, vjp, jacrev, vmap and their compositions work. Forward mode is refused.

torch.compile sees each as one call (allow_in_graph), which AOTAutograd traces into and the backend "eager" runs. An
autograd.Function that Dynamo itself takes apart has no derivative beyond the first, and nothing would say so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function, forward_ad

Tensors = tuple[Tensor | None, ...]


class _ReverseMode(Function):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(
            "hdit_kernels: no derivatives in forward mode (torch.func.jvp, jacfwd, hessian); use reverse mode instead: "
            "vjp, jacrev, and jacrev of jacrev"
        )


def differentiable(
    reference: Callable[..., Any],
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    inputs: int,
    constants: int = 0,
    extras: int = 0,
    keep_output: bool = True,
    passed_on: int | None = None,
) -> Callable[..., Any]:
    """A function of `inputs` tensors that have gradients, `constants` tensors that have none, and settings.

    Each tensor may be None. The function returns its output, or a tuple of several.

    reference: the same in plain PyTorch, same arguments; for derivatives beyond the first. forward(*arguments): the
    output; or, if there are extras, forward(*arguments, save): a list of the outputs and, if save, of `extras` more
    tensors that the backward pass needs. backward(cotangents, tensors, saved, settings, needed): one gradient for each
    input, None where it isn't needed or there is none; saved: if there are extras, the first output (unless
    keep_output is False, to free its memory) and the extras. passed_on: the input whose gradient is the output's own,
    which backward leaves out.
    """
    count = inputs + constants

    class Gradients(_ReverseMode):
        """cotangents, tensors, saved -> the gradients that are not None."""

        @staticmethod
        def forward(settings: tuple[Any, ...], needed: tuple[bool, ...], outputs: int, *tensors: Tensor | None) -> Any:
            cotangents, given, saved = tensors[:outputs], tensors[outputs : outputs + count], tensors[outputs + count :]
            return tuple(g for g in backward(cotangents, given, saved, settings, needed) if g is not None)

        @staticmethod
        def setup_context(ctx: Any, arguments: tuple[Any, ...], gradients: Any) -> None:
            ctx.settings, ctx.needed, ctx.outputs, *tensors = arguments
            ctx.save_for_backward(*tensors[: ctx.outputs + count])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            none_left = (None,) * (len(ctx.needs_input_grad) - 3 - ctx.outputs - inputs)
            found = _second_order(
                reference, ctx.saved_tensors, cotangents, ctx.settings, ctx.needed, ctx.outputs, inputs
            )
            return None, None, None, *found, *none_left

    class Forward(_ReverseMode):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return tuple(forward(*arguments, True)) if extras else forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, arguments: tuple[Any, ...], results: Any) -> None:
            ctx.settings, ctx.outputs = arguments[count:], len(results) - extras if extras else 1
            saved = (*results[: int(keep_output)], *results[ctx.outputs :]) if extras else ()
            ctx.save_for_backward(*arguments[:count], *saved)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            tensors, outputs, settings = ctx.saved_tensors, ctx.outputs, ctx.settings
            cotangents = cotangents[:outputs]
            needed = tuple([needs and i != passed_on for i, needs in enumerate(ctx.needs_input_grad[:inputs])])
            found: list[Tensor | None] = [None] * (count + len(settings))
            if all([cotangent is None for cotangent in cotangents]):
                return tuple(found)
            if any(needed):
                if torch.is_grad_enabled():
                    gradients = iter(differentiable_gradients(settings, needed, outputs, *cotangents, *tensors))
                    for i, needs in enumerate(needed):
                        if needs and tensors[i] is not None:
                            found[i] = next(gradients)
                else:
                    found[:inputs] = backward(cotangents, tensors[:count], tensors[count:], settings, needed)
            if passed_on is not None and ctx.needs_input_grad[passed_on]:
                found[passed_on] = cotangents[0]
            return tuple(found)

    def with_gradients(*arguments: Any) -> Any:
        return apply(Forward, *arguments)

    def differentiable_gradients(*arguments: Any) -> Any:
        return apply(Gradients, *arguments)

    _allow_in_graph(with_gradients, differentiable_gradients)

    def call(*arguments: Any) -> Any:
        return with_gradients(*arguments) if needs_grad(arguments, inputs) else forward(*arguments)

    def call_with_extras(*arguments: Any) -> Any:
        if needs_grad(arguments, inputs):
            results = with_gradients(*arguments)[:-extras]
        else:
            results = forward(*arguments, False)
        return results[0] if len(results) == 1 else tuple(results)

    return call_with_extras if extras else call


_for_dynamo: list[Any] = []


def _allow_in_graph(*functions: Any) -> None:
    """torch.compiler.allow_in_graph, but not before somebody imports Dynamo: it takes as long as importing torch."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.allow_in_graph(functions)
    else:
        _for_dynamo.extend(functions)


class _Telling(Loader):
    """Another loader, and then Dynamo is told of what waits for it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        torch.compiler.allow_in_graph(_for_dynamo)


class _AfterDynamo(MetaPathFinder):
    """Finds Dynamo as those behind it do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # of two copies of this package each is asked
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Telling(spec.loader)
                return spec
        return None


if "torch._dynamo" not in sys.modules:
    sys.meta_path.insert(0, _AfterDynamo())


def apply(function: Any, *arguments: Any) -> Any:
    """function.apply(*arguments), without what Function.apply does at every call for arguments with defaults (it
    inspects the signature of forward, which takes longer than the operator).
    """
    if _are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)


def needs_grad(arguments: Sequence[Any], inputs: int) -> bool:
    """Whether autograd has to see a call, of whose arguments the first `inputs` may have gradients; without it the
    forward operator is called directly.

    Forward mode has to as well, to say that there are no such derivatives, where an operator would drop the tangents;
    and functorch's transforms, whose wrapped tensors don't tell.
    """
    if _are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in arguments[:inputs]:
            if tensor is not None and tensor.requires_grad:
                return True
    if forward_ad._current_level >= 0:
        return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in arguments[:inputs])
    return False


def _second_order(
    reference: Callable[..., Any],
    saved: Tensors,
    cotangents: Tensors,
    settings: tuple[Any, ...],
    needed: tuple[bool, ...],
    outputs: int,
    inputs: int,
) -> list[Tensor | None]:
    """Gradients of sum(g · c) over the reference's needed gradients g and their cotangents c, for the cotangents of the
    outputs and for the inputs, all of which `saved` holds in this order. Differentiable itself.
    """
    tensors = saved[outputs:]
    wanted = [i for i in range(inputs) if needed[i] and tensors[i] is not None]
    incoming = [i for i in range(outputs) if saved[i] is not None]
    free = [i for i in range(outputs + inputs) if saved[i] is not None]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(saved)
        for i, value in zip(free, values, strict=True):
            given[i] = value

        def outputs_of(*chosen: Tensor) -> tuple[Tensor, ...]:
            arguments = given[outputs:]
            for i, value in zip(wanted, chosen, strict=True):
                arguments[i] = value
            results = reference(*arguments, *settings)
            results = results if isinstance(results, tuple) else (results,)
            return tuple(results[i] for i in incoming)

        _, pull = torch.func.vjp(outputs_of, *(given[outputs + i] for i in wanted))[:2]
        return pull(tuple(given[i] for i in incoming))

    found: list[Tensor | None] = [None] * (outputs + inputs)
    device = next(t for t in saved if t is not None).device.type
    with torch.autocast(device, enabled=False):
        values, pull = torch.func.vjp(gradients, *(saved[i] for i in free))[:2]
        kept = tuple(torch.zeros_like(v) if c is None else c for v, c in zip(values, cotangents, strict=True))
        for i, gradient in zip(free, pull(kept), strict=True):
            found[i] = gradient
    return found


def wanted(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The needed ones of an operator's gradients."""
    return [gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True)]
