"""Eq. 3 to 7 against the formulas written out in NumPy, and the gradients they are there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask.losses import (
    budget_loss,
    edge_target,
    entropy_loss,
    grid_cross_entropy,
    mask_branch_losses,
    mean_cost,
    switched_loss,
)
from dynamask.msm import gumbel_noise, straight_through

COSTS = torch.tensor([0.23, 0.62, 1.01, 1.40])
GRIDS = (14, 28, 56, 112)


def numpy_cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_mask_and_edge_loss_are_equations_3_and_4(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(n, g, g)).astype(np.float32) * 3 for g in (2, 4, 8, 16)]
    targets = [(rng.random((n, g, g)) > 0.5).astype(np.float32) for g in (2, 4, 8, 16)]
    choice = rng.integers(0, 4, n)
    wanted = sum(numpy_cross_entropy(logits[k][i], targets[k][i]) for i, k in enumerate(choice)) / n
    losses = grid_cross_entropy([torch.from_numpy(x) for x in logits], [torch.from_numpy(t) for t in targets])
    y = torch.eye(4)[torch.from_numpy(choice)]
    assert float(switched_loss(y, losses)) == pytest.approx(wanted, rel=1e-5)


def test_edge_target_is_the_thresholded_laplacian() -> None:
    rng = np.random.default_rng(0)
    masks = (rng.random((3, 9, 9)) > 0.4).astype(np.float32)
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wanted = np.zeros_like(masks)
    for row in range(9):
        for column in range(9):
            window = padded[:, row : row + 3, column : column + 3]
            wanted[:, row, column] = (9 * padded[:, row + 1, column + 1] - window.sum(axis=(1, 2))) > 0.1
    np.testing.assert_array_equal(edge_target(torch.from_numpy(masks)).numpy(), wanted)


def test_edge_target_of_a_square_is_its_inner_border() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[0, 2:6, 2:6] = 1
    inner = mask.clone()
    inner[0, 3:5, 3:5] = 0
    torch.testing.assert_close(edge_target(mask), inner)


@pytest.mark.parametrize("target", [0.4, 0.8, 1.4])
def test_budget_loss_is_equation_5(target: float) -> None:
    choice = np.array([0, 3, 3, 1, 2])
    expected_cost = COSTS.numpy()[choice].mean()
    y = torch.eye(4)[torch.from_numpy(choice)]
    assert float(mean_cost(y, COSTS)) == pytest.approx(expected_cost, rel=1e-6)
    assert float(budget_loss(y, COSTS, target)) == pytest.approx(max(expected_cost / target - 1, 0), abs=1e-6)


def test_entropy_loss_is_equation_6() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 7)
    f = p.mean(axis=0)
    assert float(entropy_loss(torch.from_numpy(p))) == pytest.approx((f * np.log(f)).sum() / 4)
    uniform = entropy_loss(torch.full((5, 4), 0.25))
    assert float(uniform) == pytest.approx(np.log(0.25) / 4)
    assert float(uniform) < float(entropy_loss(torch.from_numpy(p)))


def test_total_is_equation_7() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    p = torch.softmax(logits, -1)
    y = straight_through(logits, gumbel_noise((6, 4)), 1.0)
    mask, edge = torch.rand(6, 4), torch.rand(6, 4)
    terms = mask_branch_losses(y, p, mask, edge, COSTS, target=0.5, edge_weight=0.1, regularisation_weight=0.4)
    total = switched_loss(y, mask) + 0.1 * switched_loss(y, edge) + 0.4 * (budget_loss(y, COSTS, 0.5) + entropy_loss(p))
    torch.testing.assert_close(sum(terms.values()), total)


def test_losses_of_no_instance_are_zero_and_differentiable() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    y = straight_through(logits, gumbel_noise((0, 4)), 1.0)
    empty = grid_cross_entropy([torch.zeros(0, g, g) for g in GRIDS], [torch.zeros(0, g, g) for g in GRIDS])
    total = sum(mask_branch_losses(y, torch.softmax(logits, -1), empty, empty, COSTS, 0.5, 0.1, 0.4).values())
    total.backward()
    assert float(total.detach()) == 0.0 and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("term", ["mask", "edge", "budget", "entropy"])
def test_the_switch_receives_gradient_from_every_loss(term: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 4, requires_grad=True)
    y = straight_through(logits, gumbel_noise((8, 4)), 1.0)
    values = {
        "mask": lambda: switched_loss(y, torch.rand(8, 4)),
        "edge": lambda: switched_loss(y, torch.rand(8, 4)),
        "budget": lambda: budget_loss(y, COSTS, 0.3),
        "entropy": lambda: entropy_loss(torch.softmax(logits, -1)),
    }
    values[term]().backward()
    assert float(logits.grad.abs().sum()) > 1e-4


def test_gradient_descends_towards_the_grid_of_smaller_loss() -> None:
    """With a loss that is smallest at grid 2 for every instance, the switch learns to choose it."""
    torch.manual_seed(0)
    logits = torch.zeros(16, 4, requires_grad=True)
    losses = torch.tensor([0.9, 0.8, 0.1, 0.7]).expand(16, 4)
    optimizer = torch.optim.SGD([logits], lr=10.0)
    for _ in range(150):
        optimizer.zero_grad()
        switched_loss(straight_through(logits, gumbel_noise(logits.shape), 1.0), losses).backward()
        optimizer.step()
    assert (logits.argmax(-1) == 2).float().mean() > 0.9


def test_a_lower_budget_lowers_the_mean_selected_cost() -> None:
    means = []
    for target in (1.3, 0.8, 0.4):
        torch.manual_seed(0)
        logits = torch.zeros(64, 4, requires_grad=True)
        losses = torch.tensor([0.30, 0.22, 0.17, 0.15]).expand(64, 4)
        optimizer = torch.optim.SGD([logits], lr=20.0)
        for _ in range(100):
            optimizer.zero_grad()
            y = straight_through(logits, gumbel_noise(logits.shape), 1.0)
            sum(mask_branch_losses(y, torch.softmax(logits, -1), losses, losses, COSTS, target, 0.1, 0.4).values()).backward()
            optimizer.step()
        means.append(float((torch.softmax(logits, -1) @ COSTS).mean().detach()))
    assert means[0] > means[1] > means[2]
