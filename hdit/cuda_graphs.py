"""CUDA graphs of a denoiser and of a training step: a GPU does the work of hundreds of launches after one.

`capture` is for calls without gradients (sampling), `capture_step` for a whole training step. Both return a callable
that runs eagerly where it can't capture, says so once and keeps why in `reason`. What comes back is the caller's own
memory. Calls may come from any stream, one at a time from each thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from hdit._graphs import Replayable, map_tensors, no_autocast_cache, waits_in
from hdit.model import is_plain
from hdit_kernels import checks, get_backend

MOST_GRAPHS = 8


def capture(function: Callable[..., Any], graphs: int = MOST_GRAPHS, *, fixed_weights: bool = False) -> Captured:
    """A callable like `function` that replays a CUDA graph of it, one for each shape, dtype and set of conditions.

    function: a Denoiser, a network, a guided one or any other callable of tensors that returns tensors. Numbers,
    booleans and None may be among its arguments; floats reach it as tensors without dimensions, so that each noise
    level needs no graph of its own. Call it without gradients. graphs: the most to keep; calls of further shapes run
    eagerly.

    A graph reads the weights where they are, so it has every change: an optimizer's step, load_state_dict, an average's
    update, a merged adapter. It is made anew when they are elsewhere (assign=True, another layer, `.to`), or training
    or not has changed.

    fixed_weights: under autocast, round the weights of plain linear layers once instead of in every call, as for a run
    of sampling. Later changes of these weights show after `renew` only. `memory` tells the
    bytes of graphs and copies.

    A function that moves random numbers on (dropout) draws those that it would draw eagerly. Forward hooks of modules
    would not run in a graph, so a module with hooks runs eagerly.
    Raises TypeError or ValueError on a function that can't be called and on graphs below 1.
    """
    return Captured(function, graphs, fixed_weights)


def capture_step(step: Callable[..., Any], *inputs: Tensor) -> CapturedStep:
    """A callable of tensors like `inputs` that replays a CUDA graph of a whole training step.

    step: zero the gradients, compute a loss, backward, clip, optimizer, average: all that reads and writes the same
    memory each time, with learning rates as tensors and an optimizer with capturable=True, and that waits for the GPU
    nowhere. It returns a tensor, several or None. inputs: tensors on the GPU of the shapes, dtypes and device that each
    call will have.

    The first two calls run `step` as it is; the third captures it. So a captured run makes the steps of an eager one.
    Random numbers are those of the GPU's default generator: torch.manual_seed before a call decides them, captured or
    not. Weights must keep their memory: not load_state_dict(assign=True).
    Raises TypeError or ValueError on a step that can't be called and inputs that are no tensors.
    """
    return CapturedStep(step, inputs)


class Captured(Replayable):
    """What `capture` returns: call it as the function that it was made of."""

    def __init__(self, function: Callable[..., Any], graphs: int = MOST_GRAPHS, fixed_weights: bool = False) -> None:
        checks.function("function", function)
        super().__init__(function)
        self._most = checks.integer("graphs", graphs, 1)
        checks.boolean("fixed_weights", fixed_weights)
        self._fixed_weights = fixed_weights
        self._graphs: dict[Any, _Graph] = {}
        self._refused: dict[Any, str] = {}
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return self._function(*args, **kwargs)
        values = [*args, *kwargs.values()]
        devices = [value.device for value in values if isinstance(value, Tensor)]
        device = next((each for each in devices if each.type == "cuda"), None)
        if device is None:
            self._eagerly(f"no CUDA graphs on {devices[0].type if devices else 'no device'}")
            return self._function(*args, **kwargs)
        key = (len(args), *kwargs, *[_kind(value) for value in values], *_settings())
        with self._alone(device), torch.cuda.device(device):
            try:
                graph = self._graphs.get(key)
            except TypeError:
                self._eagerly("an argument is no tensor, number or None")
                return self._function(*args, **kwargs)
            if graph is not None and graph.is_random and graph.taken.changed():
                self._drop(key)  # before it draws random numbers
                graph = None
            if graph is not None:
                self.reason = None
                results = graph(values)
                if not graph.taken.changed():  # looked at while the GPU works: it takes as long as the launch
                    return results
                self._drop(key)
            graph = self._made(key, device, values, len(args), list(kwargs))
            return self._function(*args, **kwargs) if graph is None else graph(values)

    def _drop(self, key: Any) -> None:
        self.memory -= self._graphs.pop(key).memory

    def _made(
        self, key: Any, device: torch.device, values: Sequence[Any], positional: int, names: Sequence[str]
    ) -> _Graph | None:
        """A new graph, kept; or None, saying why."""
        reason = self._refused.get(key)
        if len(self._graphs) >= self._most:
            reason = f"more shapes, dtypes and conditions than the {self._most} graphs that are kept"
        if reason is None:
            modules = _modules(self._function)
            reason = _hindrance(modules, values)
        if reason is None:
            graph = _Graph(self, device, values, positional, names, modules)
            if graph.reason is None:
                self.reason, self._graphs[key] = None, graph
                return graph
            reason = self._refused[key] = graph.reason
        self._eagerly(reason)
        return None

    def renew(self) -> None:
        """Rounds the weights anew, with fixed_weights."""
        with self._lock:
            for graph in self._graphs.values():
                graph.copies.renew()


class _Graph:
    """One graph of a function, its inputs and copies of weights. reason: why there is none."""

    def __init__(
        self,
        owner: Captured,
        device: torch.device,
        values: Sequence[Any],
        positional: int,
        names: Sequence[str],
        modules: Sequence[nn.Module],
    ) -> None:
        function = owner._function
        wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in values)
        self._inputs = [_static(value, torch.float64 if wide else torch.float32, device) for value in values]
        self.taken = _Taken(modules)
        self.copies = _Copies(modules if owner._fixed_weights else [])

        def call() -> Any:
            return function(*self._inputs[:positional], **dict(zip(names, self._inputs[positional:], strict=True)))

        self._fill(values)
        self.reason: str | None = None
        self.memory = 0
        state = torch.cuda.get_rng_state(device)
        try:
            with self.copies.in_place(), owner._beside(device), no_autocast_cache():
                call()  # compiles what is compiled on first use; an error is the caller's
                self.is_random = not torch.equal(state, torch.cuda.get_rng_state(device))
                torch.cuda.set_rng_state(state, device)
                self.reason = waits_in(call)
        finally:
            torch.cuda.set_rng_state(state, device)
        if self.reason is not None:
            return
        before = owner.memory
        try:
            with self.copies.in_place():
                self._graph, self._results = owner._record(call, device)
        except Exception as error:
            self.reason = f"capturing failed ({type(error).__name__}: {str(error).splitlines()[0]})"
            torch.cuda.synchronize(device)
            return
        owner.memory += self.copies.memory + sum(v.nbytes for v in self._inputs if isinstance(v, Tensor))
        self.memory = owner.memory - before

    def __call__(self, values: Sequence[Any]) -> Any:
        self._fill(values)
        self._graph.replay()
        return map_tensors(torch.clone, self._results)

    def _fill(self, values: Sequence[Any]) -> None:
        for static, value in zip(self._inputs, values, strict=True):
            if isinstance(value, Tensor):
                static.copy_(value)
            elif isinstance(static, Tensor):
                static.fill_(value)


class _Taken:
    """What a graph has taken from modules: which they are, their tensors' memory, training or not; no hooks."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [(m, m.training) for m in modules]
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        # The tensors are held, so that a graph of old ones, noticed after its replay, has read memory of its own.
        self._tensors = [
            (tensors, name, tensor, None if tensor is None else tensor.data_ptr())
            for m in modules
            for tensors in (m._parameters, m._buffers)
            for name, tensor in tensors.items()
        ]
        self._storages = [None if tensor is None else tensor.detach() for _, _, tensor, _ in self._tensors]

    def changed(self) -> bool:
        for module, training in self._modules:
            if module.training is not training or module._forward_hooks or module._forward_pre_hooks:
                return True
        for children, name, child in self._children:
            if children.get(name) is not child:
                return True
        for tensors, name, tensor, address in self._tensors:
            if tensors.get(name) is not tensor or (tensor is not None and tensor.data_ptr() != address):
                return True
        return False


