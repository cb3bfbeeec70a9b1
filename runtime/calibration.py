"""Measures the times of a bundle's engine on this machine: of its detector, and of its mask branch by grids and numbers of instances.

Every frame that is timed runs the detector and then the mask branch, as in use. The numbers of instances at each grid take turns, in
several blocks of rounds: of each block the median counts, and of all blocks the smallest median, because other work on the machine only
makes a block slower.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.bench import random_slots, slot_grids, spread
from runtime.bundle import Bundle
from runtime.costs import MeasuredCosts, Percentiles, TimedMasks, fit_costs
from runtime.errors import InputError
from runtime.graph import GRIDS
from runtime.paste import Frame
from runtime.preprocess import letterbox_normalise
from runtime.targets.base import Engine
from runtime.targets.registry import open_engine
from runtime.timing import take_turns

Counts = tuple[int, int, int, int]
"""Instances at 14, 28, 56 and 112."""
MIXED = ((35, 34, 21, 10), (5, 13, 25, 56), (10, 20, 40, 30), (70, 30, 0, 0))
"""Shares of the grids in mixed frames: the first two are the paper's (Table 9)."""
NOISE_IMAGES = 4


class Effort(NamedTuple):
    """How much is measured."""

    uniform: tuple[int, ...]
    """Numbers of instances of the frames with all instances at one grid, as far as the engine has slots."""
    mixed: tuple[int, ...]
    """Those of the frames with instances at several grids."""
    blocks: int
    rounds: int
    """Timed rounds of each block; every frame is timed once a round."""


FULL = Effort(uniform=(1, 4, 12, 40), mixed=(4, 12, 40, 100), blocks=3, rounds=5)
SHORT = Effort(uniform=(1, 4, 12), mixed=(4, 12), blocks=2, rounds=3)


class Timed(NamedTuple):
    """The times of one frame."""

    counts: Counts
    """Those that the frame had."""
    detector_ms: float
    masks_ms: float


Sampler = Callable[[Counts], Timed]
"""Runs one frame that has, if possible, so many instances at each grid."""


def calibrate(
    bundle: Bundle,
    target: str = "auto",
    threads: int | None = None,
    images: Sequence[npt.NDArray[np.uint8]] | None = None,
    effort: Effort = FULL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, MeasuredCosts]:
    """Measure the times of the bundle's engine for a target, and keep them in its manifest.

    Args:
        bundle: an opened one.
        target: as in `open_engine`.
        threads: CPU threads of the engine; None takes all cores.
        images: `[H, W, 3] uint8` RGB that the detector runs on; noise by default. An engine whose mask branch cannot run alone takes the
            instances that it finds in them, so it needs images with enough of them.
        effort: how much is measured.
        progress: called with the number of rounds done, and of all.

    Returns:
        The target, and what the manifest holds now.

    Raises:
        InputError: the engine is not built or does not run here, or it finds no instance in the images.
        DynaMaskError: the manifest cannot be written.
    """
    with open_engine(bundle, target, threads) as engine:
        canvases = _canvases(engine, images)
        sampler = _separate(engine, canvases) if hasattr(engine, "run_masks") else _whole(engine, canvases)
        costs = measure(
            sampler, cases(bundle.manifest.detections, effort), effort, progress, threads=engine.threads, processor=engine.processor
        )
        bundle.set_costs(engine.target, costs)
        return engine.target, costs


def cases(slots: int, effort: Effort) -> list[Counts]:
    """The frames to time: without instances, with all instances at one grid, and mixed; with at most `slots` instances."""
    found: list[Counts] = [(0, 0, 0, 0)]
    for sizes, distributions in ((effort.uniform, np.eye(len(GRIDS)).tolist()), (effort.mixed, MIXED)):
        for size, shares in itertools.product(sizes, distributions):
            first, second, third, fourth = spread(min(size, slots), shares)
            found.append((first, second, third, fourth))
    return list(dict.fromkeys(found))


