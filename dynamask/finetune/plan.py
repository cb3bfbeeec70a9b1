"""The configuration of a fine-tuning that ends in a given time, from this machine's speed."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamask.config import Config, load_config, parse_config
from dynamask.distributed import joined
from dynamask.finetune.photos import PhotoSets
from dynamask.model import DynaMask
from dynamask.train.checkpoint import is_checkpoint, load_checkpoint
from dynamask.train.datasets import training_batches, training_items
from dynamask.train.learner import build_learner
from dynamask.train.progress import DivergenceGuard
from dynamask.train.schedule import Schedule
from dynamask.train.steps import Stepper
from runtime.errors import InputError
from runtime.files import input_path

BATCH = 4
MEASURED_STEPS = 4
"""Steps whose median time is that of a step, after as many that are not counted."""
CALIBRATION_PER_PHOTO, MAX_CALIBRATION = 20, 1000
"""Detections used to calibrate the MSM: so many for each photo, and at most so many."""
JUDGED_PHOTOS = 50
"""The model is judged on at most this many photos."""
SHARE_OF_TIME = 0.93
"""The share of the time left that is planned: steps vary, and the machine may get other work."""
# In times of PyTorch's detector on one image, on one thread: the export with its comparison and the engine; an image in the calibration,
# with the masks of all its detections at all grids; an image that is judged, with its masks on the whole photo.
EXPORT_COST, CALIBRATION_COST, JUDGE_COST = 300.0, 8.0, 4.0
SHORTEST_EXPORT_S, LONGEST_EXPORT_S = 8.0, 60.0
START_S = 2.0
"""To start the run after the measurement."""


@dataclass(frozen=True)
class Speed:
    """Of this machine, now, in seconds."""

    step_s: float
    """A training step."""
    image_s: float
    """The detector, without masks, on one image and one thread of the CPU, which exports and judges."""


@dataclass(frozen=True)
class Plan:
    """A run, and when its training must end."""

    config: Config
    steps: int
    epochs: float
    deadline: float
    """Of the training, on the clock of `time.monotonic`."""


def base_config(weights: str, sets: PhotoSets, seed: int, workers: int = 1) -> Config:
    """The configuration of the run, without a schedule.

    All four grids are trained (phase 1), and the MSM is calibrated at the end. What was tried is in docs/results/everyday.md.

    Args:
        weights: a DynaMask checkpoint, whose sizes the model gets, or `imagenet`.

    Raises:
        InputError: the weights are neither, or are of a Mask R-CNN head.
    """
    if weights == "imagenet":
        model = load_config("lite0-coco", {"model.canvas": [320, 320]}).model
    elif is_checkpoint(weights):
        model = load_checkpoint(weights).config.model
        if model.mask_head != "dynamask":
            raise InputError(f"{weights} has a Mask R-CNN head, a baseline that no engine runs: give a checkpoint of a DynaMask.")
    else:
        fault = "is no DynaMask checkpoint" if input_path(weights).is_file() else "does not exist"
        raise InputError(f"{weights} {fault}: give a .safetensors file of dynamask train or finetune, or leave --weights out.")
    val = sets.val or sets.train  # without photos to judge on, nothing is judged
    fields: dict[str, Any] = {
        "weights": weights,
        "model": model.model_copy(update={"frozen_stages": 2, "mask_rois_per_image": 2, "rois_per_image": 64}).model_dump(mode="json"),
        "data": {
            "kind": "coco",
            "train_annotations": str(sets.train[0]),
            "train_images": str(sets.train[1]),
            "val_annotations": str(val[0]),
            "val_images": str(val[1]),
            "scale_jitter": [0.6, 1.2],
            "copy_paste": 0.5,
            "workers": workers,
        },
        "train": {
            "batch": min(BATCH, sets.train_photos),
            "learning_rate": 0.05,
            "warmup_steps": 10,
            "phase1_epochs": 1.0,
            "phase2_epochs": 0.0,
            "rate_drop_epochs": [],
            "cosine": True,
            "calibration_detections": min(CALIBRATION_PER_PHOTO * sets.train_photos, MAX_CALIBRATION),
            "evaluate_every_epochs": None,
            "checkpoint_every_steps": 100,
            "pictures": 0,
            "seed": seed,
        },
    }
    return parse_config(fields, "the configuration of the fine-tuning")


def measure_speed(config: Config) -> Speed:
    """Take some steps of the run, which do not count, and run the detector on an image.

    Raises:
        InputError: the data or weights cannot be used.
    """
    items = training_items(config)
    epochs = 2 * MEASURED_STEPS / Schedule(config.train, len(items)).steps_per_epoch
    schedule = Schedule(config.train.model_copy(update={"phase1_epochs": epochs}), len(items))
    with joined() as world:
        learner = build_learner(config, items.classes, world.device)
        stepper = Stepper(learner, schedule, DivergenceGuard(), world)
        batches = training_batches(items, schedule, 0, config.data.workers, world)
        times = []
        for step in range(schedule.total_steps):
            start = time.monotonic()
            stepper.take(learner.model, step, *next(batches))
            times.append(time.monotonic() - start)
        image_s = _detector_s(learner.model)
    return Speed(statistics.median(times[MEASURED_STEPS:] or times), image_s)


@torch.inference_mode()
def _detector_s(model: DynaMask) -> float:
    """The seconds of the detector on one image, on one thread of the CPU."""
    model = model.cpu().eval()
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, *model.sizes.canvas), np.float32))
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(MEASURED_STEPS + 1):
            start = time.monotonic()
            model.detect(image)
            times.append(time.monotonic() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:])


def plan(config: Config, speed: Speed, sets: PhotoSets, started: float, minutes: float) -> Plan:
    """The run that ends `minutes` after `started` (on the clock of `time.monotonic`), with calibration, export, engine and judgement.

    Raises:
        InputError: the minutes are too few for one epoch; says how many are needed.
    """
    now = time.monotonic()
    per_epoch = Schedule(config.train, sets.train_photos).steps_per_epoch
    after_s = _seconds_after(speed, sets)
    steps = int(SHARE_OF_TIME * (started + 60 * minutes - now - START_S - after_s) / speed.step_s)
    if steps < per_epoch:
        needed = now - started + START_S + after_s + per_epoch * speed.step_s / SHARE_OF_TIME
        # A tenth of a minute more than was needed this time.
        least = math.ceil(10 * needed / 60 + 1) / 10
        raise InputError(
            f"{minutes:g} minutes are too few for one epoch of {sets.train_photos} photos on this machine: "
            f"give --minutes {least:g} or more."
        )
    recipe = config.train.model_copy(update={"phase1_epochs": steps / per_epoch, "warmup_steps": min(10, steps // 4)})
    calibration_s = CALIBRATION_COST * speed.image_s * min(sets.train_photos, MAX_CALIBRATION // CALIBRATION_PER_PHOTO)
    deadline = started + 60 * minutes - (after_s - calibration_s)
    return Plan(config.model_copy(update={"train": recipe}), steps, steps / per_epoch, deadline)


def _seconds_after(speed: Speed, sets: PhotoSets) -> float:
    """From the last step to the end: calibration, export, engine, judgement."""
    export_s = min(max(EXPORT_COST * speed.image_s, SHORTEST_EXPORT_S), LONGEST_EXPORT_S)
    calibrated = min(sets.train_photos, MAX_CALIBRATION // CALIBRATION_PER_PHOTO)
    judged = min(sets.val_photos, JUDGED_PHOTOS)
    return export_s + (CALIBRATION_COST * calibrated + JUDGE_COST * judged) * speed.image_s
