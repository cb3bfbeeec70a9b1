"""DynaMask assembled: detector, r-FPN, heads and MSM, with the training forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from dynamask.backbone import build_backbone
from dynamask.baselines import PYRAMIDS, MaskRCNNConvolutions, MaskRCNNPredictor, OneGrid
from dynamask.config import Config
from dynamask.fam import FUSIONS
from dynamask.flops import grid_gmacs
from dynamask.losses import (
    edge_target,
    grid_cross_entropy,
    mask_branch_losses,
    mean_cost,
    switched_loss,
)
from dynamask.mask_targets import grid_targets
from dynamask.msm import MaskSwitch, gumbel_noise, straight_through
from dynamask.rfpn import GridHeads, RegionFPN
from dynamask.roi import pyramid_roi_align
from runtime.graph import GRIDS

BOX_REGION = 7
LARGEST_PAPER_COST = 1.4
"""GMAC of the 112 x 112 grid in the paper (Table 7): the unit in which C_t is given."""


class MaskBranch(nn.Module):
    """Everything that runs once an instance: r-FPN, heads and MSM, or what stands in their places where the head is Mask R-CNN's.

    `region_size` is the side of the RoI feature, 14, or half a Mask R-CNN head's grid; `canonical_size` the side, in pixels, of a box
    that takes it from P4.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        model = config.model
        self.pyramid_channels, self.stage_channels = model.fpn_channels, model.stage_channels
        self.rfpn: RegionFPN | MaskRCNNConvolutions
        self.heads: GridHeads | MaskRCNNPredictor
        self.msm: MaskSwitch | OneGrid
        if model.mask_grid is None:
            self.region_size = GRIDS[0]
            pyramid = PYRAMIDS[model.pyramid](model.fpn_channels) if model.pyramid != "fpn" else None
            self.rfpn = RegionFPN(model.fpn_channels, model.stage_channels, FUSIONS[model.fusion], pyramid)
            self.heads = GridHeads(model.stage_channels, classes, model.class_agnostic_largest)
            self.msm = MaskSwitch(model.fpn_channels)
        else:
            self.region_size = model.mask_grid // 2
            outputs = 1 if model.class_agnostic_largest and model.mask_grid == GRIDS[-1] else classes
            self.rfpn = MaskRCNNConvolutions(model.fpn_channels)
            self.heads = MaskRCNNPredictor(model.fpn_channels, outputs, model.mask_grid)
            self.msm = OneGrid(model.mask_grid)
        self.canonical_size = 7.0 * model.anchor_sizes[0]
        self.costs: Tensor
        self.register_buffer("costs", torch.tensor(grid_gmacs(self)), persistent=False)

    def region(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        """The RoI feature `[N, C, S, S]` on each instance's own level, S the `region_size`: input of L_tiny and of the MSM."""
        return pyramid_roi_align(pyramid[:4], rois, self.region_size, self.canonical_size)

    def all_grids(self, pyramid: Sequence[Tensor], rois: Tensor, region: Tensor) -> list[Tensor]:
        """The features of all four grids for every instance, `[N, C_k, G_k, G_k]` each: what training needs."""
        laterals = self.rfpn.lateral(pyramid)
        features = [self.rfpn.tiny(region)]
        for k in (1, 2, 3):
            features.append(self.rfpn.stage(k, features[-1], laterals[k - 1], rois))
        return features


class DynaMask(nn.Module):
    """Two-stage instance segmenter whose masks have the grid that each instance needs.

    In training mode, `model(images [B, 3, H, W], targets)` returns the losses, weighted as in Eq. 7 and to be summed; `phase` 1 trains
    without the MSM, at all grids, `phase` 2 trains everything. `statistics` then holds the step's share of each grid and mean cost. A Mask
    R-CNN head has one mask loss, the same in both phases. With `train.frozen_detector` only the mask branch has losses and gradients.
    `dynamask.inference` runs it.
    """

    def __init__(self, config: Config, classes: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.classes = list(classes)
        self.backbone = build_backbone(model)
        anchors = AnchorGenerator(tuple((size,) for size in model.anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(model.fpn_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": model.proposals_training, "testing": model.proposals_per_level},
            post_nms_top_n={"training": model.proposals_training, "testing": model.proposals},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(["0", "1", "2", "3"], BOX_REGION, 2),
            TwoMLPHead(model.fpn_channels * BOX_REGION**2, model.box_features),
            FastRCNNPredictor(model.box_features, len(self.classes) + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=model.rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=model.score_threshold,
            nms_thresh=model.nms_threshold,
            detections_per_img=model.detections,
        )
        if config.train.frozen_detector:
            self.requires_grad_(False)  # the mask branch, which learns, comes after
        self.mask_branch = MaskBranch(config, len(self.classes))
        self.phase = 2
        self.statistics: dict[str, float] = {}

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a batch: images `[B, 3, H, W] float32`, targets with `boxes [G, 4]`, `labels [G]` from 1, `masks [G, H, W] uint8`."""
        pyramid = self.backbone(images)
        sizes = [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), {str(i): x for i, x in enumerate(pyramid)}, targets)
        proposals, matched, labels, regression = self.roi_heads.select_training_samples(proposals, targets)
        losses: dict[str, Tensor] = {}
        if not self.config.train.frozen_detector:
            losses |= rpn_losses
            losses["loss_classifier"], losses["loss_box"] = self._box_losses(pyramid, proposals, labels, regression)
        rois, classes, masks, truths = self._mask_samples(proposals, matched, labels, targets)
        wanted = grid_targets(masks, rois, truths)
        if isinstance(self.mask_branch.heads, MaskRCNNPredictor):
            return losses | self._one_grid_loss(self.mask_branch.heads, pyramid, rois, classes, wanted)
        region, mask, edge = self._grid_losses(self.mask_branch.heads, pyramid, rois, classes, wanted)
        if self.phase == 1:
            return losses | self._all_grid_losses(mask, edge)
        return losses | self._switched_losses(self.mask_branch.msm(region), mask, edge)

    def box_region(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        """The box head's feature `[N, C, 7, 7]` of RoIs `[N, 5]`, each on its own level; the sampling is torchvision's."""
        return pyramid_roi_align(pyramid[:4], rois, BOX_REGION, self.mask_branch.canonical_size, aligned=False)

    def box_outputs(self, region: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[N, C + 1]` and box deltas `[N, 4 (C + 1)]` from the feature that `box_region` gives."""
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(region))
        return logits, deltas

    def _box_losses(
        self, pyramid: Sequence[Tensor], proposals: list[Tensor], labels: list[Tensor], regression: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_outputs(self.box_region(pyramid, batch_rois(proposals)))
        classifier, box = fastrcnn_loss(logits, deltas, labels, regression)
        return classifier, box

    def _mask_samples(
        self, proposals: list[Tensor], matched: list[Tensor], labels: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The positives that reach the mask branch: RoIs `[N, 5]`, classes `[N]` from 0; masks `[M, H, W]`, and which is whose `[N]`."""
        limit = self.config.model.mask_rois_per_image
        kept = [torch.nonzero(label > 0)[:, 0] for label in labels]
        kept = [index[torch.randperm(len(index), device=index.device)[:limit]] for index in kept]
        rois = batch_rois([p[i] for p, i in zip(proposals, kept, strict=True)])
        classes = torch.cat([label[i] for label, i in zip(labels, kept, strict=True)]) - 1
        masks = [target["masks"] for target in targets]
        first = [sum(map(len, masks[:i])) for i in range(len(masks))]
        truths = torch.cat([start + m[i] for start, m, i in zip(first, matched, kept, strict=True)])
        return rois, classes, torch.cat(masks), truths

    def _grid_losses(
        self, heads: GridHeads, pyramid: Sequence[Tensor], rois: Tensor, classes: Tensor, mask_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mask branch on the sampled positives: their 14 x 14 features, and mask and edge losses `[N, 4]` at every grid."""
        region = self.mask_branch.region(pyramid, rois)
        features = self.mask_branch.all_grids(pyramid, rois, region)
        mask = grid_cross_entropy([heads.mask_logits(k, x, classes) for k, x in enumerate(features)], mask_targets)
        edge_targets = [edge_target(t) for t in mask_targets]
        edge = grid_cross_entropy([heads.edge_logits(k, x) for k, x in enumerate(features)], edge_targets)
        return region, mask, edge

    def _one_grid_loss(
        self, predictor: MaskRCNNPredictor, pyramid: Sequence[Tensor], rois: Tensor, classes: Tensor, mask_targets: list[Tensor]
    ) -> dict[str, Tensor]:
        """Mask R-CNN's mask loss: the cross-entropy at the head's own grid, the mean over its cells and the instances."""
        index = GRIDS.index(predictor.grid)
        feature = self.mask_branch.rfpn.tiny(self.mask_branch.region(pyramid, rois))
        loss = grid_cross_entropy([predictor.mask_logits(index, feature, classes)], [mask_targets[index]])
        self.statistics = {f"mask_{predictor.grid}": float(loss.detach().mean())}
        return {"loss_mask": switched_loss(torch.ones_like(loss), loss)}

    def _all_grid_losses(self, mask: Tensor, edge: Tensor) -> dict[str, Tensor]:
        """Phase 1: Eq. 3 and 4 with every grid switched on."""
        every = torch.ones_like(mask)
        self.statistics = {f"mask_{grid}": float(loss) for grid, loss in zip(GRIDS, mask.detach().mean(dim=0), strict=True)}
        return {
            "loss_mask": switched_loss(every, mask),
            "loss_edge": self.config.train.edge_weight * switched_loss(every, edge),
        }

    def _switched_losses(self, logits: Tensor, mask: Tensor, edge: Tensor) -> dict[str, Tensor]:
        """Phase 2: the terms of Eq. 7."""
        recipe = self.config.train
        probabilities = torch.softmax(logits.float(), dim=-1)
        y = straight_through(logits.float(), gumbel_noise(logits.shape, logits.device), recipe.temperature)
        costs = self.mask_branch.costs * (LARGEST_PAPER_COST / self.mask_branch.costs[-1])
        share = y.detach().mean(dim=0)
        self.statistics = {f"share_{grid}": float(s) for grid, s in zip(GRIDS, share, strict=True)}
        self.statistics["mean_cost"] = float(mean_cost(y.detach(), costs))
        self.statistics |= {f"mask_{grid}": float(loss) for grid, loss in zip(GRIDS, mask.detach().mean(dim=0), strict=True)}
        return mask_branch_losses(
            y, probabilities, mask, edge, costs, recipe.target_paper_gmacs, recipe.edge_weight, recipe.regularisation_weight
        )


def batch_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes `[n_b, 4]` of each image -> RoIs `[sum n_b, 5]`, the image's index first."""
    index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    return torch.cat([index, torch.cat(list(boxes))], dim=1)


def build_model(config: Config, classes: Sequence[dict[str, Any]]) -> DynaMask:
    """A DynaMask with random weights; `classes` are `{"id": category id, "name": name}`, in the order of the labels."""
    return DynaMask(config, classes)
