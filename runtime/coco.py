"""Reads data sets in COCO format: one checked reader for training and validation.

A file whose structure is wrong (images, categories, ids that several entries share) is refused in a sentence. An annotation that cannot
be used is left out and counted by its reason. A box that is missing or wrong is taken from the mask.
"""

from __future__ import annotations

import functools
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_api

from runtime.coco_masks import MaskError, Rle, checked_area, checked_box, crowd_flag, encode_mask, whole_number
from runtime.errors import InputError, is_unicode, shortened
from runtime.files import input_path
from runtime.images import MAX_PIXELS, read_image

Array = npt.NDArray[Any]

WARN_SHARE = 0.1
"""If a larger share of a file's annotations or images is left out, the summary begins with "Warning:"."""
_LONGEST_NAME = 255
"""Bytes in the name of a file or folder, on the usual file systems."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 78

UNKNOWN_IMAGE = "unknown image"
UNKNOWN_CATEGORY = "unknown category"
NO_OBJECT = "not a JSON object"
MISSING_FILE = "image file missing"


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of a COCO file. The two lists are LVIS's, None where the file has none."""

    id: int
    file_name: str
    """Relative to the folder of images, with forward slashes."""
    height: int
    width: int
    neg_category_ids: tuple[int, ...] | None = None
    not_exhaustive_category_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class CocoCategory:
    """A category of a COCO file; `frequency` is LVIS's `r`, `c` or `f`, None where the file has none."""

    id: int
    name: str
    supercategory: str | None = None
    frequency: str | None = None


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """A usable annotation: its mask is not empty and has the size of its image."""

    image_id: int
    category_id: int
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels, inside the image."""
    area: float
    """Pixels, as annotated."""
    iscrowd: bool
    size: tuple[int, int]
    """Height and width of the mask."""
    counts: str
    """The mask's runs, compressed as pycocotools does."""

    @property
    def segmentation(self) -> Rle:
        """The mask as compressed RLE."""
        return {"size": list(self.size), "counts": self.counts}

    def mask(self) -> npt.NDArray[np.uint8]:
        """The mask `[height, width] uint8`, 0 or 1."""
        return np.asarray(mask_api.decode(self.segmentation), np.uint8)


