"""The training loop: two phases, checkpoints, exact resuming, calibration of the MSM, evaluation by epoch (paper, section 4.1)."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import cv2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader

from dynamask.config import MAY_CHANGE_ON_RESUME, Config, first_difference
from dynamask.data.augment import TOLERATED_SHARE, TrainingItems
from dynamask.data.canvas import collate
from dynamask.data.cityscapes import CityscapesDataset
from dynamask.data.coco import CocoDataset, LabelledDataset, Part, coco_2017, left_out_counts, left_out_lines
from dynamask.data.lvis import lvis_v1
from dynamask.data.shapes import ShapesDataset
from dynamask.distributed import World, averaged, joined
from dynamask.model import DynaMask, build_model
from dynamask.train.calibration import calibrate, collect_samples
from dynamask.train.checkpoint import (
    TrainingState,
    is_checkpoint,
    load_checkpoint,
    load_state,
    load_tensors,
    restore_momentum,
    save_checkpoint,
    save_state,
    start_from,
)
from dynamask.train.evaluate import evaluate
from dynamask.train.log import ProgressReport, RunLog, losses_by_epoch, read_lines, save_batch
from dynamask.train.schedule import Schedule, StepSampler
from dynamask.weights import load_weights
from runtime.errors import DynaMaskError, InputError
from runtime.files import atomic_path, check_folder, write_json

UNIFORM_GRIDS = (14, 112)
"""Grids that the finished model is also judged at, beside the routed one."""
VAL_SEED_OFFSET = 1_000_003
"""Between the seed of the shapes to learn from and that of the shapes to judge on."""
DIVERGED = 10.0
"""A run has diverged when its mean loss is so many times the lowest it was in the phase (or 1, if it was lower)."""
LOSS_MEMORY = 0.98
"""Weight of the past in that mean: a single loss must be 500 times as high."""
MASK_BRANCH = "mask_branch."
"""How the names of the tensors begin that are no detector's."""
SMALLEST_SCALE = 1.0
"""With mixed precision, a gradient that overflows even at this scale of the loss is not finite in itself."""


