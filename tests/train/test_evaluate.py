"""The figures of an evaluation, from detections whose AP is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynamask.config import Config, load_config
from dynamask.data.shapes import ShapesDataset
from dynamask.model import GraphOutput
from dynamask.train import evaluate as evaluation
from runtime.graph import GRIDS

GRID = 3


def config() -> Config:
    return load_config("lite0-shapes", {"model.canvas": [128, 192], "model.detections": 12})


class Oracle(nn.Module):
    """Answers with the ground truth of the images in turn, on a canvas of half their size, all at 112 x 112."""

    def __init__(self, dataset: ShapesDataset) -> None:
        super().__init__()
        self.layer, self.mask_branch = nn.Conv2d(3, 1, 1), SimpleNamespace(msm=nn.Identity(), costs=torch.arange(1.0, 5.0))
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])
        self.calls: list[tuple[Any, Any]] = []

    def predict(self, image: Tensor, budget: Any, grid_override: Any) -> GraphOutput:
        assert image.shape == (1, 3, 128, 192)
        assert not self.training
        self.calls.append((budget, grid_override))
        target = next(self.targets)
        found, slots = len(target["labels"]), 12
        boxes, scores = torch.zeros(slots, 4), torch.zeros(slots)
        labels, grids = torch.full((slots,), -1), torch.full((slots,), -1)
        boxes[:found] = torch.from_numpy(target["boxes"]) * 0.5
        scores[:found] = torch.linspace(0.9, 0.5, found)
        labels[:found] = torch.from_numpy(target["labels"]) - 1
        grids[:found] = GRID
        empty = [torch.zeros(0, dtype=torch.int64)] * 3, [torch.zeros(0, side, side) for side in GRIDS[:3]]
        crops = [_crop(mask, box) for mask, box in zip(target["masks"], target["boxes"], strict=True)]
        return GraphOutput(boxes, scores, labels, grids, (*empty[0], torch.arange(found)), (*empty[1], torch.tensor(np.array(crops))))


def _crop(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box.astype(int)
    return cv2.resize(mask[y0:y1, x0:x1].astype(np.float32), (112, 112)) * 20 - 10


@pytest.fixture
def dataset() -> ShapesDataset:
    return ShapesDataset(3, seed=0, height=256, width=384)


def test_the_ground_truth_itself_scores_nearly_all(dataset: ShapesDataset) -> None:
    oracle = Oracle(dataset)
    figures = evaluation.evaluate(oracle.train(), dataset, config(), grid=112)  # type: ignore[arg-type]
    assert figures is not None
    assert figures["bbox"]["AP"] == pytest.approx(100.0, abs=0.1)
    assert figures["segm"]["AP"] > 90.0
    assert figures["share"] == {"14": 0.0, "28": 0.0, "56": 0.0, "112": 1.0}
    assert (figures["images"], figures["detections"]) == (3, sum(len(dataset[i][1]["labels"]) for i in range(3)))
    assert oracle.calls == [(0.0, GRID)] * 3
    assert oracle.training


def test_images_beyond_the_number_asked_for_do_not_count(dataset: ShapesDataset) -> None:
    figures = evaluation.evaluate(Oracle(dataset), dataset, config(), images=1)  # type: ignore[arg-type]
    assert figures is not None
    assert figures["images"] == 1
    assert figures["bbox"]["AP"] == pytest.approx(100.0, abs=0.1)


def test_an_evaluation_can_be_stopped(dataset: ShapesDataset) -> None:
    assert evaluation.evaluate(Oracle(dataset), dataset, config(), stop=lambda: True) is None  # type: ignore[arg-type]
