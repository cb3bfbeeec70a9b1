"""Boxes of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def mask_box(mask: npt.NDArray[Any]) -> npt.NDArray[np.float32] | None:
    """The box about the pixels of a mask `[H, W]`: `[4] float32`, xyxy, pixels, right and bottom exclusive; None if it has no pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if columns.size == 0:
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def mask_boxes(masks: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The boxes `[G, 4] float32` of masks `[G, H, W]`, as `mask_box`; a mask without a pixel has the box (0, 0, 0, 0)."""
    boxes = [mask_box(mask) for mask in masks]
    return np.array([np.zeros(4) if box is None else box for box in boxes], np.float32).reshape(-1, 4)
