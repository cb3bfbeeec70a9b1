"""Renders objects: coverage, shadow and paint, and the blur and noise of a camera."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from dynamask.data.shapes.outlines import CLASSES, INTRICATE, OUTLINES, SMOOTH, Array, Outline, fit, rotation
from dynamask.data.shapes.textures import distinct_colour, texture

_SUPERSAMPLING = 4
_FIXED_POINT_BITS = 4


@dataclass(frozen=True)
class DrawnObject:
    """The look of one object, independent of its place: the outline in pixels about its centre, and its fill."""

    label: int
    outline: Outline
    fill: Array
    """`[S, S, 3] float32`, the texture in the object's own frame, wide enough for any turn."""
    shadow: tuple[float, float, float]
    """Offset right and down, in pixels, and strength 0..1."""

    @functools.cached_property
    def radius(self) -> float:
        return float(np.linalg.norm(np.concatenate([points for points, _ in self.outline]), axis=1).max())


def draw_object(rng: np.random.Generator, side: float, angle: float, taken: list[Array]) -> DrawnObject:
    label = int(rng.integers(len(SMOOTH))) if rng.random() < 0.5 else len(SMOOTH) + int(rng.integers(len(INTRICATE)))
    outline = fit(OUTLINES[CLASSES[label]](rng), angle, side)
    colour = distinct_colour(rng, taken)
    taken.append(colour)
    extent = int(np.ceil(side * 1.5)) + 4
    strength = rng.uniform(0.15, 0.5) if rng.random() < 0.6 else 0.0
    reach = 1.5 + 0.03 * side
    shadow = (rng.uniform(-reach, reach), rng.uniform(0, reach), strength)
    return DrawnObject(label, outline, texture(rng, extent, extent, colour), shadow)


@dataclass(frozen=True)
class Footprint:
    """The pixels an object covers: `coverage [h, w] float32` in 0..1, its top-left pixel at column `x`, row `y` of the image."""

    coverage: Array
    x: int
    y: int
    whole: int
    """Pixels of the mask before the image's border cut it."""

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.coverage.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)

    @property
    def mask(self) -> Array:
        return np.asarray(self.coverage >= 0.5)


def footprint(thing: DrawnObject, centre: Array, angle: float, height: int, width: int) -> Footprint | None:
    """Rasterise an object at fourfold resolution; None where nothing of it lies in the image."""
    turned = [(points @ rotation(angle).T + centre, solid) for points, solid in thing.outline]
    everything = np.concatenate([points for points, _ in turned])
    left, top = np.floor(everything.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(everything.max(axis=0)).astype(int) + 1
    fine = np.zeros(((bottom - top) * _SUPERSAMPLING, (right - left) * _SUPERSAMPLING), np.uint8)
    for points, solid in turned:
        # OpenCV's integer coordinates are pixel centres, hence the half pixel.
        local = (points - [left, top]) * _SUPERSAMPLING - 0.5
        fixed = np.round(local * (1 << _FIXED_POINT_BITS)).astype(np.int32)
        cv2.fillPoly(fine, [fixed], 255 if solid else 0, lineType=cv2.LINE_8, shift=_FIXED_POINT_BITS)
    coverage = cv2.resize(fine, (int(right - left), int(bottom - top)), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x0 >= x1 or y0 >= y1:
        return None
    inside = coverage[y0 - top : y1 - top, x0 - left : x1 - left]
    return Footprint(inside, int(x0), int(y0), int(np.count_nonzero(coverage >= 0.5)))


def _cast_shadow(canvas: Array, thing: DrawnObject, shape: Footprint) -> None:
    dx, dy, strength = thing.shadow
    if strength == 0.0:
        return
    height, width = canvas.shape[:2]
    pad = int(abs(dx) + abs(dy)) + 4
    x0, y0 = max(shape.x - pad, 0), max(shape.y - pad, 0)
    x1 = min(shape.x + shape.coverage.shape[1] + pad, width)
    y1 = min(shape.y + shape.coverage.shape[0] + pad, height)
    move = np.array([[1, 0, shape.x - x0 + dx], [0, 1, shape.y - y0 + dy]], np.float32)
    shade = cv2.warpAffine(shape.coverage, move, (x1 - x0, y1 - y0))
    shade = cv2.blur(shade, (5, 5))
    canvas[y0:y1, x0:x1] *= 1 - strength * shade[..., None]


def paint(canvas: Array, thing: DrawnObject, shape: Footprint, centre: Array, angle: float) -> None:
    """Lay the object over `canvas [H, W, 3] float32`, its shadow first."""
    _cast_shadow(canvas, thing, shape)
    height, width = shape.coverage.shape
    middle = np.array([(thing.fill.shape[1] - 1) / 2, (thing.fill.shape[0] - 1) / 2])
    # warpAffine with WARP_INVERSE_MAP maps a pixel of the image to one of the fill.
    inverse = rotation(-angle)
    offset = middle + inverse @ (np.array([shape.x, shape.y]) - centre)
    matrix = np.column_stack([inverse, offset])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fill = cv2.warpAffine(thing.fill, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    window = canvas[shape.window]
    window += shape.coverage[..., None] * (fill - window)


def draw_background(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    colour = rng.uniform(30, 225, 3).astype(np.float32)
    return texture(rng, height, width, colour), colour


def photograph(rng: np.random.Generator, canvas: Array, blur: float, noise: float) -> Array:
    """The image with a little blur, then noise, as a camera adds them; rounded to uint8."""
    if blur > 0.3:
        canvas = cv2.GaussianBlur(canvas, (5, 5), blur)
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise)
    return np.asarray(np.clip(canvas + grain, 0, 255).astype(np.uint8))
