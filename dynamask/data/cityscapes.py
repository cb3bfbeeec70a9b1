"""Cityscapes: street scenes, eight classes with instances (Cordts et al., 2016)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynamask.data.boxes import mask_boxes
from dynamask.data.coco import Array, Layout, Part
from dynamask.data.coco_writer import coco_tree, mask_annotation
from runtime.errors import InputError
from runtime.images import read_image

CITYSCAPES = Layout(
    "Cityscapes",
    ("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"),
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com/downloads",
)
CLASSES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
"""Cityscapes' label id → name; caravans and trailers have instances too, but are not evaluated."""

_LABELS = {category: i + 1 for i, category in enumerate(CLASSES)}
_IMAGE, _INSTANCES = "_leftImg8bit.png", "_gtFine_instanceIds.png"


class CityscapesDataset:
    """Images and instance masks of one part of Cityscapes, with the items and attributes of `CocoDataset`.

    A pixel of `…_gtFine_instanceIds.png` is `class * 1000 + instance`, or below 1000 the class alone, for classes without
    instances and for groups whose members are not annotated one by one. Groups are crowds: not trained on, and detections on them do not
    count as wrong.

    Args:
        root: the folder with `leftImg8bit/` and `gtFine/`.
        part: `train` or `val`.
        images: the number of images to use, the first ones by name; all by default.

    Attributes:
        classes: the eight, as `{"id": Cityscapes' label id, "name": str}`.
        image_ids: 1, 2, … in the order of the names.

    Raises:
        InputError: names the first folder of either part, or file of this one, that is missing.
    """

    def __init__(self, root: Path, part: Part, images: int | None = None) -> None:
        CITYSCAPES.check(root)
        self.root, self.part = root, part
        names = set(self._names("leftImg8bit", _IMAGE)) | set(self._names("gtFine", _INSTANCES))
        if not names:
            raise CITYSCAPES.missing(root, f"leftImg8bit/{part}/<city>/*{_IMAGE}")
        CITYSCAPES.check_files(
            root, (file for name in sorted(names) for file in (f"leftImg8bit/{part}/{name}{_IMAGE}", f"gtFine/{part}/{name}{_INSTANCES}"))
        )
        self.names = sorted(names)[:images]
        self.classes: list[dict[str, Any]] = [{"id": category, "name": name} for category, name in CLASSES.items()]
        self.image_ids = list(range(1, len(self.names) + 1))

    def _names(self, folder: str, ending: str) -> list[str]:
        """`city/city_000000_000019` of every file."""
        return [f"{path.parent.name}/{path.name.removesuffix(ending)}" for path in (self.root / folder / self.part).glob(f"*/*{ending}")]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """As `CocoDataset.__getitem__`.

        Raises:
            InputError: a file is damaged, or the two differ in size.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self.root / "leftImg8bit" / self.part / f"{self.names[index]}{_IMAGE}"
        image, pixels = read_image(path), self._instance_map(index)
        if image.shape[:2] != pixels.shape:
            raise InputError(
                f"{path} is {image.shape[0]}x{image.shape[1]} but its instances are {pixels.shape[0]}x{pixels.shape[1]}: "
                "use the original images, not resized."
            )
        values = [value for value in _values(pixels) if value >= 1000]
        masks = np.zeros((len(values), *pixels.shape), np.uint8)
        for mask, value in zip(masks, values, strict=True):
            mask[:] = pixels == value
        target = {
            "image_id": self.image_ids[index],
            "boxes": mask_boxes(masks),
            "labels": np.array([_LABELS[value // 1000] for value in values], np.int64),
            "masks": masks,
        }
        return image, target

    @functools.cached_property
    def indices_with_instances(self) -> list[int]:
        """The items that have at least one instance that is not in a group; the first use reads all instance maps."""
        return [i for i in range(len(self)) if any(value >= 1000 for value in _values(self._instance_map(i)))]

    @functools.cached_property
    def coco_dict(self) -> dict[str, Any]:
        """The ground truth for evaluation, in COCO format, groups as crowds; the first use reads all instance maps."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.image_ids):
            pixels = self._instance_map(index)
            height, width = pixels.shape
            images.append({"id": image_id, "file_name": f"{self.names[index]}{_IMAGE}", "height": height, "width": width})
            for value in _values(pixels):
                category = value // 1000 or value
                fields = {"image_id": image_id, "iscrowd": int(value < 1000)}
                annotations.append(mask_annotation(category, pixels == value) | fields)
        return coco_tree(images, annotations, self.classes, f"Cityscapes, {self.part}")

    def _instance_map(self, index: int) -> Array:
        """The values `[H, W]` of the image's `…_instanceIds.png`, integers."""
        path = self.root / "gtFine" / self.part / f"{self.names[index]}{_INSTANCES}"
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and others on damaged files
            raise InputError(f"{path} is damaged or not an image ({error}); unpack gtFine_trainvaltest.zip again.") from error
        if pixels.ndim != 2:
            raise InputError(f"{path} has {pixels.shape[2]} channels, not one of class * 1000 + instance; use the original file.")
        return pixels


def _values(pixels: Array) -> list[int]:
    """The values, rising, that belong to the eight classes: those of instances (1000 and more) and of groups."""
    values = np.flatnonzero(np.bincount(pixels.ravel())).tolist()
    return [value for value in values if (value // 1000 or value) in CLASSES]
