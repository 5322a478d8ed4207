"""Every operator on a GPU against the float64 reference: random cases, poisoned outputs, determinism, compile keys,
kernels run.

`pytest -m gpu --record FILE` also writes what was seen (cases, worst errors) as JSON.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hdit_kernels import reference, testing
from tests.cases import Case, Generator
from tests.cases.neighborhood_attention import na2d_strips

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("few_large_tiles")]

CASES = 60  # of each operator and kind of dtypes: 240 an operator
KINDS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "mixed": (torch.bfloat16, True),  # float32 parameters beside bfloat16 activations
}


def _operators() -> dict[str, Generator]:
    modules = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[!_]*.py"))
    families = [importlib.import_module(f"tests.cases.{name}").OPERATORS for name in modules]
    return {name: generator for family in families for name, generator in family.items()}


OPERATORS = _operators()


def in_groups(name: str) -> Any:
    """A test of every operator, in two groups: a process spends seconds on its first torch.compile or profile."""
    group = {operator: pytest.mark.xdist_group(f"{name} {i % 2}") for i, operator in enumerate(OPERATORS)}
    return pytest.mark.parametrize("operator", [pytest.param(each, marks=mark) for each, mark in group.items()])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every buffer that a launcher allocates starts as NaN."""
    with testing.poisoned():
        yield


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values in the same layouts: `.cuda()` alone would close the gaps of a strided tensor."""
    moved = {}
    for name, tensor in tensors.items():
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        storage = torch.as_strided(tensor, (tensor.storage_offset() + extent,), (1,), 0).cuda()
        moved[name] = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return moved


def run(case: Case, function, tensors: dict[str, torch.Tensor], cotangents: list[torch.Tensor] | None):
    """Outputs, gradients by input name, and the cotangents used (drawn when not given)."""
    leaves = {n: t if n in case.frozen else t.detach().requires_grad_() for n, t in tensors.items()}
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    cotangents = cotangents or [torch.randn_like(o, memory_format=torch.contiguous_format) for o in outputs]
    learned = [n for n in leaves if n not in case.frozen]
    cast = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, [leaves[n] for n in learned], cast)
    return outputs, dict(zip(learned, gradients, strict=True)), cotangents


def variants(generate: Generator, seed: int, largest: float = math.inf) -> list[Case]:
    """Of 40 cases, bfloat16 with float32 parameters, the first of each choice of optional tensors, none too large."""
    sizes, values = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = (generate(sizes, values, torch.bfloat16, True) for _ in range(40))
    small = [case for case in drawn if max(t.numel() for t in case.tensors.values()) <= largest]
    return list({frozenset(case.tensors): case for case in reversed(small)}.values())


def plain_inputs(case: Case, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t if name in case.frozen else t.to(dtype) for name, t in tensors.items()}


def beside_references(
    case: Case, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each output, with and without gradients, and gradient: ours, the reference in float64, plain PyTorch in dtype."""
    outputs, gradients, cotangents = run(case, case.call, tensors, None)
    with torch.no_grad():
        alone = case.call(**tensors)
    exact = {name: t.double() for name, t in tensors.items()}
    wanted, wanted_gradients, _ = run(case, case.reference, exact, cotangents)
    with testing.plain():
        plain, plain_gradients, _ = run(case, case.reference, plain_inputs(case, tensors, dtype), cotangents)
    found = {f"out{i}": triple for i, triple in enumerate(zip(outputs, wanted, plain, strict=True))}
    alone = alone if isinstance(alone, tuple) else (alone,)
    found |= {f"alone{i}": triple for i, triple in enumerate(zip(alone, wanted, plain, strict=True))}
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape, case.description
        found["d" + name] = (gradient, wanted_gradients[name], plain_gradients[name])
    return found


