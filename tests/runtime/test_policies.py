from __future__ import annotations

import pytest

from runtime.errors import InputError
from runtime.policies import Policy, parse_policy

GMACS = {14: 0.25, 28: 0.5, 56: 0.75, 112: 1.2}


@pytest.mark.parametrize(
    ("name", "budget_gmacs", "override"),
    [
        ("routed", 0.0, -1),
        ("routed@50%", 0.6, -1),
        ("routed@0.5gmac", 0.5, -1),
        ("uniform-14", 0.0, 0),
        ("uniform-28", 0.0, 1),
        ("uniform-56", 0.0, 2),
        ("uniform-112", 0.0, 3),
        ("size-based", 0.0, 4),
    ],
)
def test_policies_are_parsed(name, budget_gmacs, override):
    assert parse_policy(name, GMACS) == Policy(name, pytest.approx(budget_gmacs), override)


def test_a_budget_in_milliseconds_is_that_of_a_frame():
    assert parse_policy("routed@20.5ms", GMACS) == Policy("routed@20.5ms", budget_gmacs=0.0, budget_ms=20.5)


def test_a_policy_is_returned_as_it_is():
    policy = Policy("mine", 0.1, 3)
    assert parse_policy(policy, GMACS) is policy


@pytest.mark.parametrize("name", ["", "Routed", "routed ", "uniform", "uniform-7", "uniform-14@50%", "size-based@50%", "28", "largest"])
def test_an_unknown_policy_is_refused_with_those_there_are(name):
    with pytest.raises(InputError, match=r"is not a grid policy; take routed, .*uniform-112, size-based"):
        parse_policy(name, GMACS)


@pytest.mark.parametrize(
    "budget", ["", "%", "gmac", "x", "0.6", "-1gmac", "0%", "nan%", "infgmac", "0.6 gflop", "ms", "0ms", "-20ms", "20 s"]
)
def test_a_budget_without_a_positive_number_and_unit_is_refused(budget):
    with pytest.raises(InputError, match="has no budget that can be kept: write a percentage"):
        parse_policy(f"routed@{budget}", GMACS)
