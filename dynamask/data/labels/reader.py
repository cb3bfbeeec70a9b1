"""Finds out the format of labels, and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamask.data.labels import coco, cvat, labelme, yolo
from dynamask.data.labels.tree import Labels
from runtime.errors import InputError
from runtime.files import input_path

FORMATS = ("coco", "yolo", "labelme", "cvat")
_READERS = {"coco": coco.read, "yolo": yolo.read, "labelme": labelme.read, "cvat": cvat.read}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_HINT = (
    "export the labels as COCO JSON, YOLO segmentation (with its data.yaml), LabelMe JSON or CVAT XML into the folder, or name their file"
)


def read_labels(photos: Path, labels: Path | None = None, kind: str | None = None) -> Labels:
    """Read the labels of photos in any of `FORMATS`, with the photos' sizes.

    Args:
        photos: the folder of the photos, as the labelling tool exported it, or with subfolders.
        labels: the file or folder of the labels; by default they are looked for in `photos`.
        kind: one of `FORMATS`; by default the content tells.

    Raises:
        InputError: there are no labels, they are not in a format that is read, or not in that which is said; a file name leads out of the
            folder; a file is damaged; all labels are of photos that are not there.

    Example:
        >>> from dynamask.data.shapes import write_dataset
        >>> _ = write_dataset(folder / "drawn", 2, seed=0, height=64, width=64)
        >>> labels = read_labels(folder / "drawn")
        >>> labels.format, len(labels.images)
        ('coco', 2)
    """
    if not input_path(photos).is_dir():
        fault = "is a file" if photos.exists() else "does not exist"
        raise InputError(f"{photos} {fault}: give the folder of the photos.")
    place = labels or photos
    if not input_path(place).exists():
        raise InputError(f"{place} does not exist: give the file or folder of the labels.")
    if place.suffix.lower() in _ARCHIVES and place.is_file():
        raise InputError(f"{place} is an archive: unpack it, and give the folder.")
    if kind is not None and kind not in FORMATS:
        raise InputError(f"{kind} is not a format of labels: choose one of {', '.join(FORMATS)}.")
    files = _files(place)
    if kind is None:
        kind = next((name for name in FORMATS if files[name]), None)
    if kind is None or not files[kind]:
        found = next((name for name in FORMATS if files[name]), None)
        if kind is not None and found is not None:
            raise InputError(f"{place} holds no labels in the format {kind}; they look like {found}: say so, or leave the format out.")
        raise InputError(f"{place} holds no labels: {_HINT}.")
    read = _READERS[kind](files[kind], photos)
    read.files = files[kind]
    if not read.images:
        absent = f", such as {read.missing[0]}" if read.missing else ""
        raise InputError(f"{photos} holds none of the {len(read.missing)} labelled photos{absent}: give their folder.")
    if not read.annotations:
        other = f" (there are {', '.join(f'{count} {name}' for name, count in read.left_out.items())})" if read.left_out else ""
        raise InputError(f"{place} has no outline of an object{other}: draw polygons or masks around the objects.")
    return read


def _files(place: Path) -> dict[str, list[Path]]:
    """The files of labels at a place, by format."""
    found: dict[str, list[Path]] = {name: [] for name in FORMATS}
    for path in _candidates(place):
        kind = _kind(path)
        if kind is not None:
            found[kind].append(path)
    return found


def _candidates(place: Path) -> list[Path]:
    """The place itself, if it is a file, or the files in the folder and two levels of folders in it that may be labels."""
    if place.is_file():
        return [place]
    files = [path for depth in ("*", "*/*", "*/*/*") for path in place.glob(depth)]
    return sorted(path for path in files if path.suffix.lower() in (".json", ".xml", ".yaml", ".yml") and path.is_file())


def _kind(path: Path) -> str | None:
    """The format of a file, by its content."""
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return "yolo" if yolo.has_names(path) else None
    if suffix == ".xml":
        return "cvat" if cvat.is_cvat(path) else None
    if suffix == ".json":
        tree = _json(path)
        if coco.is_coco(tree):
            return "coco"
        if labelme.is_labelme(tree):
            return "labelme"
    return None


def _json(path: Path) -> Any:
    """The content of a JSON file, None if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