def train(config: Config, output: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a model and leave everything in `output`: `config.yaml`, `model.safetensors` (the latest), `best.safetensors` (by mask AP),
    `state.safetensors` (to resume from), `log.jsonl`, `tensorboard/`, `metrics.json`; `pictures/`, `skipped.jsonl` (images that could not
    be read: others stood in for them) and `failed-batch.safetensors` where there is something to put there.

    The samples, their augmentation and all other randomness depend only on the seed, the epoch and the step, so that a resumed
    run does the steps that an uninterrupted one would have done (bit for bit on the CPU). SIGINT and SIGTERM end the run after
    the current step, with everything saved. Started by `torchrun`, the processes share every batch; the first one alone writes, evaluates
    and reports, and a run that torchrun starts again after a failure resumes by itself.

    Returns:
        What `metrics.json` holds: `steps`, `total_steps`, `interrupted`, `losses` (means by epoch), `ap_by_epoch`, `uniform` (by
        grid), `calibration` (of the MSM, in GMAC an instance, or None), `skipped` (images), `data` (by part, what was
        used and left out), `checkpoint`, `best`, `seconds`.

    Raises:
        InputError: the output folder holds another run or cannot be written, there is nothing to resume, the data cannot be used, the
            schedule has no step, more than a tenth of the images is broken, or the batch cannot be shared by the processes.
        DynaMaskError: a loss or gradient is not finite or diverges, a file cannot be written, or another process of the run has died; the
            last checkpoint is kept.
    """
    if config.train.threads > 0:
        torch.set_num_threads(config.train.threads)
    with joined() as world, _interruption() as interruption, ProgressReport(quiet or not world.is_main) as report:
        if config.train.batch % world.size:
            raise InputError(
                f"train.batch is {config.train.batch}, which {world.size} processes cannot share alike: "
                f"--set it to a multiple of {world.size}."
            )
        state = _state_to_resume(config, output, resume or (world.restarted and (output / "state.safetensors").exists()))
        run = Run.prepared(config, output, state, report, interruption, world)
        if run.schedule.total_steps == 0 and not (config.train.calibration_detections and run.model.mask_branch.msm is not None):
            epochs = config.train.phase1_epochs + config.train.phase2_epochs
            raise InputError(
                f"{epochs:g} epochs come to no step of {config.train.batch} images: raise train.phase2_epochs or lower "
                "train.batch, or set train.calibration_detections to calibrate only (a Mask R-CNN head has no MSM to calibrate)."
            )
        try:
            return run.to_the_end()
        except RuntimeError as error:
            if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise DynaMaskError(
                    f"Step {run.step + 1}: another process of this run has ended, so this one does ({str(error).splitlines()[0]}); "
                    f"go on from the last checkpoint with: dynamask train --output {output} --resume"
                ) from error
            raise


@dataclass
class Interruption:
    """Set by the first SIGINT or SIGTERM."""

    requested: bool = False

    def __call__(self) -> bool:
        return self.requested


@dataclass
class _LossWatch:
    """Whether the loss diverges. Part of the state, so that a resumed run judges as the uninterrupted one."""

    phase: int = 0
    mean: float = 0.0
    lowest: float = 0.0

    def diverges(self, phase: int, loss: float) -> bool:
        """Take in a step's loss. Each phase has losses of its own, and begins anew."""
        if phase != self.phase:
            self.phase, self.mean, self.lowest = phase, loss, loss
        self.mean = LOSS_MEMORY * self.mean + (1 - LOSS_MEMORY) * loss
        self.lowest = min(self.lowest, self.mean)
        return self.mean > DIVERGED * max(self.lowest, 1.0)


@dataclass
class Run:
    """One run, between two of its steps."""

    config: Config
    output: Path
    schedule: Schedule
    model: DynaMask
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    train_set: TrainingItems
    val_set: LabelledDataset
    report: ProgressReport
    interruption: Interruption
    world: World
    step: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    """Indices of the images that could not be read so far."""
    loss_watch: _LossWatch = field(default_factory=_LossWatch)
    calibration: dict[str, Any] | None = None
    """Of the MSM, once done: `step`, `requested` detections, `detections`, `target_gmacs` and the figures of `calibrate`."""

    @classmethod
    def prepared(
        cls, config: Config, output: Path, state: TrainingState | None, report: ProgressReport, interruption: Interruption, world: World
    ) -> Run:
        """Data, model and optimiser, at the beginning or where `state` left off."""
        train_set, val_set = _train_set(config), validation_set(config)
        if train_set.classes != val_set.classes:
            part = config.data.val_annotations or config.data.root
            raise InputError(f"{part}: what is judged on has other classes than what is learnt from: use one list in both.")
        for line in left_out_lines({"train": train_set.items.dataset, "val": val_set}):
            report.message(line)
        device = world.device
        torch.manual_seed(config.train.seed)
        model = build_model(config, val_set.classes)
        if state is None:
            _initialise(model, config, report)
        else:
            load_tensors(model, state.weights, output / "state.safetensors")
        model.to(device)
        optimizer = torch.optim.SGD(_parameter_groups(model, config), lr=0.0, momentum=config.train.momentum)
        scaler = GradScaler(device.type, enabled=device.type == "cuda")
        run = cls(
            config,
            output,
            Schedule(config.train, len(train_set)),
            model,
            optimizer,
            scaler,
            train_set,
            val_set,
            report,
            interruption,
            world,
        )
        if state is not None:
            restore_momentum(model, optimizer, state.momentum)
            if state.scaler:
                scaler.load_state_dict(state.scaler)
            run.step, run.seconds, run.evaluations = (state.progress[name] for name in ("step", "seconds", "evaluations"))
            run.skipped = set(state.progress.get("skipped", []))
            run.loss_watch = _LossWatch(**state.progress.get("loss_watch", {}))
            run.calibration = state.progress.get("calibration")
        return run

    def to_the_end(self) -> dict[str, Any]:
        """Step until the schedule ends or a signal comes, and write what was found."""
        started = time.monotonic() - self.seconds
        log = None
        if self.world.is_main:
            self._write_config()
            log = RunLog(self.output, self.step)
        try:
            self.report.start(self.step, self.schedule.total_steps)
            with averaged(self.model, self.world) as model:
                for images, targets in self.batches():
                    self._evaluate_if_due(log)
                    if self.world.any(self.interruption()):
                        break
                    self._note_skipped([entry for target in targets for entry in target["skipped"]], log)
                    record = self.take_step(model, images, targets)
                    self.seconds = time.monotonic() - started
                    if log is not None:
                        log.step({**record, "seconds": round(self.seconds, 3)})
                    self.report.step(record, self.config.train.batch)
                    if self.schedule.saves(self.step):
                        self._save()
                else:
                    if not self.world.any(not self._calibrate()):
                        self._evaluate_if_due(log)
            self.seconds = time.monotonic() - started
            return self._finish()
        finally:
            if log is not None:
                log.close()

    def batches(self) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
        """The batches of the steps that are left, as the loader reads them: images `[B, 3, H, W] float32`, and a target an image."""
        workers = self.config.data.workers
        loader = DataLoader(
            self.train_set,
            batch_sampler=StepSampler(self.schedule, self.step, self.world.rank, self.world.size, self.train_set.turned),
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_begin_worker,
            pin_memory=self.world.device.type == "cuda",
        )
        yield from loader

    def take_step(self, model: nn.Module, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Any]:
        """One step of SGD; returns its record, with `step` counted from 1 and the losses of the whole batch."""
        device, rate = self.world.device, self.schedule.rate(self.step)
        torch.manual_seed(self.schedule.seed(self.step, self.world.rank))
        self.model.train()
        self.model.phase = self.schedule.phase(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        wanted = [{name: target[name].to(device, non_blocking=True) for name in ("boxes", "labels", "masks")} for target in targets]
        with torch.autocast(device.type, dtype=torch.float16, enabled=self.scaler.is_enabled()):
            losses: dict[str, Tensor] = model(images.to(device, non_blocking=True), wanted)
            total = torch.stack(list(losses.values())).sum()
        means = self.world.mean(torch.stack([loss.detach().float() for loss in losses.values()]))
        values = dict(zip(losses, means.tolist(), strict=True))
        fault = self._fault(values) or self._descend(total)
        if fault:
            self._stop(fault, images, targets)
        record = {
            "step": self.step + 1,
            "epoch": round(self.schedule.epoch(self.step), 4),
            "phase": self.schedule.phase(self.step),
            "loss": sum(values.values()),
            "losses": values,
            "rate": rate,
            "statistics": dict(self.model.statistics),
        }
        self.step += 1
        return record

    def _fault(self, values: dict[str, float]) -> str:
        """What is wrong with the losses of the whole batch, or nothing."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not all(map(math.isfinite, values.values())):
            return f"a loss is not finite ({shown})"
        watch = self.loss_watch
        if watch.diverges(self.schedule.phase(self.step), sum(values.values())):
            return f"the loss diverges: its mean is {watch.mean:.4g} and was {watch.lowest:.4g} ({shown})"
        return ""

    def _descend(self, total: Tensor) -> str:
        """Step down the gradient, if it is finite; what is wrong with it, or nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        # With a scaler, a gradient that overflows is expected: it skips the step and lowers the scale.
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE):
            return f"the gradient is not finite (norm {float(norm)})"
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return ""

    def _stop(self, fault: str, images: Tensor, targets: list[dict[str, Any]]) -> NoReturn:
        """End the run with its batch saved. The losses are those of all processes, and so is the fault: all of them come here."""
        path = self.output / "failed-batch.safetensors"
        kept = f"its batch is in {path}"
        try:
            if self.world.is_main:
                if self.world.size > 1:  # the other processes' part of the batch can be had again: it depends on the step alone
                    keys = next(iter(StepSampler(self.schedule, self.step, turned=self.train_set.turned)))
                    images, targets = collate([self.train_set[key] for key in keys])
                fields = {"step": self.step + 1, "phase": self.schedule.phase(self.step), "fault": fault}
                save_batch(path, images, targets, fields)
        except DynaMaskError as error:
            kept = f"its batch could not be saved ({str(error).rstrip('.')})"
        finally:
            self.world.any(False)  # torchrun ends the others as soon as one has: they wait for the file
        raise DynaMaskError(
            f"Step {self.step + 1}: {fault}; {kept}, the last checkpoint in {self.output}; "
            "look at the batch's data, lower train.learning_rate, or raise train.warmup_steps."
        )

    def _calibrate(self) -> bool:
        """Calibrate the MSM, once the last step is done; False if that was interrupted.

        The first process does, whose weights are those that are kept.
        """
        wanted = self.config.train.calibration_detections
        given = self.calibration is not None and (self.calibration["step"], self.calibration["requested"]) == (self.step, wanted)
        if not wanted or given or self.model.mask_branch.msm is None:
            return True
        self.evaluations = [entry for entry in self.evaluations if entry["step"] != self.step]
        figures = self._calibration(wanted) if self.world.is_main else {}
        if figures is None:
            return False
        self.calibration = {"step": self.step, "requested": wanted, **figures}
        self._save()
        return True

    def _calibration(self, wanted: int) -> dict[str, Any] | None:
        branch, seed = self.model.mask_branch, self.config.train.seed
        assert branch.msm is not None
        self.report.start(0, wanted)
        samples = collect_samples(self.model, self.train_set, wanted, seed, self.report.calibration, self.interruption)
        if samples is None:
            return None
        figures: dict[str, Any] = {"detections": len(samples.regions)}
        if not samples.informative:
            self.report.message(
                f"The MSM is not calibrated: none of {len(samples.regions)} detections on the training images has a better mask at one "
                "grid than at another; train the masks for longer first."
            )
        else:
            target = branch.gmacs_of_paper(self.config.train.target_paper_gmacs)
            figures |= {"target_gmacs": target, **calibrate(branch.msm, samples, branch.costs, target, seed)}
            self.report.message(
                f"Calibrated the MSM on {len(samples.regions)} detections: it explains {figures['variance_explained']:.0%} of the variance "
                f"of IoU between grids, and its grids cost {figures['mean_gmacs']:.4f} GMAC an instance (target {target:.4f})."
            )
            if figures["mean_gmacs"] > target:
                self.report.message(
                    f"train.target_paper_gmacs={self.config.train.target_paper_gmacs:g} is less than 14 x 14 costs, the smallest grid, "
                    "which every detection got: raise it."
                )
        if len(samples.regions) < wanted:
            self.report.message(
                f"The training images gave {len(samples.regions)} of the {wanted} detections of train.calibration_detections."
            )
        return figures

    def _note_skipped(self, skipped: list[dict[str, Any]], log: RunLog | None) -> None:
        """Count and list the step's broken images, those of all processes, in each of them."""
        fresh = {entry["index"]: entry for entry in self._gathered(skipped) if entry["index"] not in self.skipped}
        if not fresh:
            return
        self.skipped |= set(fresh)
        if log is not None:
            log.skipped({"step": self.step + 1, **entry} for entry in fresh.values())
        for entry in fresh.values():
            self.report.message(f"Skipped: {entry['reason']}")
        if len(self.skipped) > self.train_set.tolerated:
            latest = entry["reason"].rstrip(".")
            raise InputError(
                f"{len(self.skipped)} of the {len(self.train_set)} images to learn from are broken, more than {TOLERATED_SHARE:.0%} "
                f"({latest}): repair those listed in {self.output / 'skipped.jsonl'}, or leave them out of the annotations."
            )

    def _gathered(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of all processes, in each of them; exchanged as JSON, because nothing is unpickled."""
        if self.world.size == 1:
            return entries
        text = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8, device=self.world.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.world.device) for _ in range(self.world.size)]
        dist.all_gather(lengths, torch.tensor([len(text)], device=self.world.device))
        longest = max(int(length) for length in lengths)
        if longest == len("[]"):
            return []
        padded = F.pad(text, (0, longest - len(text)))
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded)
        texts = (bytes(row[: int(length)].tolist()) for row, length in zip(rows, lengths, strict=True))
        return [entry for text in texts for entry in json.loads(text)]

    def _evaluate_if_due(self, log: RunLog | None) -> None:
        """Judge the model if its step calls for it and that was not done yet: also true of a run that was stopped just before."""
        if not self.schedule.evaluates(self.step) or any(entry["step"] == self.step for entry in self.evaluations):
            return
        if log is not None:
            self._evaluate(log)
        judged = self.world.any(any(entry["step"] == self.step for entry in self.evaluations))
        if judged and log is None:
            self.evaluations.append({"step": self.step})

    def _evaluate(self, log: RunLog) -> None:
        figures = evaluate(self.model, self.val_set, self.config, self.config.train.evaluate_images, stop=self.interruption)
        if figures is None:
            return
        entry = {"step": self.step, "epoch": self.schedule.epoch(self.step), **figures}
        if self.step == self.schedule.total_steps:
            uniform = {
                str(grid): evaluate(
                    self.model, self.val_set, self.config, self.config.train.evaluate_images, grid=grid, stop=self.interruption
                )
                for grid in (UNIFORM_GRIDS if self.model.mask_branch.msm is not None else ())
            }
            if None in uniform.values():
                return
            entry["uniform"] = uniform
        # Calibration changes which grids are chosen: the best of the calibrated models, whatever was better before.
        entry["calibrated"] = self.calibration is not None and self.calibration["step"] == self.step
        rivals = [rival for rival in self.evaluations if rival.get("calibrated") or not entry["calibrated"]]
        if _mask_ap(entry) > max(map(_mask_ap, rivals), default=-1.0):
            self._save_checkpoint("best.safetensors", {"step": self.step, "epoch": entry["epoch"], "segm": entry["segm"]})
        self.evaluations.append(entry)
        self._save()
        log.evaluation(entry)
        self._draw(log)
        self.report.message(f"epoch {entry['epoch']:.2f}: mask AP {_mask_ap(entry):.1f} on {entry['images']} images")

    def _draw(self, log: RunLog) -> None:
        """Pictures of the model as it is, to `pictures/` and TensorBoard."""
        if not self.config.train.pictures:
            return
        from dynamask.train.pictures import draw_pictures, write_png  # matplotlib, which a run without pictures need not wait for

        drawn = draw_pictures(self.model, self.val_set, self.config, list(read_lines(log.path)), self.evaluations)
        for name, image in drawn.items():
            stem = name if name == "curves" else f"{self.step:08d}-{name}"
            write_png(self.output / "pictures" / f"{stem}.png", image)
            log.picture(name, image, self.step)

    def _save(self) -> None:
        """The state first: were the next write to fail, the run could still go on from here."""
        if not self.world.is_main:
            return
        progress = {"step": self.step, "seconds": self.seconds, "evaluations": self.evaluations}
        progress |= {"skipped": sorted(self.skipped), "loss_watch": asdict(self.loss_watch), "calibration": self.calibration}
        fields = {"config": self.config.model_dump(mode="json"), "classes": self.val_set.classes}
        fields |= {"scaler": self.scaler.state_dict(), "progress": progress}
        save_state(self.output / "state.safetensors", self.model, self.optimizer, fields)
        self._save_checkpoint("model.safetensors", {"step": self.step, "epoch": self.schedule.epoch(self.step)})

    def _save_checkpoint(self, name: str, extra: dict[str, Any]) -> None:
        save_checkpoint(self.output / name, self.model, self.config, self.val_set.classes, extra)

    def _write_config(self) -> None:
        with atomic_path(self.output / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def _finish(self) -> dict[str, Any]:
        interrupted = self.step < self.schedule.total_steps or not any(entry["step"] == self.step for entry in self.evaluations)
        if interrupted:
            self._save()
            self.report.message(f"Stopped after step {self.step}; go on with: dynamask train --output {self.output} --resume")
        if not self.world.is_main:
            return {}
        best = self.output / "best.safetensors"
        result = {
            "steps": self.step,
            "total_steps": self.schedule.total_steps,
            "interrupted": interrupted,
            "losses": losses_by_epoch(self.output),
            "ap_by_epoch": [{name: value for name, value in entry.items() if name != "uniform"} for entry in self.evaluations],
            "uniform": self.evaluations[-1].get("uniform") if self.evaluations else None,
            "calibration": self.calibration,
            "skipped": len(self.skipped),
            "data": left_out_counts({"train": self.train_set.items.dataset, "val": self.val_set}),
            "checkpoint": str(self.output / "model.safetensors"),
            "best": str(best) if best.exists() else None,
            "seconds": round(self.seconds, 1),
        }
        write_json(self.output / "metrics.json", result)
        return result


def _state_to_resume(config: Config, output: Path, resume: bool) -> TrainingState | None:
    path = output / "state.safetensors"
    if not resume:
        if path.exists():
            raise InputError(f"{output} already holds a run: pass --resume to go on with it, or choose another --output.")
        check_folder(output)
        return None
    if not path.exists():
        raise InputError(f"{path} does not exist: there is nothing to resume; leave --resume out to begin.")
    state = load_state(path)
    changed = first_difference(state.config, config, MAY_CHANGE_ON_RESUME)
    if changed is not None:
        name, before, now = changed
        raise InputError(f"{output} was trained with {name} {before}, not {now}: resume with the same value, or choose another --output.")
    return state


def _train_set(config: Config) -> TrainingItems:
    data = config.data
    if data.kind == "shapes":
        return TrainingItems(ShapesDataset(data.shapes_train, data.shapes_seed, *config.model.canvas), config)
    if data.kind == "coco" and data.root is None:
        return TrainingItems(_coco_dataset("train", data.train_annotations, data.train_images), config)
    return TrainingItems(_published_dataset(config, "train"), config)


def validation_set(config: Config) -> LabelledDataset:
    data = config.data
    if data.kind == "shapes":
        judged = min(data.shapes_val, config.train.evaluate_images)
        return ShapesDataset(judged, data.shapes_seed + VAL_SEED_OFFSET, *config.model.canvas)
    if data.kind == "coco" and data.root is None:
        return _coco_dataset("val", data.val_annotations, data.val_images)
    return _published_dataset(config, "val")


def _published_dataset(config: Config, part: Part) -> LabelledDataset:
    root = config.data.root
    if root is None:
        raise InputError(f"data.root is not given: --set data.root=FOLDER to the folder of {config.data.kind}.")
    if config.data.kind == "cityscapes":
        # Its ground truth is read from pictures: no more of them than will be judged.
        return CityscapesDataset(root, part, config.train.evaluate_images if part == "val" else None)
    return lvis_v1(root, part) if config.data.kind == "lvis" else coco_2017(root, part)


def _coco_dataset(part: str, annotations: Path | None, images: Path | None) -> CocoDataset:
    if annotations is None or images is None:
        raise InputError(f"data.{part}_annotations and data.{part}_images are not both given: --set them to the COCO file and its folder.")
    return CocoDataset(annotations, images)


def _initialise(model: DynaMask, config: Config, report: ProgressReport) -> None:
    """Weights to begin with: a DynaMask checkpoint's where they fit, else the backbone's.

    Raises:
        InputError: they cannot be had, or hold not the whole detector of a run that keeps it.
    """
    source = config.weights
    if is_checkpoint(source):
        afresh = start_from(model, load_checkpoint(source), source, MASK_BRANCH if config.weights_part == "detector" else None)
        misfits = [name for name in afresh if not name.startswith(MASK_BRANCH)]
        if misfits and config.keeps_detector:
            raise InputError(
                f"{source} has no {misfits[0]} that fits this model, whose detector is to be kept: give a checkpoint of the same preset and"
                " classes, or train the detector too (train.frozen_detector=false, weights_part=all)."
            )
        report.message(f"Started from {source}; {len(afresh)} tensors, of the mask branch or of another shape, begin afresh.")
    elif config.keeps_detector:
        if not Path(source).is_file():
            raise InputError(
                f"{source} is not a file: give the checkpoint whose detector is to be kept, a model.safetensors of dynamask train."
            )
        raise InputError(f"{source} is no DynaMask checkpoint, whose detector could be kept: give a model.safetensors of dynamask train.")
    else:
        report.message(f"Started from {load_weights(model, source)}.")


def _parameter_groups(model: DynaMask, config: Config) -> list[dict[str, Any]]:
    """Norms and biases (all that has one dimension) do not decay; the MSM has a rate of its own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("msm" in name, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.train.weight_decay if decays else 0.0,
            "rate_factor": config.train.msm_rate_factor if msm else 1.0,
        }
        for (msm, decays), parameters in groups.items()
    ]


def _mask_ap(entry: dict[str, Any]) -> float:
    return float(entry["segm"]["AP"] or 0.0)


@contextlib.contextmanager
def _interruption() -> Iterator[Interruption]:
    """The first SIGINT or SIGTERM sets the flag; a second one acts as it would have without us."""
    flag = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin_worker(worker: int) -> None:
    """Ctrl-C, and often SIGTERM, reach the whole process group, but the parent still wants the batches; a worker ends when its parent has
    (the loader sees to that). And OpenCV's threads do not survive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)
