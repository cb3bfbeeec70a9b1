"""Draws instances on an image, coloured by their mask grid (as in the paper's Figure 7)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from runtime.instances import Instances

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

GRID_COLORS: dict[int, Color] = {112: (232, 48, 48), 56: (38, 118, 255), 28: (22, 168, 74), 14: (252, 210, 28)}
"""RGB: large red, medium blue, small green, tiny yellow."""
GRID_NAMES = {112: "large", 56: "medium", 28: "small", 14: "tiny"}
FILL_OPACITY = 0.4
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def annotate(image: Image, instances: Instances, score: float = 0.3) -> Image:
    """A copy of the image with the mask, outline and label (class, score, grid) of each instance, and a legend.

    A label that would cover the label of an instance with a higher score is left out.

    Args:
        image: `[H, W, 3] uint8` RGB, the image in which the instances were found.
        score: the lowest score that is drawn, 0 to 1.

    Returns:
        `[H, W, 3] uint8` RGB.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     picture = dynamask.annotate(image, predictor(image))
        >>> picture.shape == image.shape
        True
    """
    canvas = np.ascontiguousarray(image).copy()
    crops = list(instances.crops())
    shown = [int(i) for i in np.flatnonzero(np.asarray(instances.scores) >= score)]
    # Large masks first, so that small ones stay visible on top of them.
    for i in sorted(shown, key=lambda i: -crops[i][2].size):
        x0, y0, crop = crops[i]
        _draw_mask(canvas, x0, y0, crop, GRID_COLORS[int(instances.grids[i])])
    occupied = np.zeros(canvas.shape[:2], dtype=bool)
    scale = _text_scale(canvas)
    _draw_legend(canvas, occupied, scale)
    for i in sorted(shown, key=lambda i: -float(instances.scores[i])):
        grid = int(instances.grids[i])
        name = instances.classes[int(instances.labels[i])].name
        x0, y0, _ = crops[i]
        _draw_label(canvas, occupied, f"{name} {instances.scores[i]:.2f} {grid}", x0, y0, GRID_COLORS[grid], scale)
    return canvas


def _draw_mask(canvas: Image, x0: int, y0: int, crop: npt.NDArray[np.bool_], color: Color) -> None:
    height, width = crop.shape
    if not height or not width:
        return
    mask = np.ascontiguousarray(crop).view(np.uint8)
    region = canvas[y0 : y0 + height, x0 : x0 + width]
    region[:] = cv2.copyTo(cv2.LUT(region, _blend_table(color)), mask, region)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
    cv2.drawContours(canvas, contours, -1, color, 1, cv2.LINE_AA)


@lru_cache
def _blend_table(color: Color) -> Image:
    """`[1, 256, 3] uint8`: each channel's value after the translucent fill."""
    values = np.arange(256, dtype=np.float32)[None, :, None]
    blended = values * (1 - FILL_OPACITY) + np.array(color, np.float32) * FILL_OPACITY
    return np.round(blended).astype(np.uint8)


def _text_scale(canvas: Image) -> float:
    return float(np.clip(min(canvas.shape[:2]) / 1080, 0.36, 1.0))


def _draw_label(canvas: Image, occupied: npt.NDArray[np.bool_], text: str, x: int, y: int, color: Color, scale: float) -> None:
    """Draw a label above the point (x, y); below it if there is no room above; not at all if there is none below either."""
    (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
    box_width, box_height = width + 4, height + 6
    image_height, image_width = canvas.shape[:2]
    left = max(0, min(x, image_width - box_width))
    for top in (y - box_height, y):
        place = np.s_[top : top + box_height, left : left + box_width]
        if top < 0 or top + box_height > image_height or occupied[place].any():
            continue
        canvas[place] = color
        occupied[place] = True
        _draw_text(canvas, text, left + 2, top + height + 2, scale, _ink(color))
        return


def _draw_legend(canvas: Image, occupied: npt.NDArray[np.bool_], scale: float) -> None:
    """Draw the meaning of the colours in the bottom left corner, if the image is large enough."""
    lines = [f"{grid} {GRID_NAMES[grid]}" for grid in GRID_COLORS]
    sizes = [cv2.getTextSize(line, _FONT, scale, 1)[0] for line in lines]
    step = max(height for _, height in sizes) + 6
    box_width = max(width for width, _ in sizes) + step + 8
    box_height = step * len(lines) + 6
    image_height, image_width = canvas.shape[:2]
    if box_width > image_width // 3 or box_height > image_height // 3:
        return
    top = image_height - box_height
    place = np.s_[top:, :box_width]
    canvas[place] //= 3
    occupied[place] = True
    for row, (line, color) in enumerate(zip(lines, GRID_COLORS.values(), strict=True)):
        y = top + 4 + row * step
        cv2.rectangle(canvas, (5, y + 1), (step, y + step - 4), color, cv2.FILLED)
        _draw_text(canvas, line, step + 5, y + step - 5, scale, (255, 255, 255))


def _draw_text(canvas: Image, text: str, x: int, y: int, scale: float, ink: Color) -> None:
    cv2.putText(canvas, text, (x, y), _FONT, scale, ink, 1, cv2.LINE_AA)


def _ink(color: Color) -> Color:
    """Black on light colours, white on dark ones (ITU-R BT.601 luma)."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else (255, 255, 255)