@dataclass(frozen=True)
class CocoData:
    """A COCO data set as `read_coco` gives it."""

    path: Path
    """The annotation file."""
    folder: Path
    """The folder of the images."""
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[CocoAnnotation]
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of annotations left out, by reason."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Number of boxes changed, by reason; their annotations are used."""
    images_left_out: dict[str, int] = field(default_factory=dict)
    """Number of images left out, by reason."""

    @property
    def name(self) -> str:
        return str(self.path)

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        """The usable content in COCO format, masks as compressed RLE, annotations numbered from 1."""
        return {
            "images": [_fields(image) for image in self.images],
            "annotations": [
                {
                    "id": number + 1,
                    "image_id": entry.image_id,
                    "category_id": entry.category_id,
                    "bbox": list(entry.box),
                    "area": entry.area,
                    "iscrowd": int(entry.iscrowd),
                    "segmentation": entry.segmentation,
                }
                for number, entry in enumerate(self.annotations)
            ],
            "categories": [_fields(category) for category in self.categories],
        }

    def read_image(self, image: CocoImage) -> npt.NDArray[np.uint8]:
        """Read the file of an image: `[height, width, 3] uint8` RGB.

        Raises:
            InputError: the file is missing or damaged, or is not of the size that the annotations say.
        """
        path = self.folder / image.file_name
        pixels = read_image(path)
        if pixels.shape[:2] != (image.height, image.width):
            height, width = pixels.shape[:2]
            raise InputError(
                f"{path} has {width}x{height} pixels, but {self.path} says {image.width}x{image.height}: "
                "use the images that were annotated, not rotated or resized."
            )
        return pixels

    def files_named(self, names: Collection[str]) -> list[Path]:
        """The paths of the images whose files have one of these names, whatever their folder."""
        return [self.folder / image.file_name for image in self.images if PurePosixPath(image.file_name).name in names]

    def missing_files(self) -> list[str]:
        """The file names of the images that are not in the folder, in order. Each folder is listed once."""
        listed: dict[Path, set[str]] = {}
        missing = []
        for image in self.images:
            path = self.folder / image.file_name
            if path.parent not in listed:
                listed[path.parent] = _names(path.parent)
            if path.name not in listed[path.parent] and not _exists(path):  # a file system may not distinguish case
                missing.append(image.file_name)
        return missing

    def require_files(self) -> list[str]:
        """`missing_files`, if the folder holds at least one of the images.

        Raises:
            InputError: it holds none.
        """
        missing = self.missing_files()
        if len(missing) < len(self.images):
            return missing
        shown = f"{self.folder} holds none of the {len(missing)} images of {self.path}, such as {missing[0]}"
        # Many tools write the folder's own name before the file's.
        if (self.folder.absolute().parent / missing[0]).is_file():
            raise InputError(f"{shown}: that one is in {self.folder.absolute().parent}; give this as the folder of images.")
        raise InputError(f"{shown}: give the folder to which these names are relative, or correct the names.")

    def without_missing_files(self) -> CocoData:
        """The data set without the images that are not in the folder, and without their annotations; both are counted.

        Raises:
            InputError: the folder holds none of the images.
        """
        missing = set(self.require_files())
        if not missing:
            return self
        images = [image for image in self.images if image.file_name not in missing]
        known = {image.id for image in images}
        annotations = [entry for entry in self.annotations if entry.image_id in known]
        lost = len(self.annotations) - len(annotations)
        left_out = {**self.left_out, MISSING_FILE: lost} if lost else self.left_out
        return replace(
            self, images=images, annotations=annotations, left_out=left_out, images_left_out={MISSING_FILE: len(missing)}
        )._require_usable()

    def counts(self) -> dict[str, Any]:
        """The numbers for a JSON result: what is used, what is left out and what is repaired, by reason."""
        return {
            "images": len(self.images),
            "images_left_out": self.images_left_out,
            "annotations": len(self.annotations),
            "annotations_left_out": self.left_out,
            "boxes_repaired": self.repaired,
        }

    def summary(self) -> list[str]:
        """Sentences for the start of a run: annotations left out, images missing in the folder, boxes repaired, no mask to find.

        None of a number that is 0. A sentence begins with "Warning:" if more than a tenth is left out, or if no mask counts.
        """
        missing = len(self.missing_files())
        images_left_out = self.images_left_out or ({MISSING_FILE: missing} if missing else {})
        lines = [
            _left_out_line(self.path, "images", len(self.images) - missing, images_left_out),
            _left_out_line(self.path, "annotations", len(self.annotations), self.left_out),
        ]
        if self.repaired:
            lines.append(f"{self.path}: boxes repaired: {_listed(self.repaired)}.")
        if all(entry.iscrowd for entry in self.annotations):
            lines.append(f"Warning: {self.path} has no annotation other than crowds (iscrowd 1), so there is no AP; give one with masks.")
        return [line for line in lines if line]

    def _require_usable(self) -> CocoData:
        """The data set itself, if it has usable annotations or none at all.

        Raises:
            InputError: the file has annotations, and all are left out.
        """
        if self.left_out and not self.annotations:
            total = sum(self.left_out.values())
            raise InputError(
                f"{self.path}: none of its {total} annotations can be used ({_listed(self.left_out)}); "
                "check that it is the right file, or export it again."
            )
        return self


