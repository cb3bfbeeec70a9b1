"""Measured time of a frame: what the detector and the masks of its instances take, on the machine that measured it.

`runtime/calibration.py` measures these times, the bundle's manifest keeps them with the engine, and budgets in milliseconds go by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from runtime.graph import GRIDS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Ms = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Milliseconds."""


class GridCost(_Strict):
    """The mask branch takes `fixed_ms + n * instance_ms` for n instances, all at this grid."""

    fixed_ms: Ms
    """Milliseconds a frame, paid once if any instance has this grid and none has a larger one."""
    instance_ms: Ms
    """Milliseconds an instance; those of the smaller grids, which it passes, are in it."""


def _rising(grids: dict[int, GridCost]) -> dict[int, GridCost]:
    if tuple(sorted(grids)) != GRIDS:
        raise ValueError(f"costs are needed for the grids {GRIDS}")
    costs = [grids[grid] for grid in GRIDS]
    for low, high in pairwise(costs):
        if not (low.instance_ms < high.instance_ms and low.fixed_ms <= high.fixed_ms):
            raise ValueError("a larger grid must cost more")
    return grids


class Percentiles(_Strict):
    """Of a time, milliseconds."""

    p50: Ms
    p99: Ms


class MeasuredCosts(_Strict):
    """The times of an engine: of its detector, and of its mask branch by the number of instances at each grid.

    The stages of the mask branch are cumulative: an instance at 112 passes those of 14, 28 and 56 too, and a stage has a fixed part that is
    paid once if any instance passes it. A frame's mask time is therefore the sum of the instances' `instance_ms` and the `fixed_ms` of the
    largest grid in the frame.

    Example:
        >>> from runtime.costs import GridCost, MeasuredCosts, Percentiles
        >>> grids = {grid: GridCost(fixed_ms=2 + k, instance_ms=ms) for k, (grid, ms) in enumerate({14: 0.2, 28: 1, 56: 2, 112: 5}.items())}
        >>> costs = MeasuredCosts(
        ...     detector_ms=Percentiles(p50=30, p99=34), empty_ms=1, grids=grids, fit_error=0.03, samples=150, threads=2,
        ...     date="2026-01-31", host="box", processor="CPU",
        ... )
        >>> costs.masks_ms({14: 10, 56: 2})  # 10 * 0.2 + 2 * 2, and the fixed part of 56
        10.0
        >>> costs.frame_ms({14: 10, 56: 2}), costs.frame_ms({})
        (40.0, 31.0)
    """

    detector_ms: Percentiles
    empty_ms: Ms
    """The mask branch of a frame without instances."""
    grids: Annotated[dict[int, GridCost], AfterValidator(_rising)]
    fit_error: Ms
    """The median of |predicted - measured| / measured over the mask times that the fit was made from."""
    samples: Annotated[int, Field(gt=0)]
    """The number of frames that were timed."""
    threads: Annotated[int, Field(ge=0)]
    """CPU threads of the engine; 0 where they do not matter."""
    date: str
    """Of the measurement, as in 2026-01-31."""
    host: str
    """The name of the machine."""
    processor: str
    """The name of the processor that runs the engine."""

    def masks_ms(self, counts: Mapping[int, int]) -> float:
        """The predicted time of the mask branch of one frame, milliseconds.

        Args:
            counts: grid (14, 28, 56, 112) -> its number of instances; a grid without instances may be absent.
        """
        used = {grid: count for grid, count in counts.items() if count}
        if not used:
            return self.empty_ms
        return self.grids[max(used)].fixed_ms + sum(count * self.grids[grid].instance_ms for grid, count in used.items())

    def frame_ms(self, counts: Mapping[int, int]) -> float:
        """The predicted time of one frame, detector (its median) and mask branch, milliseconds; `counts` as in `masks_ms`.

        Scaling to the canvas, pasting the masks, decoding and encoding are not in it.

        A frame is sure to keep to a deadline if this is less for all its instances at 112; at best they are all at 14. To have the model
        choose the best grids within the time that is left, give it as the frame's budget: `predictor(image, budget_ms=...)`.
        """
        return self.detector_ms.p50 + self.masks_ms(counts)

    def least_ms(self, instances: int = 1) -> float:
        """The smallest budget in milliseconds that a frame of so many instances can keep: all of them at 14."""
        return self.frame_ms({GRIDS[0]: instances})

    def graph_costs(self) -> npt.NDArray[np.float32]:
        """The graph's input `costs`, `[2, 4] float32`: by grid the milliseconds of an instance, and the fixed milliseconds."""
        costs = [self.grids[grid] for grid in GRIDS]
        return np.array([[cost.instance_ms for cost in costs], [cost.fixed_ms for cost in costs]], np.float32)

    def difference(self, host: str, processor: str, threads: int) -> str | None:
        """How this machine or number of threads differs from the measurement's, as part of a sentence; None if they are the same."""
        if (host, processor) != (self.host, self.processor):
            return f"were measured on {self.host} ({self.processor}), and this machine is {host} ({processor})"
        if threads != self.threads:
            return f"were measured with {count_of(self.threads, 'thread')}, and the engine runs with {count_of(threads, 'thread')}"
        return None


def count_of(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class TimedMasks(NamedTuple):
    """One measurement of the mask branch."""

    counts: tuple[int, int, int, int]
    """Instances at 14, 28, 56 and 112."""
    ms: float


class Fit(NamedTuple):
    """The fixed and per-instance times of the mask branch, and their error."""

    empty_ms: float
    grids: dict[int, GridCost]
    error: float
    """As `MeasuredCosts.fit_error`."""


_LEAST_STEP = 1e-3
"""The smallest rise of the time an instance from one grid to the next, as a share of the longest measured time an instance: the graph
divides by it."""


def fit_costs(times: Sequence[TimedMasks]) -> Fit:
    """Fit fixed and per-instance times of the four stages to measured times of the mask branch, by non-negative least squares.

    The time is `empty + sum over stages k of (fixed_k [m_k > 0] + instance_k m_k)`, where `m_k` instances pass stage k: those of its grid
    and of larger ones. Errors are relative to the measured time, because a prediction's ratio is what counts.
    """
    from scipy.optimize import nnls  # Slow to import, and not needed to run an engine.

    counts = np.array([entry.counts for entry in times], float)
    measured = np.array([entry.ms for entry in times])
    passing = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    columns = np.concatenate([np.ones((len(times), 1)), passing > 0, passing], axis=1)
    parts, _ = nnls(columns / measured[:, None], np.ones(len(times)))
    empty, fixed, instance = parts[0], parts[1:5], parts[5:]
    longest = float((measured / np.maximum(counts.sum(axis=1), 1)).max())
    instance_ms = np.maximum(instance, _LEAST_STEP * longest).cumsum()
    fixed_ms = empty + fixed.cumsum()
    grids = {grid: GridCost(fixed_ms=fixed_ms[k], instance_ms=instance_ms[k]) for k, grid in enumerate(GRIDS)}
    predicted = np.where(counts.sum(axis=1) > 0, fixed_ms[(passing > 0).sum(axis=1) - 1], empty) + counts @ instance_ms
    return Fit(float(empty), grids, float(np.median(np.abs(predicted / measured - 1))))
