"""Instances as annotations in COCO format, for labelling tools to begin from: polygons, which CVAT and Label Studio import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from runtime.instances import ClassName, Instances

TOLERANCE_PX = 0.75
"""A polygon leaves the outline of its mask by at most this: fewer points are easier to correct by hand."""


def coco_annotations(instances: Instances, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """Annotations of the instances of an image, numbered from `first_id`; instances without a pixel are left out.

    Returns:
        `id`, `image_id`, `category_id`, `segmentation` (polygons, the largest first), `area` (pixels of the mask), `bbox` (x, y, width,
        height of the mask), `iscrowd` (0), `score`. Holes are filled: polygons have none.
    """
    annotations: list[dict[str, Any]] = []
    for label, score, (x0, y0, crop) in zip(instances.labels.tolist(), instances.scores.tolist(), instances.crops(), strict=True):
        polygons = mask_polygons(crop, x0, y0)
        if not polygons:
            continue
        rows, columns = np.flatnonzero(crop.any(axis=1)), np.flatnonzero(crop.any(axis=0))
        box = [x0 + columns[0], y0 + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        annotations.append(
            {
                "id": first_id + len(annotations),
                "image_id": image_id,
                "category_id": instances.classes[label].id,
                "segmentation": polygons,
                "area": float(crop.sum()),
                "bbox": [float(edge) for edge in box],
                "iscrowd": 0,
                "score": score,
            }
        )
    return annotations


def mask_polygons(mask: npt.NDArray[np.bool_], x0: int = 0, y0: int = 0) -> list[list[float]]:
    """The outer outlines of a mask `[h, w] bool` whose first pixel is `(x0, y0)`, as polygons `[x, y, x, y, …]` along the pixels' edges.

    Each connected part has one; the one around the largest area comes first. They leave the outline by at most `TOLERANCE_PX`.
    """
    # With two by two pixels for each, OpenCV's outlines, which go through the centres of pixels, tell left from right edges.
    doubled = np.kron(mask.astype(np.uint8), np.ones((2, 2), np.uint8))
    contours, _ = cv2.findContours(np.asarray(doubled, np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = [cv2.approxPolyDP((contour + 1) // 2, TOLERANCE_PX, closed=True) for contour in contours]
    outlines = [outline for outline in outlines if len(outline) >= 3 and cv2.contourArea(outline) > 0]
    outlines.sort(key=cv2.contourArea, reverse=True)
    return [(outline[:, 0] + (x0, y0)).astype(float).ravel().tolist() for outline in outlines]


def coco_file(images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]], classes: Sequence[ClassName]) -> dict[str, Any]:
    """The content of a COCO file: `images` have `id`, `file_name`, `height` and `width`."""
    return {
        "info": {"description": "Found by DynaMask, to be corrected"},
        "licenses": [],
        "images": list(images),
        "annotations": list(annotations),
        "categories": [{"id": entry.id, "name": entry.name, "supercategory": ""} for entry in classes],
    }
