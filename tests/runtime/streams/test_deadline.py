from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime.costs import GridCost, MeasuredCosts, Percentiles
from runtime.streams.deadline import Deadline
from tests.runtime.fake_stream import make_instances

GRIDS = {14: 0.2, 28: 1.0, 56: 2.0, 112: 5.0}
COSTS = MeasuredCosts(
    detector_ms=Percentiles(p50=30, p99=34),
    empty_ms=1,
    grids={grid: GridCost(fixed_ms=2 + k, instance_ms=ms) for k, (grid, ms) in enumerate(GRIDS.items())},
    fit_error=0.03,
    samples=150,
    threads=2,
    date="2026-01-31",
    host="box",
    processor="CPU",
)


def run(deadline: Deadline, slowness: float, other_ms: float, noise: np.random.Generator) -> float:
    """One frame that uses its whole budget on a machine of this slowness; returns its time."""
    budget_ms = deadline.budget_ms()
    engine_ms = budget_ms * slowness * noise.uniform(0.98, 1.02)
    instances = make_instances(1, (64, 96))
    times = {"preprocess": other_ms / 2, "detector": engine_ms / 2, "masks": engine_ms / 2, "paste": other_ms / 2}
    times["total"] = engine_ms + other_ms
    deadline.add(dataclasses.replace(instances, times_ms=times, predicted_ms={"detector": 30.0, "masks": budget_ms - 30}))
    return times["total"]


@pytest.mark.parametrize("slowness", [0.7, 1.0, 1.5])
def test_a_deadline_is_kept_and_used_at_any_speed_of_the_machine(slowness: float) -> None:
    deadline, noise = Deadline(80, COSTS), np.random.default_rng(0)
    times = [run(deadline, slowness, 6.0, noise) for _ in range(1000)][130:]
    assert np.mean(np.array(times) > 80) <= 0.03
    assert np.median(times) >= 0.95 * 80


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    deadline, noise = Deadline(80, COSTS), np.random.default_rng(0)
    for _ in range(100):
        run(deadline, 1.0, 6.0, noise)
    times = [run(deadline, 1.6, 6.0, noise) for _ in range(100)]
    assert max(times[20:]) <= 80 * 1.03


def test_frames_that_took_longer_are_missed() -> None:
    deadline, noise = Deadline(40, COSTS), np.random.default_rng(0)
    late = sum(run(deadline, 2.0, 6.0, noise) > 40 for _ in range(50))
    assert deadline.report() == {"ms": 40, "frames": 50, "missed": late}
    assert deadline.budget_ms() == COSTS.frame_ms({}), "no budget is less than a frame without instances"
