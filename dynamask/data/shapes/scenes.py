"""Images and videos of shapes: places the objects, and computes the visible part of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamask.data.shapes.outlines import Array
from dynamask.data.shapes.render import DrawnObject, Footprint, draw_background, draw_object, footprint, paint, photograph
from runtime.errors import InputError

SMALLEST_SIDE = 24.0
"""The smallest object's longer side, pixels."""
LARGEST_SHARE = 0.55
"""The largest object's longer side over the image's shorter side."""
OBJECTS = (3, 10)
"""Fewest and most objects placed in an image."""
VISIBLE_SHARE = 0.5
"""An object is kept only while this share of its mask is neither hidden nor outside the image."""
_SQUARES_OVERLAP = 0.4
_SMALLEST_IMAGE = 64


class _Visible:
    """The masks of the objects placed so far, each without the pixels that later ones hide."""

    def __init__(self, height: int, width: int) -> None:
        self._owner = np.zeros((height, width), np.uint8)
        self._wholes: list[int] = []

    def admits(self, shape: Footprint) -> bool:
        """Whether this object may be placed: enough of it is in the image, and enough of all others stays visible."""
        if np.count_nonzero(shape.mask) < max(1.0, VISIBLE_SHARE * shape.whole):
            return False
        after = self._counts()
        hidden = np.bincount(self._owner[shape.window][shape.mask], minlength=after.size)
        return bool(np.all((after - hidden)[1:] >= VISIBLE_SHARE * np.array(self._wholes)))

    def lay(self, shape: Footprint) -> None:
        self._wholes.append(shape.whole)
        self._owner[shape.window][shape.mask] = len(self._wholes)

    def masks(self) -> list[Array]:
        return [self._owner == i + 1 for i in range(len(self._wholes))]

    def shares(self) -> Array:
        return np.asarray(self._counts()[1:] / np.maximum(self._wholes, 1))

    def _counts(self) -> Array:
        return np.bincount(self._owner.ravel(), minlength=len(self._wholes) + 1)


def _sides(rng: np.random.Generator, count: int, height: int, width: int) -> Array:
    largest = LARGEST_SHARE * min(height, width)
    return np.exp(rng.uniform(np.log(min(SMALLEST_SIDE, largest / 2)), np.log(largest), count))


def _overlap(centre: Array, side: float, placed: list[tuple[Array, float]]) -> float:
    """The largest share that the square of `side` about `centre` has in common with one placed before, of the smaller one's area."""
    worst = 0.0
    for other, other_side in placed:
        edges = np.minimum(centre + side / 2, other + other_side / 2) - np.maximum(centre - side / 2, other - other_side / 2)
        worst = max(worst, float(np.prod(np.maximum(edges, 0.0))) / min(side, other_side) ** 2)
    return worst


def _layout(rng: np.random.Generator, height: int, width: int) -> Iterator[tuple[Array, float]]:
    """Centres (x, y) and sides of squares that overlap little; no class is known yet, so size stays independent of it."""
    placed: list[tuple[Array, float]] = []
    for side in _sides(rng, int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)), height, width):
        # One object in six may be cut by the image's border, the first never: no image is empty.
        margin = side / 2 if not placed or rng.random() < 5 / 6 else side / 4
        for _ in range(20):
            centre = rng.uniform(margin, np.array([width, height]) - margin)
            if _overlap(centre, side, placed) <= _SQUARES_OVERLAP:
                placed.append((centre, float(side)))
                yield placed[-1]
                break


def check_size(height: int, width: int) -> None:
    if min(height, width) < _SMALLEST_IMAGE:
        raise InputError(f"An image of {height}x{width} is too small for shapes: give at least {_SMALLEST_IMAGE}x{_SMALLEST_IMAGE}.")


def draw_image(rng: np.random.Generator, height: int, width: int) -> tuple[Array, list[dict[str, Any]]]:
    """Draw one image.

    Returns:
        The image `[height, width, 3] uint8` RGB, and its objects from back to front: `label` (index into `CLASSES`) and `mask`
        (`[height, width] bool`, the visible pixels that the object covers by half or more).

    Raises:
        InputError: the image is too small to hold objects.
    """
    check_size(height, width)
    canvas, ground = draw_background(rng, height, width)
    taken, labels, visible = [ground], [], _Visible(height, width)
    for centre, side in _layout(rng, height, width):
        angle = float(rng.uniform(0, 2 * np.pi))
        thing = draw_object(rng, side, angle, taken)
        shape = footprint(thing, centre, angle, height, width)
        if shape is None or not visible.admits(shape):
            continue
        paint(canvas, thing, shape, centre, angle)
        visible.lay(shape)
        labels.append(thing.label)
    image = photograph(rng, canvas, blur=float(rng.uniform(0, 0.8)), noise=float(rng.uniform(1, 7)))
    return image, [{"label": label, "mask": mask} for label, mask in zip(labels, visible.masks(), strict=True)]


@dataclass(frozen=True)
class _Flight:
    """An object that drifts and turns; having left the image on one side, it enters again on the other."""

    thing: DrawnObject
    start: Array
    velocity: Array
    """Pixels per frame, (x, y)."""
    angle: float
    spin: float
    """Radians per frame."""

    def at(self, frame: int, height: int, width: int) -> tuple[Array, float]:
        room = np.array([width, height]) + 2 * self.thing.radius
        centre = np.mod(self.start + self.velocity * frame + self.thing.radius, room) - self.thing.radius
        return centre, self.angle + self.spin * frame


def _flights(rng: np.random.Generator, height: int, width: int, taken: list[Array]) -> list[_Flight]:
    flights = []
    for centre, side in _layout(rng, height, width):
        angle = float(rng.uniform(0, 2 * np.pi))
        thing = draw_object(rng, side, angle, taken)
        velocity = rng.uniform(-1.0, 1.0, 2) * 0.008 * min(height, width)
        flights.append(_Flight(thing, centre, velocity, angle, float(rng.uniform(-0.03, 0.03))))
    return flights


def draw_frames(frames: int, seed: int, height: int, width: int) -> Iterator[tuple[Array, list[dict[str, Any]]]]:
    """Draw a scene in motion, frame by frame: objects drift, turn, hide each other, leave and enter.

    Yields:
        What `draw_image` returns, with `track` besides, the object's number through the whole video. An object of which less than
        half is visible is in the picture but not among the objects.
    """
    check_size(height, width)
    rng = np.random.default_rng([seed])
    ground, colour = draw_background(rng, height, width)
    flights = _flights(rng, height, width, [colour])
    for frame in range(frames):
        canvas, visible, tracks = ground.copy(), _Visible(height, width), []
        for track, flight in enumerate(flights):
            centre, angle = flight.at(frame, height, width)
            shape = footprint(flight.thing, centre, angle, height, width)
            if shape is not None:
                paint(canvas, flight.thing, shape, centre, angle)
                visible.lay(shape)
                tracks.append(track)
        objects = [
            {"label": flights[track].thing.label, "mask": mask, "track": track + 1}
            for track, mask, share in zip(tracks, visible.masks(), visible.shares(), strict=True)
            if share >= VISIBLE_SHARE and mask.any()
        ]
        yield photograph(rng, canvas, blur=0.5, noise=2.0), objects
