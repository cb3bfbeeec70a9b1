"""`ShapesDataset`: shapes drawn when an item is read."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dynamask.data.boxes import mask_boxes
from dynamask.data.coco_writer import coco_tree, mask_annotation
from dynamask.data.shapes.outlines import Array, categories
from dynamask.data.shapes.scenes import check_size, draw_image
from runtime.errors import InputError


def shapes_tree(images: list[dict[str, Any]], annotations: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """A COCO data set of the shapes' classes; the annotations are numbered from 1."""
    return coco_tree(images, annotations, categories(), f"DynaMask shapes, seed {seed}")


def shape_annotation(image_id: int, thing: dict[str, Any]) -> dict[str, Any]:
    """The COCO annotation of an object as `draw_image` gives it, without its id."""
    return {"image_id": image_id, **mask_annotation(thing["label"] + 1, thing["mask"])}


class ShapesDataset:
    """Shapes drawn on the fly, with the items and attributes of `CocoDataset`; item i is what `write_dataset` writes as image i,
    before JPEG.

    Args:
        images: the length.
        seed: image i is drawn from `(seed, i)`.
        height, width: the images' size in pixels.
    """

    def __init__(self, images: int, seed: int, height: int = 320, width: int = 320) -> None:
        if images < 1:
            raise InputError(f"A shapes data set of {images} images is empty: ask for at least 1.")
        check_size(height, width)
        self.seed, self.height, self.width = seed, height, width
        self.classes: list[dict[str, Any]] = [{"id": entry["id"], "name": entry["name"]} for entry in categories()]
        self.ids_to_category: dict[int, int] = {i + 1: entry["id"] for i, entry in enumerate(self.classes)}
        self.image_ids: list[int] = list(range(1, images + 1))
        self.indices_with_instances: list[int] = list(range(images))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """As `CocoDataset.__getitem__`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, objects = draw_image(np.random.default_rng([self.seed, index]), self.height, self.width)
        masks = np.stack([thing["mask"] for thing in objects]).astype(np.uint8)
        target = {
            "image_id": self.image_ids[index],
            "boxes": mask_boxes(masks),
            "labels": np.array([thing["label"] + 1 for thing in objects], np.int64),
            "masks": masks,
        }
        return image, target

    @functools.cached_property
    def coco_dict(self) -> dict[str, Any]:
        """The ground truth of all images in COCO format; the first use draws them all."""
        images, annotations = [], []
        for index, image_id in enumerate(self.image_ids):
            _, objects = draw_image(np.random.default_rng([self.seed, index]), self.height, self.width)
            images.append({"id": image_id, "file_name": f"{index:06d}.jpg", "height": self.height, "width": self.width})
            annotations += [shape_annotation(image_id, thing) for thing in objects]
        return shapes_tree(images, annotations, self.seed)
