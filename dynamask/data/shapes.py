"""`shapes`: a seeded generator of images with exact instance masks, in which difficulty and size are independent.

Two classes have smooth outlines, which a 14 x 14 mask holds well, and five have thin teeth, branches or strokes, which it loses. The side
of an object is drawn before its class, from one distribution for all classes, so that the outline alone says which grid an object needs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from runtime.errors import InputError
from runtime.files import atomic_path, unwritable, write_json

SMOOTH = ("ellipse", "rounded_box")
INTRICATE = ("star", "gear", "fern", "glyph", "fractal")
CLASSES = SMOOTH + INTRICATE

SMALLEST_SIDE = 24.0
"""The smallest object's longer side, pixels."""
LARGEST_SHARE = 0.55
"""The largest object's longer side over the image's shorter side."""
OBJECTS = (3, 10)
"""Fewest and most objects placed in an image."""
VISIBLE_SHARE = 0.5
"""An object is kept only while this share of its mask is neither hidden nor outside the image."""

_SUPERSAMPLING = 4
_FIXED_POINT_BITS = 4
_SQUARES_OVERLAP = 0.4
_SMALLEST_IMAGE = 64

Array = npt.NDArray[Any]
Outline = list[tuple[Array, bool]]
"""Polygons `[P, 2] float64` in units of the object, drawn in order: True fills, False cuts a hole."""


# Outlines


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


_OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "ellipse": _ellipse,
    "rounded_box": _rounded_box,
    "star": _star,
    "gear": _gear,
    "fern": _fern,
    "glyph": _glyph,
    "fractal": _fractal,
}


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _fit(outline: Outline, angle: float, side: float) -> Outline:
    """The outline scaled, in pixels and centred, so that turned by `angle` its bounding box's longer side is `side`."""
    turned = np.concatenate([points for points, _ in outline]) @ _rotation(angle).T
    low, high = turned.min(axis=0), turned.max(axis=0)
    centre = (low + high) / 2 @ _rotation(angle)
    scale = side / float((high - low).max())
    return [((points - centre) * scale, solid) for points, solid in outline]


# Textures


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


def _texture(rng: np.random.Generator, height: int, width: int, colour: Array) -> Array:
    """`[height, width, 3] float32` in 0..255 about `colour`."""
    second = np.clip(colour + rng.uniform(-60, 60, 3), 0, 255).astype(np.float32)
    field = _field(rng, height, width) + 0.25 * (_noise(rng, height, width, 3) - 0.5)
    return np.asarray(colour + field[..., None] * (second - colour), dtype=np.float32)


def _colour(rng: np.random.Generator, taken: list[Array]) -> Array:
    """A random colour, RGB float32, kept apart from those in `taken`: the best of four draws."""
    draws = rng.uniform(20, 235, (4, 3)).astype(np.float32)
    distances = np.linalg.norm(draws[:, None] - np.stack(taken)[None], axis=-1)
    # The ground comes first in `taken` and counts most: it touches every outline.
    distances[:, 1:] *= 1.5
    return np.asarray(draws[int(distances.min(axis=1).argmax())])


# Objects


@dataclass(frozen=True)
class _Object:
    """What one object looks like, whatever its place: the outline in pixels about its centre, and its fill."""

    label: int
    outline: Outline
    fill: Array
    """`[S, S, 3] float32`, the texture in the object's own frame, wide enough for any turn."""
    shadow: tuple[float, float, float]
    """Offset right and down, in pixels, and strength 0..1."""

    @functools.cached_property
    def radius(self) -> float:
        return float(np.linalg.norm(np.concatenate([points for points, _ in self.outline]), axis=1).max())


def _draw_object(rng: np.random.Generator, side: float, angle: float, taken: list[Array]) -> _Object:
    label = int(rng.integers(len(SMOOTH))) if rng.random() < 0.5 else len(SMOOTH) + int(rng.integers(len(INTRICATE)))
    outline = _fit(_OUTLINES[CLASSES[label]](rng), angle, side)
    colour = _colour(rng, taken)
    taken.append(colour)
    extent = int(np.ceil(side * 1.5)) + 4
    strength = rng.uniform(0.15, 0.5) if rng.random() < 0.6 else 0.0
    reach = 1.5 + 0.03 * side
    shadow = (rng.uniform(-reach, reach), rng.uniform(0, reach), strength)
    return _Object(label, outline, _texture(rng, extent, extent, colour), shadow)


