"""Pictures of a run: what they show is compared with what was put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamask.data.shapes import ShapesDataset
from dynamask.model import build_model
from dynamask.rfpn import GridHeads
from dynamask.train import pictures, trainer
from runtime.annotate import GRID_COLORS
from runtime.graph import GRIDS
from runtime.instances import ClassName, Instances
from tests.train.runs import losses, tiny

LINE = {"epoch": 0.5, "loss": 1.0, "losses": {"loss_mask": 1.0}, "rate": 0.1, "statistics": {"share_14": 0.5}}


def found(labels: list[int], grids: list[int], score: float = 0.9) -> Instances:
    boxes = np.array([[5 + 20 * i, 5, 20 + 20 * i, 20] for i in range(len(labels))], np.float32).reshape(-1, 4)
    logits = [np.full((grid, grid), 9, np.float32) for grid in grids]
    scores = np.full(len(labels), score, np.float32)
    classes = [ClassName(1, "round"), ClassName(2, "spiky")]
    return Instances(boxes, scores, np.array(labels, np.int64), np.array(grids, np.int64), logits, (60, 120), classes)


def pixels(image: np.ndarray, grid: int) -> int:
    return int(coloured(image, grid).sum())


def coloured(image: np.ndarray, grid: int) -> np.ndarray:
    """Where the image has the grid's colour, thin lines' blended pixels included."""
    return (np.abs(image.astype(int) - GRID_COLORS[grid]) <= 60).all(axis=-1)


def test_bars_have_the_lengths_of_the_shares() -> None:
    image = pictures.class_shares([found([0, 0, 0, 0], [112, 14, 14, 14]), found([0] * 4, [28, 28, 28, 28], score=0.1)])
    drawn = {grid: pixels(image, grid) for grid in GRIDS}
    legend = drawn[28]  # the detections of 28 x 28 score too little
    assert 0 < legend == drawn[56]
    assert (drawn[14] - legend) / (drawn[112] - legend) == pytest.approx(3, rel=0.03)


def test_the_class_with_most_large_grids_stands_on_top() -> None:
    image = pictures.class_shares([found([0, 0, 1, 1], [14, 14, 112, 112])])
    tops = {grid: coloured(image, grid).nonzero()[0].min() for grid in (14, 112)}
    assert tops[112] < tops[14]


def test_the_selection_shows_each_image_and_grids_colour() -> None:
    image = np.full((60, 120, 3), 255, np.uint8)
    sheet = pictures.grid_selection([image] * 3, [found([0], [14]), found([0], [112]), found([], [])])
    assert sheet.shape == (2 * 60 + pictures.GAP, 2 * 120 + pictures.GAP, 3)
    assert pixels(sheet[:60, :120], 14) > 30 > pixels(sheet[:60, :120], 112)
    assert pixels(sheet[:60, -120:], 112) > 30
    assert (sheet[66:, 126:] == pictures.BACKGROUND).all()


def test_edge_targets_are_the_inner_border_and_predictions_the_heads() -> None:
    config = tiny()
    model = build_model(config, [{"id": 1, "name": "disc"}]).eval()
    heads = model.mask_branch.heads
    assert isinstance(heads, GridHeads)
    for layer in heads.edges:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 20.0)
    mask = np.zeros((64, 64), np.uint8)
    cv2.circle(mask, (32, 32), 22, 1, cv2.FILLED)
    target = {"image_id": 1, "labels": np.array([1]), "masks": mask[None]}
    sheet = pictures.edge_maps(model, [(np.zeros((64, 64, 3), np.uint8), target)], config)
    step = pictures.CELL + pictures.GAP
    assert sheet.shape[1] == 9 * step - pictures.GAP
    row = sheet[-pictures.CELL :]
    for k, grid in enumerate(GRIDS):
        drawn, predicted = (row[:, (1 + 2 * k + i) * step :][:, : pictures.CELL] for i in (0, 1))
        assert (predicted == 255).all()
        edge = drawn[:: pictures.CELL // grid, :: pictures.CELL // grid, 0] > 0
        solid = edge.astype(np.uint8)
        cv2.floodFill(solid, None, (grid // 2, grid // 2), 1)
        assert solid.sum() == pytest.approx(np.pi / 4 * grid**2, rel=0.08)  # the disc fills its box
        np.testing.assert_array_equal(edge, solid > cv2.erode(solid, np.ones((3, 3), np.uint8)))


def test_curves_are_drawn_from_the_first_line_on() -> None:
    none = {"epoch": 1.0, "segm": {"AP": None}, "bbox": {"AP": 3.0}}
    first = pictures.training_curves([LINE], [])
    later = pictures.training_curves([{**LINE, "epoch": 0.1 * i} for i in range(700)], [none, {"step": 9}])
    assert first.shape == later.shape == (700, 1100, 3)
    assert 3 * pixels(first, 14) < pixels(later, 14)


@pytest.mark.usefixtures("fixed_figures")
def test_a_run_leaves_pictures_and_is_not_changed_by_them(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "train__evaluate_every_epochs": 1,
        "train__phase1_epochs": 0,
        "train__phase2_epochs": 2,
        "data__shapes_train": 2,
    }
    trainer.train(tiny(**fields), tmp_path / "plain", quiet=True)
    trainer.train(tiny(**fields, train__pictures=1), tmp_path / "drawn", quiet=True)
    assert losses(tmp_path / "drawn") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "pictures").exists()
    steps = ("00000001", "00000002")
    names = {f"{step}-{kind}.png" for step in steps for kind in ("selection", "classes", "edges")} | {"curves.png"}
    assert {path.name for path in (tmp_path / "drawn" / "pictures").iterdir()} == names
    assert all(cv2.imread(str(tmp_path / "drawn" / "pictures" / name)) is not None for name in names)
    events = EventAccumulator(str(tmp_path / "drawn" / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {f"pictures/{kind}" for kind in ("selection", "classes", "edges", "curves")}
    assert [event.step for event in events.Images("pictures/edges")] == [1, 2]


def test_the_model_is_back_in_its_mode() -> None:
    config = tiny(train__pictures=1)
    shapes = ShapesDataset(1, 0, 64, 64)
    model = build_model(config, shapes.classes).train()
    drawn = pictures.draw_pictures(model, shapes, config, [LINE], [])
    assert model.training
    assert set(drawn) == {"selection", "classes", "edges", "curves"}
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in drawn.values())
