"""A budget over many images: the mean is kept, and what one image leaves over the next may use."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.budget import HORIZON, BudgetKeeper

COSTS = {14: 0.1, 28: 0.3, 56: 0.6, 112: 1.0}
GRIDS = np.array(sorted(COSTS))


def keep_to(budget: float, wanted: np.ndarray) -> np.ndarray:
    """Grids for instances that want those of index `wanted`: each in turn a step down, until the mean keeps to the budget."""
    grids = wanted.copy()
    while len(grids) and np.mean([COSTS[int(GRIDS[k])] for k in grids]) > budget * (1 + 1e-9) and grids.max() > 0:
        grids[grids.argmax()] -= 1
    return GRIDS[grids]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.15, 0.9))
def test_the_mean_over_all_images_keeps_to_the_budget(seed: int, mean: float) -> None:
    rng = np.random.default_rng(seed)
    keeper = BudgetKeeper(mean, COSTS)
    spent = []
    for _ in range(120):
        budget = keeper.budget_gmacs()
        assert min(COSTS.values()) <= budget <= max(COSTS.values())
        grids = keep_to(budget, rng.integers(0, 4, rng.integers(0, 9)))
        keeper.spend(grids)
        spent += [COSTS[int(grid)] for grid in grids]
    # A debt can only come from an image that is fuller than all of late, and is paid back.
    assert np.mean(spent) <= mean * 1.03


def test_images_that_need_little_leave_more_to_those_that_need_much() -> None:
    keeper = BudgetKeeper(0.5, COSTS)
    assert keeper.budget_gmacs() == 0.5
    keeper.spend(np.array([14, 14]))
    assert keeper.budget_gmacs() == 0.9
    keeper.spend(np.array([112, 56]))
    assert np.isclose(keeper.budget_gmacs(), 0.5 + (2 * 0.4 - 0.6) / 2)


def test_unused_budget_lapses() -> None:
    keeper = BudgetKeeper(0.5, COSTS)
    keeper.spend(np.array([14] * 5))
    for _ in range(HORIZON):
        keeper.spend(np.array([], np.int64))
    keeper.spend(np.array([28]))
    assert np.isclose(keeper.budget_gmacs(), 0.7)


def test_without_a_limit_the_budget_stays_0() -> None:
    keeper = BudgetKeeper(0.0, {})
    keeper.spend(np.array([14, 112]))
    assert keeper.budget_gmacs() == 0
