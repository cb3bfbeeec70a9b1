"""A deadline for each frame: the budget in milliseconds that is left for the engine, corrected by how slow the machine is now."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.statistics import TOTAL

if TYPE_CHECKING:
    from runtime.costs import MeasuredCosts
    from runtime.instances import Instances

_WINDOW = 128
"""Frames that the estimates go by."""
_QUANTILE = 0.99
"""Of the estimates: the budget leaves room for all but the slowest frames."""


class Deadline:
    """Gives each frame the budget with which it is done, masks pasted, within `deadline_ms`.

    The engine's measured costs predict a frame on the machine at rest. The last frames say by which factor the machine is slower now, and
    how long all else took: scaling to the canvas and pasting.

    Example:
        >>> from runtime.costs import GridCost, MeasuredCosts, Percentiles
        >>> grids = {grid: GridCost(fixed_ms=2 + k, instance_ms=ms) for k, (grid, ms) in enumerate({14: 0.2, 28: 1, 56: 2, 112: 5}.items())}
        >>> costs = MeasuredCosts(
        ...     detector_ms=Percentiles(p50=30, p99=34), empty_ms=1, grids=grids, fit_error=0.03, samples=150, threads=2,
        ...     date="2026-01-31", host="box", processor="CPU",
        ... )
        >>> Deadline(50, costs).budget_ms()
        50.0
    """

    def __init__(self, deadline_ms: float, costs: MeasuredCosts) -> None:
        self._deadline_ms, self._costs = deadline_ms, costs
        self._slowness: deque[float] = deque(maxlen=_WINDOW)
        self._other_ms: deque[float] = deque(maxlen=_WINDOW)
        self._frames = self._missed = 0

    def budget_ms(self) -> float:
        """For the detector and the masks of the next frame, in milliseconds of the machine at rest; at least a frame without instances."""
        left_ms = self._deadline_ms - _high(self._other_ms, 0.0)
        return max(left_ms / _high(self._slowness, 1.0), self._costs.frame_ms({}))

    def add(self, instances: Instances) -> None:
        """Learn from a frame, with `times_ms` as `timed_prediction` gives them and `predicted_ms`."""
        times = instances.times_ms
        engine_ms = times["detector"] + times["masks"]
        self._slowness.append(engine_ms / sum(instances.predicted_ms.values()))
        self._other_ms.append(times[TOTAL] - engine_ms)
        self._frames += 1
        self._missed += times[TOTAL] > self._deadline_ms

    def report(self) -> dict[str, Any]:
        """`ms`, `frames` and `missed`: the frames that took longer."""
        return {"ms": self._deadline_ms, "frames": self._frames, "missed": self._missed}


def _high(values: deque[float], otherwise: float) -> float:
    return float(np.quantile(values, _QUANTILE)) if values else otherwise
