"""Whole networks as contestants: how they are built, checked against float64, counted and measured.

Every network is called as model(x, level, class_cond=…). Weights are float32; a GPU computes in bfloat16 autocast, a
CPU in float32. What is measured of one pass:

GPU time     the summed durations of its kernels (copies and fills included) in torch.profiler: what the GPU works
wall time    from the call to the end of a synchronisation: what a user waits, launches and host code included
captured     the wall time of the same pass by hdit.capture or hdit.capture_step, on a GPU: see benchmarks/captured.py
kernels      how many of them it launches
peak memory  the most that the GPU's allocator holds during the pass, less what it held before the network was built:
             weights, inputs, gradients, optimizer and averaged weights included, what the benchmark itself holds not
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import captured, ceilings, correctness, timing
from benchmarks.captured import Pass, Watched
from benchmarks.measure import DeviceLost
from benchmarks.peers import kdiffusion
from benchmarks.peers.dit import DiT
from benchmarks.runs import Row, Run
from benchmarks.timing import Effort, Stats
from hdit import Denoiser, HDiT, HDiTConfig
from hdit._runtime import autocast
from hdit.ema import ema_update
from hdit.recipe import Recipe, batch_loss
from hdit_kernels import backend, testing

WEIGHT_STD = 0.02
DIT_CHECKED = 128  # pixels: float64 attention keeps every score of every layer, at 256² more than 80 GB of DiT-XL's
LONG = 20.0  # seconds of a first pass on a CPU after which two samples have to do
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads

Inputs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Network:
    """A contestant.

    build: side of the image in pixels -> model, on torch's default device. config: of the HDiT that it is or stands
    beside, which says what images, classes and noise levels it gets. checked: the side at which a GPU compares it with
    float64. counted: a model of the same architecture whose FLOPs can be counted, like build (which it is by default).
    margin: how many times plain PyTorch's error it may have.
    """

    name: str
    build: Callable[[int], nn.Module]
    config: HDiTConfig
    checked: int
    counted: Callable[[int], nn.Module] | None = None
    margin: float = 2.0

    @property
    def side(self) -> int:
        return self.config.image_size[0]


def hdit(config: HDiTConfig, name: str = "ours") -> Network:
    return Network(name, lambda side: HDiT(config), config, checked=config.image_size[0])


def k_diffusion(config: HDiTConfig, path: Path | None) -> Network:
    """The reference HDiT (see peers/kdiffusion.py); building it raises ImportError where it isn't available.

    Its margin is double: under autocast it rounds positions and Fourier features to bfloat16, which ours keep wider.
    """

    def build(side: int) -> nn.Module:
        return kdiffusion.build(config, path)

    ours = hdit(config)
    return replace(ours, name="k-diffusion", build=build, counted=ours.build, margin=2 * ours.margin)


def dit(size: str, config: HDiTConfig) -> Network:
    """DiT in pixel space; size: "S", "B", "L" or "XL" (Peebles & Xie 2023, table 1), with patches of 4x4 pixels."""
    width, depth, heads = DIT_SIZES[size]
    config = replace(config, num_classes=config.num_classes or 1001)  # DiT has classes always

    def build(side: int) -> nn.Module:
        return DiT(
            side, channels=config.in_channels, width=width, depth=depth, heads=heads, num_classes=config.num_classes
        )

    return Network(f"DiT-{size}/4", build, config, checked=min(config.image_size[0], DIT_CHECKED))


@functools.cache
def dit_like(config: HDiTConfig) -> Network:
    """The DiT whose number of parameters is nearest to HDiT's, as a ratio."""
    own = parameters(hdit(config))
    return min((dit(size, config) for size in DIT_SIZES), key=lambda n: abs(math.log(parameters(n) / own)))


# Counting


@functools.cache
def parameters(network: Network) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in (network.counted or network.build)(network.side).parameters())


def flops(network: Network, batch: int, backward: bool) -> int:
    """FLOPs of a forward pass, or of forward and backward: counted on the meta device, 2 per multiply-accumulate."""
    return batch * _flops(network, backward)


