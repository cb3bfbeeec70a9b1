"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.data.shapes import write_dataset
from dynamask.train import calibrator, learner, validator
from tests.train.runs import StandIn


@pytest.fixture
def fixed_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the evaluation, which has a test of its own."""
    figures = {"segm": {"AP": 1.0, "AP_L": None}, "bbox": {"AP": 2.0}, "share": {"14": 1.0}, "images": 1, "detections": 1}
    monkeypatch.setattr(validator, "evaluate", lambda *_, **__: dict(figures))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, fixed_figures: None) -> None:
    """Replace the model too."""
    monkeypatch.setattr(learner, "build_model", StandIn)


@pytest.fixture
def informative(monkeypatch: pytest.MonkeyPatch) -> None:
    """IoUs that grow with the grid: those of an untrained model are 0 at every grid."""
    collect = calibrator.collect_samples

    def samples(*arguments: Any) -> Any:
        found = collect(*arguments)
        return found and found._replace(ious=torch.linspace(0.5, 0.9, 4).expand(len(found.ious), 4))

    monkeypatch.setattr(calibrator, "collect_samples", samples)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images in COCO format."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, 30, seed=1, height=64, width=64)
    return folder
