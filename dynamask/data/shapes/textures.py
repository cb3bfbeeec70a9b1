"""Textures and colours of objects and backgrounds."""

from __future__ import annotations

import cv2
import numpy as np

from dynamask.data.shapes.outlines import Array


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Smooth noise in 0..1 with features of about `cell` pixels."""
    coarse = rng.random((max(2, round(height / cell)), max(2, round(width / cell))), dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _field(rng: np.random.Generator, height: int, width: int) -> Array:
    """A pattern in 0..1, `[height, width] float32`: noise, stripes, a gradient, dots or checks."""
    kind = int(rng.integers(5))
    if kind == 0:
        return 0.6 * _noise(rng, height, width, 24) + 0.4 * _noise(rng, height, width, 5)
    angle = rng.uniform(0, np.pi)
    xs = np.arange(width, dtype=np.float32)[None]
    ys = np.arange(height, dtype=np.float32)[:, None]
    along = np.float32(np.cos(angle)) * xs + np.float32(np.sin(angle)) * ys
    if kind == 1:
        low, high = float(along.min()), float(along.max())
        return np.asarray((along - low) / max(high - low, 1.0))
    wave = np.float32(2 * np.pi / rng.uniform(7, 22))
    if kind == 2:
        return np.asarray(0.5 + 0.5 * np.sin(wave * along))
    across = np.float32(np.cos(angle)) * ys - np.float32(np.sin(angle)) * xs
    product = np.sin(wave * along) * np.sin(wave * across)
    return np.asarray((product > 0.35 if kind == 3 else product > 0).astype(np.float32))


def texture(rng: np.random.Generator, height: int, width: int, colour: Array) -> Array:
    """`[height, width, 3] float32` in 0..255 about `colour`."""
    second = np.clip(colour + rng.uniform(-60, 60, 3), 0, 255).astype(np.float32)
    field = _field(rng, height, width) + 0.25 * (_noise(rng, height, width, 3) - 0.5)
    return np.asarray(colour + field[..., None] * (second - colour), dtype=np.float32)


def distinct_colour(rng: np.random.Generator, taken: list[Array]) -> Array:
    """A random colour, RGB float32, kept apart from those in `taken`: the best of four draws."""
    draws = rng.uniform(20, 235, (4, 3)).astype(np.float32)
    distances = np.linalg.norm(draws[:, None] - np.stack(taken)[None], axis=-1)
    # The background comes first in `taken` and counts most, because it touches every outline.
    distances[:, 1:] *= 1.5
    return np.asarray(draws[int(distances.min(axis=1).argmax())])
