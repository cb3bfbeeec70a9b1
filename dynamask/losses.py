"""The losses of the mask branch, Eq. 3 to 7.

N positive instances, K = 4 grids, y the switching states; sums over instances are divided by N. Where several processes train together,
N and the means over the batch are those of all processes (`dynamask.distributed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.distributed import batch_mean, instances_per_process

LAPLACIAN = ((-1.0, -1.0, -1.0), (-1.0, 8.0, -1.0), (-1.0, -1.0, -1.0))
EDGE_THRESHOLD = 0.1


def grid_cross_entropy(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """l(m_k, t_k) of Eq. 3 and 4: binary cross-entropy averaged over the grid, for each instance and grid.

    Args:
        logits: K tensors `[N, G_k, G_k]`.
        targets: K tensors `[N, G_k, G_k]` of 0 and 1.

    Returns:
        `[N, K]`.
    """
    losses = [
        F.binary_cross_entropy_with_logits(x.float(), t.float(), reduction="none").mean(dim=(1, 2))
        for x, t in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses, dim=1)


def switched_loss(y: Tensor, losses: Tensor) -> Tensor:
    """L_mask (Eq. 3) or L_edge (Eq. 4): `sum_i sum_k y_ik l_ik / N`, from y `[N, K]` and the losses `[N, K]` of mask or edge."""
    count = instances_per_process(len(y), y.device)
    return (y * losses).sum() / (count or 1.0)


def edge_target(masks: Tensor) -> Tensor:
    """e of Eq. 4: the Laplacian of the target mask, thresholded: `[N, G, G]` of 0 and 1 -> the same, 1 on the object's inner border."""
    kernel = torch.tensor(LAPLACIAN, device=masks.device)[None, None]
    padded = F.pad(masks[:, None].float(), (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, kernel)[:, 0] > EDGE_THRESHOLD).float()


def mean_cost(y: Tensor, costs: Tensor) -> Tensor:
    """E(C): the batch's mean cost of the selected grids, from y `[N, K]` and costs `[K]`; differentiable through y."""
    return batch_mean(y) @ costs


def budget_loss(y: Tensor, costs: Tensor, target: float) -> Tensor:
    """L_budget (Eq. 5): `max(E(C) / C_t - 1, 0)`; costs `[K]` and target C_t in the same unit."""
    return F.relu(mean_cost(y, costs) / target - 1)


def entropy_loss(probabilities: Tensor) -> Tensor:
    """L_entropy (Eq. 6): `(1/K) sum_k f_k log f_k` with f_k the batch mean of P_k `[N, K]`; smallest when the grids are used alike."""
    frequency = batch_mean(probabilities)
    return torch.special.xlogy(frequency, frequency).mean()


def mask_branch_losses(
    y: Tensor,
    probabilities: Tensor,
    mask: Tensor,
    edge: Tensor,
    costs: Tensor,
    target: float,
    edge_weight: float,
    regularisation_weight: float,
) -> dict[str, Tensor]:
    """L_total (Eq. 7), `L_mask + lambda_1 L_edge + lambda_2 (L_budget + L_entropy)`, as its weighted terms, to be summed.

    Args:
        y: `[N, K]` switching states.
        probabilities: `[N, K]`, P of Eq. 1.
        mask, edge: `[N, K]`, the cross-entropies of `grid_cross_entropy`.
        costs: `[K]`, and `target` C_t, in one unit.
        edge_weight: lambda_1.
        regularisation_weight: lambda_2.
    """
    return {
        "loss_mask": switched_loss(y, mask),
        "loss_edge": edge_weight * switched_loss(y, edge),
        "loss_budget": regularisation_weight * budget_loss(y, costs, target),
        "loss_entropy": regularisation_weight * entropy_loss(probabilities),
    }