class _Copies:
    """Weights of plain linear layers in the autocast dtype, in their layers' place while a graph is made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        self._layers = [
            m for m in modules
            if dtype is not None and isinstance(m, nn.Linear) and is_plain(m) and m.weight.is_cuda
            and m.weight.dtype == torch.float32
        ]  # fmt: skip
        self._weights = list({id(layer.weight): layer.weight for layer in self._layers}.values())
        with torch.no_grad():
            self._copies = [weight.to(dtype) for weight in self._weights]
        self.memory = sum(copy.nbytes for copy in self._copies)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        copy_of = dict(zip(map(id, self._weights), self._copies, strict=True))
        before = [(layer, layer._parameters["weight"]) for layer in self._layers]
        try:
            for layer, weight in before:
                layer._parameters["weight"] = copy_of[id(weight)]  # type: ignore[assignment]
            yield
        finally:
            for layer, weight in before:
                layer._parameters["weight"] = weight

    @torch.no_grad()
    def renew(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)


class CapturedStep(Replayable):
    """What `capture_step` returns: call it with tensors like the inputs it was made for."""

    def __init__(self, step: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        checks.function("step", step)
        super().__init__(step)
        for index, tensor in enumerate(inputs):
            checks.tensor(f"inputs[{index}]", tensor)
        self._device = inputs[0].device if inputs else torch.device("cpu")
        self._likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        self._inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: Any = None
        if self._device.type != "cuda":
            self._eagerly(f"no CUDA graphs on {self._device.type}")
        else:
            self.memory = sum(tensor.nbytes for tensor in self._inputs)

    @property
    def captured(self) -> bool:
        """Whether the graph is made: from the third call on."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Any:
        likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        if likes != self._likes:
            raise ValueError(f"inputs: expected tensors like those it was made for, {self._likes}, got {likes}")
        if self.reason is not None:
            return self._function(*inputs)
        device = self._device
        with self._alone(device), torch.cuda.device(device):
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given, non_blocking=True)
            self._calls += 1
            if self._calls <= 2:
                return self._warm_up(watch=self._calls == 2)
            if self._graph is None:
                try:
                    self._graph, self._results = self._record(lambda: self._function(*self._inputs), device)
                except Exception as error:
                    self._eagerly(f"capturing failed ({type(error).__name__}: {str(error).splitlines()[0]})")
                    torch.cuda.synchronize(device)
                    return self._function(*inputs)
            self._graph.replay()
            return map_tensors(torch.clone, self._results)

    def _warm_up(self, watch: bool) -> Any:
        """A step on the stream that the graph will be made on, and in its settings: else what torch.compile made would
        be compiled anew while the graph is made, which fails."""
        found: list[Any] = []
        with self._beside(self._device), no_autocast_cache():
            reason = waits_in(lambda: found.append(self._function(*self._inputs)), watch)
        torch.cuda.empty_cache()  # else what lasts (an optimizer's state) would be put among it and hold all of it
        if reason is not None:
            self._eagerly(reason)
        return map_tensors(torch.clone, found[0])


