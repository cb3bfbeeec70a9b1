"""Calibration of the MSM: the IoU by grid, its regression, and lambda."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask.config import load_config
from dynamask.data.augment import TrainingItems
from dynamask.data.shapes import ShapesDataset
from dynamask.model import DynaMask, build_model
from dynamask.msm import Budget, MaskSwitch, route
from dynamask.train import calibration
from dynamask.train.calibration import (
    IOU_RANGE,
    LOGITS_PER_IOU,
    CalibrationSamples,
    calibrate,
    collect_samples,
    iou_by_grid,
    smallest_lambda,
)
from runtime.graph import GRIDS, MSM
from tests.tiny import TINY

COSTS = torch.tensor([0.1, 0.3, 0.6, 1.0])


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((1, 40, 60), bool)
    mask[0, y0:y1, x0:x1] = True
    return mask


def filled(grid: int, columns: float = 1.0) -> np.ndarray:
    """Logits of a mask that fills the left part of its box."""
    logits = np.full((1, grid, grid), -20.0, np.float32)
    logits[:, :, : round(grid * columns)] = 20.0
    return logits


def test_iou_by_grid_is_that_of_the_pasted_masks_clipped_to_the_range_of_ap() -> None:
    truth = rectangle(10, 5, 38, 33)  # 28 x 28 pixels, as the box
    logits = [filled(grid, part) for grid, part in zip(GRIDS, (1.0, 0.75, 0.5, 0.25), strict=True)]
    box, label = np.array([[10, 5, 38, 33]], np.float32), np.array([2])
    ious = iou_by_grid(logits, box, label, truth, np.array([2]))
    np.testing.assert_allclose(ious, [[IOU_RANGE[1], 0.75, 0.5, IOU_RANGE[0]]], atol=1e-6)


def test_the_best_true_mask_of_the_own_class_counts_and_none_is_the_lowest_iou() -> None:
    truths = np.concatenate([rectangle(10, 5, 38, 33), rectangle(10, 5, 31, 33), rectangle(0, 0, 5, 5)])
    logits = [np.repeat(filled(grid), 3, axis=0) for grid in GRIDS]
    boxes = np.array([[10, 5, 38, 33]] * 3, np.float32)
    ious = iou_by_grid(logits, boxes, np.array([0, 1, 3]), truths, np.array([1, 0, 2]))
    assert ious[0] == pytest.approx([0.75] * 4, abs=1e-6)  # the truth of class 1 fits better, but is another's
    assert ious[1] == pytest.approx([IOU_RANGE[1]] * 4)
    assert ious[2] == pytest.approx([IOU_RANGE[0]] * 4)


def samples(count: int, seed: int) -> CalibrationSamples:
    """Regions whose first channel determines the IoUs."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(count, 8, 14, 14, generator=generator)
    level = torch.rand(count, 1, generator=generator)
    regions[:, 0] = 4 * level[:, :, None]
    steps = torch.tensor([[0.0, 0.4, 0.7, 1.0]])
    return CalibrationSamples(regions.half(), 0.5 + 0.4 * level * steps)


@pytest.fixture(scope="module")
def fitted() -> tuple[MaskSwitch, dict[str, float]]:
    torch.manual_seed(0)
    msm = MaskSwitch(8)
    return msm, calibrate(msm, samples(1000, 0), COSTS, 0.55, seed=0)


def test_the_calibrated_msm_predicts_the_iou_by_grid(fitted: tuple[MaskSwitch, dict[str, float]]) -> None:
    msm, figures = fitted
    held = samples(400, 1)
    with torch.no_grad():
        logits = msm(held.regions.float()) + figures["lambda"] * COSTS  # without lambda's shift
    ious = LOGITS_PER_IOU * held.ious
    error = (logits - logits.mean(dim=1, keepdim=True)) - (ious - ious.mean(dim=1, keepdim=True))
    assert figures["variance_explained"] > 0.9
    assert float(error.square().mean()) < 0.1 * float((ious - ious.mean(dim=1, keepdim=True)).square().mean())


def test_the_mean_cost_is_the_target_without_a_budget_and_the_budget_with_one(fitted: tuple[MaskSwitch, dict[str, float]]) -> None:
    msm, figures = fitted
    seen, none = samples(1000, 0), torch.full((1000,), MSM)
    with torch.no_grad():
        log_probabilities = torch.log_softmax(msm(seen.regions.float()), dim=-1)
    for budget, expected in ((0.0, 0.55), (0.3, 0.3)):
        grids = route(log_probabilities, Budget.of_mean(torch.tensor(budget), COSTS), torch.ones(1000), none)
        assert float(COSTS[grids].mean()) == pytest.approx(expected, abs=0.01) and float(COSTS[grids].mean()) <= expected + 1e-6
    assert figures["mean_cost"] <= 0.55 and figures["lambda"] > 0
    # The instances that gain more get the larger grids.
    level = seen.ious[:, 3] - seen.ious[:, 0]
    assert float(level[grids >= 2].mean()) > float(level[grids == 0].mean()) + 0.1