@functools.cache
def _flops(network: Network, backward: bool) -> int:
    with torch.device("meta"), torch.set_grad_enabled(backward):
        model = (network.counted or network.build)(network.side)
        x, level, class_cond = draw(network.config, network.side, 1)
        with FlopCounterMode(display=False) as counter:
            out = model(x, level, class_cond=class_cond)
            if backward:
                out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def draw(config: HDiTConfig, side: int, batch: int) -> Inputs:
    """Images, noise levels and classes on torch's default device."""
    x, level = torch.randn(batch, config.in_channels, side, side), torch.randn(batch).exp()
    return x, level, torch.zeros(batch, dtype=torch.int64) if config.num_classes else None


def randomise(model: nn.Module) -> nn.Module:
    """No weight stays zero: products of zeros hide errors and draw less power, which lets a GPU clock higher."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=WEIGHT_STD)
    return model


def precision(device: torch.device) -> str:
    return "bfloat16 autocast" if device.type == "cuda" else "float32"


# Checking


@dataclass(frozen=True)
class Check:
    """Relative errors against float64, of a network's output and of its parameters' gradients as one vector (None where
    only the forward pass is measured); and what is allowed: the network's margin times the error of the same network in
    plain PyTorch and the same precision."""

    output: float
    allowed_output: float
    gradient: float | None = None
    allowed_gradient: float | None = None

    def errors(self, direction: str) -> dict[str, tuple[float, float]]:
        """{what: (error, what is allowed)} of all that counts for a pass."""
        found = {"output": (self.output, self.allowed_output)}
        if direction != "forward" and self.gradient is not None and self.allowed_gradient is not None:
            found["gradient"] = (self.gradient, self.allowed_gradient)
        return found


def check(networks: Sequence[Network], device: torch.device, backward: bool = True) -> dict[str, Check | str]:
    """What is known of the correctness of networks that share one architecture: a Check, or why there is none, by name.

    All get the first one's weights (with load_state_dict, strictly) and the same image: of the first one's `checked`
    side, on a CPU the smallest that it takes. backward: whether the gradients are checked, too.
    """
    try:
        return _check(networks, device, backward)
    except Exception as error:  # without a reference nothing can be said of any
        return {network.name: f"not checked against float64: {timing.one_line(error)}" for network in networks}
    finally:
        release(device)


def _check(networks: Sequence[Network], device: torch.device, backward: bool) -> dict[str, Check | str]:
    first, side = networks[0], checked_side(networks[0], device)
    torch.manual_seed(0)
    with device:
        model = randomise(first.build(side))
        inputs = draw(first.config, side, 1)
        cotangent = torch.randn(1, first.config.out_channels, side, side) if backward else None
    state = model.state_dict()
    wide = tuple(t.double() if t is not None and t.is_floating_point() else t for t in inputs)
    with testing.large_tiles(device):
        wanted = _evaluate(copy.deepcopy(model).double(), wide, cotangent)
        with mock.patch.object(backend, "chosen", "reference"):
            plain = _errors(_evaluate(model, inputs, cotangent), wanted)
    floor = correctness.FLOOR[torch.bfloat16 if device.type == "cuda" else torch.float32]
    del model

    found: dict[str, Check | str] = {}
    for network in networks:
        try:
            with device:
                contestant = network.build(side)
            contestant.load_state_dict(state)
            _poison(device)
            errors = _errors(_evaluate(contestant, inputs, cotangent), wanted)
        except Exception as error:  # whatever a peer raises is its own failure, not the run's
            found[network.name] = timing.one_line(error)
        else:
            allowed = [max(network.margin * error, floor) for error in plain]
            found[network.name] = Check(*(value for pair in zip(errors, allowed, strict=True) for value in pair))
    return found


def checked_side(network: Network, device: torch.device) -> int:
    """The side in pixels of the image that `check` compares with float64."""
    if device.type == "cpu":
        return min(network.checked, smallest_side(network.config))
    return network.checked


def _poison(device: torch.device) -> None:
    """Fills half of a GPU's free memory with NaN of every float dtype and gives it to the caching allocator, which
    hands it out next: what a kernel leaves unwritten shows."""
    release(device)
    if device.type == "cuda":
        torch.full((int(room(device)) // 8,), -1, dtype=torch.int32, device=device)


def smallest_side(config: HDiTConfig) -> int:
    """The side in pixels of the smallest square image whose grids hold every level's window."""
    step = config.patch_size[0] * 2 ** (len(config.levels) - 1)
    for side in range(step, config.image_size[0], step):
        try:
            config.grids(side, side)
        except ValueError:
            continue
        return side
    return config.image_size[0]