def check_random_cases(operator: str, generate: Generator, kind: str, seed: int, record) -> None:
    """Error of every output and gradient ≤ max(2 · plain PyTorch's in the same dtype, the dtype's floor)."""
    dtype, mixed = KINDS[kind]
    sizes, values = random.Random(f"{operator} {kind} {seed}"), torch.Generator().manual_seed(seed)
    worst: tuple[float, float, str, str] = (0.0, 0.0, "", "")  # error over its limit, error, tensor, case
    pools: dict[str, tuple[testing.Pool, testing.Pool]] = {}
    for _ in range(CASES):
        case = generate(sizes, values, dtype, mixed)
        tensors = on_gpu(case.tensors)
        for name, (result, want, simple) in beside_references(case, tensors, dtype).items():
            if name.removeprefix("d") in case.pooled:
                ours, theirs = pools.setdefault(name, (testing.Pool(), testing.Pool()))
                ours.add(result, want)
                theirs.add(simple, want)
                continue
            error = testing.relative_error(result, want)
            limit = testing.allowed(dtype, testing.relative_error(simple, want))
            worst = max(worst, (error / limit, error, name, case.description))
    for name, (ours, theirs) in pools.items():
        limit = testing.allowed(dtype, theirs.relative)
        worst = max(worst, (ours.relative / limit, ours.relative, name, "pooled over the cases"))
    ratio, error, tensor, where = worst
    seen = dict(cases=CASES, worst_ratio=min(ratio, 1e9), error=min(error, 1e9), worst_tensor=tensor, case=where)
    record("operators", operator, kind, seen)
    assert ratio <= 1.0, f"{tensor} is {ratio:.2f} times its limit: {where}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_random_cases(operator: str, kind: str, seed: int, poisoned: None, record) -> None:
    check_random_cases(operator, OPERATORS[operator], kind, seed, record)


@pytest.fixture
def few_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One to three strips, of which every other time all run at once, as those of large images; small cases have
    strips of one tile.
    """
    hopper_plan = pytest.importorskip("hdit_kernels.neighborhood_attention.hopper_plan")
    forward = importlib.import_module("hdit_kernels.neighborhood_attention.hopper_forward")

    def strips_down(columns: int, tiles: int, *rest: object) -> tuple[int, bool]:
        return min(tiles, 1 + columns % 3), columns % 2 == 0

    caches = hopper_plan.plan_strips, forward._plan_forward
    monkeypatch.setattr(hopper_plan, "strips_down", strips_down)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_strips_that_run_at_once(kind: str, seed: int, poisoned: None, few_strips: None, record) -> None:
    """Walked down and up by turns by Hopper's kernels; the others have none."""
    check_random_cases("na2d_strips", na2d_strips, kind, seed, record)


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic(operator: str, seed: int, record) -> None:
    """20 runs, forward and backward, bitwise equal."""
    for case in variants(OPERATORS[operator], seed):
        tensors = on_gpu(case.tensors)
        first, first_gradients, cotangents = run(case, case.call, tensors, None)
        for _ in range(19):
            outputs, gradients, _ = run(case, case.call, tensors, cotangents)
            assert all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True)), case.description
            assert all(torch.equal(gradients[n], first_gradients[n]) for n in gradients), case.description
    record("deterministic", operator, "bfloat16", dict(runs=20))


@in_groups("profiled")
def test_runs_only_our_kernels(operator: str, seed: int, record) -> None:
    """Forward and backward launch Triton kernels of ours and named cuBLAS products, and nothing else: no copies, no
    casts, save those that feed_forward needs for cuBLAS: weights rounded, and x where addmm adds the product to it.
    """
    names: list[str] = []
    for case in variants(OPERATORS[operator], seed):
        tensors = {
            n: t.contiguous().detach().requires_grad_(n not in case.frozen) for n, t in on_gpu(case.tensors).items()
        }
        cotangents = both_ways(case, tensors, None)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            both_ways(case, tensors, cotangents)
            torch.cuda.synchronize()
        on_cuda = torch.autograd.DeviceType.CUDA
        names += [event.name for event in profiler.events() if event.device_type == on_cuda]
    names = sorted(set(names))
    record("kernels", operator, "mixed", names)
    assert names
    foreign = [name for name in names if not name.startswith("_") and not is_cublas(name)]
    if operator == "feed_forward":
        foreign = [name for name in foreign if "Memcpy DtoD" not in name and "copy_kernel" not in name]
    assert not foreign, f"kernels that are not ours: {foreign}"


def both_ways(case: Case, tensors: dict[str, torch.Tensor], cotangents: list[torch.Tensor] | None):
    """Forward and backward with nothing around them; the cotangents used (drawn when not given)."""
    outputs = case.call(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = cotangents or [torch.randn_like(o) for o in outputs]
    torch.autograd.grad(outputs, [t for n, t in tensors.items() if n not in case.frozen], cotangents)
    return cotangents


def is_cublas(name: str) -> bool:
    return any(word in name.lower() for word in ("gemm", "gemv", "cutlass", "cublas", "nvjet", "splitkreduce"))


@in_groups("compiled")
def test_compiles_whole_and_under_autocast(operator: str, seed: int) -> None:
    """torch.compile(fullgraph=True) gives the same numbers forward and backward, with and without autocast."""
    case = OPERATORS[operator](random.Random(seed), torch.Generator().manual_seed(seed), torch.bfloat16, True)
    tensors = on_gpu(case.tensors)
    outputs, gradients, cotangents = run(case, case.call, tensors, None)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **inputs: case.call(**inputs), fullgraph=True)
    found, found_gradients, _ = run(case, compiled, tensors, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(outputs, found, strict=True)), case.description
    assert all(torch.equal(gradients[n], found_gradients[n]) for n in gradients), case.description
    with torch.autocast("cuda", torch.bfloat16):
        again, _, _ = run(case, case.call, tensors, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)), case.description


