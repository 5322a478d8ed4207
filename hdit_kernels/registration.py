"""How an operator joins PyTorch: one `define` a forward or backward, seen by the dispatcher as an opaque call.

CPU, MPS, float64 and machines without Triton run the reference; CUDA and ROCm tensors run the Triton launcher, imported
on its first call; `hdit_kernels.backend` may say otherwise. The two directions are joined by the `autograd.Function`s
of `hdit_kernels.autograd`, which cost half as much host time a call as `torch.library.custom_op` and trace under
`torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels import backend, checks

# Named "hdit_kernels". A copy imported beside it under another name has operators of its own (tools/huggingface.py).
LIBRARY = torch.library.Library(__package__, "DEF")


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    launcher: Callable[[], Callable[..., Any]],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Registers `hdit_kernels::name` and returns it as a callable.

    signature: the schema after the name, e.g. "(Tensor x) -> Tensor", with a tensor first. reference: plain PyTorch,
    same arguments; outputs are made contiguous. launcher: gives the function of the same arguments that launches the
    kernels, whose module imports Triton; called once, when first needed. fake: returns empty outputs of the right shape
    and dtype, contiguous. flops: takes the arguments with shapes in place of tensors, 2 per multiply-accumulate.
    """
    LIBRARY.define(name + signature)
    packet = getattr(getattr(torch.ops, LIBRARY.ns), name)
    arguments = packet.default._schema.arguments
    tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]

    def by_reference(*args: Any) -> Any:
        for position in tensors:  # sparse and nested tensors of a GPU come here, too
            if args[position] is not None:
                checks.tensor(arguments[position].name, args[position])
        device = _first_tensor(args).device.type
        with ExitStack() as stack:
            for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
                # backward references use autograd, which a dispatch mode around them (a FLOP counter, say) has put out
                # of reach
                stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            return _contiguous(reference(*args))

    load = functools.cache(launcher)

    def elsewhere(*args: Any) -> Any:
        if backend.chosen != "triton" or args[0].numel() == 0:
            return by_reference(*args)
        backend.check_kernels_run([args[position] for position in tensors if args[position] is not None])
        return load()(*args)  # in Triton's interpreter

    def on_gpu(*args: Any) -> Any:
        if backend.chosen == "reference" or args[0].numel() == 0:  # an empty batch: nothing to launch, its sums are 0
            return by_reference(*args)
        if not backend.triton_available():
            return elsewhere(*args)
        for position in tensors:
            argument = args[position]
            if argument is not None and argument.dtype is torch.float64:
                return elsewhere(*args)
        device = args[0].get_device()
        if device != torch.cuda.current_device():  # a Triton launch goes to the current device
            with torch.cuda.device(device):
                return load()(*args)
        return load()(*args)

    LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"{LIBRARY.ns}::{name}", functools.partial(_in_turn, packet.default), lib=LIBRARY)
    if flops is not None:
        # The formula sees shapes for tensors and, last, the output's shape, which no formula here needs.
        register_flop_formula(packet)(lambda *args, out_shape=None, **kwargs: flops(*args, **kwargs))
    return packet.default


def vjp(
    function: Callable[..., Any], inputs: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
) -> list[Any]:
    """Gradients of sum(function(*inputs) * cotangents) by autograd, one per input (None where the input is None)."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
        found = torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t is not None], [c for _, c in pairs])
    gradients = iter(found)
    return [None if t is None else next(gradients) for t in leaves]


def gradients(
    function: Any, inputs: Sequence[Tensor | None], dout: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The needed gradients of sum(function(*inputs) * dout) by autograd, and empty tensors for the others."""

    def of_needed(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return function(*(next(given) if wanted else t for t, wanted in zip(inputs, needed, strict=True)))

    leaves = tuple(t for t, wanted in zip(inputs, needed, strict=True) if wanted)
    found = iter(vjp(of_needed, leaves, (dout,)) if leaves else [])
    return tuple(next(found) if wanted else dout.new_empty(0) for wanted in needed)


def fake_gradients(inputs: Sequence[Tensor | None], dout: Tensor, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Empty tensors like the needed gradients, and without elements for the others."""
    return tuple(
        t.new_empty(t.shape) if wanted and t is not None else dout.new_empty(0)
        for t, wanted in zip(inputs, needed, strict=True)
    )


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """The autocast dtype when autocast is on where `tensor` lies, else None; None also for what is no tensor."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensor, Tensor):
        return None
    device_type = tensor.device.type
    if device_type == "meta":  # of which torch.is_autocast_enabled raises
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in the autocast dtype."""
    return tensor if dtype is None else tensor.to(cast_dtype(tensor.dtype, dtype))


def cast_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What `cast` makes of a dtype; as autocast itself does, float64 stays as it is."""
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _in_turn(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """torch.vmap of an operator: a call for each element, the results stacked."""
    given = list(zip(args, in_dims, strict=True))
    if info.batch_size == 0:  # a call with zeros tells what the results are like
        given = [(a.new_zeros(a.movedim(d, 0).shape[1:]), None) if isinstance(d, int) else (a, d) for a, d in given]
    calls = [
        operator(*[a.select(dim, i) if isinstance(dim, int) else a for a, dim in given])
        for i in range(max(1, info.batch_size))
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)[: info.batch_size], 0
    stacked = [torch.stack(results)[: info.batch_size] for results in zip(*calls, strict=True)]
    return type(calls[0])(stacked), type(calls[0])([0] * len(stacked))


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


def _contiguous(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return type(result)(t.contiguous() for t in result)
