"""LVIS v1: 1203 classes on COCO's images, annotated by federation (Gupta et al., LVIS, 2019, section 2)."""

from __future__ import annotations

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

    Of most classes it is unknown whether an image shows them: only those annotated in it, and those in its `neg_category_ids`, were
    looked for. `coco_dict` keeps what `runtime.coco_metrics` needs to judge by that: both lists of each image, and each category's
    `frequency`.

    Args:
        annotations: the JSON file.
        images: the folder that holds `train2017/` and `val2017/`: images are found by their `coco_url`.

    Raises:
        InputError: as `CocoDataset`; or an image lacks its two lists, or a category its frequency.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        super().__init__(annotations, images)
        for entry in self.coco_dict["images"]:
            for name in _FEDERATED:
                if not isinstance(entry.get(name), list):
                    raise InputError(f"{self.annotations} is not LVIS v1: image {entry['id']} has no list {name}; give the original file.")
        for entry in self.coco_dict["categories"]:
            if entry.get("frequency") not in ("r", "c", "f"):
                raise InputError(
                    f"{self.annotations} is not LVIS v1: category {entry['id']} has frequency {entry.get('frequency')!r}, "
                    "not 'r', 'c' or 'f'; give the original file."
                )

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """As `CocoDataset.__getitem__`; the target also holds `neg_category_ids` and `not_exhaustive_category_ids` (`[n] int64`,
        category ids): classes that the image does not show, and annotated classes of which it shows more instances than are annotated."""
        image, target = super().__getitem__(index)
        entry = self.coco_dict["images"][index]
        return image, target | {name: np.array(entry[name], np.int64) for name in _FEDERATED}


def lvis_v1(root: Path, part: Part) -> LvisDataset:
    """A part of LVIS v1, from the folder of the whole, which may be that of COCO 2017. Each part has images of both of COCO's folders.

    Raises:
        InputError: names the first file of either part, or image of this one, that is missing; or as `LvisDataset`.
    """
    LVIS_V1.check(root)
    dataset = LvisDataset(root / "annotations" / f"lvis_v1_{part}.json", root)
    LVIS_V1.check_files(root, (entry["file_name"] for entry in dataset.coco_dict["images"]))
    return dataset
