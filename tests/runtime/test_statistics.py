from __future__ import annotations

import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.statistics import LATENCIES, RunStatistics, grid_statistics, percentiles, timed_prediction
from tests.runtime.fake_stream import GRID_GMACS, FakePredictor, make_instances


def test_percentiles_interpolate():
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50, "p95": 95, "p99": 99, "mean": 50}
    assert percentiles([1.0, 2.0])["p50"] == 1.5


def test_the_mean_cost_weighs_each_grid_by_its_instances():
    found = grid_statistics({14: 3, 112: 1}, GRID_GMACS)
    assert found["instances"] == 4 and found["gmacs"] == pytest.approx((3 * 0.2 + 1.4) / 4)
    assert found["share"] == {"14": 0.75, "28": 0.0, "56": 0.0, "112": 0.25}


def test_without_instances_there_is_no_mean_cost():
    assert grid_statistics({}, GRID_GMACS) == {"instances": 0, "gmacs": None, "share": {"14": 0, "28": 0, "56": 0, "112": 0}}
    assert RunStatistics(GRID_GMACS).summary()["latency_ms"] == {}


def test_a_run_is_summed_up_over_its_images():
    collected = RunStatistics(GRID_GMACS)
    images = [make_instances(count, (64, 96), seed=count) for count in (0, 3, 5)]
    for index, instances in enumerate(images):
        instances.times_ms = {part: float(index) for part in LATENCIES}
        collected.add(instances)
    summary = collected.summary()
    costs = [GRID_GMACS[grid] for instances in images for grid in instances.grids.tolist()]
    assert summary["instances"] == 8 and summary["gmacs"] == pytest.approx(statistics.fmean(costs))
    assert list(summary["latency_ms"]) == ["preprocess", "detector", "masks", "paste", "total"]
    assert summary["latency_ms"]["masks"] == {"p50": 1.0, "p95": pytest.approx(1.9), "p99": pytest.approx(1.98), "mean": 1.0}


def test_predicted_times_are_compared_with_the_measured_ones():
    collected = RunStatistics(GRID_GMACS)
    assert collected.summary()["predicted"] is None
    for masks_ms, predicted_ms in ((10.0, 9.0), (20.0, 22.0), (40.0, 60.0)):
        instances = make_instances(2, (64, 96))
        instances.times_ms = dict.fromkeys(LATENCIES, 0.0) | {"detector": 30.0, "masks": masks_ms}
        instances.predicted_ms = {"detector": 30.0, "masks": predicted_ms}
        collected.add(instances)
    assert collected.summary()["predicted"] == {
        "masks": {"ms": 22.0, "ratio": pytest.approx(1.1)},
        "frame": {"ms": 52.0, "ratio": pytest.approx(52 / 50)},
    }


def test_a_timed_prediction_has_its_masks_pasted_and_all_times(monkeypatch):
    clock = iter([10.0, 10.5, 10.75])
    monkeypatch.setattr("runtime.statistics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = timed_prediction(FakePredictor(3), np.zeros((64, 96, 3), np.uint8), 0.0, -1)
    assert found.times_ms == {"preprocess": 1.0, "detector": 2.0, "masks": 3.0, "paste": 250.0, "total": 750.0}
    assert len(found.__dict__["_crops"]) == 3
