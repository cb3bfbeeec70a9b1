"""Data sets in COCO format, checked before use."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from runtime.errors import InputError
from runtime.images import read_image

Array = npt.NDArray[Any]
Part = Literal["train", "val"]

_BOX_TOLERANCE = 0.01
"""Pixels by which a box may leave its image and not be counted as clipped: COCO's own rounding."""


class _Defect(Exception):
    """Why an annotation cannot be used."""


class LabelledDataset(Protocol):
    """What all data sets have in common, to learn from and to be judged on; `CocoDataset` says what each is."""

    @property
    def classes(self) -> list[dict[str, Any]]: ...

    @property
    def indices_with_instances(self) -> list[int]: ...

    @property
    def coco_dict(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]: ...


@dataclass(frozen=True)
class Layout:
    """What the folder of a published data set holds (`paths`, relative to it), and where it is to be had."""

    name: str
    paths: tuple[str, ...]
    source: str

    def check(self, root: Path) -> None:
        """Look for the files and folders, so that a run ends before it reads a large file in vain.

        Raises:
            InputError: names the first that is missing.
        """
        for path in self.paths:
            if not (root / path).exists():
                raise self.missing(root, path)

    def check_files(self, root: Path, files: Iterable[str]) -> None:
        """Look for files by their paths relative to `root`; each folder is listed once, since there may be 100 000.

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
        """The sentence for a path that is not there."""
        return InputError(
            f"{root / path} is missing: data.root={root} must hold {', '.join(self.paths)}, complete, as in {self.name} ({self.source})."
        )


COCO_2017 = Layout(
    "COCO 2017",
    ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"),
    "https://cocodataset.org/#download",
)


class CocoDataset:
    """Images and instance masks from a COCO file.

    Annotations that cannot be used (unknown category or image, empty or malformed mask, degenerate box, box outside the image) are
    left out, boxes that leave their image are clipped, and both are counted in `report`.

    Args:
        annotations: the JSON file.
        images: the folder its `file_name`s are relative to. An image that has a `coco_url` alone, as in LVIS, is looked for under the
            last two parts of it: `train2017/000000391895.jpg`.

    Attributes:
        classes: `[{"id": category_id, "name": str}, …]`, in order of label − 1 (by rising category id).
        ids_to_category: label (1..C) → category id.
        image_ids: the image id of every item.
        indices_with_instances: the items that have at least one instance which is not a crowd.
        coco_dict: the ground truth for evaluation, in COCO format: every usable annotation, crowds included.
        report: reason → number of annotations left out or clipped for it.

    Raises:
        InputError: the file is missing, not JSON, not COCO, names no images or categories, or has no usable annotation.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        tree = _read_tree(self.annotations)
        self._entries = [_image_entry(entry, self.annotations) for entry in tree["images"]]
        categories = sorted((_category(entry, self.annotations) for entry in tree["categories"]), key=lambda entry: int(entry["id"]))
        self.classes: list[dict[str, Any]] = [{"id": entry["id"], "name": entry["name"]} for entry in categories]
        self.ids_to_category: dict[int, int] = {i + 1: entry["id"] for i, entry in enumerate(self.classes)}
        self._labels = {category: label for label, category in self.ids_to_category.items()}
        self.image_ids: list[int] = [entry["id"] for entry in self._entries]
        _require_unique(self.image_ids, "image", self.annotations)
        _require_unique([entry["id"] for entry in categories], "category", self.annotations)
        usable, self.report = self._usable(tree["annotations"])
        if all(entry["iscrowd"] for entry in usable):
            reasons = ", ".join(f"{count} with {reason}" for reason, count in self.report.items()) or "none are there"
            raise InputError(f"{self.annotations} is empty: no annotation can be used ({reasons}); check the file's export.")
        self.coco_dict: dict[str, Any] = {
            "info": tree.get("info", {}),
            "images": self._entries,
            "annotations": usable,
            "categories": categories,
        }
        self._targets: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in usable:
            if not entry["iscrowd"]:
                self._targets[entry["image_id"]].append(entry)
        self.indices_with_instances: list[int] = [i for i, image_id in enumerate(self.image_ids) if image_id in self._targets]

    def _usable(self, annotations: list[Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in self._entries}
        categories = set(self.ids_to_category.values())
        report: Counter[str] = Counter()
        usable: list[dict[str, Any]] = []
        for entry in annotations:
            try:
                checked, clipped = _checked(entry, sizes, categories)
            except _Defect as defect:
                report[str(defect)] += 1
                continue
            if clipped:
                report["a box clipped to its image"] += 1
            # Evaluators take the number 0 for "no match", and files with repeated numbers exist: number anew.
            checked["id"] = len(usable) + 1
            usable.append(checked)
        return usable, dict(report)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """Item `index`: the image `[H, W, 3] uint8` RGB and its target, crowds left out.

        The target holds `image_id` (int), `boxes` (`[G, 4] float32`, xyxy pixels), `labels` (`[G] int64`, 1..C) and `masks`
        (`[G, H, W] uint8`, 0 or 1).

        Raises:
            InputError: the image is missing or truncated, or is not of the size the annotations say.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = self._entries[index]
        height, width = entry["height"], entry["width"]
        path = self.images / entry["file_name"]
        image = read_image(path)
        if image.shape[:2] != (height, width):
            raise InputError(
                f"{path} is {image.shape[0]}x{image.shape[1]} but {self.annotations} says {height}x{width}: "
                "use the images that were annotated, not rotated or resized."
            )
        instances = self._targets.get(entry["id"], [])
        boxes = np.array([thing["bbox"] for thing in instances], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(instances), height, width), np.uint8)
        for mask, thing in zip(masks, instances, strict=True):
            mask[:] = decode_mask(thing["segmentation"], height, width)
        target = {
            "image_id": entry["id"],
            "boxes": boxes,
            "labels": np.array([self._labels[thing["category_id"]] for thing in instances], np.int64),
            "masks": masks,
        }
        return image, target


def coco_2017(root: Path, part: Part) -> CocoDataset:
    """A part of COCO 2017, from the folder of the whole.

    Raises:
        InputError: names the first file of either part, or image of this one, that is missing; or as `CocoDataset`.
    """
    COCO_2017.check(root)
    dataset = CocoDataset(root / "annotations" / f"instances_{part}2017.json", root / f"{part}2017")
    COCO_2017.check_files(root, (f"{part}2017/{entry['file_name']}" for entry in dataset.coco_dict["images"]))
    return dataset


def decode_mask(segmentation: Any, height: int, width: int) -> Array:
    """A COCO segmentation (polygons, or RLE plain or compressed) as a mask `[height, width] uint8`, 0 or 1."""
    if isinstance(segmentation, list):
        encoded = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return np.asarray(rle.decode(encoded))


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the annotations' JSON file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): give the annotations' JSON file.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): give the annotations of a data set in COCO format.") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is not in COCO format: at its top level stand no images, annotations and categories.")
    for section in ("images", "annotations", "categories"):
        if not isinstance(tree.get(section), list):
            raise InputError(f"{path} is not in COCO format: it has no list of {section}.")
    for section in ("images", "categories"):
        if not tree[section]:
            raise InputError(f"{path} is empty: its list of {section} has no entry; export it with at least one.")
    return tree


def _image_entry(entry: Any, path: Path) -> dict[str, Any]:
    try:
        checked = {**entry, "id": int(entry["id"]), "height": int(entry["height"]), "width": int(entry["width"])}
        if "file_name" not in entry:
            checked["file_name"] = "/".join(entry["coco_url"].split("/")[-2:])
        if isinstance(checked["file_name"], str) and checked["height"] > 0 and checked["width"] > 0:
            return checked
    except (TypeError, KeyError, ValueError, AttributeError):
        pass
    raise InputError(f"{path} has an image without a usable id, file_name, height and width ({_short(entry)}): correct that entry.")


def _category(entry: Any, path: Path) -> dict[str, Any]:
    try:
        return {**entry, "id": int(entry["id"]), "name": str(entry["name"])}
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path} has a category without a usable id and name ({_short(entry)}): correct that entry.") from None


def _require_unique(ids: list[int], what: str, path: Path) -> None:
    repeated = [number for number, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InputError(f"{path} gives the {what} id {repeated[0]} to several entries: number them apart.")


def _short(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else text[:77] + "..."


def _checked(entry: Any, sizes: dict[int, tuple[int, int]], categories: set[int]) -> tuple[dict[str, Any], bool]:
    """A copy of the annotation with its box inside the image and an area, and whether the box had to be clipped for it."""
    if not isinstance(entry, dict):
        raise _Defect("no fields")
    if entry.get("category_id") not in categories:
        raise _Defect("an unknown category")
    if entry.get("image_id") not in sizes:
        raise _Defect("an unknown image")
    height, width = sizes[entry["image_id"]]
    segmentation = _checked_segmentation(entry.get("segmentation"), height, width)
    box, clipped = _clipped_box(entry.get("bbox"), height, width)
    area = entry.get("area")
    if not isinstance(area, int | float) or not math.isfinite(area):
        area = int(decode_mask(segmentation, height, width).sum())
    crowd = 1 if entry.get("iscrowd") else 0
    return {**entry, "segmentation": segmentation, "bbox": box, "area": area, "iscrowd": crowd}, clipped


def _clipped_box(box: Any, height: int, width: int) -> tuple[list[float], bool]:
    """The box, xywh, cut to the image, and whether it left it by more than rounding."""
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(edge) for edge in box):
        raise _Defect("no usable box")
    x, y, w, h = (float(edge) for edge in box)
    if w <= 0 or h <= 0:
        raise _Defect("a degenerate box")
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x0 >= x1 or y0 >= y1:
        raise _Defect("a box outside its image")
    clipped = max(x0 - x, y0 - y, x + w - x1, y + h - y1) > _BOX_TOLERANCE
    if not clipped and x0 == x and y0 == y:
        return [x, y, min(w, x1 - x), min(h, y1 - y)], False
    return [x0, y0, x1 - x0, y1 - y0], clipped


def _finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _checked_segmentation(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        polygons = [points for points in segmentation if _is_polygon(points)]
        if not polygons:
            raise _Defect("an empty polygon")
        return polygons
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise _Defect("no mask")
    if segmentation.get("size") != [height, width]:
        raise _Defect("a mask of another size than its image")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise _Defect("a malformed mask")
        if sum(counts[1::2]) == 0:
            raise _Defect("an empty mask")
        return segmentation
    if not isinstance(counts, str) or not counts.isascii() or _runs_total(counts) != height * width:
        raise _Defect("a malformed mask")
    if int(rle.area(segmentation)) == 0:
        raise _Defect("an empty mask")
    return segmentation


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and all(_finite(point) for point in points)


def _runs_total(counts: str) -> int:
    """The pixels that a compressed RLE describes, −1 if it is malformed.

    pycocotools decodes without checking, so the string is read here first: each run is a little-endian number in groups of five
    bits (a sixth bit says that more follow, the characters start at `0`), from the third on relative to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        group = character - 48
        if not 0 <= group < 64 or shift > 35:
            return -1
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        run = value + runs[-2] if len(runs) > 2 else value
        if run < 0:
            return -1
        runs.append(run)
        value = shift = 0
    return sum(runs) if shift == 0 else -1
