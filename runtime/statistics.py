"""Grids, cost and latency over many images: what `stream` and `validate` report."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from runtime.instances import Instances
    from runtime.predictor import Predictor

PARTS = ("preprocess", "detector", "masks", "paste")
"""The parts of an image's latency, in order: scaling to the canvas and normalising, detector, mask branch, pasting of the masks."""
TOTAL = "total"
"""From the decoded image to the pasted masks."""
LATENCIES = (*PARTS, TOTAL)
PREDICTED: Mapping[str, tuple[str, ...]] = {"masks": ("masks",), "frame": ("detector", "masks")}
"""The times that measured costs predict, and the parts that they are the sum of."""
QUANTILES = ("p50", "p95", "p99")
MAX_TIMES = 100_000
"""Images whose latencies are kept; of more, a random sample of this size."""


def timed_prediction(
    predictor: Predictor,
    image: npt.NDArray[np.uint8],
    budget_gmacs: float,
    grid_override: int,
    min_score: float = 0.0,
    budget_ms: float | None = None,
) -> Instances:
    """The instances in an image with their masks pasted; `times_ms` has all of `LATENCIES`.

    The arguments are those of `Predictor.__call__`.
    """
    start = time.perf_counter()
    instances = predictor(image, budget_gmacs, grid_override, min_score, budget_ms)
    before_paste = time.perf_counter()
    deque(instances.crops(), maxlen=0)  # The instances keep their crops: they are pasted only once.
    end = time.perf_counter()
    # An engine that pastes on its device has a part of this time already.
    paste_ms = instances.times_ms.get("paste", 0) + 1000 * (end - before_paste)
    instances.times_ms = {**instances.times_ms, "paste": paste_ms, TOTAL: 1000 * (end - start)}
    return instances


class _Sample:
    """All values, or of more than `MAX_TIMES` a uniform random sample of that size (Vitter's algorithm R): streams run for weeks."""

    def __init__(self) -> None:
        self.values = array("d")
        self._seen = 0
        self._random = random.Random(0)

    def append(self, value: float) -> None:
        self._seen += 1
        if len(self.values) < MAX_TIMES:
            self.values.append(value)
        elif (place := self._random.randrange(self._seen)) < MAX_TIMES:
            self.values[place] = value


class RunStatistics:
    """Collects the grids and latencies of many images."""

    def __init__(self, grid_gmacs: Mapping[int, float]) -> None:
        """`grid_gmacs`: cumulative cost of each grid in GMAC."""
        self._grid_gmacs = grid_gmacs
        self._counts: Counter[int] = Counter()
        self._times_ms = {part: _Sample() for part in LATENCIES}
        self._predicted_ms = {part: _Sample() for part in PREDICTED}
        self._ratios = {part: _Sample() for part in PREDICTED}

    def add(self, instances: Instances) -> None:
        """Count the instances of one image, with `times_ms` as `timed_prediction` gives them."""
        self._counts.update(instances.grids.tolist())
        for part, times in self._times_ms.items():
            times.append(instances.times_ms[part])
        if instances.predicted_ms:
            for part, parts in PREDICTED.items():
                predicted, measured = (sum(times[name] for name in parts) for times in (instances.predicted_ms, instances.times_ms))
                self._predicted_ms[part].append(predicted)
                self._ratios[part].append(predicted / measured)

    def summary(self) -> dict[str, Any]:
        """The figures of all images.

        Returns:
            `instances`, `gmacs` and `share` of `grid_statistics`; `latency_ms`, the `percentiles` of each of `LATENCIES`; and `predicted`,
            None without predictions: for `masks` and `frame` (detector and masks) `ms`, the median predicted time, and `ratio`, the median
            over the images of the predicted time over the measured one.
        """
        latency_ms = {part: percentiles(times.values) for part, times in self._times_ms.items() if times.values}
        predicted = {
            part: {"ms": float(np.median(times.values)), "ratio": float(np.median(self._ratios[part].values))}
            for part, times in self._predicted_ms.items()
            if times.values
        }
        return {**grid_statistics(self._counts, self._grid_gmacs), "latency_ms": latency_ms, "predicted": predicted or None}


def grid_statistics(counts: Mapping[int, int], grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    """The mean cost of instances, and their share of each grid.

    Args:
        counts: the number of instances of each grid (14, 28, 56, 112); a grid without instances may be absent.
        grid_gmacs: cumulative cost of each grid in GMAC.

    Returns:
        `instances`, their number; `gmacs`, the mean GMAC per instance, None without instances; `share`, each grid's share of the
        instances (`{"14": 0.0 to 1.0, …}`), all 0 without instances.
    """
    by_grid = {grid: counts.get(grid, 0) for grid in sorted(grid_gmacs)}
    total = sum(by_grid.values())
    return {
        "instances": total,
        "gmacs": sum(count * grid_gmacs[grid] for grid, count in by_grid.items()) / total if total else None,
        "share": {str(grid): count / total if total else 0.0 for grid, count in by_grid.items()},
    }


def percentiles(values: Sequence[float] | array[float]) -> dict[str, float]:
    """`p50`, `p95`, `p99` (interpolated linearly) and `mean` of the values, in their unit."""
    quantiles = np.percentile(values, [int(name[1:]) for name in QUANTILES])
    return {**dict(zip(QUANTILES, quantiles.tolist(), strict=True)), "mean": float(np.mean(values))}
