"""LVIS v1: 1203 classes on COCO's images, annotated federatedly (Gupta et al., LVIS, 2019, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.data.coco import Array, CocoDataset, Layout, Part
from runtime.errors import InputError

LVIS_V1 = Layout(
    "LVIS v1 with COCO's images",
    ("annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json", "train2017", "val2017"),
    "https://www.lvisdataset.org/dataset",
)
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


class LvisDataset(CocoDataset):
    """Images and instance masks from an LVIS v1 file.

    It is unknown whether an image shows most of the classes: annotators looked only for those annotated in it and those in its
    `neg_category_ids`. `coco_dict` keeps what `runtime.coco_metrics` needs for that rule: both lists of each image, and each category's
    `frequency`.

    Args:
        annotations: the JSON file.
        images: the folder that holds `train2017/` and `val2017/`: images are found by their `coco_url`.
        missing: as for `CocoDataset`.

    Raises:
        InputError: as `CocoDataset`; or an image lacks its two lists, or a category its frequency.
    """

    def __init__(self, annotations: str | Path, images: str | Path, missing: Callable[[str], InputError] | None = None) -> None:
        super().__init__(annotations, images, missing)
        for image in self.data.images:
            for name in _FEDERATED:
                if getattr(image, name) is None:
                    raise InputError(f"{annotations} is not LVIS v1: image {image.id} has no list {name}; give the original file.")
        for category in self.data.categories:
            if category.frequency not in ("r", "c", "f"):
                raise InputError(
                    f"{annotations} is not LVIS v1: category {category.id} has frequency {category.frequency!r}, "
                    "not 'r', 'c' or 'f'; give the original file."
                )

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """As `CocoDataset.__getitem__`; the target also holds `neg_category_ids` and `not_exhaustive_category_ids` (`[n] int64`,
        category ids): classes that the image does not show, and annotated classes of which it shows more instances than are annotated."""
        image, target = super().__getitem__(index)
        record = self.data.images[index]
        return image, target | {name: np.array(getattr(record, name), np.int64) for name in _FEDERATED}


def lvis_v1(root: Path, part: Part) -> LvisDataset:
    """A part of LVIS v1, from the folder of the whole, which may be that of COCO 2017. Each part has images of both of COCO's folders.

    Raises:
        InputError: names the first file of either part, or image of this one, that is missing; or as `LvisDataset`.
    """
    LVIS_V1.check(root)
    return LvisDataset(root / "annotations" / f"lvis_v1_{part}.json", root, lambda name: LVIS_V1.missing(root, name))
