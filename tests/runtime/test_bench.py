from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import runtime.timing
from runtime.bench import bench_latency, bench_routing, random_boxes, spread
from runtime.errors import InputError
from runtime.machine import machine
from runtime.timing import take_turns

GMACS = {14: 0.25, 28: 0.5, 56: 0.75, 112: 1.0}
COST_MS = (0.02, 0.04, 0.08, 0.16)


class _Clock:
    """Time that passes only while something works."""

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def work(self, milliseconds):
        self.seconds += milliseconds / 1000


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(runtime.timing, "time", clock)
    return clock


class _Engine:
    """A mask branch that takes a known time per instance and grid, and remembers what it was given."""

    def __init__(self, clock, slots=100):
        self.clock = clock
        classes = [SimpleNamespace(id=1, name="a"), SimpleNamespace(id=2, name="b")]
        self.manifest = SimpleNamespace(
            detections=slots, canvas=(320, 384), classes=classes, score_threshold=0.05, grid_gmacs=GMACS, preset="fake"
        )
        self.feature_shapes = [(1, 8, 320 // s, 384 // s) for s in (4, 8, 16, 32)]
        self.calls = []

    def run_masks(self, features, boxes, scores, labels, budget, grid_override):
        self.calls.append((features, boxes, scores, labels, budget, grid_override))
        self.clock.work(sum(COST_MS[g] for g, score in zip(grid_override, scores, strict=True) if score > 0))


def test_routing_is_timed_against_the_largest_grid(clock):
    engine = _Engine(clock)
    result = bench_routing(engine, 80, (35, 34, 21, 10), repeats=5)
    assert result["distribution"] == [28, 27, 17, 8]
    expected = np.dot(result["distribution"], COST_MS) / (80 * COST_MS[3])
    assert result["ratio"] == pytest.approx(expected)
    assert result["gmacs_ratio"] == pytest.approx((28 * 0.25 + 27 * 0.5 + 17 * 0.75 + 8) / 80)
    assert list(result["uniform_ms"]) == ["14", "28", "56", "112"]
    assert "engine_speedup" not in result


def test_every_contender_gets_the_same_instances(clock):
    engine, eager_calls = _Engine(clock), []
    result = bench_routing(engine, 40, repeats=2, eager=lambda *inputs: (eager_calls.append(inputs), clock.work(20))[0])
    assert result["engine_speedup"]["largest"] == pytest.approx(20 / (40 * COST_MS[3]))
    features, boxes, scores, labels, _, _ = engine.calls[0]
    for call in [*engine.calls, *eager_calls]:
        assert all(given is first for given, first in zip(call[0], features, strict=True))
        assert call[1] is boxes and call[2] is scores and call[3] is labels
    assert [f.shape for f in features] == engine.feature_shapes and features[0].dtype == np.float32
    assert (scores > 0).sum() == 40 and (np.diff(scores) <= 0).all() and (labels[40:] == -1).all() and (labels[:40] >= 0).all()
    routed = next(call[5] for call in engine.calls if len(set(call[5][:40])) > 1)
    assert np.bincount(routed[:40], minlength=4).tolist() == spread(40, (35, 34, 21, 10)) and (routed[40:] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instances": 101}, "101 instances do not fit the bundle's 100 slots"),
        ({"instances": 0}, "0 instances"),
        ({"distribution": (1, 2, 3)}, "four parts"),
        ({"distribution": (1, -2, 3, 4)}, "four parts"),
        ({"repeats": 0}, "0 repeats"),
    ],
)
def test_senseless_calls_are_refused(arguments, message, clock):
    with pytest.raises(InputError, match=message):
        bench_routing(_Engine(clock), **arguments)


def test_a_mask_branch_that_cannot_run_alone_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"engine for tensorrt runs detector and mask branch as one.*; give --target onnxruntime\.$"):
        bench_routing(SimpleNamespace(target="tensorrt"))


def test_boxes_are_inside_the_canvas():
    boxes = random_boxes(500, 320, 384, np.random.default_rng(0))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 384.01).all() and (boxes[:, 3] <= 320.01).all()
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) / np.sqrt(320 * 384)
    assert sides.min() > 0.03 and sides.max() < 0.61 and np.median(sides) < 0.25


def test_contenders_take_turns():
    order = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abc" * 3 + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_latency_is_compared_on_the_same_images(clock):
    images = [np.zeros((8, 8, 3), np.uint8), np.ones((9, 8, 3), np.uint8)]
    seen = {"engine": [], "peer": []}

    def predictor(image):
        seen["engine"].append(image)
        clock.work(2)
        return SimpleNamespace(crops=lambda: iter([1, 2, 3]))

    def peer(image):
        seen["peer"].append(image)
        clock.work(8)
        return 5

    result = bench_latency(predictor, images, {"other": peer}, repeats=3)
    assert result["ratio"] == pytest.approx(0.25)
    assert result["engine_fps"] == pytest.approx(500)
    assert (result["peer"], result["engine_instances"], result["peer_instances"]) == ("other", 3, 5)
    assert all(a is b for a, b in zip(seen["engine"], seen["peer"], strict=True)) and len(seen["peer"]) == 7
    with pytest.raises(InputError, match="0 images"):
        bench_latency(predictor, [], {"other": peer})


def test_the_machine_is_named():
    named = machine()
    assert named["cpu"] and named["cores"] >= 1 and "numpy" in named["versions"]