@dataclass(frozen=True)
class _Footprint:
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


def _footprint(thing: _Object, centre: Array, angle: float, height: int, width: int) -> _Footprint | None:
    """Rasterise an object at fourfold resolution; None where nothing of it lies in the image."""
    turned = [(points @ _rotation(angle).T + centre, solid) for points, solid in thing.outline]
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
    return _Footprint(inside, int(x0), int(y0), int(np.count_nonzero(coverage >= 0.5)))


def _cast_shadow(canvas: Array, thing: _Object, shape: _Footprint) -> None:
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


def _paint(canvas: Array, thing: _Object, shape: _Footprint, centre: Array, angle: float) -> None:
    """Lay the object over `canvas [H, W, 3] float32`, its shadow first."""
    _cast_shadow(canvas, thing, shape)
    height, width = shape.coverage.shape
    middle = np.array([(thing.fill.shape[1] - 1) / 2, (thing.fill.shape[0] - 1) / 2])
    # warpAffine with WARP_INVERSE_MAP maps a pixel of the image to one of the fill.
    inverse = _rotation(-angle)
    offset = middle + inverse @ (np.array([shape.x, shape.y]) - centre)
    matrix = np.column_stack([inverse, offset])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fill = cv2.warpAffine(thing.fill, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    window = canvas[shape.window]
    window += shape.coverage[..., None] * (fill - window)


def _ground(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    colour = rng.uniform(30, 225, 3).astype(np.float32)
    return _texture(rng, height, width, colour), colour


def _photograph(rng: np.random.Generator, canvas: Array, blur: float, noise: float) -> Array:
    """What a camera adds: a little blur, then noise; rounded to uint8."""
    if blur > 0.3:
        canvas = cv2.GaussianBlur(canvas, (5, 5), blur)
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise)
    return np.asarray(np.clip(canvas + grain, 0, 255).astype(np.uint8))


class _Visible:
    """The masks of the objects laid so far, each without what later ones hide."""

    def __init__(self, height: int, width: int) -> None:
        self._owner = np.zeros((height, width), np.uint8)
        self._wholes: list[int] = []

    def admits(self, shape: _Footprint) -> bool:
        """Whether this object may be laid: enough of it is in the image, and it leaves enough of all others."""
        if np.count_nonzero(shape.mask) < max(1.0, VISIBLE_SHARE * shape.whole):
            return False
        after = self._counts()
        hidden = np.bincount(self._owner[shape.window][shape.mask], minlength=after.size)
        return bool(np.all((after - hidden)[1:] >= VISIBLE_SHARE * np.array(self._wholes)))

    def lay(self, shape: _Footprint) -> None:
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


def _check_size(height: int, width: int) -> None:
    if min(height, width) < _SMALLEST_IMAGE:
        raise InputError(f"An image of {height}x{width} is too small for shapes: give at least {_SMALLEST_IMAGE}x{_SMALLEST_IMAGE}.")


def draw_image(rng: np.random.Generator, height: int, width: int) -> tuple[Array, list[dict[str, Any]]]:
    """Draw one image.

    Returns:
        The image `[height, width, 3] uint8` RGB, and its objects from back to front: `label` (index into `CLASSES`) and `mask`
        (`[height, width] bool`, what is visible of the object, the pixels it covers by half or more).

    Raises:
        InputError: the image is too small to hold objects.
    """
    _check_size(height, width)
    canvas, ground = _ground(rng, height, width)
    taken, labels, visible = [ground], [], _Visible(height, width)
    for centre, side in _layout(rng, height, width):
        angle = float(rng.uniform(0, 2 * np.pi))
        thing = _draw_object(rng, side, angle, taken)
        shape = _footprint(thing, centre, angle, height, width)
        if shape is None or not visible.admits(shape):
            continue
        _paint(canvas, thing, shape, centre, angle)
        visible.lay(shape)
        labels.append(thing.label)
    image = _photograph(rng, canvas, blur=float(rng.uniform(0, 0.8)), noise=float(rng.uniform(1, 7)))
    return image, [{"label": label, "mask": mask} for label, mask in zip(labels, visible.masks(), strict=True)]


# COCO


def categories() -> list[dict[str, Any]]:
    """The classes as COCO categories: `id` from 1, `name`, and `supercategory` smooth or intricate."""
    return [{"id": i + 1, "name": name, "supercategory": "smooth" if name in SMOOTH else "intricate"} for i, name in enumerate(CLASSES)]


def annotation(label: int, mask: Array) -> dict[str, Any]:
    """A COCO annotation, compressed RLE, of one mask `[H, W] bool`; the caller adds `id` and `image_id`."""
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": label + 1,
        "bbox": [float(edge) for edge in rle.toBbox(encoded)],
        "area": int(rle.area(encoded)),
        "iscrowd": 0,
        "segmentation": {"size": [int(edge) for edge in encoded["size"]], "counts": encoded["counts"].decode("ascii")},
    }


