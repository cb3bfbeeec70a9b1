"""The Mask Switch Module (paper, section 3.2): chooses a grid for each instance, also within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.initialise import gaussian, kaiming
from runtime.graph import GRIDS, MSM, SIZE_BASED


class SqueezeExcitation(nn.Module):
    """Channel attention (Hu et al., CVPR 2018): `[N, C, H, W] -> [N, C, H, W]`."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 8)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * scale[:, :, None, None]


class MaskSwitch(nn.Module):
    """MSM: the RoI feature `[N, C, 14, 14]` -> logits over the four grids `[N, 4]` (Figure 4: SE block, two convolutions, two FC).

    Layer normalisation between the two FC layers is ours: RoI features are large, and without it the first steps over the budget
    drive the logits so far apart that two grids are never chosen again (docs/results/shapes.md).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 4, 32)
        self.attention = SqueezeExcitation(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc1 = nn.Linear(width * 7 * 7, 128)
        self.norm = nn.LayerNorm(128)
        self.fc2 = nn.Linear(128, 4)
        kaiming(self.conv1, self.conv2, self.fc1)
        gaussian(0.01, self.fc2)

    def forward(self, region: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(self.attention(region)))))
        logits: Tensor = self.fc2(F.relu(self.norm(self.fc1(x.flatten(1)))))
        return logits


class Budget(NamedTuple):
    """Two limits on the cost of masks, and the costs that they are counted in: GMAC, milliseconds or any other unit.

    The total cost of instances is the sum of their own costs, and the fixed cost of the largest grid among them, which is paid once.
    """

    mean: Tensor
    """`[]`, the largest mean of the instances' own costs; none where it is 0 or less."""
    total: Tensor
    """`[]`, the largest total cost; none where it is 0 or less."""
    costs: Tensor
    """`[2, 4]`, by grid: an instance's own cost, ascending, and the fixed cost, not descending."""

    @classmethod
    def of_mean(cls, mean: Tensor, costs: Tensor) -> Budget:
        """A limit on the mean, in the unit of `costs [4]`."""
        return cls(mean, torch.zeros_like(mean), torch.stack([costs, torch.zeros_like(costs)]))


def route(log_probabilities: Tensor, budget: Budget, sizes: Tensor, override: Tensor) -> Tensor:
    """The grid of each instance, 0..3, at inference.

    `argmax_k (log p_k - lambda c_k)` with lambda the smallest that keeps to the budget. Mean and total cost fall in steps as lambda
    rises, and step only where some instance is indifferent between two grids, so that trying those values finds lambda exactly. With no
    limit lambda is 0: the paper's argmax (Eq. 1). A limit below the smallest grid's cost gives the smallest grid.

    Args:
        log_probabilities: `[N, 4]`; log p of Eq. 1.
        budget: the limits, and c_k.
        sizes: `[N]`, the side of the box over the side of the canvas, `sqrt(w h / (w0 h0))`, for the size-based rule.
        override: `[N] int64`: `MSM`, `SIZE_BASED` (Eq. 8), or a grid 0..3. Only instances left to the MSM count for the budget.

    Returns:
        `[N] int64`.
    """
    costs, fixed = budget.costs[0], budget.costs[1]
    routed = override == MSM
    free = routed.to(log_probabilities.dtype)
    weight = free / free.sum().clamp(min=1.0)
    lambdas = _indifference(log_probabilities, costs)
    # The axes of argmax count from the front: from the back, ONNX Runtime 1.23 gives a wrong shape where N is 0.
    grids = torch.argmax(log_probabilities[None] - lambdas[:, None, None] * costs, dim=2)
    own = costs[grids]
    # The column of zeros gives the maximum a value where N is 0.
    largest = torch.cat([torch.where(routed, grids, 0), torch.zeros_like(lambdas, dtype=torch.int64)[:, None]], dim=1).amax(dim=1)
    feasible = _within((own * weight).sum(dim=1), budget.mean) & _within((own * free).sum(dim=1) + fixed[largest], budget.total)
    # The last candidate gives every instance the smallest grid; it is the fallback where even that exceeds the budget.
    chosen = torch.where(feasible, lambdas, lambdas.max()).min()
    best = torch.argmax(log_probabilities - chosen * costs, dim=1)
    grids = torch.where(override == SIZE_BASED, size_based_grid(sizes), best)
    return torch.where((override >= 0) & (override < SIZE_BASED), override, grids)


