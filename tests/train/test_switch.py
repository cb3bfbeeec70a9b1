"""What the switch is taught: what a grid is worth, and what it may cost."""

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
from dynamask.msm import MaskSwitch, route
from dynamask.train.switch import SHARPNESS, WORTH, Lessons, collect_lessons, fit_switch, grid_worths
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


def test_a_worth_is_the_iou_of_the_pasted_mask_between_the_thresholds_of_average_precision() -> None:
    truth = rectangle(10, 5, 38, 33)  # 28 x 28 pixels, as the box
    logits = [filled(grid, part) for grid, part in zip(GRIDS, (1.0, 0.75, 0.5, 0.25), strict=True)]
    box, label = np.array([[10, 5, 38, 33]], np.float32), np.array([2])
    worths = grid_worths(logits, box, label, truth, np.array([2]))
    np.testing.assert_allclose(worths, [[WORTH[1], 0.75, 0.5, WORTH[0]]], atol=1e-6)


def test_of_several_truths_the_best_of_the_own_class_counts_and_a_false_detection_is_worth_nothing_more_at_any_grid() -> None:
    truths = np.concatenate([rectangle(10, 5, 38, 33), rectangle(10, 5, 31, 33), rectangle(0, 0, 5, 5)])
    logits = [np.repeat(filled(grid), 3, axis=0) for grid in GRIDS]
    boxes = np.array([[10, 5, 38, 33]] * 3, np.float32)
    worths = grid_worths(logits, boxes, np.array([0, 1, 3]), truths, np.array([1, 0, 2]))
    assert worths[0] == pytest.approx([0.75] * 4, abs=1e-6)  # the truth of class 1 fits better, but is another's
    assert worths[1] == pytest.approx([WORTH[1]] * 4)
    assert worths[2] == pytest.approx([WORTH[0]] * 4)


def lessons(count: int, seed: int) -> Lessons:
    """Regions from whose first two channels the worths follow."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(count, 8, 14, 14, generator=generator)
    level = torch.rand(count, 1, generator=generator)
    regions[:, 0] = 4 * level[:, :, None]
    steps = torch.tensor([[0.0, 0.4, 0.7, 1.0]])
    return Lessons(regions.half(), 0.5 + 0.4 * level * steps)


@pytest.fixture(scope="module")
def fitted() -> tuple[MaskSwitch, dict[str, float]]:
    torch.manual_seed(0)
    msm = MaskSwitch(8)
    return msm, fit_switch(msm, lessons(1000, 0), COSTS, 0.55, seed=0)


def test_the_switch_learns_what_each_grid_is_worth(fitted: tuple[MaskSwitch, dict[str, float]]) -> None:
    msm, figures = fitted
    held = lessons(400, 1)
    with torch.no_grad():
        logits = msm(held.regions.float()) + figures["lambda"] * COSTS  # without the price
    worths = SHARPNESS * held.worths
    error = (logits - logits.mean(dim=1, keepdim=True)) - (worths - worths.mean(dim=1, keepdim=True))
    assert figures["explained"] > 0.9
    assert float(error.square().mean()) < 0.1 * float((worths - worths.mean(dim=1, keepdim=True)).square().mean())


def test_without_a_budget_the_switch_costs_what_it_was_told_and_with_one_that(fitted: tuple[MaskSwitch, dict[str, float]]) -> None:
    msm, figures = fitted
    seen, none = lessons(1000, 0), torch.full((1000,), MSM)
    with torch.no_grad():
        log_probabilities = torch.log_softmax(msm(seen.regions.float()), dim=-1)
    for budget, expected in ((0.0, 0.55), (0.3, 0.3)):
        grids = route(log_probabilities, COSTS, torch.tensor(budget), torch.ones(1000), none)
        assert float(COSTS[grids].mean()) == pytest.approx(expected, abs=0.01) and float(COSTS[grids].mean()) <= expected + 1e-6
    assert figures["mean_cost"] <= 0.55 and figures["lambda"] > 0
    # Who gains more gets the larger grid.
    level = seen.worths[:, 3] - seen.worths[:, 0]
    assert float(level[grids >= 2].mean()) > float(level[grids == 0].mean()) + 0.1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.05, 1.1))
def test_the_price_is_the_smallest_that_keeps_to_the_cost(seed: int, budget: float) -> None:
    """Against `route`, which finds lambda by trying every value at which an instance is indifferent."""
    from dynamask.train.switch import _price

    log_probabilities = torch.log_softmax(3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    price = _price(log_probabilities, COSTS, budget)
    ours = (log_probabilities - price * COSTS).argmax(dim=-1)
    exact = route(log_probabilities, COSTS, torch.tensor(budget), torch.ones(30), torch.full((30,), MSM))
    assert float(COSTS[ours].mean()) <= max(budget, 0.1) + 1e-6
    assert float(COSTS[ours].mean()) == pytest.approx(float(COSTS[exact].mean()), abs=0.031)  # one instance's step


@pytest.fixture(scope="module")
def model_and_items() -> tuple[DynaMask, TrainingItems]:
    torch.manual_seed(0)
    config = load_config("lite0-shapes", {**TINY, "data.shapes_train": 6, "model.score_threshold": 0.0})
    items = TrainingItems(ShapesDataset(6, 0, *config.model.canvas), config)
    return build_model(config, items.classes), items


def test_lessons_are_as_many_as_were_asked_for_and_the_same_again(model_and_items: tuple[DynaMask, TrainingItems]) -> None:
    model, items = model_and_items
    model.train()
    told: list[tuple[int, int]] = []
    first = collect_lessons(model, items, 12, 3, lambda *counts: told.append(counts))
    again = collect_lessons(model, items, 12, 3)
    assert first is not None and again is not None and model.training
    assert first.regions.shape == (12, 16, 14, 14) and first.worths.shape == (12, 4)
    assert torch.equal(first.worths, again.worths) and torch.equal(first.regions, again.regions)
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_lessons_end_with_the_training_images_or_when_they_are_stopped(model_and_items: tuple[DynaMask, TrainingItems]) -> None:
    model, items = model_and_items
    all_of_them = collect_lessons(model, items, 10**6, 0)
    assert all_of_them is not None and len(all_of_them.worths) == 6 * 5  # of five detections each
    assert collect_lessons(model, items, 100, 0, stop=lambda: True) is None


def test_detections_that_no_grid_draws_better_teach_nothing() -> None:
    regions = torch.zeros(2, 8, 14, 14).half()
    assert not Lessons(regions[:0], torch.zeros(0, 4)).teach
    assert not Lessons(regions, torch.full((2, 4), WORTH[0])).teach
    assert Lessons(regions, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.6, 0.6]])).teach
