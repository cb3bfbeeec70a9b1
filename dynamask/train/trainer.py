"""The training loop: two phases, checkpoints, exact resuming, evaluation, calibration of the MSM (paper, section 4.1).

`Trainer.run` is the loop. Its parts have modules of their own: `steps`, `validator`, `checkpointer`, `calibrator`, `metrics`, `skipped`,
`interruption`; they share the run's `Progress`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamask.config import Config
from dynamask.data.coco import left_out_counts, left_out_lines
from dynamask.distributed import World, averaged, joined
from dynamask.train.calibrator import Calibrator
from dynamask.train.checkpoint import TrainingState
from dynamask.train.checkpointer import STATE_FILE, Checkpointer, state_to_resume
from dynamask.train.datasets import training_and_validation, training_batches
from dynamask.train.interruption import Interruption, interruption
from dynamask.train.learner import build_learner
from dynamask.train.log import ProgressReport
from dynamask.train.metrics import Metrics, interrupted, write_metrics
from dynamask.train.progress import Progress
from dynamask.train.schedule import Schedule
from dynamask.train.skipped import SkippedImages
from dynamask.train.steps import FaultReport, StepFault, Stepper
from dynamask.train.validator import Validator
from runtime.errors import DynaMaskError, InputError, first_line


def train(config: Config, output: Path, resume: bool = False, quiet: bool = False, deadline: float | None = None) -> dict[str, Any]:
    """Train a model and write everything to the folder `output` (docs/training.md lists the files).

    The samples, their augmentation and all other randomness depend only on the seed, the epoch and the step, so that a resumed
    run does the steps that an uninterrupted one would have done (bit for bit on the CPU). SIGINT and SIGTERM end the run after
    the current step, with everything saved. Started by `torchrun`, the processes share every batch; only the first one writes, evaluates
    and reports, and a run that torchrun starts again after a failure resumes by itself.

    Args:
        config: the model, the data and the recipe.
        output: the run's folder.
        resume: continue the run in `output`.
        quiet: print nothing.
        deadline: when the run ends as after a signal, on the clock of `time.monotonic`.

    Returns:
        The contents of `metrics.json`: `steps`, `total_steps`, `interrupted`, `losses` (means by epoch), `ap_by_epoch`, `uniform` (by
        grid), `calibration` (of the MSM, in GMAC or ms per instance, or None), `skipped` (images), `data` (by part, the
        images and annotations used and left out), `checkpoint`, `best`, `seconds`. Empty in all processes but the first.

    Raises:
        InputError: the output folder holds another run or cannot be written, there is nothing to resume, the data cannot be used, the
            schedule has no step, more than a tenth of the images is broken, or the batch cannot be shared by the processes.
        DynaMaskError: a loss or gradient is not finite or diverges, a file cannot be written, or another process of the run has died; the
            last checkpoint is kept.
    """
    if config.train.threads > 0:
        torch.set_num_threads(config.train.threads)
    with joined() as world, interruption(deadline) as interrupt, ProgressReport(quiet or not world.is_main) as report:
        if config.train.batch % world.size:
            raise InputError(
                f"train.batch is {config.train.batch}, which {world.size} processes cannot share equally: "
                f"--set it to a multiple of {world.size}."
            )
        state = state_to_resume(config, output, resume or (world.restarted and (output / STATE_FILE).exists()))
        trainer = Trainer(config, output, state, report, interrupt, world)
        try:
            return trainer.run()
        except RuntimeError as error:
            if not world.lost_process(error):
                raise
            raise DynaMaskError(
                f"Step {trainer.progress.step + 1}: another process of this run has ended, and so this one ends "
                f"({first_line(error)}); resume from the last checkpoint with: dynamask train --output {output} --resume"
            ) from error


class Trainer:
    """A run: its parts, and the loop over its steps."""

    def __init__(
        self, config: Config, output: Path, state: TrainingState | None, report: ProgressReport, interrupt: Interruption, world: World
    ) -> None:
        """Load the data, build the model and all parts; continue where `state` left off, if given.

        Raises:
            InputError: the data or weights cannot be used, or there is nothing to do.
        """
        self.output, self.workers, self.interruption, self.world = output, config.data.workers, interrupt, world
        self.items, val_set = training_and_validation(config)
        parts = {"train": self.items.items.dataset, "val": val_set}
        self.data_counts = left_out_counts(parts)
        for line in left_out_lines(parts):
            report.message(line)
        self.schedule = Schedule(config.train, len(self.items))
        self.progress = Progress() if state is None else Progress.from_json(state.progress)
        learner = build_learner(config, val_set.classes, world.device, state, output / STATE_FILE, report.message)
        self.model = learner.model
        self._check_schedule(config)

        self.metrics = Metrics(output, report, self.progress, self.schedule, world.is_main)
        self.stepper = Stepper(learner, self.schedule, self.progress.guard, world)
        self.fault_report = FaultReport(output, self.schedule, self.items, world)
        self.skipped_images = SkippedImages(output, self.items, self.progress, self.metrics, world)
        self.checkpointer = Checkpointer(output, config, learner, self.schedule, self.progress, world)
        self.validator = Validator(
            output, config, self.model, val_set, self.schedule, self.progress, self.checkpointer, self.metrics, interrupt, world
        )
        self.calibrator = Calibrator(config.train, self.model, self.items, self.progress, self.checkpointer, report, interrupt, world)

    def run(self) -> dict[str, Any]:
        """Train to the end of the schedule, or until a signal comes; returns what `train` returns."""
        try:
            self.checkpointer.write_config()
            with averaged(self.model, self.world) as model:
                self._loop(model)
            return self._finish()
        finally:
            self.metrics.close()

    def _loop(self, model: nn.Module) -> None:
        batches = training_batches(self.items, self.schedule, self.progress.step, self.workers, self.world)
        while self.progress.step < self.schedule.total_steps:
            self.validator.evaluate_if_due()
            if self.world.any(self.interruption()):
                return
            self._step(model, *next(batches))
            self.checkpointer.save_if_due()
        if self.calibrator.calibrate_if_due():
            self.validator.evaluate_if_due()

    def _step(self, model: nn.Module, images: Tensor, targets: list[dict[str, Any]]) -> None:
        self.skipped_images.note(targets)
        try:
            record = self.stepper.take(model, self.progress.step, images, targets)
        except StepFault as fault:
            self.fault_report.end(fault, self.progress.step, images, targets)
        self.progress.step += 1
        self.metrics.step(record)

    def _finish(self) -> dict[str, Any]:
        """Save what an interrupted run has done, and write `metrics.json`."""
        self.metrics.keep_time()
        if interrupted(self.progress, self.schedule):
            self.checkpointer.save()
            self.metrics.message(f"Stopped after step {self.progress.step}; resume with: dynamask train --output {self.output} --resume")
        return write_metrics(self.output, self.progress, self.schedule, self.data_counts) if self.world.is_main else {}

    def _check_schedule(self, config: Config) -> None:
        recipe = config.train
        calibrates = recipe.calibration_detections and self.model.mask_branch.msm is not None
        if self.schedule.total_steps == 0 and not calibrates:
            raise InputError(
                f"{recipe.phase1_epochs + recipe.phase2_epochs:g} epochs come to no step of {recipe.batch} images: raise "
                "train.phase2_epochs or lower train.batch, or set train.calibration_detections to calibrate only (a Mask R-CNN head has "
                "no MSM to calibrate)."
            )
