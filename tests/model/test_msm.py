"""The switching module: Eq. 1, Eq. 2, Eq. 8 and the budget at deployment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask.msm import Budget, MaskSwitch, SqueezeExcitation, gumbel_noise, route, size_based_grid, straight_through
from runtime.graph import MSM, SIZE_BASED

COSTS = torch.tensor([0.23, 0.54, 0.90, 1.36])


def routed(log_p: torch.Tensor, budget: float, override: int = MSM) -> torch.Tensor:
    n = len(log_p)
    return route(log_p, Budget.of_mean(torch.tensor(budget), COSTS), torch.full((n,), 0.3), torch.full((n,), override))


def test_without_a_budget_the_most_probable_grid_is_chosen() -> None:
    log_p = torch.log_softmax(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), -1)
    torch.testing.assert_close(routed(log_p, 0.0), log_p.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.floats(0.2, 1.5))
def test_the_budget_is_kept_with_the_smallest_lambda(seed: int, n: int, budget: float) -> None:
    """Against a dense search over lambda in float64."""
    log_p = torch.log_softmax(2 * torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), -1)
    grids = routed(log_p, budget)
    mean = float(COSTS[grids].mean())
    scores, costs = log_p.double().numpy(), COSTS.double().numpy()
    for value in np.concatenate([[0.0], np.geomspace(1e-4, 200, 4000)]):
        choice = (scores - value * costs).argmax(-1)
        if costs[choice].mean() <= budget:
            break
    if budget < float(COSTS[0]):
        assert grids.eq(0).all()
    else:
        assert mean <= budget * (1 + 1e-5)
        # The dense search can only overshoot lambda, and a larger lambda is never dearer.
        assert mean >= costs[choice].mean() - 1e-6


def test_a_larger_budget_never_makes_masks_smaller() -> None:
    log_p = torch.log_softmax(torch.randn(40, 4, generator=torch.Generator().manual_seed(3)), -1)
    means = [float(COSTS[routed(log_p, budget)].mean()) for budget in np.linspace(0.25, 1.4, 12)]
    assert means == sorted(means)


def test_overrides_are_obeyed_and_do_not_count_for_the_budget() -> None:
    log_p = torch.log_softmax(torch.tensor([[0.0, 0.0, 0.0, 9.0]] * 4), -1)
    override = torch.tensor([3, 3, MSM, SIZE_BASED])
    sizes = torch.tensor([0.1, 0.1, 0.1, 0.3])
    grids = route(log_p, Budget.of_mean(torch.tensor(0.54), COSTS), sizes, override)
    assert grids[:2].tolist() == [3, 3] and COSTS[grids[2]] <= 0.54 and int(grids[3]) == 2


def test_no_instance_is_routed_to_nothing() -> None:
    assert routed(torch.zeros(0, 4), 0.5).shape == (0,)
    assert within_total(torch.zeros(0, 4), 0.5).shape == (0,)


FIXED = torch.tensor([0.5, 1.0, 1.0, 2.5])


def within_total(log_p: torch.Tensor, total: float) -> torch.Tensor:
    n = len(log_p)
    budget = Budget(torch.tensor(0.0), torch.tensor(total), torch.stack([COSTS, FIXED]))
    return route(log_p, budget, torch.full((n,), 0.3), torch.full((n,), MSM))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.floats(0.2, 2.0))
def test_the_total_with_the_largest_grids_fixed_cost_is_kept(seed: int, n: int, each: float) -> None:
    """Against a dense search over lambda in float64."""
    log_p = torch.log_softmax(2 * torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), -1)
    grids = within_total(log_p, each * n)
    total = float(COSTS[grids].sum() + FIXED[grids.max()])
    scores, costs, fixed = log_p.double().numpy(), COSTS.double().numpy(), FIXED.double().numpy()
    for value in np.concatenate([[0.0], np.geomspace(1e-4, 200, 4000)]):
        choice = (scores - value * costs).argmax(-1)
        searched = costs[choice].sum() + fixed[choice.max()]
        if searched <= each * n:
            break
    if each * n < n * float(COSTS[0]) + 0.5:
        assert grids.eq(0).all()
    else:
        assert searched - 1e-5 <= total <= each * n * (1 + 1e-5)


def test_the_fixed_cost_of_a_grid_may_forbid_it_to_all() -> None:
    """One instance at 112 would cost 1.36 + 2.5, at 56 0.9 + 1."""
    log_p = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), -1)
    assert [int(within_total(log_p, total)) for total in (3.9, 3.8, 1.95, 1.85, 0.1)] == [3, 2, 2, 1, 0]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1.0))
def test_the_size_rule_is_equation_8(size: float) -> None:
    wanted = int(np.clip(np.floor(4 + np.log2(np.float32(size))), 0, 3))
    assert int(size_based_grid(torch.tensor([size]))) == wanted


def test_straight_through_is_one_hot_forward_and_equation_2_backward() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, requires_grad=True)
    noise = gumbel_noise((5, 4))
    y = straight_through(logits, noise, 0.7)
    assert sorted(set(y.detach().round(decimals=5).flatten().tolist())) == [0.0, 1.0]
    torch.testing.assert_close(y.sum(-1), torch.ones(5))
    weight = torch.randn(5, 4)
    (wanted,) = torch.autograd.grad((torch.softmax((torch.log_softmax(logits, -1) + noise) / 0.7, -1) * weight).sum(), logits)
    (found,) = torch.autograd.grad((y * weight).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_noisy_choices_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    y = straight_through(p.log().expand(40_000, 4), gumbel_noise((40_000, 4)), 1.0)
    assert y.mean(0).tolist() == pytest.approx(p.tolist(), abs=0.01)


def test_squeeze_excitation_scales_channels_by_a_gate() -> None:
    torch.manual_seed(0)
    block = SqueezeExcitation(32)
    x = torch.randn(2, 32, 5, 5)
    ratio = block(x) / x
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    assert ratio.min() > 0 and ratio.max() < 1


def test_the_switch_gives_four_logits() -> None:
    assert MaskSwitch(64)(torch.randn(3, 64, 14, 14)).shape == (3, 4)
    assert MaskSwitch(64)(torch.randn(0, 64, 14, 14)).shape == (0, 4)
