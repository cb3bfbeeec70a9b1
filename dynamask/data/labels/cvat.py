"""CVAT for images 1.1: one XML file with an `<image>` for each photo, in it `<polygon>`, `<mask>`, `<box>` and other shapes.

https://docs.cvat.ai/docs/other/xml_format
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from dynamask.data.labels.tree import Labels, numbers, photo_in
from runtime.errors import InputError

_MASKS = ("polygon", "mask", "ellipse")


def is_cvat(path: Path) -> bool:
    """Whether an XML file is an export of CVAT."""
    try:
        with path.open("rb") as file:
            return b"<annotations" in file.read(4096)
    except OSError:
        return False


def read(files: list[Path], photos: Path) -> Labels:
    """Read polygons, masks and ellipses; other shapes are counted in `left_out`.

    Raises:
        InputError: a file is damaged, of a video, or has a shape without a label or with wrong numbers.
    """
    labels = Labels(photos, "cvat")
    for file in files:
        root = _parse(file)
        if root.find("track") is not None:
            raise InputError(f"{file} is an export of a video (CVAT for video 1.1): export it as CVAT for images 1.1.")
        labels.classes += [name for name in _declared(root) if name not in labels.classes]
        for image in root.iter("image"):
            _add(labels, image, file)
    return labels


def _declared(root: Any) -> list[str]:
    """The names of the task's or project's labels."""
    return [label.findtext("name") or "" for label in root.findall("./meta//labels/label") if label.findtext("name")]


def _add(labels: Labels, image: Any, file: Path) -> None:
    name = image.get("name") or ""
    places = [place / inner for place in (file.parent, labels.folder) for inner in ("images", ".", f"images/{image.get('subset')}")]
    inside = [labels.folder / place.relative_to(labels.folder) for place in places if labels.folder in (place, *place.parents)]
    photo = photo_in(inside, name, file)
    if photo is None:
        labels.missing.append(name)
        return
    height, width = (int(numbers(image.get(key) or "", file)[0]) if image.get(key) else 0 for key in ("height", "width"))
    if height < 1 or width < 1:
        raise InputError(f"{file}: the image {name[:80]} lacks its width and height: export it again.")
    image_id = labels.add_image(photo, height, width, (image.get("subset") or "").lower())
    for shape in image:
        if shape.tag in ("tag", "attribute"):
            continue
        if not shape.get("label"):
            raise InputError(f"{file}: the image {name[:80]} has a {shape.tag} without a label: export it again.")
        if shape.tag not in _MASKS:
            labels.left_out[shape.tag] += 1
        else:
            labels.add(image_id, shape.get("label"), _segmentation(shape, file, height, width))


def _segmentation(shape: Any, file: Path, height: int, width: int) -> Any:
    """The COCO segmentation of a shape."""
    if shape.tag == "polygon":
        points = numbers(shape.get("points") or "", file)
        if len(points) < 6 or len(points) % 2:
            raise InputError(f"{file} has a polygon of {len(points)} numbers: it needs at least three points, x,y;x,y;x,y.")
        return [points]
    fields = {key: numbers(shape.get(key) or "", file) for key in _FIELDS[shape.tag]}
    if any(len(values) != 1 for key, values in fields.items() if key != "rle"):
        raise InputError(f"{file} has a {shape.tag} that lacks one of {', '.join(_FIELDS[shape.tag])}: export it again.")
    if shape.tag == "ellipse":
        cx, cy, rx, ry = (fields[key][0] for key in _FIELDS["ellipse"])
        angles = np.arange(64) * np.pi / 32
        return [np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1).ravel().tolist()]
    runs = fields["rle"]
    left, top, w, h = (int(fields[key][0]) for key in ("left", "top", "width", "height"))
    if min(left, top) < 0 or w < 1 or h < 1 or left + w > width or top + h > height or min(runs, default=-1) < 0 or sum(runs) != w * h:
        raise InputError(f"{file} has a mask whose runs are not those of {w}x{h} pixels inside its image: export it again.")
    # Runs of 0 and 1 by rows, of the part of the image at (left, top).
    values = np.repeat(np.arange(len(runs)) % 2, np.asarray(runs, np.int64)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + h, left : left + w] = values.reshape(h, w)
    encoded = mask_api.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


_FIELDS = {"ellipse": ("cx", "cy", "rx", "ry"), "mask": ("rle", "left", "top", "width", "height")}


def _parse(file: Path) -> Any:
    """The root of the file. Declarations of entities, which may grow without bound, are refused."""
    try:
        content = file.read_bytes()
        if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
            raise InputError(f"{file} declares entities, which no export of CVAT does: export it again.")
        return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): export it again.") from error
