"""The inference pass, with static detection slots and routed masks: what is evaluated in PyTorch is what is exported.

One image at a time (`B = 1`). Sizes that depend on the data appear in the mask branch only, where they are what saves the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from dynamask.config import GRIDS
from dynamask.model import DynaMask, MaskBranch
from dynamask.msm import MSM, route

RPN_NMS_THRESHOLD = 0.7


class Detections(NamedTuple):
    """K slots by falling score; an empty slot has score 0 and label -1."""

    boxes: Tensor
    """`[K, 4] float32`, xyxy in canvas pixels."""
    scores: Tensor
    """`[K] float32`."""
    labels: Tensor
    """`[K] int64`, from 0."""


class RoutedMasks(NamedTuple):
    """The mask branch's output: each instance appears at its own grid and nowhere else."""

    grids: Tensor
    """`[K] int64`: 0..3, and -1 for an empty slot."""
    slots: tuple[Tensor, Tensor, Tensor, Tensor]
    """Per grid, the slots of its instances, `[n_g] int64`."""
    logits: tuple[Tensor, Tensor, Tensor, Tensor]
    """Per grid, the mask logits of the instances' own class, `[n_g, G, G] float32`."""


class GraphOutput(NamedTuple):
    """What the exported graph gives for one image: `Detections` and `RoutedMasks` together."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    grids: Tensor
    slots: tuple[Tensor, Tensor, Tensor, Tensor]
    logits: tuple[Tensor, Tensor, Tensor, Tensor]


def propose(model: DynaMask, image: Tensor, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """RPN proposals of one image: boxes `[P, 4]` in a fixed number of rows and which of them count, `[P] bool`."""
    config = model.config.model
    anchors = model.rpn.anchor_generator.grid_anchors(
        [tuple(x.shape[-2:]) for x in pyramid],
        [[torch.tensor(image.shape[i] // x.shape[i], device=image.device) for i in (-2, -1)] for x in pyramid],
    )
    objectness, deltas = model.rpn.head(pyramid)
    boxes, scores, levels = [], [], []
    for level, (anchor, logit, delta) in enumerate(zip(anchors, objectness, deltas, strict=True)):
        logit = logit[0].permute(1, 2, 0).reshape(-1)
        per_cell = delta.shape[1] // 4
        delta = delta[0].view(per_cell, 4, *delta.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        top, index = logit.topk(min(config.proposals_per_level, logit.shape[0]))
        decoded = model.rpn.box_coder.decode_single(delta.index_select(0, index), anchor.to(delta.dtype).index_select(0, index))
        boxes.append(clip_boxes_to_image(decoded.reshape(-1, 4), _size(image)))
        scores.append(torch.sigmoid(top))
        levels.append(torch.full_like(top, level))
    box, score = torch.cat(boxes), torch.cat(scores)
    # NMS keeps to each level: boxes of different levels are moved apart, as torchvision's batched NMS does.
    apart = torch.cat(levels)[:, None] * float(2 * max(_size(image)))
    keep, valid = _nms_slots(box + apart, score, RPN_NMS_THRESHOLD, config.proposals)
    return box.index_select(0, keep), valid


def detect(model: DynaMask, image: Tensor, min_score: Tensor | float = 0.0) -> tuple[list[Tensor], Detections]:
    """Backbone, i-FPN, RPN and box head on one normalised canvas `[1, 3, H, W]` -> P2..P5 and the detections.

    Detections at or below `min_score` (`[]`, or the model's own threshold where that is higher) leave their slots empty, so that the mask
    branch does no work for them.
    """
    config = model.config.model
    pyramid = model.backbone(image)
    proposals, valid = propose(model, image, pyramid)
    logits, deltas = model.box_outputs(pyramid, _rois(proposals))
    scores = (torch.softmax(logits, dim=-1) * valid[:, None])[:, 1:]
    boxes = model.roi_heads.box_coder.decode_single(deltas, proposals).view(len(proposals), -1, 4)[:, 1:]
    boxes = clip_boxes_to_image(boxes.reshape(-1, 4), _size(image))
    classes = scores.shape[1]
    score, index = scores.reshape(-1).topk(min(10 * config.detections, scores.numel()))
    least = torch.as_tensor(min_score, dtype=score.dtype, device=score.device).clamp(min=config.score_threshold)
    score = torch.where(score > least, score, torch.zeros_like(score))
    box, label = boxes.index_select(0, index), index % classes
    apart = label[:, None].to(box.dtype) * float(2 * max(_size(image)))
    keep, valid = _nms_slots(box + apart, score, config.nms_threshold, config.detections)
    score = score.index_select(0, keep) * valid
    filled = score > 0
    label = torch.where(filled, label.index_select(0, keep), torch.full_like(keep, -1))
    return pyramid[:4], Detections(box.index_select(0, keep) * filled[:, None], score, label)


def segment(
    branch: MaskBranch, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Tensor, override: Tensor
) -> RoutedMasks:
    """The routed mask branch: stage k runs on the instances whose grid is k or larger.

    Args:
        branch: the model's mask branch.
        pyramid: P2..P5.
        detections: K slots.
        canvas: height and width, pixels.
        budget: `[]`, mean GMAC an instance; none where 0 or less.
        override: `[K] int64`, see `dynamask.msm.route`.
    """
    slots = torch.nonzero(detections.scores > 0)[:, 0]
    boxes = detections.boxes.index_select(0, slots)
    labels = detections.labels.index_select(0, slots)
    rois = _rois(boxes)
    region = branch.region(pyramid, rois)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0)
    sides = torch.sqrt(areas / float(canvas[0] * canvas[1]))
    log_probabilities = torch.log_softmax(branch.msm(region), dim=-1)
    grids = route(log_probabilities, branch.costs, budget, sides, override.index_select(0, slots))
    all_grids = torch.full_like(detections.labels, -1).scatter(0, slots, grids)

    laterals = branch.rfpn.lateral(pyramid)
    feature = branch.rfpn.tiny(region)
    grid_slots, logits = [], []
    for k in range(len(GRIDS)):
        if k > 0:
            onward = torch.nonzero(grids >= k)[:, 0]
            feature, rois, grids = feature.index_select(0, onward), rois.index_select(0, onward), grids.index_select(0, onward)
            slots, labels = slots.index_select(0, onward), labels.index_select(0, onward)
            feature = branch.rfpn.stage(k, feature, laterals[k - 1], rois)
        here = torch.nonzero(grids == k)[:, 0]
        grid_slots.append(slots.index_select(0, here))
        logits.append(branch.heads.mask_logits(k, feature.index_select(0, here), labels.index_select(0, here)))
    return RoutedMasks(all_grids, tuple(grid_slots), tuple(logits))  # type: ignore[arg-type]


@torch.inference_mode()
def predict(model: DynaMask, image: Tensor, budget: Tensor | float = 0.0, grid_override: Tensor | int = MSM) -> GraphOutput:
    """Detections and masks of one normalised canvas `[1, 3, H, W]`; the model is in evaluation mode.

    Args:
        model: on the image's device.
        image: `[1, 3, H, W] float32`.
        budget: mean GMAC an instance; 0 or less for the paper's argmax.
        grid_override: one value for all slots, or `[K] int64` (`dynamask.msm.route`).
    """
    override = torch.as_tensor(grid_override, dtype=torch.int64, device=image.device).expand(model.config.model.detections)
    limit = torch.as_tensor(budget, dtype=torch.float32, device=image.device)
    pyramid, detections = detect(model, image)
    return GraphOutput(*detections, *segment(model.mask_branch, pyramid, detections, _size(image), limit, override))


def _nms_slots(boxes: Tensor, scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """NMS into a fixed number of rows: indices `[count]` by falling score, and which of them count, `[count] bool`."""
    keep = nms(boxes, scores, threshold)
    slots = torch.arange(count, device=boxes.device)
    padded = torch.cat([keep, torch.zeros_like(slots)])[:count]
    return padded, slots < keep.shape[0]


def _rois(boxes: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)


def _size(image: Tensor) -> tuple[int, int]:
    return int(image.shape[-2]), int(image.shape[-1])
