"""Latency benchmarks: the mask branch when routed and with all instances at 112, and a whole frame beside another model."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.graph import GRIDS, MSM
from runtime.machine import machine
from runtime.timing import take_turns

if TYPE_CHECKING:
    from runtime.bundle import Manifest
    from runtime.predictor import Predictor
    from runtime.targets.base import Engine


class MaskEngine(Protocol):
    """An engine whose mask branch can run alone."""

    manifest: Manifest

    @property
    def feature_shapes(self) -> list[tuple[int, int, int, int]]:
        """`[1, C, H / s, W / s]` of P2..P5."""

    def run_masks(
        self, features: Sequence[Any], boxes: Any, scores: Any, labels: Any, budget_gmacs: float | None, grid_override: Any
    ) -> Any:
        """The mask branch on the pyramid and K slots; `grid_override` is `[K]`."""


class MaskInputs(NamedTuple):
    """Inputs of the mask branch: the pyramid and K detection slots, of which the first ones are filled."""

    features: tuple[NDArray[np.float32], ...]
    """P2..P5, `[1, C, H / s, W / s]`."""
    boxes: NDArray[np.float32]
    """`[K, 4]`, xyxy in canvas pixels."""
    scores: NDArray[np.float32]
    """`[K]`; 0 in an empty slot."""
    labels: NDArray[np.int64]
    """`[K]`; -1 in an empty slot."""


Eager = Callable[
    ["tuple[NDArray[np.float32], ...]", "NDArray[np.float32]", "NDArray[np.float32]", "NDArray[np.int64]", "NDArray[np.int64]"], None
]
"""PyTorch's mask branch on (features, boxes, scores, labels, grid_override)."""
Frame = Callable[["NDArray[np.uint8]"], int]
"""From a decoded image `[H, W, 3] uint8` RGB to pasted masks; returns the number of instances."""


