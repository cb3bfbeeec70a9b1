"""The photos of a fine-tuning: checked, divided into those to train on and those to judge on, the former scaled down once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.data.coco_writer import coco_tree, mask_annotation, write_image
from dynamask.data.labels import Labels, read_labels
from runtime.coco import CocoAnnotation, CocoData, CocoImage, read_coco
from runtime.errors import InputError
from runtime.files import write_json
from runtime.preprocess import resize, scaled_size
from runtime.sources import IMAGE_SUFFIXES

HELD_BACK_SHARE = 0.2
"""The share of the photos that is held back to judge the model on, where no others are given."""
COPY_SIDE_PX = 512
"""The longer side of the copies that are trained on, at most: a training step need not decode large photos."""

Message = Callable[[str], None]
_SEED = 2
"""Keeps the random numbers of the division apart from those of the training."""


@dataclass(frozen=True)
class PhotoSets:
    """The data of a fine-tuning, as COCO files and the folders of their images."""

    classes: list[dict[str, Any]]
    """`{"id": category id, "name": str}`, each with at least one object to train on."""
    train: tuple[Path, Path]
    """Scaled copies."""
    val: tuple[Path, Path] | None
    """The photos themselves; None where none is held back."""
    train_photos: int
    val_photos: int
    broken: list[str]
    """Sentences about photos that cannot be read."""


def prepare_photos(
    photos: Path, folder: Path, labels: Path | None, kind: str | None, val: Path | None, seed: int, message: Message
) -> PhotoSets:
    """Read labels and photos, and write the two parts into `folder`.

    The photos to judge on are those in `val`; else those that the export has in a part for validation; else a fifth of the photos, drawn
    at random such that each of their classes stays in a photo to train on.

    Args:
        photos, labels, kind: as for `read_labels`.
        val: a folder of other labelled photos.
        seed: of the division.
        message: called with a sentence for each thing that is left out.

    Raises:
        InputError: as `read_labels`, or no labelled photo can be read.
    """
    found = read_labels(photos, labels, kind)
    data = _checked(found, folder / "labels.json", message)
    readable, broken = _copies(data, folder / "photos", message)
    if not readable:
        raise InputError(f"{photos}: none of the {len(data.images)} labelled photos can be read; the first: {broken[0]}")
    objects = _objects(data)
    held = set() if val is not None else _held_back([image.id for image in readable], objects, found, data, seed)
    train = [image for image in readable if image.id not in held]
    ids = _ids(data, {entry.category_id for image in train for entry in objects[image.id]}, message)
    classes = [{"id": number, "name": name} for name, number in ids.items()]
    _write_copies(folder, train, objects, _numbers(data, ids), classes)
    if val is not None:
        judged_data, judged = _of_other_photos(val, folder, ids, photos, message)
    else:
        judged_data, judged = data, [image for image in readable if image.id in held]
    sets = PhotoSets(classes, (folder / "train.json", folder / "photos"), None, len(train), len(judged), [*found.broken, *broken])
    if not judged:
        message("No photo is held back to judge the model on: there are too few. Give other photos with --val.")
        return sets
    tree = _part(judged, _objects(judged_data), _numbers(judged_data, ids), classes)
    write_json(folder / "val.json", tree)
    return replace(sets, val=(folder / "val.json", val or photos))


def _ids(data: CocoData, used: set[int], message: Message) -> dict[str, int]:
    """The model's classes, by name, with ids from 1: those that have an object to train on."""
    names = {category.id: category.name for category in data.categories}
    unlabelled = [name for number, name in names.items() if number not in used]
    if unlabelled:
        message(f"No object to train on is labelled as {', '.join(unlabelled)}: the model will not find {_it(unlabelled)}.")
    return {names[number]: i + 1 for i, number in enumerate(sorted(used))}


def _numbers(data: CocoData, ids: dict[str, int]) -> dict[int, int]:
    """A data set's category ids -> the model's, by name."""
    return {category.id: ids[category.name] for category in data.categories if category.name in ids}


