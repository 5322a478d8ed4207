"""One training step of hdit.train, in two halves: gradients, and what they do to the weights.

In between the host looks whether loss and gradient are finite, which is the step's one wait for a GPU: weights that
give others are neither changed nor saved. On a GPU each half is a CUDA graph (hdit.capture), not waiting for Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hdit import processes
from hdit._runtime import compile_kernels
from hdit.config import HDiTConfig
from hdit.cuda_graphs import CapturedStep, capture_step
from hdit.denoiser import Denoiser
from hdit.ema import ema_update
from hdit.model import HDiT
from hdit.recipe import Recipe, batch_loss


class TrainingStep:
    """A step of `model` by `recipe`. captured: as CUDA graphs, where the model is on a GPU; the same numbers result.

    With several processes (see hdit.processes) each takes its part of a batch, and the gradients are the means of all.
    """

    def __init__(
        self,
        model: HDiT,
        ema_model: HDiT,
        optimizer: torch.optim.Optimizer,
        config: HDiTConfig,
        recipe: Recipe,
        captured: bool = True,
    ) -> None:
        self._model, self._ema_model, self._optimizer = model, ema_model, optimizer
        self._config, self._recipe = config, recipe
        self._denoiser = Denoiser(processes.replicated(model), config.sigma_data, recipe.loss_weighting)
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        self._captured = captured and next(model.parameters()).is_cuda
        self._halves: dict[str, CapturedStep] = {}
        self._compiled = False

    def gradients(self, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
        """Computes them for a batch, clipped; returns its loss and their norm before. Random by torch's generators.

        pixels uint8 [B, C, H, W] and labels int64 [B], on the model's device. Raises ValueError as batch_loss does, and
        ConnectionError if another process is gone.
        """
        if not self._compiled:
            self._compiled = True
            with torch.random.fork_rng([pixels.device] if pixels.is_cuda else []):
                alone = Denoiser(self._model, self._config.sigma_data, self._recipe.loss_weighting)
                compile_kernels(
                    pixels.device, lambda: (self._compute(pixels, labels, alone), self._optimizer.zero_grad())
                )
        half = self._halves.get("gradients")
        if half is not None and not half.captured:
            self._optimizer.zero_grad()  # else the last ones would hold the memory that capturing gives back
        with processes.connected():
            loss, norm = self._run("gradients", self._compute, pixels, labels).tolist()  # the step's one wait for a GPU
        return loss, norm

    def update(self, step: int) -> None:
        """Makes step `step`, counted from 0, with these gradients: the optimizer's and the average's."""
        factor, decay = self._recipe.lr_factor(step), self._recipe.ema_decay(step)
        rates = [learning_rate * factor for learning_rate in self._learning_rates]
        device = next(self._model.parameters()).device
        if device.type != "cuda":
            self._take(rates, decay)
            return
        # float64, since 1 - 0.9999 has four digits left in float32
        numbers = torch.tensor([*rates, decay], dtype=torch.float64).to(device, non_blocking=True)
        self._run("update", lambda numbers: self._take(numbers[:-1].float().unbind(), numbers[-1]), numbers)

    def _run(self, name: str, half: Callable[..., Any], *inputs: Tensor) -> Any:
        if not self._captured:
            return half(*inputs)
        if name not in self._halves:
            self._halves[name] = capture_step(half, *inputs)
        return self._halves[name](*inputs)

    def _compute(self, pixels: Tensor, labels: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        self._optimizer.zero_grad()
        loss = batch_loss(denoiser or self._denoiser, self._config, pixels, labels, self._recipe)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.max_gradient_norm)
        return torch.stack([loss.detach(), norm])

    def _take(self, rates: Any, decay: float | Tensor) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        for group, learning_rate in zip(self._optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate
        ema_update(self._model, self._ema_model, decay)
