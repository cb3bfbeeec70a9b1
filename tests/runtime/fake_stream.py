"""A small video, synthetic instances and a predictor without an engine, for the tests of streams."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np

from runtime.instances import ClassName, Instances

GRID_GMACS = {14: 0.2, 28: 0.6, 56: 1.0, 112: 1.4}
CLASSES = [ClassName(id=1, name="star"), ClassName(id=7, name="gear")]


def make_instances(count: int, size: tuple[int, int], seed: int = 0) -> Instances:
    """Discs of random place and size, at random grids; scores fall from 0.99 to 0.5."""
    random = np.random.default_rng(seed)
    height, width = size
    sides = random.uniform(4, max(5, min(size) / 3), (count, 2))
    corners = random.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    grids = random.choice([14, 28, 56, 112], count)
    return Instances(
        boxes=np.concatenate([corners, corners + sides], axis=1).astype(np.float32).reshape(count, 4),
        scores=np.linspace(0.99, 0.5, count, dtype=np.float32),
        labels=random.integers(0, 2, count),
        grids=grids,
        mask_data=[_disc(int(grid)) for grid in grids],
        size=size,
        classes=CLASSES,
        times_ms={"preprocess": 1.0, "detector": 2.0, "masks": 3.0},
    )


def _disc(grid: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    y, x = np.mgrid[:grid, :grid] / (grid - 1) * 2 - 1
    return (4 * (1 - np.hypot(x, y))).astype(np.float32)


class FakePredictor:
    """Finds `count` discs in every image, whatever the budget; may fail, or be interrupted, at the given call."""

    def __init__(self, count: int = 3, error: BaseException | None = None, at: int = 5, budget_gmacs: float = 0.0) -> None:
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(grid_gmacs=GRID_GMACS))
        self.budget_gmacs, self.budget_ms = budget_gmacs, 0.0
        self.calls = 0
        self.budgets: list[float | None] = []
        self.overrides: list[int | None] = []
        self.costs: list[float] = []
        self._count, self._error, self._at = count, error, at

    def costs_notice(self) -> None:
        """Its engine has no measured times."""

    def check_budget(self, budget_gmacs: float, budget_ms: float) -> None:
        """Any can be kept."""

    def __call__(
        self,
        image: np.ndarray[Any, np.dtype[np.uint8]],
        budget_gmacs: float | None = None,
        grid_override: int | None = None,
        min_score: float = 0.0,
        budget_ms: float | None = None,
    ) -> Instances:
        self.calls += 1
        self.budgets.append(budget_gmacs)
        self.overrides.append(grid_override)
        if self._error is not None and self.calls == self._at:
            raise self._error
        found = make_instances(self._count, image.shape[:2], seed=self.calls)
        found = found[found.scores > min_score]
        self.costs.append(sum(GRID_GMACS[int(grid)] for grid in found.grids))
        return found


def write_video(path: Path, frames: int = 30, height: int = 64, width: int = 96, rate: int = 10) -> Path:
    """H.264 in MP4 with its index at the front, noise that moves; frame i has the mean brightness 40 + 4 i."""
    texture = np.random.default_rng(0).integers(-30, 30, (height, width, 3))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "10"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(frames):
            image = np.clip(np.roll(texture, i, axis=1) + 40 + 4 * i, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def count_frames(path: Path) -> int:
    """Frames that FFmpeg decodes from a file."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
