"""Masks and boxes of COCO annotations, checked before pycocotools computes with them.

pycocotools takes all memory for a polygon with NaN, and reads beyond the end of malformed runs. Here each number is checked first, so
that a segmentation of any origin either becomes a mask or is refused with a reason.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_api

Array = npt.NDArray[Any]
Rle = dict[str, Any]
"""A mask as compressed runs: `{"size": [height, width], "counts": str}`."""

LONGEST_OUTLINE_PX = 1_000_000
"""Polygons with a longer outline are left out: pycocotools takes about 100 bytes for each pixel of it."""

_BOX_TOLERANCE_PX = 0.01
"""A box may leave its image by this much and not be counted as clipped: COCO's own rounding."""
_BOX_DISTANCE_PX = 2.0
_BOX_IOU = 0.5
"""A box is wrong if an edge is further from the mask's than the distance, and the IoU of both boxes is less than this."""

NO_MASK = "no mask"
EMPTY_MASK = "empty mask"
MALFORMED_MASK = "malformed mask"
OTHER_SIZE = "mask of another size than its image"
MALFORMED_POLYGON = "malformed polygon"
SHORT_POLYGON = "polygon with fewer than 3 points"
NOT_FINITE = "polygon with a number that is not finite"
FAR_POLYGON = "polygon far outside its image"
LONG_POLYGON = f"polygon with an outline of more than {LONGEST_OUTLINE_PX} pixels"
UNKNOWN_CROWD = "iscrowd is neither 0 nor 1"
BOX_FROM_MASK = "box missing or wrong, taken from the mask"
BOX_CLIPPED = "box clipped to its image"

_ID_LIMIT = 2**63


class MaskError(ValueError):
    """A segmentation that cannot be used; the text is the reason under which it is counted."""


def encode_mask(segmentation: Any, height: int, width: int) -> Rle:
    """A COCO segmentation (polygons, plain or compressed RLE) of an image as compressed RLE.

    Raises:
        MaskError: the segmentation cannot be used; the text is the reason.
    """
    if isinstance(segmentation, list) and segmentation:
        rle = mask_api.merge(mask_api.frPyObjects(_polygons(segmentation, height, width), height, width))
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        rle = _checked_rle(segmentation, height, width)
    else:
        raise MaskError(NO_MASK)
    if not mask_api.area(rle):
        raise MaskError(EMPTY_MASK)
    counts = rle["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def checked_area(area: Any, rle: Rle) -> float:
    """The annotated area in pixels, or the mask's, if that is missing, not a number, not positive or larger than the image."""
    height, width = rle["size"]
    if _is_number(area) and 0 < area <= height * width:
        return float(area)
    return float(mask_api.area(rle))


def checked_box(box: Any, rle: Rle) -> tuple[tuple[float, float, float, float], str | None]:
    """The annotated box cut to the image, or the mask's box, if the annotated one is missing or far from it.

    Args:
        box: `[x, y, width, height]`, pixels, or anything else.
        rle: the mask, not empty.

    Returns:
        The box `(x, y, width, height)`, and why it is another than the annotated one, or None.
    """
    height, width = rle["size"]
    x0, y0, w, h = (float(edge) for edge in mask_api.toBbox(rle))
    from_mask = (x0, y0, w, h)
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(edge) for edge in box):
        return from_mask, BOX_FROM_MASK
    x, y, w, h = (float(edge) for edge in box)
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if w <= 0 or h <= 0 or left >= right or top >= bottom:
        return from_mask, BOX_FROM_MASK
    clipped = max(left - x, top - y, x + w - right, y + h - bottom) > _BOX_TOLERANCE_PX
    # Where nothing is cut off, the numbers stay as they are: x + w - x is not always w.
    inside = (left, top, w if left == x and right == x + w else right - left, h if top == y and bottom == y + h else bottom - top)
    if _far_apart(inside, from_mask):
        return from_mask, BOX_FROM_MASK
    return inside, BOX_CLIPPED if clipped else None


