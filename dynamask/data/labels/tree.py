"""The labels of a folder of photos, in COCO's terms, and how the readers of the formats build them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from runtime.errors import InputError
from runtime.files import write_json

Outline = list[float]
"""x, y, x, y, … in pixels."""

VALIDATION_PARTS = ("val", "valid", "validation", "test")
"""Names of the parts of an export that are not for training."""


@dataclass
class Labels:
    """Photos and their labelled objects; `to_coco` gives them in COCO format."""

    folder: Path
    """The folder that `file_name`s are relative to."""
    format: str
    """One of `FORMATS`."""
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Names, in order; the category ids count them from 1."""
    validation: set[str] = field(default_factory=set)
    """The `file_name`s of photos that the export has in a part for validation or test."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of labels that are no outlines, by their kind."""
    missing: list[str] = field(default_factory=list)
    """Photos that have labels, and are not in the folder."""
    files: list[Path] = field(default_factory=list)
    """The files of labels that were read."""
    broken: list[str] = field(default_factory=list)
    """Sentences about photos whose size could not be read."""

    @property
    def unlabelled(self) -> list[str]:
        """Classes that no object has."""
        used = {entry["category_id"] for entry in self.annotations}
        return [name for i, name in enumerate(self.classes) if i + 1 not in used]

    def add_image(self, file: Path, height: int, width: int, part: str = "") -> int:
        """Add a photo of a size in pixels; returns its id."""
        name = file.relative_to(self.folder).as_posix()
        self.images.append({"id": len(self.images) + 1, "file_name": name, "height": height, "width": width})
        if part in VALIDATION_PARTS:
            self.validation.add(name)
        return len(self.images)

    def add_outlines(self, image_id: int, name: str, outlines: Sequence[Outline]) -> None:
        """Add an object of the class `name`: the area inside its outlines."""
        self.add(image_id, name, [list(outline) for outline in outlines])

    def add(self, image_id: int, name: str, segmentation: Any, **fields: Any) -> None:
        """Add an object of the class `name` with a COCO segmentation."""
        if name not in self.classes:
            self.classes.append(name)
        entry = {"id": len(self.annotations) + 1, "image_id": image_id, "category_id": self.classes.index(name) + 1, "iscrowd": 0}
        self.annotations.append({**entry, "segmentation": segmentation, **fields})

    def to_coco(self) -> dict[str, Any]:
        """The content of a COCO file."""
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}

    def counts(self) -> dict[str, Any]:
        """The numbers for a JSON result."""
        return {
            "images": len(self.images),
            "annotations": len(self.annotations),
            "classes": self.classes,
            "unlabelled_classes": self.unlabelled,
            "annotations_left_out": dict(self.left_out),
            "missing_photos": self.missing,
            "broken_photos": self.broken,
        }

    def summary(self) -> list[str]:
        """Sentences about what is left out or lacks labels; none of a number that is 0."""
        lines = list(self.broken)
        if self.missing:
            lines.append(f"{self.folder} lacks {len(self.missing)} labelled photos, such as {self.missing[0]}: they are left out.")
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
            lines.append(f"{self.folder}: labels left out: {reasons}.")
        if self.unlabelled:
            lines.append(f"No object is labelled as {', '.join(self.unlabelled)}.")
        return lines

    def write(self, path: Path) -> None:
        """Write a COCO file.

        Raises:
            InputError, DynaMaskError: it cannot be written.
        """
        write_json(path, self.to_coco())


def photo_in(folders: Iterable[Path], name: str, source: Path) -> Path | None:
    """The file `name` in the first of the folders that has it, or None.

    Raises:
        InputError: the name leads out of the folders.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or PureWindowsPath(name).drive or ".." in relative.parts or "\0" in name:
        raise InputError(f"{source}: the file name {name[:80]!r} leads out of the folder of photos: make it relative to that folder.")
    return next((folder / relative for folder in folders if (folder / relative).is_file()), None)


def numbers(text: str, source: Path) -> Outline:
    """The numbers in a text, which blanks, commas and semicolons separate.

    Raises:
        InputError: one is no number.
    """
    try:
        return [float(word) for word in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        raise InputError(f"{source} has {text.strip()[:60]!r} where numbers are expected: export it again.") from None


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Outline:
    """The outline of a rectangle between two corners."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]