def read_coco(data: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> CocoData:
    """Read a data set in COCO format and check every part of it.

    Ids may be whole numbers, floats without a fraction or strings of digits. Polygons may be nested (`[[x, y, …], …]`), flat
    (`[x, y, …]`) or lists of points. Polygons become RLE as pycocotools rasterises them. Coordinates may lie outside the image by as
    much as its size; the mask ends at the image's border.

    Args:
        data: a folder that holds `instances.json` and `images/`, or an annotation file.
        images: the folder that the file names are relative to; by default the folder `images` beside the annotation file.

    Returns:
        The images, categories and usable annotations, and the number of annotations left out and of boxes repaired, by reason.

    Raises:
        InputError: a file or folder is missing, the file is not a COCO data set, holds no images or no categories, gives an id or a file
            name to several entries, or all of its annotations are left out.

    Example:
        >>> import json, dynamask
        >>> fields = {"image_id": 1, "category_id": 3}
        >>> triangle = {**fields, "segmentation": [[8, 4, 40, 4, 40, 36]]}  # x, y, x, y, ... in pixels
        >>> broken = {**fields, "segmentation": [[8, 4, float("nan"), 4, 40, 36]]}
        >>> images = [{"id": 1, "file_name": photo.name, "height": image.shape[0], "width": image.shape[1]}]
        >>> tree = {"images": images, "annotations": [triangle, broken], "categories": [{"id": 3, "name": "leaf"}]}
        >>> length = (folder / "instances.json").write_text(json.dumps(tree))
        >>> data = dynamask.read_coco(folder / "instances.json", photo.parent)
        >>> len(data.annotations), data.left_out
        (1, {'polygon with a number that is not finite': 1})
    """
    path, folder = _locate(Path(data), None if images is None else Path(images))
    tree = _parse(path)
    records = [_image(entry, path) for entry in tree["images"]]
    categories = [_category(entry, path) for entry in tree["categories"]]
    _require_unique((image.id for image in records), "image id", path)
    _require_unique((image.file_name for image in records), "image file name", path)
    _require_unique((category.id for category in categories), "category id", path)
    _require_unique((category.name for category in categories), "category name", path)
    _require_unique(_annotation_ids(tree["annotations"]), "annotation id", path)
    sizes = {image.id: (image.height, image.width) for image in records}
    known = {category.id for category in categories}
    left_out: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    annotations = []
    for entry in tree["annotations"]:
        try:
            annotation, repair = _annotation(entry, sizes, known)
        except MaskError as reason:
            left_out[str(reason)] += 1
            continue
        annotations.append(annotation)
        if repair:
            repaired[repair] += 1
    return CocoData(path, folder, records, categories, annotations, dict(left_out), dict(repaired))._require_usable()


def first_other_class(first: Mapping[int, str], second: Mapping[int, str]) -> tuple[int, str, str] | None:
    """The lowest id at which two lists of classes (id -> name) differ, and what each has there, for a sentence; None if they are equal."""
    for number in sorted(first.keys() | second.keys()):
        if first.get(number) != second.get(number):
            ours, theirs = (repr(classes[number]) if number in classes else "absent" for classes in (first, second))
            return number, ours, theirs
    return None


# Files


def _locate(data: Path, images: Path | None) -> tuple[Path, Path]:
    path = input_path(data / "instances.json" if input_path(data).is_dir() else data)
    # Not is_file: process substitution gives a pipe.
    if not path.exists() or path.is_dir():
        raise InputError(f"{path} does not exist: give an annotation file in COCO format, or a folder with instances.json and images/.")
    folder = images or path.parent / "images"
    if not input_path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of {path.name}'s images.")
    return path, folder


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a path of more than 4096 bytes, though none of its parts is too long
        return False


def _names(folder: Path) -> set[str]:
    """The names in a folder; none if it cannot be listed."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _parse(path: Path) -> dict[str, Any]:
    """The tree of a file, which has lists of images, annotations and categories, none empty but that of annotations."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): give an annotation file in COCO format.") from error
    try:
        tree = json.loads(content)  # also takes UTF-16, UTF-32 and a byte order mark
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a COCO file: give the annotations of a data set in COCO format.") from None
    except ValueError as error:
        raise InputError(f"{path} {_not_json(content, error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is not in COCO format: {_foreign_list(tree)}; give a file with images, annotations and categories.")
    for section in ("images", "annotations", "categories"):
        if not isinstance(tree.get(section), list):
            raise InputError(f"{path} is not in COCO format: it has no list of {section}{_foreign_object(tree)}.")
    for section in ("images", "categories"):
        if not tree[section]:
            raise InputError(f"{path} is empty: its list of {section} has no entry; export it with at least one.")
    if any("segments_info" in entry for entry in tree["annotations"][:1] if isinstance(entry, dict)):
        raise InputError(f"{path} is a COCO panoptic file, which has no mask for each instance: give the file instances_*.json.")
    return tree


