"""YOLO segmentation: `data.yaml` with the names of the classes, and for each photo a text file of outlines (Ultralytics, Roboflow, CVAT).

A line is a class and the outline's points, `class x y x y …`, from 0 to 1 of the photo's width and height. The text file has the photo's
name; it stands in a folder `labels` where the photo stands in a folder `images`, or beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dynamask.data.labels.tree import VALIDATION_PARTS, Labels, numbers
from runtime.errors import InputError
from runtime.files import natural_order
from runtime.images import image_size
from runtime.sources import IMAGE_SUFFIXES

BOX = "box without an outline"


def has_names(path: Path) -> bool:
    """Whether a YAML file has the names of YOLO's classes."""
    return isinstance(_yaml(path), dict) and "names" in _yaml(path)


def read(files: list[Path], photos: Path) -> Labels:
    """Read the label files of all photos in the folder.

    Raises:
        InputError: there are several `data.yaml`, or a line or class in a file is wrong.
    """
    if len(files) > 1:
        raise InputError(f"{files[0]} and {files[1]} both name the classes of YOLO labels: keep one of them.")
    names = _names(files[0])
    labels = Labels(photos, "yolo", classes=list(names.values()))
    texts = {path: path for path in photos.rglob("*.txt")}
    used: set[Path] = set()
    for photo in natural_order(path for path in photos.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        text = next((texts[place] for place in _text_places(photo, photos) if place in texts), None)
        if text is not None:
            used.add(text)
            _add(labels, photo, text, names)
    labels.missing = [str(path) for path in texts if path not in used and path.parent.name == "labels"]
    return labels


def _add(labels: Labels, photo: Path, text: Path, names: dict[int, str]) -> None:
    try:
        height, width = image_size(photo)
    except InputError as error:
        labels.broken.append(str(error))
        return
    part = next((name for name in photo.relative_to(labels.folder).parts if name in VALIDATION_PARTS), "")
    image_id = labels.add_image(photo, height, width, part)
    for line in _lines(text):
        values = numbers(line, text)
        if not values or values[0] not in names:
            raise InputError(f"{text} has an object of class {line.split()[0]}, and data.yaml names {len(names)} classes: correct one.")
        if len(values) == 5:
            labels.left_out[BOX] += 1
        elif len(values) < 7 or len(values) % 2 == 0:
            raise InputError(f"{text} has a line of {len(values)} numbers: a line is a class and at least three points, x y x y x y.")
        else:
            scaled = np.reshape(values[1:], (-1, 2)) * (width, height)
            labels.add_outlines(image_id, names[int(values[0])], [scaled.ravel().tolist()])


def _text_places(photo: Path, photos: Path) -> list[Path]:
    """Where the text file of a photo may be."""
    inside = photo.relative_to(photos).parts
    places = [photo.with_suffix(".txt")]
    for i, name in enumerate(inside[:-1]):
        if name == "images":
            places.append(photos.joinpath(*inside[:i], "labels", *inside[i + 1 :]).with_suffix(".txt"))
    return places


def _lines(text: Path) -> list[str]:
    try:
        return [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read as text ({error}): export the labels again.") from error


def _names(path: Path) -> dict[int, str]:
    """Number -> name; YAML has a list or a table of them."""
    names = _yaml(path)["names"]
    table = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(table, dict) or not table or not all(isinstance(number, int) for number in table):
        raise InputError(f"{path} has no list of names: write names: [leaf, flower].")
    found = {number: str(name) for number, name in sorted(table.items())}
    if len(set(found.values())) < len(found):
        raise InputError(f"{path} gives one name to two classes: give each its own.")
    return found


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
