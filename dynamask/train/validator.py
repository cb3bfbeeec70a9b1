"""Evaluates the model of a run when the schedule says so, keeps the best, and draws its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.config import Config
from dynamask.data.coco import LabelledDataset
from dynamask.distributed import World
from dynamask.model import DynaMask
from dynamask.train.checkpointer import Checkpointer
from dynamask.train.evaluate import evaluate
from dynamask.train.interruption import Interruption
from dynamask.train.log import read_lines
from dynamask.train.metrics import Metrics
from dynamask.train.progress import Progress
from dynamask.train.schedule import Schedule

UNIFORM_GRIDS = (14, 112)
"""Grids for all instances at which the finished model is evaluated, besides the routed ones."""


@dataclass
class Validator:
    """Evaluates a run's model; the first process does, while the others wait."""

    output: Path
    config: Config
    model: DynaMask
    val_set: LabelledDataset
    schedule: Schedule
    progress: Progress
    checkpointer: Checkpointer
    metrics: Metrics
    interruption: Interruption
    world: World

    def evaluate_if_due(self) -> None:
        """Evaluate the model if the schedule says so and it has not been done, also in a run that was stopped just before."""
        if not self.schedule.evaluates(self.progress.step) or self.progress.evaluated:
            return
        if self.world.is_main:
            self._evaluate()
        if self.world.any(self.progress.evaluated) and not self.world.is_main:
            self.progress.evaluations.append({"step": self.progress.step})

    def _evaluate(self) -> None:
        entry = self._figures()
        if entry is None:
            return
        if self._is_best(entry):
            self.checkpointer.save_best(entry)
        self.progress.evaluations.append(entry)
        self.checkpointer.save()
        self.metrics.evaluation(entry)
        self._draw()
        self.metrics.message(f"epoch {entry['epoch']:.2f}: mask AP {_mask_ap(entry):.1f} on {entry['images']} images")

    def _figures(self) -> dict[str, Any] | None:
        """The figures of the model as it is, after the last step with those of uniform grids; None if interrupted."""
        figures = self._run()
        if figures is None:
            return None
        step, calibration = self.progress.step, self.progress.calibration
        entry = {"step": step, "epoch": self.schedule.epoch(step), **figures}
        if step == self.schedule.total_steps:
            grids = UNIFORM_GRIDS if self.model.mask_branch.msm is not None else ()
            entry["uniform"] = {str(grid): self._run(grid) for grid in grids}
            if None in entry["uniform"].values():
                return None
        entry["calibrated"] = calibration is not None and calibration["step"] == step
        return entry

    def _run(self, grid: int | None = None) -> dict[str, Any] | None:
        images = self.config.train.evaluate_images
        return evaluate(self.model, self.val_set, self.config, images, grid=grid, stop=self.interruption)

    def _is_best(self, entry: dict[str, Any]) -> bool:
        """Whether the mask AP is the highest so far. Calibration changes the grids that are chosen, and so a calibrated model is compared
        with calibrated ones only."""
        rivals = [rival for rival in self.progress.evaluations if rival.get("calibrated") or not entry["calibrated"]]
        return _mask_ap(entry) > max(map(_mask_ap, rivals), default=-1.0)

    def _draw(self) -> None:
        """Draw the model's pictures to `pictures/` and TensorBoard."""
        if not self.config.train.pictures:
            return
        from dynamask.train.pictures import draw_pictures, write_png  # imports matplotlib, which a run without pictures does not need

        lines = list(read_lines(self.output / "log.jsonl"))
        for name, image in draw_pictures(self.model, self.val_set, self.config, lines, self.progress.evaluations).items():
            stem = name if name == "curves" else f"{self.progress.step:08d}-{name}"
            write_png(self.output / "pictures" / f"{stem}.png", image)
            self.metrics.picture(name, image)


def _mask_ap(entry: dict[str, Any]) -> float:
    return float(entry["segm"]["AP"] or 0.0)
