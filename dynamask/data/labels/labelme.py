"""LabelMe: a JSON file for each photo, with `imagePath`, the photo's size, and `shapes`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dynamask.data.labels.tree import Labels, Outline, photo_in, rectangle
from runtime.coco_masks import whole_number
from runtime.errors import InputError
from runtime.files import natural_order

CIRCLE_POINTS = 64


def is_labelme(tree: Any) -> bool:
    """Whether a JSON file's content is LabelMe's."""
    return isinstance(tree, dict) and isinstance(tree.get("shapes"), list) and isinstance(tree.get("imagePath"), str)


def read(files: list[Path], photos: Path) -> Labels:
    """Read LabelMe files: polygons, rectangles and circles. Shapes of one `group_id` and label are one object.

    The photo is looked for beside the file, then in `photos`.

    Raises:
        InputError: a file lacks the photo's size, a shape is wrong, or a photo has two files.
    """
    labels = Labels(photos, "labelme")
    for file in natural_order(files):
        tree = json.loads(file.read_bytes())
        # LabelMe writes the path from the file to the photo; the photo may have moved, so its name counts.
        name = PurePosixPath(tree["imagePath"].replace("\\", "/")).name
        places = [place for place in (file.parent, photos) if place == photos or photos in place.parents]
        photo = photo_in(places, name, file)
        if photo is None:
            labels.missing.append(name)
            continue
        height, width = (whole_number(tree.get(key)) for key in ("imageHeight", "imageWidth"))
        if not height or not width or height < 1 or width < 1:
            raise InputError(f"{file} lacks imageHeight and imageWidth: save it again in LabelMe.")
        if any(entry["file_name"] == photo.relative_to(photos).as_posix() for entry in labels.images):
            raise InputError(f"{file} has labels of {photo}, which another file has too: keep one of the files.")
        image_id = labels.add_image(photo, height, width, file.parent.name)
        for name, outlines in _objects(tree["shapes"], labels, file):
            labels.add_outlines(image_id, name, outlines)
    return labels


def _objects(shapes: list[Any], labels: Labels, file: Path) -> list[tuple[str, list[Outline]]]:
    """Class and outlines of each object."""
    objects: dict[Any, tuple[str, list[Outline]]] = {}
    groups: dict[Any, int] = defaultdict(lambda: len(groups))
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise InputError(f"{file} has a shape without a label: correct it in LabelMe.")
        outline = _outline(shape, file)
        if outline is None:
            labels.left_out[str(shape.get("shape_type"))] += 1
            continue
        group = shape.get("group_id")
        key = ("shape", number) if group is None else (shape["label"], groups[repr(group)])
        objects.setdefault(key, (shape["label"], []))[1].append(outline)
    return list(objects.values())


def _outline(shape: dict[str, Any], file: Path) -> Outline | None:
    """The outline of a shape; None of one without an area, as a line."""
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.asarray(shape.get("points"), np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        raise InputError(f"{file} has a {kind} whose points are not pairs of numbers: correct it in LabelMe.") from None
    if kind == "polygon" and len(points) >= 3:
        return [float(value) for value in points.ravel()]
    if kind in ("rectangle", "circle") and len(points) == 2:
        (x0, y0), (x1, y1) = points.tolist()
        if kind == "rectangle":
            return rectangle(x0, y0, x1, y1)
        angles = np.arange(CIRCLE_POINTS) * 2 * math.pi / CIRCLE_POINTS
        circle = points[0] + math.dist((x0, y0), (x1, y1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return [float(value) for value in circle.ravel()]
    return None