def measure(
    sample: Sampler,
    frames: Sequence[Counts],
    effort: Effort,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int = 0,
    processor: str = "",
) -> MeasuredCosts:
    """Time the frames in turns, and fit the costs to the times.

    Raises:
        InputError: no frame had an instance.
    """
    counts: dict[str, Counts] = {}
    masks_ms: dict[str, float] = {}
    detector: list[tuple[float, float]] = []
    for block in range(effort.blocks):
        detector_ms: list[float] = []

        def elapsed(call: Callable[[], Any], times: list[float] = detector_ms) -> float:
            timed: Timed = call()
            times.append(timed.detector_ms)
            return timed.masks_ms

        def contender(name: str, wanted: Counts) -> Callable[[], Timed]:
            def call() -> Timed:
                timed = sample(wanted)
                counts[name] = timed.counts
                return timed

            return call

        contenders = {str(wanted): contender(str(wanted), wanted) for wanted in frames}
        for name, values in take_turns(contenders, effort.rounds, warm_up=0 if block else 1, elapsed_ms=elapsed).items():
            masks_ms[name] = min(masks_ms.get(name, np.inf), float(np.median(values)))
        median, slow = np.percentile(detector_ms, (50, 99))
        detector.append((float(median), float(slow)))
        progress(block + 1, effort.blocks)
    if not any(map(any, counts.values())):
        raise InputError("the model finds no instance in the images, so that its masks cannot be timed; give --images with what it finds.")
    fit = fit_costs([TimedMasks(counts[name], ms) for name, ms in masks_ms.items()])
    median, slow = min(detector)
    return MeasuredCosts(
        detector_ms=Percentiles(p50=median, p99=slow),
        empty_ms=fit.empty_ms,
        grids=fit.grids,
        fit_error=fit.error,
        samples=effort.blocks * effort.rounds * len(frames),
        threads=threads,
        date=datetime.date.today().isoformat(),
        host=platform.node(),
        processor=processor,
    )


def _canvases(engine: Engine, images: Sequence[npt.NDArray[np.uint8]] | None) -> list[npt.NDArray[np.float32]]:
    """The images `[1, 3, H, W]` on the canvas that the engine is tuned for."""
    height, width = engine.profile.canvas[1]
    manifest, random = engine.manifest, np.random.default_rng(0)
    if images is None:
        images = [random.integers(0, 256, (height, width, 3), np.uint8) for _ in range(NOISE_IMAGES)]
    return [letterbox_normalise(image, height, width, manifest.mean, manifest.std)[0] for image in images]


def _separate(engine: Any, canvases: Sequence[npt.NDArray[np.float32]]) -> Sampler:
    """Frames of an engine whose mask branch runs alone: the detector on an image, and the masks of random boxes on its pyramid."""
    random = np.random.default_rng(0)
    slots: dict[Counts, Any] = {}
    upcoming = itertools.cycle(canvases)

    def sample(counts: Counts) -> Timed:
        if counts not in slots:
            grids = random.permutation(np.repeat(np.arange(len(GRIDS)), counts))
            slots[counts] = (*random_slots(engine.manifest, len(grids), random), slot_grids(engine.manifest.detections, grids))
        boxes, scores, labels, override = slots[counts]
        start = time.perf_counter()
        features, *_ = engine.run_detector(next(upcoming))
        detected = time.perf_counter()
        engine.run_masks(features, boxes, scores, labels, grid_override=override)
        end = time.perf_counter()
        return Timed(counts, 1000 * (detected - start), 1000 * (end - detected))

    return sample


def _whole(engine: Engine, canvases: Sequence[npt.NDArray[np.float32]]) -> Sampler:
    """Frames of an engine that runs as one: a threshold leaves the wanted number of the instances that it finds in an image."""
    random = np.random.default_rng(0)
    orders: dict[Counts, npt.NDArray[np.int64]] = {}
    frame = Frame(1.0, engine.profile.canvas[1])
    scores = [engine.run(canvas).scores for canvas in canvases]
    found = [int(np.count_nonzero(of_image > 0)) for of_image in scores]
    fullest = int(np.argmax(found))

    def sample(counts: Counts) -> Timed:
        wanted = sum(counts)
        image = next((index for index, number in enumerate(found) if number >= wanted), fullest)
        ranked = np.append(scores[image], 0.0)
        if counts not in orders:
            orders[counts] = random.permutation(np.repeat(np.arange(len(GRIDS)), counts))
        grids = orders[counts][: found[image]]
        override = slot_grids(engine.manifest.detections, grids)
        # With a frame, as a predictor runs it: masks that the engine pastes on its device are not copied to the host.
        output = engine.run(canvases[image], None, override, float(ranked[len(grids)]), [frame])
        first, second, third, fourth = (int(np.count_nonzero(output.grids == k)) for k in range(len(GRIDS)))
        return Timed((first, second, third, fourth), output.times_ms["detector"], output.times_ms["masks"])

    return sample


def read_costs(path: Path) -> MeasuredCosts:
    """The measured times in a bundle, or in a file that `dynamask calibrate --json` wrote.

    Raises:
        InputError: there is no such bundle or file, it has no measured times, or the bundle has those of several engines.
    """
    if path.is_file():
        try:
            fields = json.loads(path.read_bytes())
            return MeasuredCosts.model_validate({name: fields[name] for name in MeasuredCosts.model_fields})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} holds no measured times; give a file that dynamask calibrate --json wrote.") from error
    engines = Bundle.open(path).manifest.engines
    found = {target: entry.costs for target, entry in engines.items() if entry.costs is not None}
    if len(found) != 1:
        several = f"the measured times of several engines ({', '.join(found)})" if found else "no measured times"
        raise InputError(f"{path} has {several}; give the file that dynamask calibrate {path} --json FILE writes.")
    (costs,) = found.values()
    return costs
