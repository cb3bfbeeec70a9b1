"""The mask branch: the part of the model that runs once per instance, on the instances that the detector found.

`MaskBranch` is the interface that the detector, the trainer, evaluation, pictures and export use. `DynamicMaskBranch` is the paper's;
`dynamask/baselines.py` has Mask R-CNN's. `dynamask.model.build_mask_branch` chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynamask.config import TrainConfig
from dynamask.detector import Detections
from dynamask.flops import PAPER_GMACS, MacCounter
from dynamask.losses import edge_target, grid_cross_entropy, mask_branch_losses, mean_cost, switched_loss
from dynamask.msm import Budget, MaskSwitch, Routing, gumbel_noise, plan_routing, straight_through
from dynamask.rfpn import GridHeads, RegionFPN
from dynamask.roi import image_rois, pyramid_roi_align
from runtime.graph import GRIDS

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""One tensor for each of `GRIDS`."""


class MaskLosses(NamedTuple):
    """A training step's losses in the mask branch, weighted and to be summed, and figures for the log."""

    losses: dict[str, Tensor]
    statistics: dict[str, float]


class RoutedMasks(NamedTuple):
    """The masks of one image: each instance appears at its own grid and nowhere else."""

    grids: Tensor
    """`[K] int64`: 0..3, and -1 for an empty slot."""
    slots: FourTensors
    """Per grid, the slots of its instances, `[n_g] int64`."""
    logits: FourTensors
    """Per grid, the mask logits of the instances' own class, `[n_g, G, G] float32`."""


class MaskPass(NamedTuple):
    """The dynamic mask branch's tensors for n filled slots. They are the seams of the exported graph (`export/seams.py`)."""

    slots: Tensor
    """`[n] int64`, rising: the filled slots."""
    mask_boxes: Tensor
    """`[n, 4] float32`, their boxes, xyxy in canvas pixels."""
    mask_overrides: Tensor
    """`[n] int64`, their `grid_override`."""
    region: Tensor
    """`[n, C, 14, 14]`, the mask branch's RoI feature."""
    msm_logits: Tensor
    """`[n, 4]`."""
    routing: Routing
    logits: FourTensors
    """As in `RoutedMasks`."""