def _far_apart(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether an edge of two boxes (x, y, width, height) differs by more than two pixels and their IoU is less than a half."""
    edges, others = ((x, y, x + w, y + h) for x, y, w, h in (box, other))
    if max(abs(a - b) for a, b in zip(edges, others, strict=True)) <= _BOX_DISTANCE_PX:
        return False
    w = min(edges[2], others[2]) - max(edges[0], others[0])
    h = min(edges[3], others[3]) - max(edges[1], others[1])
    common = max(w, 0.0) * max(h, 0.0)
    return common < _BOX_IOU * (box[2] * box[3] + other[2] * other[3] - common)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _polygons(segmentation: list[Any], height: int, width: int) -> list[list[float]]:
    """The polygons as flat lists of coordinates. Parts with fewer than 3 points have no area and are dropped if others remain."""
    first = segmentation[0]
    flat = not isinstance(first, list)
    points = isinstance(first, list) and len(first) == 2 and not isinstance(first[0], list)
    outlines = [_outline(part) for part in ([segmentation] if flat or points else segmentation)]
    outlines = [outline for outline in outlines if len(outline) >= 3]
    if not outlines:
        raise MaskError(SHORT_POLYGON)
    for outline in outlines:
        if not np.isfinite(outline).all():
            raise MaskError(NOT_FINITE)
        low, high = outline.min(axis=0), outline.max(axis=0)
        if low[0] < -width or low[1] < -height or high[0] > 2 * width or high[1] > 2 * height:
            raise MaskError(FAR_POLYGON)
    if sum(map(len, outlines)) * 3 * max(height, width) > LONGEST_OUTLINE_PX and sum(map(_length_px, outlines)) > LONGEST_OUTLINE_PX:
        raise MaskError(LONG_POLYGON)
    return [outline.ravel().tolist() for outline in outlines]


def _outline(part: Any) -> Array:
    """A polygon, `[x, y, …]` or `[[x, y], …]`, as `[P, 2] float64`."""
    if not isinstance(part, list):
        raise MaskError(MALFORMED_POLYGON)
    try:
        points = np.asarray(part, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MaskError(MALFORMED_POLYGON) from None
    if not (points.ndim == 1 and points.size % 2 == 0) and not (points.ndim == 2 and points.shape[1] == 2):
        raise MaskError(MALFORMED_POLYGON)
    return points.reshape(-1, 2)


def _length_px(outline: Array) -> float:
    """The length of a closed outline, as pycocotools walks it: the larger of the two coordinates' differences, summed."""
    return float(np.abs(outline - np.roll(outline, 1, axis=0)).max(axis=1).sum())


def _checked_rle(segmentation: dict[str, Any], height: int, width: int) -> Rle:
    size = segmentation.get("size")
    if not isinstance(size, (list, tuple)) or [whole_number(edge) for edge in size] != [height, width]:
        raise MaskError(OTHER_SIZE)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        rle: Rle = mask_api.frPyObjects({"size": [height, width], "counts": _plain_runs(counts, height * width)}, height, width)
        return rle
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    # A run of n pixels takes at most n characters.
    if not isinstance(counts, bytes) or len(counts) > height * width + 16 or _runs_total(counts) != height * width:
        raise MaskError(MALFORMED_MASK)
    return {"size": [height, width], "counts": counts}


def _plain_runs(counts: list[Any], pixels: int) -> list[int]:
    try:
        runs = np.asarray(counts, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MaskError(MALFORMED_MASK) from None
    if runs.ndim != 1 or not ((runs >= 0) & (runs <= pixels) & (runs == np.floor(runs))).all() or runs.sum() != pixels:
        raise MaskError(MALFORMED_MASK)
    whole: list[int] = runs.astype(np.int64).tolist()
    return whole


def _runs_total(counts: bytes) -> int:
    """The pixels that compressed runs describe, -1 if they are malformed.

    Each run is a little-endian number in groups of five bits: the characters start at `0`, a sixth bit says that more follow, the last
    group's fifth bit is the sign. From the fourth on, a run is the difference to the run two before.
    """
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 0x20:
        return -1
    ends = np.flatnonzero(~groups & 0x20)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        return -1
    shifts = 5 * (np.arange(groups.size) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((groups & 0x1F) << shifts, starts)
    runs -= np.where(groups[ends] & 0x10, np.int64(1) << (shifts[ends] + 5), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return -1 if runs.min() < 0 else int(runs.sum())


def whole_number(value: Any) -> int | None:
    """A number as JSON files hold it (`7`, `7.0`, `"7"`) as int; None if it is not whole or does not fit 64 bits."""
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,19}(\.0*)?", text):
            return None
        value = int(text.partition(".")[0])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float):
        # Beyond 2**53 several whole numbers share a float.
        if not (math.isfinite(value) and value.is_integer() and abs(value) < 2**53):
            return None
        value = int(value)
    return value if -_ID_LIMIT <= value < _ID_LIMIT else None


def crowd_flag(value: Any) -> bool:
    """COCO's `iscrowd` as a bool: 0 or 1 as a number, a string or a bool; missing (None) is 0.

    Raises:
        MaskError: it is something else.
    """
    if value is None:
        return False
    if isinstance(value, str):
        value = value.strip().lower()
        value = {"false": 0, "true": 1}.get(value, whole_number(value))
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise MaskError(UNKNOWN_CROWD)
