"""Writes data sets in COCO format: annotations of masks, the tree of the JSON file, image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_api

from runtime.files import atomic_path

Array = npt.NDArray[Any]


def mask_annotation(category_id: int, mask: Array) -> dict[str, Any]:
    """A COCO annotation (compressed RLE, tight box, area) of one mask `[H, W] bool`; the caller adds `id` and `image_id`."""
    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": category_id,
        "bbox": [float(edge) for edge in mask_api.toBbox(encoded)],
        "area": int(mask_api.area(encoded)),
        "iscrowd": 0,
        "segmentation": {"size": [int(edge) for edge in encoded["size"]], "counts": encoded["counts"].decode("ascii")},
    }


def coco_tree(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: list[dict[str, Any]], description: str
) -> dict[str, Any]:
    """The top level of a COCO file, its annotations numbered from 1."""
    numbered = [{**entry, "id": i + 1} for i, entry in enumerate(annotations)]
    return {"info": {"description": description}, "images": images, "annotations": numbered, "categories": categories}


def write_image(path: Path, pixels: Array) -> None:
    """Write an image file in the format of its suffix (JPEG at quality 95).

    Args:
        pixels: `[H, W, 3] uint8` RGB, or `[H, W]` of one channel, uint8 or (PNG) uint16.

    Raises:
        DynaMaskError: the file cannot be written.
    """
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