def test_a_tenth_is_held_out_and_what_is_explained_there_is_told() -> None:
    """IoUs that have nothing to do with the regions can be learnt by heart, and are not predicted on others."""
    torch.manual_seed(0)
    noise = CalibrationSamples(torch.randn(300, 8, 14, 14).half(), 0.5 + 0.4 * torch.rand(300, 4))
    fitted, held_out = noise.split()
    assert len(fitted.ious) == 270 and torch.equal(torch.cat([fitted.ious, held_out.ious]), noise.ious)
    msm = MaskSwitch(8)
    figures = calibrate(msm, noise, COSTS, 0.55, seed=0)
    assert figures["held_out"] == 30 and figures["variance_explained_held_out"] < min(0.3, figures["variance_explained"])
    with torch.no_grad():
        logits = msm(held_out.regions.float()) + figures["lambda"] * COSTS
    wanted = LOGITS_PER_IOU * held_out.ious
    residual, total = (float((x - x.mean(dim=1, keepdim=True)).square().sum()) for x in (logits - wanted, wanted))
    assert figures["variance_explained_held_out"] == pytest.approx(1 - residual / total, abs=1e-4)


def test_weights_that_no_epoch_improves_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    msm = MaskSwitch(8)
    seen = samples(200, 0)
    first = calibrate(msm, seen, COSTS, 10.0, seed=0)
    before = {name: value.clone() for name, value in msm.state_dict().items()}
    monkeypatch.setattr(calibration, "RATE", 10.0)
    again = calibrate(msm, seen, COSTS, 10.0, seed=0)
    assert first["epoch"] > 0 and again["epoch"] == 0 and first["lambda"] == again["lambda"] == 0
    assert all(torch.equal(value, before[name]) for name, value in msm.state_dict().items())


def test_one_detection_is_fitted_and_held_out() -> None:
    single = CalibrationSamples(torch.zeros(1, 8, 14, 14).half(), torch.tensor([[0.5, 0.6, 0.7, 0.8]]))
    assert [len(part.ious) for part in single.split()] == [1, 1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.05, 1.1))
def test_lambda_is_the_smallest_that_keeps_to_the_target(seed: int, budget: float) -> None:
    """Against `route`, which finds lambda by trying every value at which an instance is indifferent."""
    log_probabilities = torch.log_softmax(3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    lambda_ = smallest_lambda(log_probabilities, COSTS, budget)
    ours = (log_probabilities - lambda_ * COSTS).argmax(dim=-1)
    exact = route(log_probabilities, Budget.of_mean(torch.tensor(budget), COSTS), torch.ones(30), torch.full((30,), MSM))
    assert float(COSTS[ours].mean()) <= max(budget, 0.1) + 1e-6
    assert float(COSTS[ours].mean()) == pytest.approx(float(COSTS[exact].mean()), abs=0.031)  # one instance's step


@pytest.fixture(scope="module")
def model_and_items() -> tuple[DynaMask, TrainingItems]:
    torch.manual_seed(0)
    config = load_config("lite0-shapes", {**TINY, "data.shapes_train": 6, "model.score_threshold": 0.0})
    items = TrainingItems(ShapesDataset(6, 0, *config.model.canvas), config)
    return build_model(config, items.classes), items


def test_samples_are_as_many_as_requested_and_the_same_again(model_and_items: tuple[DynaMask, TrainingItems]) -> None:
    model, items = model_and_items
    model.train()
    told: list[tuple[int, int]] = []
    first = collect_samples(model, items, 12, 3, lambda *counts: told.append(counts))
    again = collect_samples(model, items, 12, 3)
    assert first is not None and again is not None and model.training
    assert first.regions.shape == (12, 16, 14, 14) and first.ious.shape == (12, 4)
    assert torch.equal(first.ious, again.ious) and torch.equal(first.regions, again.regions)
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_sampling_ends_with_the_training_images_or_when_stopped(model_and_items: tuple[DynaMask, TrainingItems]) -> None:
    model, items = model_and_items
    all_of_them = collect_samples(model, items, 10**6, 0)
    assert all_of_them is not None and len(all_of_them.ious) == 6 * 5  # of five detections each
    assert collect_samples(model, items, 100, 0, stop=lambda: True) is None


def test_samples_whose_ious_do_not_depend_on_the_grid_are_not_informative() -> None:
    regions = torch.zeros(2, 8, 14, 14).half()
    assert not CalibrationSamples(regions[:0], torch.zeros(0, 4)).informative
    assert not CalibrationSamples(regions, torch.full((2, 4), IOU_RANGE[0])).informative
    assert CalibrationSamples(regions, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.6, 0.6]])).informative
