"""The data sets of a run, as its configuration names them, and the batches that are read from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
from torch import Tensor
from torch.utils.data import DataLoader

from dynamask.config import Config
from dynamask.data.augment import TrainingItems
from dynamask.data.canvas import collate
from dynamask.data.cityscapes import CityscapesDataset
from dynamask.data.coco import CocoDataset, LabelledDataset, Part, coco_2017
from dynamask.data.lvis import lvis_v1
from dynamask.data.shapes import ShapesDataset
from dynamask.distributed import World
from dynamask.train.interruption import ignore_signals
from dynamask.train.schedule import Schedule, StepSampler
from runtime.coco import first_other_class
from runtime.errors import InputError

VAL_SEED_OFFSET = 1_000_003
"""Added to `data.shapes_seed` for the validation images of `shapes`."""


def training_and_validation(config: Config) -> tuple[TrainingItems, LabelledDataset]:
    """Both data sets of a run.

    Raises:
        InputError: a file is missing or does not fit, or the two have different classes.
    """
    train_set, val_set = training_items(config), validation_set(config)
    names = ({entry["id"]: entry["name"] for entry in part.classes} for part in (train_set, val_set))
    if (difference := first_other_class(*names)) is not None:
        number, training, validation = difference
        raise InputError(
            f"{config.data.val_annotations or config.data.root}: class {number} is {validation} for the validation images and {training} "
            "for the training images: use the same list of classes in both."
        )
    return train_set, val_set


def training_items(config: Config) -> TrainingItems:
    """The training images, augmented and on the canvas."""
    data = config.data
    if data.kind == "shapes":
        return TrainingItems(ShapesDataset(data.shapes_train, data.shapes_seed, *config.model.canvas), config)
    return TrainingItems(_dataset(config, "train"), config)


def validation_set(config: Config) -> LabelledDataset:
    """The validation images, as they are."""
    data = config.data
    if data.kind == "shapes":
        count = min(data.shapes_val, config.train.evaluate_images)
        return ShapesDataset(count, data.shapes_seed + VAL_SEED_OFFSET, *config.model.canvas)
    return _dataset(config, "val")


def _dataset(config: Config, part: Part) -> LabelledDataset:
    data = config.data
    if data.kind == "coco" and data.root is None:
        files = {"train": (data.train_annotations, data.train_images), "val": (data.val_annotations, data.val_images)}
        annotations, images = files[part]
        if annotations is None or images is None:
            raise InputError(
                f"data.{part}_annotations and data.{part}_images are not both given: --set them to a COCO file and its folder of images."
            )
        return CocoDataset(annotations, images)
    return _published_dataset(config, part)


def _published_dataset(config: Config, part: Part) -> LabelledDataset:
    root, kind = config.data.root, config.data.kind
    if root is None:
        raise InputError(f"data.root is not given: --set data.root=FOLDER to the folder of {kind}.")
    if kind == "cityscapes":
        # Its annotations are read from pictures: only those of the images that will be evaluated.
        return CityscapesDataset(root, part, config.train.evaluate_images if part == "val" else None)
    return lvis_v1(root, part) if kind == "lvis" else coco_2017(root, part)


def training_batches(
    items: TrainingItems, schedule: Schedule, first_step: int, workers: int, world: World
) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
    """This process's part of the batches from `first_step` to the schedule's last step.

    Args:
        workers: processes that read; 0 reads in this one.

    Yields:
        Images `[B, 3, H, W] float32`, and a target for each image.
    """
    loader = DataLoader(
        items,
        batch_sampler=StepSampler(schedule, first_step, world.rank, world.size, items.turned),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=world.device.type == "cuda",
    )
    yield from loader


def _start_worker(worker: int) -> None:
    ignore_signals()
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