class MaskBranch(nn.Module, ABC):
    """From the pyramid P2..P5 and boxes to masks.

    Args:
        region_size: side of the RoI feature, cells.
        canonical_size: side of a box that takes its RoI feature from P4, canvas pixels.
    """

    grids: tuple[int, ...]
    """The grids that the branch makes masks at, some of `GRIDS`."""
    msm: MaskSwitch | None
    """Chooses an instance's grid; None in a branch of one grid."""
    costs: Tensor
    """`[4] float32`, `grid_gmacs()`."""

    def __init__(self, region_size: int, canonical_size: float) -> None:
        super().__init__()
        self.region_size, self.canonical_size = region_size, canonical_size

    def region(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        """The RoI feature `[N, C, S, S]` of RoIs `[N, 5]`, each from its own level; S is `region_size`."""
        return pyramid_roi_align(pyramid[:4], rois, self.region_size, self.canonical_size)

    @abstractmethod
    def losses(
        self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor, targets: Sequence[Tensor], phase: int, recipe: TrainConfig
    ) -> MaskLosses:
        """The losses of N positive RoIs.

        Args:
            pyramid: P2..P5 `[B, C, H_l, W_l]`.
            rois: `[N, 5]`, image index and xyxy in canvas pixels.
            labels: `[N] int64`, from 0.
            targets: by grid, `[N, G, G]` of 0 and 1 (`dynamask.mask_targets`).
            phase: 1 trains every grid without the MSM, 2 trains everything.
            recipe: weights of the losses, C_t and temperature.
        """

    @abstractmethod
    def segment(
        self, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Budget, override: Tensor
    ) -> RoutedMasks:
        """The masks of one image.

        Args:
            pyramid: P2..P5 `[1, C, H_l, W_l]`.
            detections: K slots.
            canvas: height and width, pixels.
            budget: the limits on the cost of the masks, and the costs (`gmac_budget`).
            override: `[K] int64`, see `dynamask.msm.route`.

        Raises:
            InputError: `override` asks for a grid that the branch does not make.
        """

    @abstractmethod
    def mask_logits(self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor) -> list[Tensor]:
        """The mask logits `[N, G, G]` of every instance at each of `grids`; arguments as in `losses`."""

    @abstractmethod
    def edge_logits(self, pyramid: Sequence[Tensor], rois: Tensor) -> list[Tensor]:
        """The edge logits `[N, G, G]` of every instance at each of `grids`; an empty list from a branch without edge heads."""

    @abstractmethod
    def grid_gmacs(self) -> list[float]:
        """The cost of one instance that exits at each of `GRIDS`, counted from the modules, GMAC.

        The work done once per image (`image_gmacs`) and the MSM's (`msm_gmacs`) are not in it.
        """

    def msm_gmacs(self) -> float:
        """The cost of choosing one instance's grid, GMAC."""
        return 0.0

    def image_gmacs(self, canvas: tuple[int, int]) -> float:
        """The cost of the work that the branch does once per image of `canvas` (height, width, pixels), GMAC."""
        return 0.0

    def gmac_budget(self, mean_gmacs: Tensor | float = 0.0) -> Budget:
        """A limit on the mean GMAC of an instance's mask; none where it is 0 or less."""
        return Budget.of_mean(torch.as_tensor(mean_gmacs, dtype=torch.float32, device=self.costs.device), self.costs)

    @property
    def paper_costs(self) -> Tensor:
        """`costs` in the paper's unit, in which the largest grid costs 1.40 (`PAPER_GMACS`)."""
        return self.costs * (PAPER_GMACS[-1] / self.costs[-1])

    def gmacs_of_paper(self, paper_gmacs: float) -> float:
        """`paper_gmacs`, in the unit in which 112 x 112 costs 1.40, as GMAC of this branch: the same share of the largest cost."""
        return paper_gmacs / PAPER_GMACS[-1] * float(self.costs[-1])


class DynamicMaskBranch(MaskBranch):
    """The paper's mask branch: r-FPN, heads at four grids, and the MSM that chooses a grid for each instance."""

    grids = GRIDS
    msm: MaskSwitch

    def __init__(self, rfpn: RegionFPN, heads: GridHeads, msm: MaskSwitch, canonical_size: float) -> None:
        super().__init__(GRIDS[0], canonical_size)
        self.rfpn, self.heads, self.msm = rfpn, heads, msm
        self.register_buffer("costs", torch.tensor(self.grid_gmacs()), persistent=False)

    def all_grids(self, pyramid: Sequence[Tensor], rois: Tensor, region: Tensor) -> list[Tensor]:
        """The features `[N, C_k, G_k, G_k]` of every instance at all four grids."""
        laterals = self.rfpn.lateral(pyramid)
        features = [self.rfpn.tiny(region)]
        for k in (1, 2, 3):
            features.append(self.rfpn.stage(k, features[-1], laterals[k - 1], rois))
        return features

    def losses(
        self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor, targets: Sequence[Tensor], phase: int, recipe: TrainConfig
    ) -> MaskLosses:
        """Phase 1: Eq. 3 and 4 with every grid switched on. Phase 2: the terms of Eq. 7."""
        region = self.region(pyramid, rois)
        features = self.all_grids(pyramid, rois, region)
        mask = grid_cross_entropy([self.heads.mask_logits(k, x, labels) for k, x in enumerate(features)], targets)
        edge = grid_cross_entropy([self.heads.edge_logits(k, x) for k, x in enumerate(features)], [edge_target(t) for t in targets])
        statistics = {f"mask_{grid}": float(loss) for grid, loss in zip(GRIDS, mask.detach().mean(dim=0), strict=True)}
        if phase == 1:
            every = torch.ones_like(mask)
            losses = {"loss_mask": switched_loss(every, mask), "loss_edge": recipe.edge_weight * switched_loss(every, edge)}
            return MaskLosses(losses, statistics)
        logits = self.msm(region).float()
        y = straight_through(logits, gumbel_noise(logits.shape, logits.device), recipe.temperature)
        share = y.detach().mean(dim=0)
        shares = {f"share_{grid}": float(s) for grid, s in zip(GRIDS, share, strict=True)}
        shares["mean_cost"] = float(mean_cost(y.detach(), self.paper_costs))
        probabilities = torch.softmax(logits, dim=-1)
        weights = (recipe.edge_weight, recipe.regularisation_weight)
        losses = mask_branch_losses(y, probabilities, mask, edge, self.paper_costs, recipe.target_paper_gmacs, *weights)
        return MaskLosses(losses, shares | statistics)

    def segment(
        self, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Budget, override: Tensor
    ) -> RoutedMasks:
        """As `MaskBranch.segment`; every grid can be asked for."""
        masks = self.mask_pass(pyramid, detections, canvas, budget, override)
        return RoutedMasks(masks.routing.grids, masks.routing.slots, masks.logits)

    def mask_pass(
        self, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Budget, override: Tensor
    ) -> MaskPass:
        """The routed pass: stage k of the r-FPN runs on the instances whose grid is k or larger, and on no others."""
        slots = torch.nonzero(detections.scores > 0)[:, 0]
        mask_boxes, overrides = detections.boxes.index_select(0, slots), override.index_select(0, slots)
        region = self.region(pyramid, image_rois(mask_boxes))
        msm_logits = self.msm(region)
        routing = plan_routing(msm_logits, mask_boxes, overrides, slots, budget, canvas, len(override))

        laterals = self.rfpn.lateral(pyramid)
        feature, boxes, logits = self.rfpn.tiny(region), mask_boxes, []
        for k in range(len(GRIDS)):
            if k > 0:
                continuing = routing.continuing[k - 1]
                feature, boxes = feature.index_select(0, continuing), boxes.index_select(0, continuing)
                feature = self.rfpn.stage(k, feature, laterals[k - 1], image_rois(boxes))
            labels = detections.labels.index_select(0, routing.slots[k])
            logits.append(self.heads.mask_logits(k, feature.index_select(0, routing.exiting[k]), labels))
        return MaskPass(slots, mask_boxes, overrides, region, msm_logits, routing, tuple(logits))  # type: ignore[arg-type]

    def mask_logits(self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor) -> list[Tensor]:
        """As `MaskBranch.mask_logits`."""
        features = self.all_grids(pyramid, rois, self.region(pyramid, rois))
        return [self.heads.mask_logits(k, feature, labels) for k, feature in enumerate(features)]

    def edge_logits(self, pyramid: Sequence[Tensor], rois: Tensor) -> list[Tensor]:
        """As `MaskBranch.edge_logits`."""
        features = self.all_grids(pyramid, rois, self.region(pyramid, rois))
        return [self.heads.edge_logits(k, feature) for k, feature in enumerate(features)]

    @torch.no_grad()
    def grid_gmacs(self) -> list[float]:
        """As `MaskBranch.grid_gmacs`: the r-FPN up to the grid, and that grid's head for the instance's own class."""
        cumulative, spent = [], 0.0
        feature = torch.zeros(1, self.rfpn.pyramid_channels, GRIDS[0], GRIDS[0])
        for k, (grid, channels) in enumerate(zip(GRIDS, self.rfpn.channels, strict=True)):
            module = self.rfpn.tiny if k == 0 else self.rfpn.stages[k - 1]
            with MacCounter(module) as counter:
                crop = [torch.zeros(1, channels, grid, grid)] if k > 0 else []
                feature = module(feature, *crop)
            spent += counter.total()
            cumulative.append(spent + channels * grid * grid / 1e9)
        return cumulative

    @torch.no_grad()
    def msm_gmacs(self) -> float:
        """As `MaskBranch.msm_gmacs`."""
        with MacCounter(self.msm) as counter:
            self.msm(torch.zeros(1, self.rfpn.pyramid_channels, GRIDS[0], GRIDS[0]))
        return counter.total()

    @torch.no_grad()
    def image_gmacs(self, canvas: tuple[int, int]) -> float:
        """As `MaskBranch.image_gmacs`: the r-FPN's pyramid and lateral convolutions."""
        pyramid = [torch.zeros(1, self.rfpn.pyramid_channels, canvas[0] // stride, canvas[1] // stride) for stride in (4, 8, 16, 32)]
        with MacCounter(self.rfpn) as counter:
            self.rfpn.lateral(pyramid)
        return counter.total()
