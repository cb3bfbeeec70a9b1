"""The classes of `shapes` and the formulas of their outlines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

SMOOTH = ("ellipse", "rounded_box")
INTRICATE = ("star", "gear", "fern", "glyph", "fractal")
CLASSES = SMOOTH + INTRICATE

Array = npt.NDArray[Any]
Outline = list[tuple[Array, bool]]
"""Polygons `[P, 2] float64` in units of the object, drawn in order: True fills, False cuts a hole."""


def categories() -> list[dict[str, Any]]:
    """The classes as COCO categories: `id` from 1, `name`, and `supercategory` smooth or intricate."""
    return [{"id": i + 1, "name": name, "supercategory": "smooth" if name in SMOOTH else "intricate"} for i, name in enumerate(CLASSES)]


def _polar(radius: Array | float, angle: Array) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _turns(count: int) -> Array:
    return np.arange(count) * (2 * np.pi / count)


def _ellipse(rng: np.random.Generator) -> Outline:
    return [(_polar(1.0, _turns(180)) * [1.0, rng.uniform(0.5, 0.95)], True)]


def _rounded_box(rng: np.random.Generator) -> Outline:
    half = np.array([1.0, rng.uniform(0.45, 1.0)])
    radius = half[1] * rng.uniform(0.15, 0.4)
    angles = _turns(96)
    corner = np.sign(np.cos(angles + 1e-9))[:, None] * [1, 0] + np.sign(np.sin(angles + 1e-9))[:, None] * [0, 1]
    return [(corner * (half - radius) + _polar(radius, angles), True)]


def _star(rng: np.random.Generator) -> Outline:
    points = int(rng.integers(11, 17))
    radii = np.tile([1.0, rng.uniform(0.3, 0.42)], points)
    return [(_polar(radii, _turns(2 * points)), True)]


def _gear(rng: np.random.Generator) -> Outline:
    teeth = int(rng.integers(13, 20))
    root = rng.uniform(0.72, 0.78)
    pitch = 2 * np.pi / teeth
    tooth = np.array([0.0, 0.08, 0.42, 0.5]) * pitch
    rim = _polar(np.tile([root, 1.0, 1.0, root], teeth), (_turns(teeth)[:, None] + tooth).ravel())
    outline: Outline = [(rim, True)]
    spokes = int(rng.integers(5, 8))
    inner, outer = 0.3, root - 0.14
    window = np.linspace(0.1, 0.9, 12) * 2 * np.pi / spokes
    for turn in _turns(spokes):
        arc = turn + window
        outline.append((np.concatenate([_polar(outer, arc), _polar(inner, arc[::-1])]), False))
    outline.append((_polar(0.13, _turns(24)), False))
    return outline


def _leaflet(base: Array, direction: float, length: float, width: float) -> Array:
    """A thin leaf from `base`, widest a third of the way out."""
    along = np.array([0.0, 0.15, 0.4, 0.75, 1.0, 0.75, 0.4, 0.15]) * length
    across = np.array([0.2, 0.42, 0.5, 0.3, 0.0, -0.3, -0.5, -0.42]) * width
    heading = np.array([np.cos(direction), np.sin(direction)])
    left = np.array([-heading[1], heading[0]])
    return base + along[:, None] * heading + across[:, None] * left


def _fern(rng: np.random.Generator) -> Outline:
    pairs = int(rng.integers(9, 13))
    bend, reach, slant = rng.uniform(-0.8, 0.8), rng.uniform(0.6, 0.8), rng.uniform(0.9, 1.2)
    at = np.linspace(0.0, 1.0, pairs + 1)
    heading = bend * at
    step = 2.0 / pairs
    stem = np.concatenate([[[0.0, 0.0]], np.cumsum(step * _polar(1.0, heading[:-1]), axis=0)])
    normal = _polar(1.0, heading + np.pi / 2) * np.linspace(0.045, 0.015, pairs + 1)[:, None]
    outline: Outline = [(np.concatenate([stem + normal, (stem - normal)[::-1]]), True)]
    for i in range(1, pairs):
        length = reach * (1.0 - at[i]) ** 0.7 * min(1.0, 0.45 + 3 * at[i])
        for side in (-1, 1):
            outline.append((_leaflet(stem[i], heading[i] + side * slant, length + 0.08, 0.62 * step), True))
    outline.append((_leaflet(stem[-2], heading[-1], 1.6 * step, 0.6 * step), True))
    return outline


def _glyph(rng: np.random.Generator) -> Outline:
    """Strokes along a random spanning tree of a lattice, so that the glyph is one piece with deep notches."""
    side = int(rng.integers(5, 7))
    half = 0.5 * rng.uniform(0.36, 0.46)
    cells = {(int(rng.integers(side)), int(rng.integers(side)))}
    outline: Outline = []
    while len(cells) < side * side:
        border = [
            (cell, to)
            for cell in sorted(cells)
            for to in ((cell[0] + 1, cell[1]), (cell[0] - 1, cell[1]), (cell[0], cell[1] + 1), (cell[0], cell[1] - 1))
            if to not in cells and 0 <= to[0] < side and 0 <= to[1] < side
        ]
        start, end = border[int(rng.integers(len(border)))]
        cells.add(end)
        low, high = np.minimum(start, end) - half, np.maximum(start, end) + half
        outline.append((np.array([low, [high[0], low[1]], high, [low[0], high[1]]]), True))
    return outline


def _fractal(rng: np.random.Generator) -> Outline:
    """A Koch snowflake whose generator is a narrow spike: every edge grows one, three generations deep."""
    corners = int(rng.integers(3, 6))
    half_width, height = rng.uniform(0.09, 0.13), rng.uniform(0.42, 0.52)
    generator = np.array([0.0, 0.5 - half_width, 0.5 - 1j * height, 0.5 + half_width])
    curve = np.exp(1j * _turns(corners))
    for _ in range(3):
        edges = np.roll(curve, -1) - curve
        curve = (curve[:, None] + edges[:, None] * generator).ravel()
    return [(np.stack([curve.real, curve.imag], axis=-1), True)]


OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "ellipse": _ellipse,
    "rounded_box": _rounded_box,
    "star": _star,
    "gear": _gear,
    "fern": _fern,
    "glyph": _glyph,
    "fractal": _fractal,
}


def rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def fit(outline: Outline, angle: float, side: float) -> Outline:
    """The outline scaled, in pixels and centred, so that turned by `angle` its bounding box's longer side is `side`."""
    turned = np.concatenate([points for points, _ in outline]) @ rotation(angle).T
    low, high = turned.min(axis=0), turned.max(axis=0)
    centre = (low + high) / 2 @ rotation(angle)
    scale = side / float((high - low).max())
    return [((points - centre) * scale, solid) for points, solid in outline]
