"""Data sets in COCO format to train on, and the layouts of published data sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from runtime.coco import CocoAnnotation, CocoData, read_coco
from runtime.errors import InputError

Array = npt.NDArray[Any]
Part = Literal["train", "val"]


class InstanceDataset(Protocol):
    """Images with instances; `CocoDataset` describes each member."""

    @property
    def indices_with_instances(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]: ...


class LabelledDataset(InstanceDataset, Protocol):
    """The interface of all data sets, for training and validation; `CocoDataset` describes each member."""

    @property
    def classes(self) -> list[dict[str, Any]]: ...

    @property
    def coco_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Layout:
    """The files and folders of a published data set (`paths`, relative to its folder), and the site it comes from (`source`)."""

    name: str
    paths: tuple[str, ...]
    source: str

    def check(self, root: Path) -> None:
        """Look for the files and folders before a large file is read.

        Raises:
            InputError: names the first that is missing.
        """
        for path in self.paths:
            if not (root / path).exists():
                raise self.missing(root, path)

    def check_files(self, root: Path, files: Iterable[str]) -> None:
        """Look for files by their paths relative to `root`. Each folder is listed only once: there may be 100,000 files.

        Raises:
            InputError: names the first that is missing.
        """
        listed: dict[str, set[str]] = {}
        for file in files:
            folder, _, name = file.rpartition("/")
            if folder not in listed:
                listed[folder] = {path.name for path in (root / folder).iterdir()} if (root / folder).is_dir() else set()
            if name not in listed[folder]:
                raise self.missing(root, file)

    def missing(self, root: Path, path: str) -> InputError:
        """The error for a path that does not exist."""
        return InputError(
            f"{root / path} is missing: data.root={root} must contain all of {', '.join(self.paths)}, as in {self.name} ({self.source})."
        )


COCO_2017 = Layout(
    "COCO 2017",
    ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"),
    "https://cocodataset.org/#download",
)


class CocoDataset:
    """Images and instance masks from a COCO file, which `runtime.coco.read_coco` reads and checks.

    Annotations that cannot be used and images that are not in the folder are left out; `data` holds their numbers by reason.

    Args:
        annotations: the JSON file.
        images: the folder its `file_name`s are relative to. An image that has a `coco_url` alone, as in LVIS, is looked for under the
            last two parts of it: `train2017/000000391895.jpg`.
        missing: makes the error for an image that is not in the folder from its file name; by default, such images are left out.

    Attributes:
        data: the records of the file.
        classes: `[{"id": category_id, "name": str}, …]`, in order of label - 1 (by rising category id).
        ids_to_category: label (1..C) → category id.
        image_ids: the image id of every item.
        indices_with_instances: the items that have at least one instance which is not a crowd.

    Raises:
        InputError: as `read_coco`; or the file has no usable annotation that is not a crowd, or none of its images is in the folder.
    """

    def __init__(self, annotations: str | Path, images: str | Path, missing: Callable[[str], InputError] | None = None) -> None:
        data = read_coco(annotations, images)
        if missing is not None and (absent := data.missing_files()):
            raise missing(absent[0])
        self.data = data.without_missing_files()
        if all(entry.iscrowd for entry in self.data.annotations):
            raise InputError(f"{annotations} has no annotation to train on: it needs at least one mask that is not a crowd (iscrowd 1).")
        categories = sorted(self.data.categories, key=lambda category: category.id)
        self.classes: list[dict[str, Any]] = [{"id": category.id, "name": category.name} for category in categories]
        self.ids_to_category: dict[int, int] = {i + 1: category.id for i, category in enumerate(categories)}
        self.image_ids: list[int] = [image.id for image in self.data.images]
        self._labels = {category: label for label, category in self.ids_to_category.items()}
        self._instances: dict[int, list[CocoAnnotation]] = defaultdict(list)
        for entry in self.data.annotations:
            if not entry.iscrowd:
                self._instances[entry.image_id].append(entry)
        self.indices_with_instances: list[int] = [i for i, image_id in enumerate(self.image_ids) if image_id in self._instances]

    @property
    def coco_dict(self) -> dict[str, Any]:
        """The ground truth for evaluation, in COCO format: every usable annotation, crowds included."""
        return self.data.truth

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """Item `index`: the image `[H, W, 3] uint8` RGB and its target, crowds left out.

        The target holds `image_id` (int), `boxes` (`[G, 4] float32`, xyxy pixels), `labels` (`[G] int64`, 1..C) and `masks`
        (`[G, H, W] uint8`, 0 or 1).

        Raises:
            InputError: the image is damaged, or is not of the size the annotations say.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self.data.images[index]
        image = self.data.read_image(record)
        instances = self._instances.get(record.id, [])
        boxes = np.array([entry.box for entry in instances], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(instances), record.height, record.width), np.uint8)
        for mask, entry in zip(masks, instances, strict=True):
            mask[:] = entry.mask()
        target = {
            "image_id": record.id,
            "boxes": boxes,
            "labels": np.array([self._labels[entry.category_id] for entry in instances], np.int64),
            "masks": masks,
        }
        return image, target


def left_out_lines(datasets: Mapping[str, Any]) -> list[str]:
    """Sentences about the annotations that were left out or repaired, for the start of a run; none for data sets other than COCO files.

    Args:
        datasets: by the name of their part, such as `train` and `val`.
    """
    return list(dict.fromkeys(line for data in _coco_data(datasets).values() for line in data.summary()))


def left_out_counts(datasets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same as numbers, for a run's JSON result: by part, those of `runtime.coco.CocoData.counts`."""
    return {part: data.counts() for part, data in _coco_data(datasets).items()}


def _coco_data(datasets: Mapping[str, Any]) -> dict[str, CocoData]:
    return {part: dataset.data for part, dataset in datasets.items() if isinstance(dataset, CocoDataset)}


def coco_2017(root: Path, part: Part) -> CocoDataset:
    """A part of COCO 2017, from the folder of the whole.

    Raises:
        InputError: names the first file of either part, or image of this one, that is missing; or as `CocoDataset`.
    """
    COCO_2017.check(root)
    folder = f"{part}2017"
    return CocoDataset(
        root / "annotations" / f"instances_{folder}.json", root / folder, lambda name: COCO_2017.missing(root, f"{folder}/{name}")
    )
