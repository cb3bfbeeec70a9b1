"""Grid policies: the rules that choose the mask grid of each instance, as `predict`, `stream` and `validate` name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from runtime.errors import InputError, shortened
from runtime.graph import GRIDS, MSM, SIZE_BASED

ROUTED = "routed"


class Policy(NamedTuple):
    """A rule that chooses the mask grid of each instance, as values for the graph's inputs.

    Example:
        >>> import dynamask
        >>> dynamask.Policy("routed at 0.1 GMAC", budget_gmacs=0.1)
        Policy(name='routed at 0.1 GMAC', budget_gmacs=0.1, grid_override=-1, budget_ms=0.0)
        >>> with dynamask.load(bundle) as predictor, dynamask.open_source(clip) as source:
        ...     report = dynamask.run_stream(predictor, source, [], dynamask.Policy("large", grid_override=3))
        >>> report.share["112"]
        1.0
    """

    name: str
    budget_gmacs: float = 0.0
    """The largest mean cost of an instance's mask in GMAC, over all images; 0 sets no limit."""
    grid_override: int = MSM
    """-1: the model chooses; 0 to 3: that grid (14, 28, 56, 112) for all; 4: the size of the box decides (paper, Eq. 8)."""
    budget_ms: float = 0.0
    """The largest predicted time of each frame, detector and mask branch together, in milliseconds; 0 sets no limit. A policy has this
    limit or `budget_gmacs`, not both."""


def parse_policy(policy: str | Policy, grid_gmacs: Mapping[int, float]) -> Policy:
    """The policy that a text names; a `Policy` is returned as it is.

    - `routed`: the model chooses (paper, Eq. 1);
    - `routed@50%`: the model chooses, and the mean cost is at most half the cost of the largest grid;
    - `routed@0.6gmac`: the model chooses, and the mean cost is at most 0.6 GMAC per instance;
    - `routed@20ms`: the model chooses, and the predicted time of each frame, detector and mask branch together, is at most 20 ms. The
      times are those that `dynamask calibrate` measured;
    - `uniform-14`, `uniform-28`, `uniform-56`, `uniform-112`: that grid for all instances;
    - `size-based`: the size of the box decides (paper, Eq. 8).

    Args:
        grid_gmacs: cumulative cost of each grid in GMAC, `{14: …, 28: …, 56: …, 112: …}`.

    Raises:
        InputError: there is no such policy, or its budget is not a positive number.
    """
    if isinstance(policy, Policy):
        return policy
    rule, at, budget = policy.partition("@")
    if rule == ROUTED:
        return _with_budget(policy, budget, max(grid_gmacs.values())) if at else Policy(policy)
    overrides = {f"uniform-{grid}": index for index, grid in enumerate(GRIDS)} | {"size-based": SIZE_BASED}
    if policy not in overrides:
        raise InputError(
            f"{shortened(policy)!r} is not a grid policy; take routed, routed@50%, routed@0.6gmac, routed@20ms, {', '.join(overrides)}."
        )
    return Policy(policy, grid_override=overrides[policy])


def _with_budget(policy: str, text: str, largest_gmacs: float) -> Policy:
    """The routed policy with a budget of `50%`, `0.6gmac` or `20ms`."""
    units = {"%": largest_gmacs / 100, "gmac": 1.0, "ms": 1.0}
    unit = next((unit for unit in units if text.endswith(unit)), None)
    try:
        budget = 0.0 if unit is None else float(text.removesuffix(unit)) * units[unit]
    except ValueError:
        budget = 0.0
    if not (budget > 0 and math.isfinite(budget)):
        raise InputError(
            f"{shortened(policy)!r} has no budget that can be kept: write a percentage of the largest grid's cost (routed@50%), "
            "the mean GMAC per instance (routed@0.6gmac) or the milliseconds of a frame (routed@20ms)."
        )
    return Policy(policy, budget_ms=budget) if unit == "ms" else Policy(policy, budget)