def _not_json(content: bytes, error: ValueError) -> str:
    """The rest of the sentence about a file that is not JSON: the most likely cause, and the way out."""
    start = content[:4096].removeprefix(b"\xef\xbb\xbf").strip()
    if not start:
        return "is empty: export the annotations again."
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed: unpack it and give the JSON file in it."
    if start.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return "is an image, not JSON: give the file of annotations."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the annotations: run git lfs pull."
    if start.strip(b"\0") == b"" or content.endswith(b"\0\0"):
        return "holds zero bytes, as after an interrupted copy: copy or export it again."
    if start.startswith(b"<"):
        return "is XML or HTML, not JSON: export the annotations in COCO format."
    if re.match(rb"\d+([ \t]+-?\d*\.\d+){4}", start):
        return "looks like a YOLO label file, not JSON: export the annotations in COCO format."
    if isinstance(error, UnicodeDecodeError):
        return f"is not JSON in UTF-8 (byte {error.start}): give the annotations' JSON file, saved as UTF-8."
    if isinstance(error, json.JSONDecodeError):
        at = error.doc[error.pos :].strip()
        if not at or error.msg.startswith("Unterminated string"):
            return "is not JSON, it ends too early: copy or export it again, it may be truncated."
        if at[0] in "}]" or "trailing comma" in error.msg:
            return f"is not JSON: it has a comma too many before line {error.lineno} column {error.colno}; remove it."
    return f"is not JSON ({error}): give the annotations of a data set in COCO format."


def _foreign_list(tree: Any) -> str:
    first = tree[0] if isinstance(tree, list) and tree else None
    if isinstance(first, dict) and {"image_id", "score"} <= first.keys():
        return "it is a list of detections (COCO results)"
    if isinstance(first, dict) and {"annotations", "data"} <= first.keys():
        return "it looks like an export of Label Studio"
    if isinstance(first, dict) and {"annotations", "image"} <= first.keys():
        return "it looks like a CreateML file"
    return "its top level is a list" if isinstance(tree, list) else "its top level is no object"


def _foreign_object(tree: dict[str, Any]) -> str:
    for keys, origin in (
        ({"shapes", "imagePath"}, "a labelme file"),
        ({"_via_img_metadata"}, "a project of VGG Image Annotator"),
        ({"features"}, "GeoJSON"),
    ):
        if keys <= tree.keys():
            return f", it looks like {origin}; export the annotations in COCO format"
    return ""


# Images, categories and ids


def _image(entry: Any, path: Path) -> CocoImage:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: an entry of images is {_short(entry)}, not an object: correct that entry.")
    number = _required_number(entry, "id", f"an image ({_short(entry)})", path)
    height, width = (_required_number(entry, side, f"image {number}", path) for side in ("height", "width"))
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise InputError(
            f"{path}: image {number} has height {height} and width {width}; both must be at least 1, "
            f"and their product at most {MAX_PIXELS}: correct that entry."
        )
    name = entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = "/".join(entry["coco_url"].split("/")[-2:])
    if not (isinstance(name, str) and name.strip()):
        raise InputError(f"{path}: image {number} has {_given(entry, 'file_name')}; that must be a name: correct that entry.")
    lists = (_id_list(entry.get(key)) for key in ("neg_category_ids", "not_exhaustive_category_ids"))
    return CocoImage(number, _relative_name(name, path), height, width, *lists)


