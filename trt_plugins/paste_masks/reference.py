"""PasteMasks in NumPy: the formula, pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def paste_masks(logits: npt.NDArray[Any], boxes: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Logits `[n, G, G]`, boxes `[n, 4]` xyxy in pixels -> masks `[n, height, width] bool`, in float64.

    The centre of cell i of a grid is at `x0 + (i + 0.5) w / G`; beyond the grid the probability is 0. A pixel is covered if its centre is
    in the box and the probability there, interpolated bilinearly, is above 0.5.
    """
    masks = np.zeros((len(logits), height, width), bool)
    for mask, grid, box in zip(masks, logits.astype(np.float64), boxes.astype(np.float64), strict=True):
        rows, inside_rows = _weights(height, box[1], box[3], len(grid))
        columns, inside_columns = _weights(width, box[0], box[2], len(grid))
        mask[:] = inside_rows[:, None] & inside_columns & (rows @ (1 / (1 + np.exp(-grid))) @ columns.T > 0.5)
    return masks


def _weights(pixels: int, start: float, end: float, cells: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Along one axis: each pixel's weights of the cells `[pixels, cells]`, and whether its centre is in the box."""
    centre = np.arange(pixels) + 0.5
    inside = (centre >= start) & (centre < end)
    position = np.where(inside, (centre - start) * cells / max(end - start, 1e-9) - 0.5, 0)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells))), inside