def _within(cost: Tensor, limit: Tensor) -> Tensor:
    return (cost <= limit * (1 + 1e-6)) | (limit <= 0)


def _indifference(log_probabilities: Tensor, costs: Tensor) -> Tensor:
    """Candidates for lambda, `[1 + 6 N + 1]`: 0, just above each value at which an instance changes its grid, and one above all."""
    lower, upper = torch.triu_indices(4, 4, offset=1, device=costs.device)
    pairs = (log_probabilities[:, upper] - log_probabilities[:, lower]) / (costs[upper] - costs[lower])
    pairs = pairs.clamp(min=0).flatten() * (1 + 1e-5) + 1e-6
    zero = torch.zeros(1, dtype=pairs.dtype, device=pairs.device)
    beyond = torch.cat([pairs, zero]).max()[None] + 1.0
    return torch.cat([zero, pairs, beyond])


def size_based_grid(sizes: Tensor) -> Tensor:
    """The size-based rule (Eq. 8), `floor(4 + log2(size))` held to 0..3: `[N] -> [N] int64`."""
    return torch.floor(4 + torch.log2(sizes.clamp(min=1e-6))).clamp(0, 3).to(torch.int64)


class Routing(NamedTuple):
    """The instances that each stage of the r-FPN runs on. Stage k makes grid `GRIDS[k]`; stage 0 has all n instances."""

    grids: Tensor
    """`[K] int64`, by slot: 0..3, and -1 for an empty slot."""
    continuing: tuple[Tensor, Tensor, Tensor]
    """For stages 1 to 3: the instances that continue to it, as positions among those of the stage before, `int64`."""
    exiting: tuple[Tensor, Tensor, Tensor, Tensor]
    """For stages 0 to 3: the instances that exit there, as positions among those of that stage, `[n_g] int64`."""
    slots: tuple[Tensor, Tensor, Tensor, Tensor]
    """For stages 0 to 3: the detection slots of the instances that exit there, `[n_g] int64`."""


def plan_routing(
    msm_logits: Tensor,
    boxes: Tensor,
    override: Tensor,
    slots: Tensor,
    budget: Budget,
    canvas: tuple[int, int],
    detections: int,
) -> Routing:
    """The grid of each instance (`route`), and the instances that continue or exit at each stage.

    Args:
        msm_logits: `[n, 4]`.
        boxes: `[n, 4]`, xyxy in canvas pixels.
        override: `[n] int64`, as in `route`.
        slots: `[n] int64`, the detection slot of each instance.
        budget: as in `route`.
        canvas: height and width, pixels.
        detections: K.
    """
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0)
    sides = torch.sqrt(areas / float(canvas[0] * canvas[1]))
    grids = route(torch.log_softmax(msm_logits, dim=-1), budget, sides, override)
    all_grids = torch.full((detections,), -1, dtype=torch.int64, device=grids.device).scatter(0, slots, grids)
    continuing, exiting, exit_slots = [], [], []
    for k in range(len(GRIDS)):
        if k > 0:
            continuing.append(torch.nonzero(grids >= k)[:, 0])
            grids, slots = grids.index_select(0, continuing[-1]), slots.index_select(0, continuing[-1])
        exiting.append(torch.nonzero(grids == k)[:, 0])
        exit_slots.append(slots.index_select(0, exiting[-1]))
    return Routing(all_grids, tuple(continuing), tuple(exiting), tuple(exit_slots))  # type: ignore[arg-type]


def gumbel_noise(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Samples of Gumbel(0, 1), `-log(-log u)`."""
    uniform = torch.rand(tuple(shape), device=device).clamp(1e-10, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The switching state y (Eq. 2): one-hot of the largest noisy log-probability forward, the Gumbel-softmax's gradient backward.

    Args:
        logits: `[N, K]`, the MSM's.
        noise: `[N, K]`, samples of Gumbel(0, 1) (`gumbel_noise`).
        temperature: tau of Eq. 2.
    """
    soft = torch.softmax((torch.log_softmax(logits, dim=-1) + noise) / temperature, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()