def _instances(images: list[dict[str, Any]], annotations: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    for i, entry in enumerate(annotations):
        entry["id"] = i + 1
    info = {"description": f"DynaMask shapes, seed {seed}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories()}


def write_dataset(
    folder: str | Path,
    images: int,
    seed: int,
    height: int = 320,
    width: int = 320,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `folder/images/000000.jpg`, … and, last, `folder/instances.json` in COCO format (compressed RLE); returns the JSON's path.

    Image i depends on `(seed, i)` and the size alone. `progress(done, images)` is called after each image.

    Raises:
        InputError: no images are asked for, they are too small, or the folder holds a data set already.
        DynaMaskError: the folder cannot be written.
    """
    folder = Path(folder)
    if images < 1:
        raise InputError(f"A data set of {images} images cannot be written: ask for at least 1.")
    _check_size(height, width)
    instances = folder / "instances.json"
    if instances.exists():
        raise InputError(f"{instances} exists already: remove that data set or choose another folder.")
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        image, objects = draw_image(np.random.default_rng([seed, i]), height, width)
        name = f"{i:06d}.jpg"
        _write_jpeg(folder / "images" / name, image)
        entries.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        annotations += [{"image_id": i + 1, **annotation(thing["label"], thing["mask"])} for thing in objects]
        if progress is not None:
            progress(i + 1, images)
    write_json(instances, _instances(entries, annotations, seed))
    return instances


def _write_jpeg(path: Path, image: Array) -> None:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise unwritable(path, error) from error


# Video


@dataclass(frozen=True)
class _Flight:
    """An object that drifts and turns; having left the image on one side, it enters again on the other."""

    thing: _Object
    start: Array
    velocity: Array
    """Pixels a frame, (x, y)."""
    angle: float
    spin: float
    """Radians a frame."""

    def at(self, frame: int, height: int, width: int) -> tuple[Array, float]:
        room = np.array([width, height]) + 2 * self.thing.radius
        centre = np.mod(self.start + self.velocity * frame + self.thing.radius, room) - self.thing.radius
        return centre, self.angle + self.spin * frame


def _flights(rng: np.random.Generator, height: int, width: int, taken: list[Array]) -> list[_Flight]:
    flights = []
    for centre, side in _layout(rng, height, width):
        angle = float(rng.uniform(0, 2 * np.pi))
        thing = _draw_object(rng, side, angle, taken)
        velocity = rng.uniform(-1.0, 1.0, 2) * 0.008 * min(height, width)
        flights.append(_Flight(thing, centre, velocity, angle, float(rng.uniform(-0.03, 0.03))))
    return flights


def draw_frames(frames: int, seed: int, height: int, width: int) -> Iterator[tuple[Array, list[dict[str, Any]]]]:
    """Draw a scene in motion, frame by frame: objects drift, turn, hide each other, leave and enter.

    Yields:
        What `draw_image` returns, with `track` besides, the object's number through the whole video. An object of which less than
        half is visible is in the picture but not among the objects.
    """
    _check_size(height, width)
    rng = np.random.default_rng([seed])
    ground, colour = _ground(rng, height, width)
    flights = _flights(rng, height, width, [colour])
    for frame in range(frames):
        canvas, visible, tracks = ground.copy(), _Visible(height, width), []
        for track, flight in enumerate(flights):
            centre, angle = flight.at(frame, height, width)
            shape = _footprint(flight.thing, centre, angle, height, width)
            if shape is not None:
                _paint(canvas, flight.thing, shape, centre, angle)
                visible.lay(shape)
                tracks.append(track)
        objects = [
            {"label": flights[track].thing.label, "mask": mask, "track": track + 1}
            for track, mask, share in zip(tracks, visible.masks(), visible.shares(), strict=True)
            if share >= VISIBLE_SHARE and mask.any()
        ]
        yield _photograph(rng, canvas, blur=0.5, noise=2.0), objects


def write_video(path: str | Path, frames: int, seed: int, height: int = 320, width: int = 320, fps: int = 25) -> Path:
    """Write an MP4 (H.264) of shapes in motion, and beside it, with suffix `.json`, its objects in COCO format; returns the video's path.

    In the JSON every frame is an image (`frame_index` from 0), and `track_id` names the object through the video.

    Raises:
        InputError: no frames are asked for, the name does not end in `.mp4`, or the size is odd or too small.
        DynaMaskError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path} does not end in .mp4, the only format shapes are filmed in: rename it.")
    if frames < 1 or height % 2 or width % 2:
        raise InputError(f"{path} cannot have {frames} frames of {height}x{width}: ask for at least 1 frame and an even height and width.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with atomic_path(path) as temporary:
        _encode(temporary, _record(draw_frames(frames, seed, height, width), path.name, images, annotations), height, width, fps)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(_instances(images, annotations, seed)), encoding="utf-8")
    return path


def _record(
    frames: Iterator[tuple[Array, list[dict[str, Any]]]], name: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> Iterator[Array]:
    """Pass the pictures on, noting each frame and its objects."""
    for i, (picture, objects) in enumerate(frames):
        images.append({"id": i + 1, "file_name": name, "frame_index": i, "height": picture.shape[0], "width": picture.shape[1]})
        for thing in objects:
            annotations.append({"image_id": i + 1, "track_id": thing["track"], **annotation(thing["label"], thing["mask"])})
        yield picture


def _encode(path: Path, pictures: Iterator[Array], height: int, width: int, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


# Drawn as they are asked for


class ShapesDataset:
    """Shapes drawn on the fly, with the items and attributes of `CocoDataset`; item i is what `write_dataset` writes as image i,
    before JPEG.

    Args:
        images: the length.
        seed: image i is drawn from `(seed, i)`.
        height, width: the images' size in pixels.
    """

    def __init__(self, images: int, seed: int, height: int = 320, width: int = 320) -> None:
        if images < 1:
            raise InputError(f"A shapes data set of {images} images is empty: ask for at least 1.")
        _check_size(height, width)
        self.seed, self.height, self.width = seed, height, width
        self.classes: list[dict[str, Any]] = [{"id": entry["id"], "name": entry["name"]} for entry in categories()]
        self.ids_to_category: dict[int, int] = {i + 1: entry["id"] for i, entry in enumerate(self.classes)}
        self.image_ids: list[int] = list(range(1, images + 1))
        self.indices_with_instances: list[int] = list(range(images))
        self.report: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Array, dict[str, Any]]:
        """As `CocoDataset.__getitem__`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, objects = draw_image(np.random.default_rng([self.seed, index]), self.height, self.width)
        masks = np.stack([thing["mask"] for thing in objects]).astype(np.uint8)
        target = {
            "image_id": self.image_ids[index],
            "boxes": np.stack([_extent(mask) for mask in masks]),
            "labels": np.array([thing["label"] + 1 for thing in objects], np.int64),
            "masks": masks,
        }
        return image, target

    @functools.cached_property
    def coco_dict(self) -> dict[str, Any]:
        """The ground truth of all images in COCO format; the first use draws them all."""
        images, annotations = [], []
        for index, image_id in enumerate(self.image_ids):
            _, objects = draw_image(np.random.default_rng([self.seed, index]), self.height, self.width)
            images.append({"id": image_id, "file_name": f"{index:06d}.jpg", "height": self.height, "width": self.width})
            annotations += [{"image_id": image_id, **annotation(thing["label"], thing["mask"])} for thing in objects]
        return _instances(images, annotations, self.seed)


def _extent(mask: Array) -> Array:
    """The tight box `[4] float32`, xyxy, of a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
