"""Calibrates the MSM of a run after its last step (`dynamask/train/calibration.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamask.config import TrainConfig
from dynamask.data.augment import TrainingItems
from dynamask.distributed import World
from dynamask.model import DynaMask
from dynamask.msm import MaskSwitch
from dynamask.train.calibration import CalibrationSamples, calibrate, collect_samples
from dynamask.train.checkpointer import Checkpointer
from dynamask.train.interruption import Interruption
from dynamask.train.log import ProgressReport
from dynamask.train.progress import Progress


@dataclass
class Calibrator:
    """Calibrates a run's MSM, once for each step and number of detections; only in the first process, whose weights are saved."""

    recipe: TrainConfig
    model: DynaMask
    items: TrainingItems
    progress: Progress
    checkpointer: Checkpointer
    report: ProgressReport
    interruption: Interruption
    world: World

    def calibrate_if_due(self) -> bool:
        """Calibrate unless it is disabled, done, or the model has no MSM; False if it was interrupted, in any process."""
        return not self.world.any(not self._done())

    def _done(self) -> bool:
        requested = self.recipe.calibration_detections
        before = self.progress.calibration
        already = before is not None and (before["step"], before["requested"]) == (self.progress.step, requested)
        msm = self.model.mask_branch.msm if requested and not already else None
        if msm is None:
            return True
        # The model changes: evaluations of this step are no longer valid.
        self.progress.evaluations = [entry for entry in self.progress.evaluations if entry["step"] != self.progress.step]
        figures = self._calibrate(msm, requested) if self.world.is_main else {}
        if figures is None:
            return False
        self.progress.calibration = {"step": self.progress.step, "requested": requested, **figures}
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

    def _fit(self, msm: MaskSwitch, samples: CalibrationSamples) -> dict[str, float]:
        branch, paper_gmacs = self.model.mask_branch, self.recipe.target_paper_gmacs
        target = branch.gmacs_of_paper(paper_gmacs)
        figures = calibrate(msm, samples, branch.costs, target, self.recipe.seed)
        self.report.message(
            f"Calibrated the MSM on {len(samples.regions)} detections: it explains {figures['variance_explained']:.0%} of the variance of "
            f"IoU between grids, and its grids cost {figures['mean_gmacs']:.4f} GMAC per instance (target {target:.4f})."
        )
        if figures["mean_gmacs"] > target:
            self.report.message(
                f"train.target_paper_gmacs={paper_gmacs:g} is less than the smallest grid costs, so every instance gets 14 x 14: raise it."
            )
        return {"target_gmacs": target, **figures}
