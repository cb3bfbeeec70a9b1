"""Pastes masks: mask logits to the pixels of the image, as crops of the box's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import cv2
import numpy as np
import numpy.typing as npt

Crop = tuple[int, int, npt.NDArray[np.bool_]]
"""`x0, y0` of the crop's first pixel in the image, and the mask inside it."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """The mask of an instance as bits, from an engine that pastes on its device: `mask_crop` with 32 pixels in an item."""

    left: int
    top: int
    """The crop's first pixel in the image."""
    width: int
    """The crop's width, pixels."""
    words: npt.NDArray[np.int32]
    """`[height, ceil(width / 32)]`: bit b of word w of a row is its pixel 32 w + b; bits beyond the width are 0."""

    def crop(self) -> Crop:
        """The mask, one item for each pixel."""
        height = len(self.words)
        if not height or not self.width:
            return self.left, self.top, np.zeros((height, self.width), bool)
        octets = np.ascontiguousarray(self.words, "<i4").view(np.uint8).reshape(height, -1)
        return self.left, self.top, np.unpackbits(octets, axis=1, count=self.width, bitorder="little").view(bool)


class Frame(NamedTuple):
    """The image that was scaled to a canvas."""

    scale: float
    """Canvas pixels per image pixel."""
    size: tuple[int, int]
    """The image's height and width, pixels."""

    def boxes(self, boxes: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Boxes `[n, 4]` (xyxy) in canvas pixels as boxes in the image's pixels, clipped to the image."""
        height, width = self.size
        return np.clip(boxes / self.scale, 0, [width, height, width, height]).astype(np.float32)


class Rle(TypedDict):
    """A COCO run-length encoding: `[height, width]` and the compressed counts."""

    size: list[int]
    counts: str


def covered_pixels(boxes: npt.NDArray[np.floating[Any]], height: int, width: int) -> npt.NDArray[np.int64]:
    """The pixels of an image whose centres are in boxes `[..., 4]`, xyxy in pixels: `left, top, right, bottom`, the last two excluded.

    A box that is turned inside out, or not a number, has none.
    """
    edges = np.nan_to_num(np.ceil(boxes.astype(np.float64) - 0.5))
    first = np.clip(edges[..., :2], 0, [width, height])
    last = np.clip(edges[..., 2:], first, [width, height])
    return np.concatenate([first, last], axis=-1).astype(np.int64)


def mask_crop(logits: npt.NDArray[np.float32], box: npt.NDArray[np.floating[Any]], height: int, width: int) -> Crop:
    """The pixels of a mask, as a crop of the `height x width` image: those whose probability (`probability_crop`) is above 0.5.

    Args:
        logits: `[g, g] float32`.
        box: `[4]`, xyxy in the image's pixels; may exceed the image.

    Returns:
        `(x0, y0, mask [h, w] bool)`: the pixels of the image whose centres are in the box; `h` or `w` is 0 where there are none.
    """
    left, top, probabilities = probability_crop(logits, box, height, width)
    return left, top, probabilities > 0.5


def probability_crop(
    logits: npt.NDArray[np.float32], box: npt.NDArray[np.floating[Any]], height: int, width: int
) -> tuple[int, int, npt.NDArray[np.float32]]:
    """The mask probabilities of an instance, as a crop of the `height x width` image.

    They are sampled bilinearly at pixel centres, as in torchvision and Detectron2: the centre of grid cell i is at `x0 + (i + 0.5) w / g`,
    and outside the grid the probability is 0.

    Args:
        logits: `[g, g] float32`.
        box: `[4]`, xyxy in the image's pixels; may exceed the image.

    Returns:
        `(x0, y0, probabilities [h, w] float32)`, over the pixels of the image whose centres are in the box; `h` or `w` is 0 where there are
        none.
    """
    grid = logits.shape[0]
    x0, y0, x1, y1 = (float(value) for value in box)
    left, top, right, bottom = covered_pixels(box, height, width).tolist()
    columns, rows = right - left, bottom - top
    if not columns or not rows:
        return left, top, np.zeros((rows, columns), np.float32)
    step_x, step_y = grid / (x1 - x0), grid / (y1 - y0)
    to_grid = np.array(
        [[step_x, 0, (left + 0.5 - x0) * step_x - 0.5], [0, step_y, (top + 0.5 - y0) * step_y - 0.5]],
        np.float64,
    )
    probabilities = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    sampled = cv2.warpAffine(probabilities, to_grid, (columns, rows), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return left, top, np.asarray(sampled, np.float32)


def encode_crop(crop: Crop, height: int, width: int) -> Rle:
    """COCO's run-length encoding of a crop's mask in its `height x width` image, without drawing that image.

    The same string as `pycocotools.mask.encode` gives for the full mask.
    """
    from pycocotools import mask as coco_mask

    x0, y0, mask = crop
    # A zero at the end of each column makes each run start and end within its column.
    columns = np.zeros((mask.shape[1], mask.shape[0] + 1), bool)
    columns[:, :-1] = mask.T
    flat = columns.ravel()
    column, row = np.divmod(np.flatnonzero(flat != np.concatenate([[False], flat[:-1]])), columns.shape[1])
    edges = (column + x0) * height + row + y0
    # A run that reaches the bottom of the image continues at the top of the next column.
    if mask.shape[0] == height and len(edges):
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
