"""Makes training items: replaces broken images, pastes instances, and puts portrait images on the transposed canvas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynamask.config import Config
from dynamask.data.canvas import CanvasDataset, tight_box
from dynamask.data.coco import CocoDataset, LabelledDataset
from runtime.errors import InputError

TOLERATED_SHARE = 0.1
"""The share of the images that may be broken; a run with more of them ends."""
PASTED_SHARE = 0.5
"""The probability with which each instance of the other image is pasted."""
_PASTE, _REPLACE = 1, 2
"""Seeds that keep the random numbers of pasting and replacing apart from those of the canvas."""


def copy_paste(
    image: Tensor, target: dict[str, Any], other: Tensor, other_target: dict[str, Any], rng: np.random.Generator
) -> tuple[Tensor, dict[str, Any]]:
    """Paste a random half of another image's instances, at their places (Ghiasi et al. 2021, "Simple Copy-Paste").

    Args:
        image, other: canvases `[3, H, W] float32`.
        target, other_target: as `to_canvas` gives them: `boxes`, `labels`, `masks [G, H, W] uint8`.

    Returns:
        The canvas, and the target. Masks lose the pixels that pasted instances hide, and boxes are tight about the rest. Instances less
        than two pixels wide or high are left out. The pasted ones come last.
    """
    pasted = torch.from_numpy(rng.random(len(other_target["labels"])) < PASTED_SHARE)
    cover = other_target["masks"][pasted].bool().any(dim=0)
    masks = torch.cat([target["masks"] * ~cover, other_target["masks"][pasted]])
    labels = torch.cat([target["labels"], other_target["labels"][pasted]])
    boxes = [tight_box(mask.numpy()) for mask in masks]
    kept = [i for i, box in enumerate(boxes) if box is not None]
    placed = {
        "boxes": torch.tensor([boxes[i] for i in kept], dtype=torch.float32).reshape(-1, 4),
        "labels": labels[kept],
        "masks": masks[kept],
    }
    return torch.where(cover, other, image), {**target, **placed}


class TrainingItems(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Items on the canvas by `(index, epoch)`: a loader's workers get the epoch with each index.

    An item is as `to_canvas` gives it. Its target also has `skipped`: `{"index", "reason"}` of each image that could not be read for
    it. The image that replaces a broken one, and the pasted instances, depend on the seed, the epoch and the index alone.

    Attributes:
        classes: the data set's.
        turned: by index, whether the image is placed on the transposed canvas; empty if none is.
        tolerated: the number of images that may be broken.
    """

    def __init__(self, dataset: LabelledDataset, config: Config) -> None:
        model, data = config.model, config.data
        self.classes = dataset.classes
        self.seed, self.copy_paste = config.train.seed, data.copy_paste
        self.items = CanvasDataset(
            dataset,
            *model.canvas,
            model.mean,
            model.std,
            seed=config.train.seed,
            scale_jitter=data.scale_jitter,
            flip=data.flip,
            color_jitter=data.color_jitter,
        )
        self.tolerated = int(TOLERATED_SHARE * len(self))
        self.turned: list[bool] = []
        if data.portrait_batches and isinstance(dataset, CocoDataset):  # in other data sets all images have one size
            records = [dataset.data.images[item] for item in self.items.indices]
            sizes = [(record.height, record.width) for record in records]
            self.turned = turned_images(sizes, model.canvas, config.train.batch)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        index, epoch = key
        turned = bool(self.turned) and self.turned[index]
        skipped: list[dict[str, Any]] = []
        for candidate in self._candidates(index, epoch):
            found = self._read(candidate, epoch, turned, skipped)
            if found is not None:
                image, target = self._pasted(*found, candidate, epoch, turned, skipped)
                return image, {**target, "skipped": skipped}
        image, target = self.items.blank(turned)  # not trained on: this many broken images end the run
        return image, {**target, "skipped": skipped}

    def _read(self, index: int, epoch: int, turned: bool, skipped: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Any]] | None:
        try:
            return self.items.placed(index, epoch, turned)
        except InputError as error:
            skipped.append({"index": self.items.indices[index], "reason": str(error)})
            return None

    def _candidates(self, index: int, epoch: int) -> Iterator[int]:
        """The image itself, then the images that may replace it: together one more than may be broken."""
        yield index
        start = int(np.random.default_rng([self.seed, epoch, index, _REPLACE]).integers(len(self)))
        others = ((start + i) % len(self) for i in range(self.tolerated + 1))
        yield from [other for other in others if other != index][: self.tolerated]

    def _pasted(
        self, image: Tensor, target: dict[str, Any], index: int, epoch: int, turned: bool, skipped: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Any]]:
        """With the probability `copy_paste`, the item with instances of another one pasted in.

        The other item is any of the data set, not of the batch, so that the item is the same for any number of processes.
        """
        if not self.copy_paste:
            return image, target
        rng = np.random.default_rng([self.seed, epoch, index, _PASTE])
        if rng.random() >= self.copy_paste:
            return image, target
        other = self._read(int(rng.integers(len(self))), epoch, turned, skipped)
        return (image, target) if other is None else copy_paste(image, target, *other, rng)


def turned_images(sizes: list[tuple[int, int]], canvas: tuple[int, int], batch: int) -> list[bool]:
    """Whether each image, of `sizes` (height, width), is placed on the transposed canvas (height, width); empty if none is.

    It is, if it then fills more of the canvas. All images of a batch have the same canvas, so if one canvas has too few images for a
    batch, they go to the other.
    """
    turned = [(height - width) * (canvas[1] - canvas[0]) > 0 for height, width in sizes]
    if sum(turned) < batch:
        return []
    return turned if len(turned) - sum(turned) >= batch else [True] * len(turned)