def _required_number(entry: dict[str, Any], field: str, owner: str, path: Path) -> int:
    """A field that must be a whole number; `owner` names the entry in the sentence."""
    number = whole_number(entry.get(field))
    if number is None:
        raise InputError(f"{path}: {owner} has {_given(entry, field)}; that must be a whole number: correct that entry.")
    return number


def _given(entry: dict[str, Any], field: str) -> str:
    return f"{field} {_short(entry[field])}" if field in entry else f"no {field}"


def _relative_name(name: str, path: Path) -> str:
    """The file name with forward slashes and without `.` parts.

    Raises:
        InputError: it leads out of the folder of images, or no file can have it.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or PureWindowsPath(name).drive or ".." in relative.parts:
        raise InputError(f"{path}: the file name {_short(name)} leads out of the folder of images: make it relative to that folder.")
    if not relative.parts or "\0" in name or not is_unicode(name) or any(len(part.encode()) > _LONGEST_NAME for part in relative.parts):
        raise InputError(f"{path}: {_short(name)} cannot be the name of a file: correct that entry of images.")
    return str(relative)


def _id_list(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    ids = [whole_number(entry) for entry in value]
    return tuple(number for number in ids if number is not None) if None not in ids else None


def _category(entry: Any, path: Path) -> CocoCategory:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: an entry of categories is {_short(entry)}, not an object: correct that entry.")
    number, name = _required_number(entry, "id", f"a category ({_short(entry)})", path), entry.get("name")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not (isinstance(name, str) and name.strip() and is_unicode(name)):
        raise InputError(f"{path}: category {number} has {_given(entry, 'name')}; that must be a name: correct that entry.")
    return CocoCategory(number, name, *(_text_or_none(entry.get(field)) for field in ("supercategory", "frequency")))


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and is_unicode(value) else None


def _annotation_ids(annotations: Iterable[Any]) -> Iterable[int]:
    """The usable ids; annotations without one are numbered by the reader."""
    for entry in annotations:
        number = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if number is not None:
            yield number


def _require_unique(values: Iterable[int | str], what: str, path: Path) -> None:
    seen: set[int | str] = set()
    for value in values:
        if value in seen:
            raise InputError(f"{path} gives the {what} {_short(value)} to several entries: correct or remove all but one.")
        seen.add(value)


def _short(value: Any) -> str:
    """The value for a sentence: at most 80 characters, however long or deep it is."""
    return shortened(_REPR.repr(value))


def _fields(record: CocoImage | CocoCategory) -> dict[str, Any]:
    """The fields that are there, in COCO's names."""
    values = ((name, getattr(record, name)) for name in record.__slots__)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values if value is not None}


# Annotations


def _annotation(entry: Any, sizes: dict[int, tuple[int, int]], known: set[int]) -> tuple[CocoAnnotation, str | None]:
    """The annotation, and why its box was changed, if it was.

    Raises:
        MaskError: it cannot be used.
    """
    if not isinstance(entry, dict):
        raise MaskError(NO_OBJECT)
    image_id, category_id = whole_number(entry.get("image_id")), whole_number(entry.get("category_id"))
    if image_id is None or image_id not in sizes:
        raise MaskError(UNKNOWN_IMAGE)
    if category_id is None or category_id not in known:
        raise MaskError(UNKNOWN_CATEGORY)
    crowd = crowd_flag(entry.get("iscrowd"))
    size = sizes[image_id]
    rle = encode_mask(entry.get("segmentation"), *size)
    box, repair = checked_box(entry.get("bbox"), rle)
    area = checked_area(entry.get("area"), rle)
    return CocoAnnotation(image_id, category_id, box, area, crowd, size, rle["counts"]), repair


def _left_out_line(path: Path, what: str, used: int, reasons: dict[str, int]) -> str:
    count = sum(reasons.values())
    if not count:
        return ""
    share = count / (used + count)
    line = f"{path}: {count} of {used + count} {what} ({share:.1%}) are left out: {_listed(reasons)}"
    return f"Warning: {line}; correct the file, or check that it is the right one." if share > WARN_SHARE else f"{line}."


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