def _evaluate(model: nn.Module, inputs: tuple[Any, ...], cotangent: Tensor | None) -> list[dict[str, Tensor]]:
    """The output, dropout off; and, given a cotangent, the gradient of each parameter."""
    x, level, class_cond = inputs
    model.eval().zero_grad()
    with autocast(x.device), torch.set_grad_enabled(cotangent is not None):  # autocast leaves float64 as it is
        out = model(x, level, class_cond=class_cond)
    if cotangent is None:
        return [{"": out}]
    out.backward(cotangent.to(out.dtype))
    return [{"": out.detach()}, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}]


def _errors(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> list[float]:
    return [_relative(a, b) for a, b in zip(found, wanted, strict=True)]


def _relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """‖found − wanted‖ / ‖wanted‖ over all tensors together; infinite if one is missing or not finite."""
    if found.keys() != wanted.keys():
        return math.inf
    error = torch.stack([(found[name].double() - tensor).square().sum() for name, tensor in wanted.items()]).sum()
    norm = torch.stack([tensor.square().sum() for tensor in wanted.values()]).sum()
    ratio = (error / norm).sqrt().item()
    return ratio if math.isfinite(ratio) else math.inf


# Measuring


def prepare(network: Network, direction: str, batch: int, device: torch.device, capturing: bool = False) -> Pass:
    """A model on the device, ready: each call runs one pass. direction: "forward", "forward+backward" or "step".

    capturing: by hdit.capture or hdit.capture_step, of those in captured.FIRST. The same weights and inputs each time.
    """
    torch.manual_seed(0)
    with device:
        model = randomise(network.build(network.side))
        x, level, class_cond = draw(network.config, network.side, batch)
    if direction == "step":
        step, given = _training(model, network.config, batch, device)
        run = _capture().capture_step(step, *given) if capturing else step
        return Pass(lambda: run(*given), run if capturing else None)
    if direction == "forward":
        model.eval()
        run = _capture().capture(model) if capturing else model

        def forward() -> Tensor:
            with torch.no_grad(), autocast(device):
                return run(x, level, class_cond=class_cond)

        return Pass(forward, run if capturing else None)
    model.train()
    cotangent = torch.randn(batch, network.config.out_channels, *x.shape[2:], device=device)

    def both() -> None:
        model.zero_grad()
        with autocast(device):
            out = model(x, level, class_cond=class_cond)
        out.backward(cotangent.to(out.dtype))

    return Pass(both)


def _capture() -> Any:
    """hdit.cuda_graphs, which older revisions, of benchmarks.compare, don't have."""
    return importlib.import_module("hdit.cuda_graphs")


def _training(
    model: nn.Module, config: HDiTConfig, batch: int, device: torch.device
) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """One step of hdit.train: loss, backward, clipping, AdamW and the average of the weights; and a batch for it. It
    returns the loss and the gradient's norm."""
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    groups = list(getattr(model, "param_groups", model.parameters)())
    fused = device.type == "cuda"
    recipe = Recipe()
    optimizer = recipe.optimizer(groups, fused)
    denoiser = Denoiser(model, config.sigma_data, recipe.loss_weighting)
    with device:
        pixels = torch.randint(0, 256, (batch, config.in_channels, *config.image_size), dtype=torch.uint8)
        labels = torch.zeros(batch, dtype=torch.int64)

    def step(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = batch_loss(denoiser, config, pixels, labels, recipe)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        ema_update(model, average, recipe.ema_decay(1000))
        return loss.detach(), norm

    return step, (pixels, labels)


@dataclass(frozen=True)
class Measurement:
    """Of one pass. first_call_s: seconds, compilation included. sdpa: whose kernels scaled_dot_product_attention ran.
    gpu_us, kernels, peak_bytes and sdpa are None on a CPU.
    """

    first_call_s: float
    gpu_us: Stats | None
    wall_us: Stats
    kernels: int | None = None
    peak_bytes: int | None = None
    sdpa: str | None = None


class TooSlow(Exception):
    """A pass took longer than one is willing to wait. first_call_s: seconds of the first one."""

    def __init__(self, which: str, took: float, patience: float, first_call_s: float) -> None:
        super().__init__(f"its {which} pass took {took:.2g} s, more than the {patience:.2g} s allowed")
        self.first_call_s = first_call_s


def measure_call(
    call: Callable[[], object], device: torch.device, seconds: float, before: int = 0, patience: float = math.inf
) -> Measurement:
    """Measures a pass after its first call, which may compile kernels: about so many seconds of wall time, and on a GPU
    half as many under the profiler. before: bytes that were held before the network was built, see `held`.

    Raises TooSlow where the first call takes more than `patience` seconds, on a GPU (which may have compiled) also the
    second.
    """
    first = took = timing.seconds_of(call, device)
    if first > patience and device.type == "cuda":
        took = timing.seconds_of(call, device)
    if took > patience:
        raise TooSlow("second" if device.type == "cuda" else "first", took, patience, first)
    effort = Effort(width=0.03, fewest=5, most=50, seconds=seconds)
    if device.type != "cuda":
        # First calls were seen to take four times as long, so they are never among the samples.
        effort = replace(effort, least=2 if first > LONG else fewest_calls(device))
        return Measurement(first, None, timing.sample(lambda: _wall(call, device), effort))
    torch.cuda.reset_peak_memory_stats(device)
    wall = timing.sample(lambda: _wall(call, device), effort)
    peak = torch.cuda.max_memory_allocated(device) - before
    kernels: list[str] = []

    def profiled() -> float:
        microseconds, kernels[:] = profile(call, device)
        return microseconds

    least = effort.fewest if wall.median < 1e6 else effort.least  # three tell little, five cost hardly more
    gpu = timing.sample(profiled, replace(effort, width=0.01, most=20, seconds=seconds / 2, least=least))
    return Measurement(first, gpu, wall, len(kernels), peak, sdpa_of(kernels))


def profile(call: Callable[[], object], device: torch.device) -> tuple[float, list[str]]:
    """(summed microseconds, names) of what a call runs on the GPU: kernels, copies and fills."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in profiler.events() or [] if e.device_type == on_gpu and not e.is_user_annotation]
    if not events:
        raise RuntimeError("torch.profiler saw nothing on the GPU")
    return sum(event.time_range.elapsed_us() for event in events), [event.name for event in events]


SDPA = {  # in the names of its kernels; those of packages that are called directly are others
    r"cudnn.*sdpa": "cuDNN",
    r"pytorch_flash::": "FlashAttention",
    r"fmha_cutlass[FB]": "memory-efficient attention",
}


def sdpa_of(kernels: Sequence[str]) -> str | None:
    """Whose kernels scaled_dot_product_attention ran, if any."""
    for pattern, whose in SDPA.items():
        if any(re.search(pattern, kernel) for kernel in kernels):
            return whose
    return None


def _wall(call: Callable[[], object], device: torch.device) -> float:
    return timing.seconds_of(call, device) * 1e6


def attempt(
    blank: Row,
    network: Network,
    checked: Check | str,
    run: Run,
    device: torch.device,
    seconds: float,
    patience: float = math.inf,
) -> Row:
    """Measures what blank names (it has the pass and the batch), and adds the row to the run; an error is its status.

    patience: seconds of a pass beyond which it stays "not measured": it isn't tried where a matrix product of as many
    FLOPs would take longer, and left as `measure_call` has it.

    Raises DeviceLost, the row added, when the GPU no longer answers.
    """
    row = blank | _attempted(blank, network, checked, run, device, seconds, patience)
    run.put(row)
    run.save()
    try:
        timing.synchronize(device)
    except RuntimeError as lost:
        message = f"{row['case']}, {network.name}: the GPU no longer answers: {timing.one_line(lost)}"
        raise DeviceLost(message, [row]) from lost
    return row


def _attempted(
    blank: Row,
    network: Network,
    checked: Check | str,
    run: Run,
    device: torch.device,
    seconds: float,
    patience: float,
) -> dict[str, Any]:
    direction, batch = blank["pass"], blank["settings"]["batch"]
    if isinstance(checked, str):
        return {"status": "failed", "reason": checked}
    errors = checked.errors(direction)
    what, (error, allowed) = max(errors.items(), key=lambda item: item[1][0] / item[1][1])
    found: dict[str, Any] = {"error": error if math.isfinite(error) else None, "allowed_error": allowed}
    if error > allowed:
        return found | {"status": "failed", "reason": f"wrong {what}: error {error:.1e}, allowed {allowed:.1e}"}
    rate = run.session["ceilings"].get(ceilings.KEY["bfloat16" if device.type == "cuda" else "float32"])
    floor_us = blank["flops"] / (rate * 1e6) if rate else None
    if floor_us is not None and floor_us / 1e6 > patience:
        reason = f"at least {floor_us / 1e6:.2g} s a pass, more than the {patience:.2g} s allowed"
        return found | {"status": "not measured", "reason": reason}
    eager = []
    call: Callable[[], object] | None = None
    try:
        before = held(device)
        call = prepare(network, direction, batch, device)
        if device.type == "cuda" and direction in captured.FIRST:
            call = Watched(call, captured.FIRST[direction])
            eager = call.results
        measured = measure_call(call, device, seconds, before, patience)
    except TooSlow as slow:
        return found | {"status": "not measured", "reason": str(slow), "first_call_s": slow.first_call_s}
    except Exception as failure:  # of one measurement; the others go on
        status = "out of memory" if timing.out_of_memory(failure) else "failed"
        return found | {"status": status, "reason": timing.one_line(failure)}
    finally:
        call = None
        release(device)
    details = [blank["detail"], f"SDPA by {measured.sdpa}" if measured.sdpa else None]
    if eager and measured.wall_us.median > captured.LONGEST * 1e6:
        details.append(f"{captured.NOT}a pass takes more than {captured.LONGEST:g} s")
    elif eager:
        allowed = max(bar for _, bar in errors.values())
        again = functools.partial(prepare, network, direction, batch, device, capturing=True)
        graph = captured.measure(again, direction, eager, allowed, device, seconds / 2)
        release(device)
        if isinstance(graph, str):
            details.append(captured.NOT + graph.replace("; ", ", "))
        else:
            found["captured_us"] = graph.to_dict()
    return found | {
        "status": "ok",
        "detail": "; ".join(filter(None, details)) or None,
        "gpu_us": measured.gpu_us.to_dict() if measured.gpu_us else None,
        "wall_us": measured.wall_us.to_dict(),
        "first_call_s": measured.first_call_s,
        "floor_us": floor_us,
        "ratio_to_floor": (measured.gpu_us or measured.wall_us).median / floor_us if floor_us else None,
        "peak_bytes": measured.peak_bytes,
        "kernels": measured.kernels,
        "images_per_s": batch / (measured.wall_us.median / 1e6),
    }


def fewest_calls(device: torch.device, seconds: float = 0.0) -> int:
    """How many passes attempt() makes at least, after the first, of so many seconds each; on a GPU of those of a second
    or more two less, on a CPU of LONG ones one."""
    if device.type != "cuda":
        return 3
    return 8 if seconds > captured.LONGEST else 8 + max(captured.FIRST.values()) + captured.LEAST


def peak(network: Network, direction: str, batch: int, device: torch.device) -> int:
    """Peak memory of one pass, bytes, as `measure` has it; raises torch.OutOfMemoryError."""
    before = held(device)
    call = prepare(network, direction, batch, device)
    call()  # the first needs more, which is not counted at one image either
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held(device: torch.device) -> int:
    """Bytes of device memory that are allocated once all that can be given back is; 0 on a CPU."""
    release(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def room(device: torch.device) -> float:
    """Bytes of device memory that a new model may count on."""
    return 0.92 * torch.cuda.mem_get_info(device)[0]


def release(device: torch.device) -> None:
    """Gives a GPU's memory of dropped models back, and cuBLAS's workspaces, which each network makes anew."""
    if device.type == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        timing.release(device)