@pytest.mark.parametrize("operator", OPERATORS)
def test_compile_keys(operator: str, seed: int, record) -> None:
    """Sizes, batches and strides compile nothing new: over 30 cases of a dtype at most 10 binaries of any one kernel.
    Those of `na2d` differ by head_dim, entry of the configurations and alignment, of which a seed may draw 8.
    """
    from triton.runtime.jit import JITFunction

    from hdit_kernels import launch

    compiled: dict[str, int] = {}
    do_compile = JITFunction._do_compile

    def counting(self, *args, **kwargs):
        compiled[self.fn.__name__] = compiled.get(self.fn.__name__, 0) + 1
        return do_compile(self, *args, **kwargs)

    sizes, values = random.Random(seed), torch.Generator().manual_seed(seed)
    with mock.patch.object(JITFunction, "_do_compile", counting):
        for function in kernels_of_the_package():
            function.device_caches.clear()
        launch._compiled.clear()
        for _ in range(30):
            case = OPERATORS[operator](sizes, values, torch.bfloat16, False)
            run(case, case.call, on_gpu(case.tensors), None)
    record("compile_keys", operator, "bfloat16", compiled)
    assert compiled and max(compiled.values()) <= 10, compiled


def kernels_of_the_package():
    """All that can run on this GPU."""
    from triton.runtime.jit import JITFunction

    from hdit_kernels import launch
    from hdit_kernels.neighborhood_attention import hopper_plan

    on_hopper = (
        launch.gpu_family(torch.device("cuda", torch.cuda.current_device())) == "hopper" and hopper_plan.gluon_known()
    )
    for path in Path(reference.__file__).parent.rglob("*.py"):
        name = ".".join(path.relative_to(Path(reference.__file__).parent.parent).with_suffix("").parts)
        of_hopper = "hopper" in name.rpartition(".")[2].split("_")
        portable = name.endswith(("_triton", "triton_forward", "triton_backward", "triton_additional", "launch"))
        if of_hopper and on_hopper or portable:
            module = importlib.import_module(name)
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))


def test_float64_takes_the_reference(seed: int) -> None:
    for operator, generate in OPERATORS.items():
        case = generate(random.Random(seed), torch.Generator().manual_seed(seed), torch.float32, False)
        exact = {n: t.double() for n, t in on_gpu(case.tensors).items()}
        outputs, gradients, cotangents = run(case, case.call, exact, None)
        wanted, wanted_gradients, _ = run(case, case.reference, exact, cotangents)
        for found, want in [
            *zip(outputs, wanted, strict=True),
            *((gradients[n], wanted_gradients[n]) for n in gradients),
        ]:
            assert testing.relative_error(found, want) <= testing.FLOOR[torch.float64], operator


def test_tf32_only_when_torch_allows_it(seed: int) -> None:
    """float32 products are IEEE unless torch's own setting says tf32, read at every call."""
    from hdit_kernels import na2d

    query, key, value = (torch.randn(1, 16, 16, 2, 64, device="cuda") for _ in range(3))
    wanted, _ = reference.na2d(query.double(), key.double(), value.double(), (7, 7))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        exact = testing.relative_error(na2d(query, key, value, 7), wanted)
        matmul.fp32_precision = "tf32"
        coarse = testing.relative_error(na2d(query, key, value, 7), wanted)
    finally:
        matmul.fp32_precision = before
    assert exact < 2e-6 and 1e-5 < coarse < 3e-3


def test_head_dims_that_no_kernel_takes() -> None:
    from hdit_kernels import na2d

    query, value = (torch.randn(1, 8, 8, 1, dim, device="cuda") for dim in (264, 520))
    with pytest.raises(ValueError, match="head_dim: expected a multiple of 8, at most 256, on a GPU, got 264"):
        na2d(query, query, query, 3)
    with pytest.raises(ValueError, match="value: expected a head_dim .* at most 512, on a GPU, got 520"):
        na2d(query[..., :8], query[..., :8], value, 3)
