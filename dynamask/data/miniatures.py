"""Miniatures of published data sets: a few generated shapes in the same files and folders, to try a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamask.data import cityscapes
from dynamask.data.coco import Part
from dynamask.data.coco_writer import coco_tree, write_image
from dynamask.data.shapes import categories, draw_image
from dynamask.data.shapes.dataset import shape_annotation
from runtime.errors import InputError
from runtime.files import input_path, write_json

Array = npt.NDArray[Any]

IMAGES: dict[Part, int] = {"train": 6, "val": 2}
HEIGHT, WIDTH = 192, 256
_DESCRIPTION = "DynaMask miniature"
_SEEDS: dict[Part, int] = {"train": 1, "val": 2}


def write_miniature(kind: str, folder: Path) -> dict[str, Any]:
    """Write the miniature of a layout: `IMAGES` pictures per part, `HEIGHT` x `WIDTH` pixels, always the same.

    Args:
        kind: `coco`, `lvis` or `cityscapes`, as `data.kind` in the configuration.
        folder: where it goes, for `data.root`; made if need be.

    Returns:
        `kind`, `root`, and the number of `images` by part.

    Raises:
        InputError: no such kind, or the folder holds something.
        DynaMaskError: the folder cannot be written.
    """
    if kind not in _WRITERS:
        raise InputError(f"{kind} is not a layout that can be written: choose {', '.join(_WRITERS)}.")
    if input_path(folder).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: remove it or choose another.")
    for part in IMAGES:
        _WRITERS[kind](folder, part)
    return {"kind": kind, "root": str(folder), "images": dict(IMAGES)}


def _pictures(part: Part) -> Iterator[tuple[int, Array, list[dict[str, Any]]]]:
    """Index, image `[H, W, 3] uint8` RGB and objects, as `draw_image` gives them."""
    for index in range(IMAGES[part]):
        yield index, *draw_image(np.random.default_rng([_SEEDS[part], index]), HEIGHT, WIDTH)


def _write_coco(folder: Path, part: Part) -> None:
    images, annotations = [], []
    for index, picture, objects in _pictures(part):
        name = f"{index + 1:012d}.jpg"
        write_image(folder / f"{part}2017" / name, picture)
        images.append({"id": index + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
        annotations += [shape_annotation(index + 1, thing) for thing in objects]
    write_json(folder / "annotations" / f"instances_{part}2017.json", coco_tree(images, annotations, categories(), _DESCRIPTION))


def _write_lvis(folder: Path, part: Part) -> None:
    """Federated: in every image a third of the classes was not looked for, and of one class only the first instance is annotated."""
    images, annotations = [], []
    for index, picture, objects in _pictures(part):
        image_id = 1000 * _SEEDS[part] + index
        # In LVIS v1, too, some validation images are in the folder of COCO's training images.
        file = f"{'train' if index == 0 else part}2017/{image_id:012d}.jpg"
        write_image(folder / file, picture)
        counts = Counter(thing["label"] + 1 for thing in objects)
        verified = [entry["id"] for entry in categories() if (entry["id"] + index) % 3]
        partial = [category for category in verified if counts[category] > 1][:1]
        images.append(
            {
                "id": image_id,
                "coco_url": f"http://images.cocodataset.org/{file}",
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": [category for category in verified if not counts[category]],
                "not_exhaustive_category_ids": partial,
            }
        )
        seen: set[int] = set()
        for thing in objects:
            category = thing["label"] + 1
            if category in verified and not (category in partial and category in seen):
                annotations.append(shape_annotation(image_id, thing))
            seen.add(category)
    classes = [{**entry, "frequency": "rcf"[entry["id"] % 3]} for entry in categories()]
    write_json(folder / "annotations" / f"lvis_v1_{part}.json", coco_tree(images, annotations, classes, _DESCRIPTION))


def _write_cityscapes(folder: Path, part: Part) -> None:
    """The shapes get Cityscapes' classes in turn, and the last shape of every image is a group."""
    ids = list(cityscapes.CLASSES)
    for index, picture, objects in _pictures(part):
        pixels = np.full((HEIGHT, WIDTH), 7, np.uint16)  # road
        for i, thing in enumerate(objects):
            category = ids[(thing["label"] + index) % len(ids)]
            pixels[thing["mask"]] = category if i == len(objects) - 1 else category * 1000 + i
        name = f"miniature/miniature_000000_{index:06d}"
        write_image(folder / "leftImg8bit" / part / f"{name}_leftImg8bit.png", picture)
        write_image(folder / "gtFine" / part / f"{name}_gtFine_instanceIds.png", pixels)


_WRITERS: dict[str, Callable[[Path, Part], None]] = {"coco": _write_coco, "lvis": _write_lvis, "cityscapes": _write_cityscapes}
