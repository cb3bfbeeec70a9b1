"""Calibrates the MSM of a run after its last step (`dynamask/train/calibration.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dynamask.config import TrainConfig
from dynamask.data.augment import TrainingItems
from dynamask.distributed import World
from dynamask.flops import PAPER_GMACS
from dynamask.model import DynaMask
from dynamask.msm import MaskSwitch
from dynamask.train.calibration import CalibrationSamples, calibrate, collect_samples
from dynamask.train.checkpointer import Checkpointer
from dynamask.train.interruption import Interruption
from dynamask.train.log import ProgressReport
from dynamask.train.progress import Progress
from runtime.calibration import read_costs

UNITS = {"gmacs": "GMAC", "ms": "ms"}
"""Of costs: its name in figures and in sentences."""


@dataclass
class Calibrator:
    """Calibrates a run's MSM, once for each step, number of detections and costs; only in the first process, whose weights are saved."""

    recipe: TrainConfig
    model: DynaMask
    items: TrainingItems
    progress: Progress
    checkpointer: Checkpointer
    report: ProgressReport
    interruption: Interruption
    world: World

    def __post_init__(self) -> None:
        """Read the costs.

        Raises:
            InputError: `train.calibration_costs` has none.
        """
        file, own = self.recipe.calibration_costs, self.model.mask_branch
        self._costs_file = None if file is None else str(file)
        # A cost for each grid, `[4] float32`.
        self._measured = None if file is None or own.msm is None else torch.from_numpy(read_costs(file).graph_costs()[0])

    def calibrate_if_due(self) -> bool:
        """Calibrate unless it is disabled, done, or the model has no MSM; False if it was interrupted, in any process."""
        return not self.world.any(not self._done())

    def _done(self) -> bool:
        requested = self.recipe.calibration_detections
        before = self.progress.calibration
        # Runs of earlier versions name no costs: theirs were GMAC.
        settings = {"step": self.progress.step, "requested": requested, "costs": self._costs_file}
        already = before is not None and {"costs": None, **before}.items() >= settings.items()
        msm = self.model.mask_branch.msm if requested and not already else None
        if msm is None:
            return True
        # The model changes: evaluations of this step are no longer valid.
        self.progress.evaluations = [entry for entry in self.progress.evaluations if entry["step"] != self.progress.step]
        figures = self._calibrate(msm, requested) if self.world.is_main else {}
        if figures is None:
            return False
        self.progress.calibration = {**settings, **figures}
        self.checkpointer.save()
        return True

    def _calibrate(self, msm: MaskSwitch, requested: int) -> dict[str, Any] | None:
        self.report.start(0, requested)
        samples = collect_samples(self.model, self.items, requested, self.recipe.seed, self.report.calibration, self.interruption)
        if samples is None:
            return None
        found = len(samples.regions)
        figures: dict[str, Any] = {"detections": found}
        if samples.informative:
            figures |= self._fit(msm, samples)
        else:
            self.report.message(
                f"The MSM is not calibrated: none of {found} detections on the training images has a better mask at one grid than at "
                "another; train the masks for longer first."
            )
        if found < requested:
            self.report.message(f"The training images gave {found} of the {requested} detections of train.calibration_detections.")
        return figures

    def _fit(self, msm: MaskSwitch, samples: CalibrationSamples) -> dict[str, Any]:
        paper_gmacs = self.recipe.target_paper_gmacs
        own = self.model.mask_branch.costs
        costs, unit = (own, "gmacs") if self._measured is None else (self._measured.to(own.device), "ms")
        # The same share of the largest grid's cost in every unit.
        target = paper_gmacs / PAPER_GMACS[-1] * float(costs[-1])
        figures = calibrate(msm, samples, costs, target, self.recipe.seed)
        mean_cost = figures.pop("mean_cost")
        self.report.message(
            f"Calibrated the MSM on {len(samples.regions)} detections: it explains {figures['variance_explained_held_out']:.0%} of the "
            f"variance of IoU between grids on the {figures['held_out']} held out, {figures['variance_explained']:.0%} on the others; its "
            f"grids cost {mean_cost:.4f} {UNITS[unit]} per instance (target {target:.4f})."
        )
        if mean_cost > target:
            self.report.message(
                f"train.target_paper_gmacs={paper_gmacs:g} is less than the smallest grid costs, so every instance gets 14 x 14: raise it."
            )
        return {f"target_{unit}": target, f"mean_{unit}": mean_cost, **figures}
