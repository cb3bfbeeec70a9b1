"""MsmRoute in PyTorch: lambda by trying every candidate in turn, and each stage's lists by selecting from the stage before."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from runtime.graph import MSM, SIZE_BASED


def msm_route(
    logits: Tensor,
    boxes: Tensor,
    override: Tensor,
    slots: Tensor,
    budget: Tensor,
    total_budget: Tensor,
    costs: Tensor,
    feature: Tensor,
    stride: int,
    detections: int,
) -> list[Tensor]:
    """The outputs of `MsmRoute`, in their order, from its inputs and attributes; the attribute `batch` does not matter."""
    canvas = (feature.shape[2] * stride, feature.shape[3] * stride)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0)
    sides = torch.sqrt(areas / float(canvas[0] * canvas[1])).clamp(min=1e-6)
    size_based = torch.floor(4 + torch.log2(sides)).clamp(0, 3).long()
    routed = routed_grids(torch.log_softmax(logits.float(), -1), override == MSM, float(budget), float(total_budget), costs)
    grids = torch.where(override == SIZE_BASED, size_based, routed)
    grids = torch.where((override >= 0) & (override < SIZE_BASED), override, grids)
    return [torch.full((len(feature) * detections,), -1).scatter(0, slots, grids), *stage_lists(grids, slots)]


def routed_grids(log_probabilities: Tensor, free: Tensor, budget: float, total_budget: float, costs: Tensor) -> Tensor:
    """`[n] int64`: the argmax at the smallest lambda that keeps to both budgets, `free [n] bool` the instances that they limit."""
    own, fixed = costs
    pairs = [
        (log_probabilities[:, dear] - log_probabilities[:, cheap]) / (own[dear] - own[cheap]) for cheap, dear in combinations(range(4), 2)
    ]
    candidates = torch.cat([torch.zeros(1), torch.cat(pairs).clamp(min=0) * (1 + 1e-5) + 1e-6]).sort().values
    grids = torch.empty(0, dtype=torch.int64)
    for penalty in [*candidates, candidates.max() + 1]:
        grids = torch.argmax(log_probabilities - penalty * own, dim=1)
        limited = grids[free]
        spent = own[limited].double().sum()
        once = fixed[limited.max()] if len(limited) else 0.0
        within_mean = budget <= 0 or spent / max(len(limited), 1) <= budget * (1 + 1e-6)
        if within_mean and (total_budget <= 0 or spent + once <= total_budget * (1 + 1e-6)):
            break
    return grids


def stage_lists(grids: Tensor, slots: Tensor) -> list[Tensor]:
    """The `continue`, `exit` and `slots` lists of the stages, and their sizes, for instances of these grids `[n]` in these slots `[n]`."""
    continuing, exiting, exit_slots = [], [], []
    for k in range(4):
        if k > 0:
            continuing.append(torch.nonzero(grids >= k)[:, 0])
            grids, slots = grids[continuing[-1]], slots[continuing[-1]]
        exiting.append(torch.nonzero(grids == k)[:, 0])
        exit_slots.append(slots[exiting[-1]])
    return [*continuing, *exiting, *exit_slots, *(torch.tensor(len(places)) for places in (*continuing, *exiting))]