def _of_other_photos(val: Path, folder: Path, ids: dict[str, int], photos: Path, message: Message) -> tuple[CocoData, list[CocoImage]]:
    """The labels of photos that were given to judge on, and those of the photos that show the model's classes."""
    data = _checked(read_labels(val), folder / "val-labels.json", message)
    known = _numbers(data, ids)
    objects = _objects(data)
    judged = [image for image in data.images if any(entry.category_id in known for entry in objects[image.id])]
    if not judged:
        raise InputError(f"{val} has no object of the classes of {photos} ({', '.join(ids)}): label some, or leave --val out.")
    return data, judged


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _checked(found: Labels, file: Path, message: Message) -> CocoData:
    """The labels as `read_coco` reads them; says what is left out."""
    listed = {found.folder / image["file_name"] for image in found.images}
    others = sum(path.suffix.lower() in IMAGE_SUFFIXES and path not in listed for path in found.folder.rglob("*"))
    for line in found.summary():
        if not line.startswith("No object"):  # said below, with the parts
            message(line)
    if others > len(found.broken):
        message(f"{found.folder} has {others - len(found.broken)} photos without labels: they are not used.")
    found.write(file)
    data = read_coco(file, found.folder)
    for line in data.summary():
        message(line.replace(str(file), str(found.folder)))
    return data


def _objects(data: CocoData) -> dict[int, list[CocoAnnotation]]:
    """The objects of each photo, crowds left out."""
    objects: dict[int, list[CocoAnnotation]] = defaultdict(list)
    for entry in data.annotations:
        if not entry.iscrowd:
            objects[entry.image_id].append(entry)
    return objects


def _copies(data: CocoData, folder: Path, message: Message) -> tuple[list[CocoImage], list[str]]:
    """Write scaled copies of the labelled photos; returns those that could be read, and why others could not."""
    labelled = {entry.image_id for entry in data.annotations if not entry.iscrowd}
    readable, broken = [], []
    for image in data.images:
        if image.id not in labelled:
            continue
        try:
            pixels = data.read_image(image)
        except InputError as error:
            broken.append(str(error))
            message(f"Left out: {error}")
            continue
        height, width, scale = _copy_size(image)
        write_image(folder / f"{image.id}.jpg", resize(pixels, height, width, scale))
        readable.append(image)
    return readable, broken


def _copy_size(image: CocoImage) -> tuple[int, int, float]:
    """Height and width of a photo's copy, and its scale."""
    scale = min(1.0, COPY_SIDE_PX / max(image.height, image.width))
    return *scaled_size(image.height, image.width, scale), scale


def _held_back(photos: list[int], objects: dict[int, list[CocoAnnotation]], found: Labels, data: CocoData, seed: int) -> set[int]:
    """The ids of the photos to judge on."""
    given = {image.id for image in data.images if image.file_name in found.validation} & set(photos)
    if given and given != set(photos):
        return given
    held: set[int] = set()
    wanted = max(1, round(HELD_BACK_SHARE * len(photos)))
    for photo in np.random.default_rng([seed, _SEED]).permutation(photos).tolist():
        rest = {entry.category_id for other in photos if other not in held and other != photo for entry in objects[other]}
        if len(held) < wanted and {entry.category_id for entry in objects[photo]} <= rest:
            held.add(photo)
    return held


def _write_copies(
    folder: Path, images: list[CocoImage], objects: dict[int, list[CocoAnnotation]], ids: dict[int, int], classes: list[dict[str, Any]]
) -> None:
    """Write `train.json`, the labels of the copies."""
    entries, annotations = [], []
    for image in images:
        height, width, scale = _copy_size(image)
        entries.append({"id": image.id, "file_name": f"{image.id}.jpg", "height": height, "width": width})
        for entry in objects[image.id]:
            # A pixel belongs to the mask if at least half of its area does.
            mask = resize(entry.mask() * np.uint8(255), height, width, scale) >= 128
            if mask.any():
                annotations.append({"image_id": image.id, **mask_annotation(ids[entry.category_id], mask)})
    write_json(folder / "train.json", coco_tree(entries, annotations, classes, "copies of photos, to train on"))


def _part(
    images: list[CocoImage], objects: dict[int, list[CocoAnnotation]], ids: dict[int, int], classes: list[dict[str, Any]]
) -> dict[str, Any]:
    """The COCO tree of some of the photos."""
    entries = [{"id": image.id, "file_name": image.file_name, "height": image.height, "width": image.width} for image in images]
    annotations = [
        {
            "image_id": image.id,
            "category_id": ids[entry.category_id],
            "bbox": list(entry.box),
            "area": entry.area,
            "iscrowd": 0,
            "segmentation": entry.segmentation,
        }
        for image in images
        for entry in objects[image.id]
        if entry.category_id in ids
    ]
    return coco_tree(entries, annotations, classes, "photos to judge on")
