"""Measuring an engine's times: which frames are timed, what is made of the times, and the engines that can be timed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cli.main import main
from export.onnxruntime_engine import build_onnxruntime
from runtime import calibration
from runtime.bundle import Bundle
from runtime.calibration import Effort, Timed, cases, measure
from runtime.costs import GridCost
from runtime.errors import InputError
from runtime.graph import GRIDS
from tests.runtime.known_costs import costs

SMALL = Effort(uniform=(1, 4), mixed=(4,), blocks=1, rounds=1)
KNOWN = costs(empty_ms=2, grids={grid: GridCost(fixed_ms=2 + k, instance_ms=1 + k) for k, grid in enumerate(GRIDS)})


def known_ms(counts: tuple[int, ...]) -> float:
    return KNOWN.masks_ms(dict(zip(GRIDS, counts, strict=True)))


def test_every_grid_is_timed_alone_and_mixed() -> None:
    frames = cases(100, Effort((1, 12, 200), (100,), 1, 1))
    assert frames[0] == (0, 0, 0, 0) and len(set(frames)) == len(frames)
    for size in (1, 12, 100):
        assert {tuple(size if k == grid else 0 for k in range(4)) for grid in range(4)} <= set(frames)
    assert (35, 34, 21, 10) in frames and max(map(sum, frames)) == 100


def test_known_times_are_found_through_disturbances() -> None:
    """Each block of rounds is disturbed by another factor, and single frames by more."""
    random, calls = np.random.default_rng(0), [0]
    effort = Effort((1, 4, 12), (4, 12), blocks=3, rounds=5)
    frames = cases(100, effort)

    def sample(counts: tuple[int, int, int, int]) -> Timed:
        block = max(0, calls[0] - len(frames)) // (effort.rounds * len(frames))
        calls[0] += 1
        factor = (1.5, 1.0, 1.2)[block] * (5.0 if random.random() < 0.1 else 1.0)
        return Timed(counts, 20 * factor, known_ms(counts) * factor)

    found = measure(sample, frames, effort, threads=3, processor="CPU")
    assert calls[0] == len(frames) * (1 + 3 * 5)  # One round is not timed.
    assert found.detector_ms.p50 == pytest.approx(20) and found.detector_ms.p99 == pytest.approx(100)
    assert found.fit_error < 1e-6 and found.empty_ms == pytest.approx(2)
    assert (found.threads, found.processor, found.samples) == (3, "CPU", 15 * len(frames))
    for grid, cost in KNOWN.grids.items():
        assert found.grids[grid].fixed_ms == pytest.approx(cost.fixed_ms)
        assert found.grids[grid].instance_ms == pytest.approx(cost.instance_ms)


def test_frames_take_turns() -> None:
    order: list[tuple[int, ...]] = []

    def sample(counts: tuple[int, int, int, int]) -> Timed:
        order.append(counts)
        return Timed(counts, 1.0, known_ms(counts))

    effort = Effort((1,), (), blocks=2, rounds=2)
    frames = cases(4, effort)
    measure(sample, frames, effort)
    rounds = [order[i : i + len(frames)] for i in range(0, len(order), len(frames))]
    assert len(rounds) == 5 and all(set(one) == set(frames) for one in rounds) and rounds[1] != rounds[2]


def test_images_in_which_nothing_is_found_are_refused() -> None:
    with pytest.raises(InputError, match="finds no instance in the images"):
        measure(lambda _: Timed((0, 0, 0, 0), 1.0, 1.0), cases(4, SMALL), SMALL)


def test_the_times_are_kept_with_the_engine(synthetic: ModuleType, tmp_path: Path) -> None:
    bundle = synthetic.create(tmp_path / "bundle")
    build_onnxruntime(bundle)
    progress: list[tuple[int, int]] = []
    target, found = calibration.calibrate(bundle, threads=1, effort=SMALL, progress=lambda *done: progress.append(done))
    assert target == "onnxruntime" and Bundle.open(bundle.path).engine(target).costs == found
    assert found.threads == 1 and found.detector_ms.p50 > 0 and progress == [(1, 1)]


def test_an_engine_that_runs_as_one_is_timed_on_what_it_finds(synthetic: ModuleType) -> None:
    """Its images have 4 and 2 instances in 6 slots; a threshold leaves as many as wanted, each at the wanted grid."""

    class Engine:
        profile = SimpleNamespace(canvas=((64, 64),) * 3)
        manifest = synthetic.manifest()

        def run(self, image: Any, budget: Any = None, override: Any = None, min_score: float = 0.0, frames: Any = None) -> Any:
            scores = np.array([0.9, 0.8, 0.6, 0.4, 0, 0] if image else [0.7, 0.5, 0, 0, 0, 0], np.float32)
            scores = np.where(scores > np.float32(min_score), scores, 0)
            grids = np.where(scores > 0, 0 if override is None else override, -1)
            counts = [int((grids == k).sum()) for k in range(4)]
            return SimpleNamespace(scores=scores, grids=grids, times_ms={"detector": 3.0, "masks": known_ms(tuple(counts))})

    sample = calibration._whole(Engine(), [True, False])  # type: ignore[arg-type, list-item]
    for counts in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 2), (1, 1, 1, 1), (0, 3, 0, 0)):
        assert sample(counts) == (counts, 3.0, known_ms(counts))
    timed = sample((0, 0, 0, 9))
    assert timed.counts == (0, 0, 0, 4) and timed.masks_ms == known_ms(timed.counts)


def test_the_command_measures_and_says(synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    bundle = synthetic.create(tmp_path / "bundle")
    monkeypatch.setattr(calibration, "FULL", SMALL)
    assert main(["calibrate", str(bundle.path)]) == 2
    assert "not built" in capsys.readouterr().err
    build_onnxruntime(bundle)
    assert main(["calibrate", str(bundle.path), "--threads", "1", "--json", str(tmp_path / "times.json")]) == 0
    said = capsys.readouterr().out
    assert "all at 112" in said and "1 thread" in said
    assert Bundle.open(bundle.path).engine("onnxruntime").costs is not None and (tmp_path / "times.json").exists()
