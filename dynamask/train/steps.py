"""Takes a step of SGD, and ends a run whose step fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dynamask.data.augment import TrainingItems
from dynamask.data.canvas import collate
from dynamask.distributed import World
from dynamask.train.learner import Learner
from dynamask.train.log import save_batch
from dynamask.train.progress import DivergenceGuard
from dynamask.train.schedule import Schedule, StepSampler
from runtime.errors import DynaMaskError

SMALLEST_SCALE = 1.0
"""With mixed precision: a gradient that overflows even at this loss scale would not be finite in float32 either."""


class StepFault(Exception):
    """A loss or gradient with which training cannot continue. The losses are those of all processes, and so all of them raise it."""


@dataclass
class Stepper:
    """Takes the steps of a schedule."""

    learner: Learner
    schedule: Schedule
    guard: DivergenceGuard
    world: World

    def take(self, model: nn.Module, step: int, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Any]:
        """Take the step with the number `step`, counted from 0.

        Args:
            model: the learner's model, or the module that averages its gradients over the processes.
            images: `[B, 3, H, W] float32`.
            targets: of each image `boxes`, `labels`, `masks`.

        Returns:
            The record for the log; `step` is counted from 1 there, and the losses are means over all processes.

        Raises:
            StepFault: a loss or the gradient is not finite, or the loss diverges.
        """
        rate, phase = self.schedule.rate(step), self.schedule.phase(step)
        torch.manual_seed(self.schedule.seed(step, self.world.rank))
        self.learner.model.train()
        self.learner.model.phase = phase
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        losses = self._losses(model, images, targets)
        means = self.world.mean(torch.stack([loss.detach().float() for loss in losses.values()]))
        values = dict(zip(losses, means.tolist(), strict=True))
        self._check(values, phase)
        self._descend(torch.stack(list(losses.values())).sum())
        return {
            "step": step + 1,
            "epoch": round(self.schedule.epoch(step), 4),
            "phase": phase,
            "loss": sum(values.values()),
            "losses": values,
            "rate": rate,
            "statistics": dict(self.learner.model.statistics),
        }

    def _losses(self, model: nn.Module, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = self.world.device
        moved = [{name: target[name].to(device, non_blocking=True) for name in ("boxes", "labels", "masks")} for target in targets]
        with torch.autocast(device.type, dtype=torch.float16, enabled=self.learner.scaler.is_enabled()):
            losses: dict[str, Tensor] = model(images.to(device, non_blocking=True), moved)
        return losses

    def _check(self, values: dict[str, float], phase: int) -> None:
        """Raise `StepFault` if the losses of the whole batch are not finite or diverge."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not all(map(math.isfinite, values.values())):
            raise StepFault(f"a loss is not finite ({shown})")
        guard = self.guard
        if guard.diverges(phase, sum(values.values())):
            raise StepFault(f"the loss diverges: its mean is {guard.mean:.4g} and was {guard.lowest:.4g} ({shown})")

    def _descend(self, loss: Tensor) -> None:
        """Step down the gradient, or raise `StepFault` if it is not finite."""
        optimizer, scaler = self.learner.optimizer, self.learner.scaler
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.learner.model.parameters(), self.schedule.config.clip_norm)
        # With a scaler, a gradient that overflows is expected: it skips the step and lowers the scale.
        if not math.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE):
            raise StepFault(f"the gradient is not finite (norm {float(norm)})")
        scaler.step(optimizer)
        scaler.update()


@dataclass
class FaultReport:
    """Ends a run whose step failed, with the batch of the step saved as `failed-batch.safetensors`."""

    output: Path
    schedule: Schedule
    items: TrainingItems
    world: World

    def end(self, fault: StepFault, step: int, images: Tensor, targets: list[dict[str, Any]]) -> NoReturn:
        """Save the whole batch of the step, counted from 0, and raise; every process of the run calls this.

        Raises:
            DynaMaskError: says what is wrong and where the batch is.
        """
        path = self.output / "failed-batch.safetensors"
        outcome = f"its batch is in {path}"
        try:
            if self.world.is_main:
                images, targets = self._whole_batch(step, images, targets)
                fields = {"step": step + 1, "phase": self.schedule.phase(step), "fault": str(fault)}
                save_batch(path, images, targets, fields)
        except DynaMaskError as error:
            outcome = f"its batch could not be saved ({str(error).rstrip('.')})"
        finally:
            self.world.any(False)  # torchrun ends the other processes as soon as one has ended: they wait here for the file
        raise DynaMaskError(
            f"Step {step + 1}: {fault}; {outcome}, the last checkpoint in {self.output}; "
            "look at the batch's data, lower train.learning_rate, or raise train.warmup_steps."
        ) from fault

    def _whole_batch(self, step: int, images: Tensor, targets: list[dict[str, Any]]) -> tuple[Tensor, list[dict[str, Any]]]:
        """The batch with the other processes' part, which is read again: it depends on the step alone."""
        if self.world.size == 1:
            return images, targets
        keys = next(iter(StepSampler(self.schedule, step, turned=self.items.turned)))
        return collate([self.items[key] for key in keys])
