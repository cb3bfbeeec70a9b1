"""COCO JSON as tools export it: one file, or one for each part (`train/_annotations.coco.json`, `annotations/instances_train.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamask.data.labels.tree import VALIDATION_PARTS, Labels
from runtime.coco import CocoData, read_coco
from runtime.errors import InputError


def is_coco(tree: Any) -> bool:
    """Whether a JSON file's content is a COCO data set."""
    return isinstance(tree, dict) and all(isinstance(tree.get(name), list) for name in ("images", "annotations", "categories"))


def read(files: list[Path], photos: Path) -> Labels:
    """Read COCO files; `runtime.coco.read_coco` checks them. Annotations that cannot be used are counted in `left_out`.

    Parts may number their classes differently: the names count. A class without objects that is the supercategory of others is left out:
    Roboflow's exports have one.
    """
    parts = [(file, read_coco(file, photos)) for file in files]
    categories = [category for _, data in parts for category in data.categories]
    used = {category.name for _, data in parts for category in data.categories if category.id in {e.category_id for e in data.annotations}}
    groups = {category.supercategory for category in categories}
    names = [category.name for category in categories if category.name in used or category.name not in groups]
    labels = Labels(photos, "coco", classes=list(dict.fromkeys(names)))
    for file, data in parts:
        _add(labels, data, _folders(file, photos), _part(file))
    return labels


def _add(labels: Labels, data: CocoData, folders: list[Path], part: str) -> None:
    folder = max(folders, key=lambda place: sum((place / image.file_name).is_file() for image in data.images))
    ids: dict[int, int] = {}
    for image in data.images:
        path = folder / image.file_name
        if not path.is_file():
            labels.missing.append(image.file_name)
            continue
        if any(entry["file_name"] == path.relative_to(labels.folder).as_posix() for entry in labels.images):
            raise InputError(f"{data.path} has labels of {path}, which another file of labels has too: keep one of the files.")
        ids[image.id] = labels.add_image(path, image.height, image.width, part)
    names = {category.id: category.name for category in data.categories}
    for entry in data.annotations:
        if entry.image_id in ids:
            fields = {"bbox": list(entry.box), "area": entry.area, "iscrowd": int(entry.iscrowd)}
            labels.add(ids[entry.image_id], names[entry.category_id], entry.segmentation, **fields)
    labels.left_out.update(data.left_out)


def _folders(file: Path, photos: Path) -> list[Path]:
    """Where the photos of a file may be, the likeliest first: CVAT has them in `images`, or `images/<part>`, Roboflow beside the file."""
    part = _part(file)
    roots = [place for place in (file.parent, file.parent.parent, photos) if place == photos or photos in place.parents]
    places = [root / inner for root in dict.fromkeys(roots) for inner in (".", "images", part, f"images/{part}")]
    return [photos / place.relative_to(photos) for place in places]


def _part(file: Path) -> str:
    """The part of a data set that a file is for: `train`, `valid`, …; empty if its name does not say."""
    words = [file.parent.name, *reversed(file.stem.removesuffix(".coco").split("_"))]
    return next((word for word in words if word in ("train", *VALIDATION_PARTS, "default")), "")
