"""From a data set's items to the canvas the model sees: letterboxed, normalised, in batches."""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_SMALLEST_SIDE = 2.0
"""Instances narrower than this on the canvas, in pixels, are left out: no mask can be learnt from them."""


class InstanceDataset(Protocol):
    """What `CocoDataset` and `ShapesDataset` have in common."""

    @property
    def indices_with_instances(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]: ...


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
    """Letterbox an image and its instances: scaled to fit, at the top left, the rest zeros after normalising.

    With `rng`, the scale is multiplied by a number drawn from `scale_jitter` (what then exceeds the canvas is cropped, at random), and
    with `flip` every other image is mirrored. Without `rng` nothing is random.

    Args:
        image: `[h, w, 3] uint8` RGB.
        target: `image_id`, `boxes [G, 4]`, `labels [G]`, `masks [G, h, w]`, as the data sets give them.
        height, width: the canvas, pixels.
        mean, std: of the normalisation `(x / 255 - mean) / std`.

    Returns:
        The canvas `[3, height, width] float32`, and the target in its pixels: `boxes [G', 4] float32` (xyxy, tight about the masks),
        `labels [G'] int64`, `masks [G', height, width] uint8`, `image_id` (int), `scale` (float, canvas pixels per image pixel).
        Instances of which less than two pixels remain either way are left out.
    """
    masks = target["masks"]
    scale = min(height / image.shape[0], width / image.shape[1])
    if rng is not None:
        scale *= float(rng.uniform(*scale_jitter))
        if flip and rng.random() < 0.5:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
    size = tuple(max(1, round(edge * scale)) for edge in image.shape[:2])
    window = _window(size, (height, width), rng)
    placed = np.zeros((height, width, 3), np.float32)
    part = _resize(image, size, scale)[window]
    placed[: part.shape[0], : part.shape[1]] = (part.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    kept, boxes, canvases = [], [], []
    for i, mask in enumerate(masks):
        canvas = np.zeros((height, width), np.uint8)
        # A pixel belongs to the mask if at least half of its area does.
        canvas[: part.shape[0], : part.shape[1]] = _resize(mask * np.uint8(255), size, scale)[window] >= 128
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
    return torch.from_numpy(np.ascontiguousarray(placed.transpose(2, 0, 1))), placed_target


def _window(size: tuple[int, ...], canvas: tuple[int, int], rng: np.random.Generator | None) -> tuple[slice, slice]:
    """The part of a scaled image of `size` that is placed: all of it, unless it exceeds the canvas."""
    starts = [0 if rng is None or edge <= limit else int(rng.integers(edge - limit + 1)) for edge, limit in zip(size, canvas, strict=True)]
    rows, columns = (slice(start, start + limit) for start, limit in zip(starts, canvas, strict=True))
    return rows, columns


def _resize(pixels: Array, size: tuple[int, ...], scale: float) -> Array:
    if pixels.shape[:2] == size:
        return pixels
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), (size[1], size[0]), interpolation=interpolation))


def tight_box(mask: Array) -> tuple[int, int, int, int] | None:
    """The extent of a mask `[H, W]`, xyxy in pixels, or None if it is too small to learn from."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if columns.size == 0:
        return None
    x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return None if min(x1 - x0, y1 - y0) < _SMALLEST_SIDE else (x0, y0, x1, y1)


class CanvasDataset(torch.utils.data.Dataset[tuple[Tensor, dict[str, Any]]]):
    """A data set's items on the canvas. What is random in training depends on `(seed, epoch, item)` alone, so that a resumed run goes on
    exactly as the one that was interrupted.

    Args:
        dataset: `CocoDataset` or `ShapesDataset`.
        height, width, mean, std: as for `to_canvas`.
        train: leave out images without instances, jitter the scale, and flip; otherwise every image is kept as it is.
        seed: of the jitter and the flips.
        scale_jitter, flip: as for `to_canvas`; used in training only.

    Attributes:
        indices: the data set's items this one serves, in order.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        height: int,
        width: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        train: bool,
        seed: int = 0,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        flip: bool = False,
    ) -> None:
        self.dataset, self.train, self.seed = dataset, train, seed
        self.height, self.width, self.mean, self.std = height, width, mean, std
        self.scale_jitter, self.flip = scale_jitter, flip
        self.indices = list(dataset.indices_with_instances) if train else list(range(len(dataset)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random numbers; call it before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self.placed(index, self.epoch)

    def placed(self, index: int, epoch: int, turned: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """An item as it is in that epoch; `turned` places it on the transposed canvas.

        Raises:
            InputError: the image cannot be read.
        """
        item = self.indices[index]
        image, target = self.dataset[item]
        rng = np.random.default_rng([self.seed, epoch, item]) if self.train else None
        return to_canvas(image, target, *self._canvas(turned), self.mean, self.std, rng, self.scale_jitter, self.flip)

    def blank(self, turned: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """An empty canvas and a target without instances, where there is no image to be had."""
        height, width = self._canvas(turned)
        nothing = {"image_id": -1, "labels": [], "masks": np.zeros((0, height, width), np.uint8)}
        return to_canvas(np.zeros((height, width, 3), np.uint8), nothing, height, width, self.mean, self.std)

    def _canvas(self, turned: bool) -> tuple[int, int]:
        return (self.width, self.height) if turned else (self.height, self.width)


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Stack canvases into `[B, 3, H, W] float32`; targets stay a list, one dictionary an image."""
    images, targets = zip(*batch, strict=True)
    return torch.stack(images), list(targets)