def _kind(value: Any) -> Any:
    """What of an argument decides about a graph: all but the numbers in a tensor and the value of a float."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return float if type(value) is float else (type(value), value)


def _settings() -> tuple[Any, ...]:
    """What of torch's and our own settings decides about a graph."""
    return (
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        get_backend(),
    )


def _static(value: Any, floats: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, Tensor):  # a number on the CPU would be a constant of the graph
        return torch.empty_like(value, device=device if value.ndim == 0 else None, requires_grad=False)
    return torch.empty((), dtype=floats, device=device) if type(value) is float else value


def _hindrance(modules: Iterable[nn.Module], values: Iterable[Any]) -> str | None:
    """Why a call can't be captured, as far as can be told before."""
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return "forward hooks of all modules, which a graph would not run"
    modules = list(modules)
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook of a {type(module).__name__}, which a graph would not run"
    tensors = [value for value in values if isinstance(value, Tensor)]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors + parameters):
        return "gradients are asked for; call it under torch.no_grad()"
    if len({t.device for t in tensors if t.ndim}) > 1:
        return "the tensors are on several devices"
    return None


def _modules(function: Any) -> list[nn.Module]:
    """The modules that a callable holds: itself, its attributes, what it is bound to or closes over."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found |= {id(module): module for module in each.modules()}
        elif isinstance(each, functools.partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
        elif callable(each) and not isinstance(each, type):
            waiting += [cell.cell_contents for cell in getattr(each, "__closure__", None) or () if _is_filled(cell)]
            waiting += [getattr(each, "__self__", None), getattr(each, "__wrapped__", None)]
            waiting += vars(each).values() if hasattr(each, "__dict__") else []
    return list(found.values())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