def bench_routing(
    engine: Engine,
    instances: int = 100,
    distribution: Sequence[float] = (35, 34, 21, 10),
    repeats: int = 20,
    eager: Eager | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the mask branch alone, on random features and boxes: with the instances spread over the grids, and with all at one grid.

    Args:
        engine: an engine whose mask branch can run alone, as ONNX Runtime's can.
        instances: filled detection slots.
        distribution: shares of the instances at 14, 28, 56 and 112 (paper, Table 9: 35, 34, 21, 10).
        repeats: timed rounds; in each, every contender runs once, in rotating order. The results are medians.
        eager: the same branch in PyTorch, timed too.
        seed: of the random features, boxes and labels.

    Returns:
        `routed_ms`, `largest_ms` (all at 112), their `ratio`, `gmacs_ratio` (the ratio of the counted multiply-accumulates), `uniform_ms`
        by grid, and with `eager` also `eager_routed_ms`, `eager_largest_ms`, `engine_speedup` (`routed`, `largest`: eager's time over the
        engine's).

    Raises:
        InputError: the engine's mask branch cannot run alone, or instances, distribution or repeats are out of range.
    """
    mask_engine = _mask_engine(engine)
    manifest = engine.manifest
    counts = spread(instances, distribution)
    if instances > manifest.detections:
        raise InputError(f"{instances} instances do not fit the bundle's {manifest.detections} slots; give {manifest.detections} at most.")
    if repeats < 1:
        raise InputError(f"{repeats} repeats measure nothing; give 1 or more.")
    random = np.random.default_rng(seed)
    inputs = random_inputs(mask_engine, instances, random)
    overrides = {f"uniform {grid}": slot_grids(manifest.detections, np.full(instances, g)) for g, grid in enumerate(GRIDS)}
    overrides["routed"] = slot_grids(manifest.detections, random.permutation(np.repeat(np.arange(4), counts)))
    contenders: dict[str, Callable[[], Any]] = {name: _engine_call(mask_engine, inputs, override) for name, override in overrides.items()}
    if eager is not None:
        contenders["eager routed"] = _eager_call(eager, inputs, overrides["routed"])
        contenders["eager largest"] = _eager_call(eager, inputs, overrides["uniform 112"])
    times = {name: statistics.median(values) for name, values in take_turns(contenders, repeats).items()}
    return {
        "instances": instances,
        "distribution": counts,
        "repeats": repeats,
        **_routing_figures(times, counts, [manifest.grid_gmacs[grid] for grid in GRIDS]),
        "machine": machine(),
    }


def _mask_engine(engine: Engine) -> MaskEngine:
    if not hasattr(engine, "run_masks"):
        raise InputError(
            f"The engine for {engine.target} runs detector and mask branch as one, so that its mask branch cannot be timed alone; "
            "give --target onnxruntime."
        )
    return cast(MaskEngine, engine)


def _routing_figures(times: Mapping[str, float], counts: Sequence[int], gmacs: Sequence[float]) -> dict[str, Any]:
    routed, largest = times["routed"], times["uniform 112"]
    figures: dict[str, Any] = {
        "routed_ms": routed,
        "largest_ms": largest,
        "ratio": routed / largest,
        "gmacs_ratio": float(np.dot(counts, gmacs)) / (sum(counts) * gmacs[-1]),
        "uniform_ms": {str(grid): times[f"uniform {grid}"] for grid in GRIDS},
    }
    if "eager routed" in times:
        figures["eager_routed_ms"], figures["eager_largest_ms"] = times["eager routed"], times["eager largest"]
        figures["engine_speedup"] = {"routed": times["eager routed"] / routed, "largest": times["eager largest"] / largest}
    return figures


def random_inputs(engine: MaskEngine, instances: int, random: np.random.Generator) -> MaskInputs:
    """Normally distributed features of the engine's own shapes, and `instances` filled slots in front of empty ones."""
    features = tuple(random.standard_normal(shape, np.float32) for shape in engine.feature_shapes)
    return MaskInputs(features, *random_slots(engine.manifest, instances, random))


def random_slots(
    manifest: Manifest, instances: int, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Boxes `[K, 4]`, scores `[K]` and labels `[K]` of `instances` filled slots in front of empty ones."""
    slots = manifest.detections
    boxes, scores, labels = np.zeros((slots, 4), np.float32), np.zeros(slots, np.float32), np.full(slots, MSM, np.int64)
    boxes[:instances] = random_boxes(instances, *manifest.canvas, random)
    scores[:instances] = np.sort(random.uniform(max(0.5, manifest.score_threshold), 1, instances))[::-1]
    labels[:instances] = random.integers(0, len(manifest.classes), instances)
    return boxes, scores, labels


def slot_grids(slots: int, grids: NDArray[Any]) -> NDArray[np.int64]:
    """The `grid_override` `[slots]` that gives the first slots these grids (0 to 3), and leaves the others to the model."""
    override = np.full(slots, MSM, np.int64)
    override[: len(grids)] = grids
    return override


def _engine_call(engine: MaskEngine, inputs: MaskInputs, override: NDArray[np.int64]) -> Callable[[], Any]:
    return lambda: engine.run_masks(*inputs, 0.0, override)


def _eager_call(eager: Eager, inputs: MaskInputs, override: NDArray[np.int64]) -> Callable[[], Any]:
    return lambda: eager(*inputs, override)


def spread(instances: int, distribution: Sequence[float]) -> list[int]:
    """Whole numbers of instances per grid that add up to `instances`, as near to the distribution as can be (largest remainders).

    Raises:
        InputError: no instances, or not four parts, none negative, that add up to something.
    """
    parts = np.asarray(distribution, float)
    if instances < 1:
        raise InputError(f"{instances} instances leave nothing to measure; give 1 or more.")
    if parts.shape != (4,) or not np.isfinite(parts).all() or (parts < 0).any() or parts.sum() == 0:
        raise InputError(f"a distribution of {list(distribution)} does not give each grid its share; give four parts, as in 35,34,21,10.")
    exact = parts / parts.sum() * instances
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: instances - counts.sum()]] += 1
    return [int(count) for count in counts]


def random_boxes(count: int, height: int, width: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Boxes inside the canvas `[count, 4]` (xyxy, pixels): sides from 4 % to 60 % of it, small ones the most frequent, as in COCO."""
    side = np.exp(random.uniform(np.log(0.04), np.log(0.6), count)) * np.sqrt(height * width)
    aspect = np.exp(random.normal(0, 0.35, count))
    w, h = np.minimum(side * aspect, width), np.minimum(side / aspect, height)
    x, y = random.uniform(0, 1, count) * (width - w), random.uniform(0, 1, count) * (height - h)
    return np.stack([x, y, x + w, y + h], 1).astype(np.float32)


def bench_latency(
    predictor: Predictor, images: Sequence[NDArray[np.uint8]], against: Mapping[str, Frame], repeats: int = 1
) -> dict[str, Any]:
    """Time a whole frame, from the decoded image to pasted masks: the engine and one other model, on the same images in turns.

    Args:
        images: `[H, W, 3] uint8` RGB each.
        against: one entry: the peer's name -> a function that handles a frame.
        repeats: rounds over the images.

    Returns:
        `engine_ms`, `peer_ms` (medians), `ratio` (the engine's over the peer's), `engine_fps`, `peer_fps`, and the mean number of instances
        that each found and pasted, `engine_instances`, `peer_instances`.

    Raises:
        InputError: there are no images or no repeats.
    """
    if not images or repeats < 1:
        raise InputError(f"{len(images)} images taken {repeats} times measure nothing; give at least one of both.")
    ((peer_name, peer),) = against.items()
    frames: dict[str, Frame] = {"engine": lambda image: paste_all(predictor, image), "peer": peer}
    found: dict[str, list[int]] = {name: [] for name in frames}
    calls = {name: _frame_call(frame, images, found[name]) for name, frame in frames.items()}
    times = take_turns(calls, repeats * len(images), warm_up=1)
    engine_ms, peer_ms = statistics.median(times["engine"]), statistics.median(times["peer"])
    return {
        "peer": peer_name,
        "images": len(images),
        "repeats": repeats,
        "engine_ms": engine_ms,
        "peer_ms": peer_ms,
        "ratio": engine_ms / peer_ms,
        "engine_fps": 1000 / engine_ms,
        "peer_fps": 1000 / peer_ms,
        "engine_instances": statistics.mean(found["engine"][1:]),
        "peer_instances": statistics.mean(found["peer"][1:]),
        "machine": machine(),
    }


def _frame_call(frame: Frame, images: Sequence[NDArray[np.uint8]], found: list[int]) -> Callable[[], None]:
    """A call that handles the next image and notes the number of instances; the first image comes twice, to warm up."""
    upcoming = itertools.chain(images[:1], itertools.cycle(images))
    return lambda: found.append(frame(next(upcoming)))


def paste_all(predictor: Predictor, image: NDArray[np.uint8]) -> int:
    """One frame through the predictor up to every mask at image resolution; the number of instances."""
    return sum(1 for _ in predictor(image).crops())
