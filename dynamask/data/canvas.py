"""Puts the items of data sets on the canvas, the input of the model: letterboxed, normalised, in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamask.data.boxes import mask_box
from dynamask.data.coco import InstanceDataset
from runtime.preprocess import letterbox_scale, place_normalised, resize, scaled_size

Array = npt.NDArray[Any]

_GREY = np.array([0.2989, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in a pixel's grey (ITU-R BT.601)."""
_COLOR = 3
"""Keeps the random numbers of the colours apart from the others."""
_SMALLEST_SIDE = 2.0
"""Instances narrower than this on the canvas, in pixels, are left out: they are too small to train on."""


def to_canvas(
    image: Array,
    target: dict[str, Any],
    height: int,
    width: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    rng: np.random.Generator | None = None,
    scale_jitter: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Letterbox an image and its instances: scaled to fit the canvas, at its top left, normalised; the rest is 0.

    With `rng`, the scale is multiplied by a number drawn from `scale_jitter`, and an image larger than the canvas is cropped at a random
    place. With `flip`, one image in two is mirrored, at random. Without `rng` nothing is random.

    Args:
        image: `[h, w, 3] uint8` RGB.
        target: `image_id`, `boxes [G, 4]`, `labels [G]`, `masks [G, h, w]`, as the data sets give them.
        height, width: the canvas, pixels.
        mean, std: of the normalisation `(x / 255 - mean) / std`.

    Returns:
        The canvas `[3, height, width] float32`, and the target in its pixels: `boxes [G', 4] float32` (xyxy, tight about the masks),
        `labels [G'] int64`, `masks [G', height, width] uint8`, `image_id` (int), `scale` (float, canvas pixels per image pixel).
        Instances less than two pixels wide or high are left out.
    """
    masks = target["masks"]
    scale, _, _ = letterbox_scale(image.shape[0], image.shape[1], height, width)
    if rng is not None:
        scale *= float(rng.uniform(*scale_jitter))
        if flip and rng.random() < 0.5:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
    size = scaled_size(image.shape[0], image.shape[1], scale)
    window = _window(size, (height, width), rng)
    placed = np.empty((3, height, width), np.float32)
    part = resize(np.ascontiguousarray(image), *size, scale)[window]
    place_normalised(part, mean, std, placed)
    kept, boxes, canvases = [], [], []
    for i, mask in enumerate(masks):
        canvas = np.zeros((height, width), np.uint8)
        # A pixel belongs to the mask if at least half of its area does.
        canvas[: part.shape[0], : part.shape[1]] = resize(mask * np.uint8(255), *size, scale)[window] >= 128
        box = tight_box(canvas)
        if box is not None:
            kept.append(i)
            boxes.append(box)
            canvases.append(canvas)
    placed_target = {
        "boxes": torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
        "labels": torch.from_numpy(np.asarray(target["labels"], np.int64)[kept]),
        "masks": torch.from_numpy(np.array(canvases, np.uint8).reshape(-1, height, width)),
        "image_id": int(target["image_id"]),
        "scale": float(scale),
    }
    return torch.from_numpy(placed), placed_target


def with_colors(image: Array, brightness: float, contrast: float, saturation: float) -> Array:
    """The image `[h, w, 3] uint8` RGB with its brightness, contrast and saturation multiplied, in this order.

    As torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation`: black, the mean of the grey image, and each pixel's
    grey are the points that stay.
    """
    values = np.clip(image.astype(np.float32) * np.float32(brightness), 0, 255)
    mean = np.float32((values @ _GREY).mean())
    values = np.clip(mean + (values - mean) * np.float32(contrast), 0, 255)
    grey = (values @ _GREY)[..., None]
    return np.clip(grey + (values - grey) * np.float32(saturation), 0, 255).round().astype(np.uint8)


def _window(size: tuple[int, ...], canvas: tuple[int, int], rng: np.random.Generator | None) -> tuple[slice, slice]:
    """The part of a scaled image of `size` that is placed: all of it, unless it exceeds the canvas."""
    starts = [0 if rng is None or edge <= limit else int(rng.integers(edge - limit + 1)) for edge, limit in zip(size, canvas, strict=True)]
    rows, columns = (slice(start, start + limit) for start, limit in zip(starts, canvas, strict=True))
    return rows, columns


def tight_box(mask: Array) -> tuple[int, int, int, int] | None:
    """The box about a mask `[H, W]`, xyxy in pixels, or None if it is too small to train on."""
    box = mask_box(mask)
    if box is None or min(box[2:] - box[:2]) < _SMALLEST_SIDE:
        return None
    x0, y0, x1, y1 = box.astype(int).tolist()
    return x0, y0, x1, y1


class CanvasDataset:
    """The items of a data set to train on, on the canvas: those with instances, their scale jittered, mirrored at random.

    The random numbers depend on `(seed, epoch, item)` alone, so a resumed run gets the same items as an uninterrupted one.

    Args:
        dataset: `CocoDataset`, `ShapesDataset` or another data set with their items.
        height, width, mean, std: as for `to_canvas`.
        seed: of the jitter and the flips.
        scale_jitter, flip: as for `to_canvas`.
        color_jitter: as `data.color_jitter`.

    Attributes:
        indices: the data set's items with instances, in order.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        height: int,
        width: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int = 0,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        flip: bool = False,
        color_jitter: float = 0.0,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.height, self.width, self.mean, self.std = height, width, mean, std
        self.scale_jitter, self.flip, self.color_jitter = scale_jitter, flip, color_jitter
        self.indices = list(dataset.indices_with_instances)

    def __len__(self) -> int:
        return len(self.indices)

    def placed(self, index: int, epoch: int, turned: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """Item `index` in an epoch, as `to_canvas` gives it; `turned` places it on the transposed canvas.

        Raises:
            InputError: the image cannot be read.
        """
        item = self.indices[index]
        image, target = self.dataset[item]
        rng = np.random.default_rng([self.seed, epoch, item])
        if self.color_jitter:
            # Random numbers of their own: an item has the same place with and without this.
            factors = np.random.default_rng([self.seed, epoch, item, _COLOR]).uniform(1 - self.color_jitter, 1 + self.color_jitter, 3)
            image = with_colors(image, *factors.tolist())
        return to_canvas(image, target, *self._canvas(turned), self.mean, self.std, rng, self.scale_jitter, self.flip)

    def blank(self, turned: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """An empty canvas and a target without instances; replaces an image that cannot be read."""
        height, width = self._canvas(turned)
        nothing = {"image_id": -1, "labels": [], "masks": np.zeros((0, height, width), np.uint8)}
        return to_canvas(np.zeros((height, width, 3), np.uint8), nothing, height, width, self.mean, self.std)

    def _canvas(self, turned: bool) -> tuple[int, int]:
        return (self.width, self.height) if turned else (self.height, self.width)


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Stack canvases into `[B, 3, H, W] float32`; targets stay a list, one dictionary per image."""
    images, targets = zip(*batch, strict=True)
    return torch.stack(images), list(targets)
