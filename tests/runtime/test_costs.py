"""The times that a bundle keeps, and the fit that they come from, on synthetic times."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from runtime.bundle import Bundle
from runtime.costs import TimedMasks, fit_costs
from runtime.errors import InputError
from runtime.graph import GRIDS
from tests.runtime.known_costs import costs

EMPTY = 1.5
FIXED = (0.5, 1.0, 2.0, 0.25)
"""Of each stage, once a frame."""
STEP = (0.25, 0.75, 2.0, 5.0)
"""Of each stage, an instance."""


def true_ms(counts: tuple[int, ...]) -> float:
    """The time of a frame, stage by stage."""
    total = EMPTY
    for stage in range(4):
        passing = sum(counts[stage:])
        total += (FIXED[stage] if passing else 0.0) + STEP[stage] * passing
    return total


def measured(noise: float = 0.0) -> list[TimedMasks]:
    random = np.random.default_rng(0)
    uniform = [tuple(n if k == grid else 0 for k in range(4)) for n, grid in itertools.product((1, 4, 12), range(4))]
    mixed = [(0, 0, 0, 0), (8, 8, 5, 3), (2, 1, 1, 0), (20, 0, 0, 1), (1, 1, 1, 1)]
    return [TimedMasks(counts, true_ms(counts) * (1 + noise * random.standard_normal())) for counts in (*uniform, *mixed)]  # type: ignore[arg-type]


def test_exact_times_are_fitted_exactly() -> None:
    fit = fit_costs(measured())
    assert fit.empty_ms == pytest.approx(EMPTY) and fit.error < 1e-9
    for k, grid in enumerate(GRIDS):
        assert fit.grids[grid].instance_ms == pytest.approx(sum(STEP[: k + 1]))
        assert fit.grids[grid].fixed_ms == pytest.approx(EMPTY + sum(FIXED[: k + 1]))


def test_a_mixed_frame_that_was_not_measured_is_predicted() -> None:
    fit = fit_costs(measured(noise=0.02))
    predicted = costs(empty_ms=fit.empty_ms, grids=fit.grids)
    for counts in ((30, 20, 10, 5), (0, 3, 0, 2), (7, 0, 0, 0)):
        assert predicted.masks_ms(dict(zip(GRIDS, counts, strict=True))) == pytest.approx(true_ms(counts), rel=0.05)
    assert 0 < fit.error < 0.03


def test_a_grid_that_was_not_slower_still_costs_a_little_more() -> None:
    flat = [TimedMasks(counts, 1.0 + 0.5 * sum(counts)) for counts, _ in measured()]
    fit = fit_costs(flat)
    times = [fit.grids[grid].instance_ms for grid in GRIDS]
    assert times == sorted(set(times)) and times[-1] == pytest.approx(0.5, rel=0.02)
    costs(empty_ms=fit.empty_ms, grids=fit.grids)


def test_a_frame_pays_its_largest_grids_fixed_part_once() -> None:
    assert costs().masks_ms({}) == costs().masks_ms({14: 0, 112: 0}) == 1
    assert costs().masks_ms({14: 3, 56: 2}) == 4 + 3 * 1 + 2 * 3
    assert costs().frame_ms({14: 3, 56: 2}) == 20 + 13
    assert costs().least_ms(5) == 20 + 2 + 5
    np.testing.assert_array_equal(costs().graph_costs(), [[1, 2, 3, 4], [2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (("box", "CPU", 2), None),
        (("other", "CPU", 2), "measured on box (CPU), and this machine is other (CPU)"),
        (("box", "GPU", 2), "this machine is box (GPU)"),
        (("box", "CPU", 1), "measured with 2 threads, and the engine runs with 1 thread"),
    ],
)
def test_another_machine_or_number_of_threads_is_named(here: tuple[str, str, int], said: str | None) -> None:
    found = costs().difference(*here)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize(
    "grids",
    [
        {14: (0, 1), 28: (0, 2), 56: (0, 3)},
        {14: (0, 1), 28: (0, 1), 56: (0, 3), 112: (0, 4)},
        {14: (1, 1), 28: (0, 2), 56: (0, 3), 112: (0, 4)},
        {14: (0, 1), 28: (0, 2), 56: (0, 3), 112: (0, float("nan"))},
    ],
)
def test_costs_that_do_not_rise_are_refused(grids: dict[int, tuple[float, float]]) -> None:
    with pytest.raises(ValidationError):
        costs(grids={grid: {"fixed_ms": fixed, "instance_ms": instance} for grid, (fixed, instance) in grids.items()})


def test_a_bundle_keeps_the_costs_with_its_engine(tmp_path: Any, synthetic: Any) -> None:
    bundle = synthetic.create(tmp_path / "bundle")
    with pytest.raises(InputError, match="not built"):
        bundle.set_costs("onnxruntime", costs())
    bundle.add_engine("onnxruntime", {"masks.onnx": b"x"}, "fp32", {})
    assert Bundle.open(bundle.path).manifest.engines["onnxruntime"].costs is None
    bundle.set_costs("onnxruntime", costs())
    opened = Bundle.open(bundle.path)
    assert opened.engine("onnxruntime").costs == costs() and opened.engine("onnxruntime").files
    bundle.add_engine("onnxruntime", {"masks.onnx": b"y"}, "fp32", {})
    assert Bundle.open(bundle.path).engine("onnxruntime").costs is None
