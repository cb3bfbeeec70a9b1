"""The inference pass, with static detection slots and routed masks: what is evaluated in PyTorch is what is exported.

One image at a time (`B = 1`). Sizes that depend on the data appear in the mask branch only, where they are what saves the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from dynamask.model import DynaMask, MaskBranch
from dynamask.msm import route
from runtime.graph import GRIDS, MSM

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


class DetectorPass(NamedTuple):
    """The detector's tensors at the seams of the exported graph: a target may compute what lies between them in its own way."""

    pyramid: list[Tensor]
    """P2..P6, `[1, C, H_l, W_l]`."""
    rpn_logits: list[Tensor]
    """Per level, `[1, A, H_l, W_l]` for A anchors a cell."""
    rpn_deltas: list[Tensor]
    """Per level, `[1, 4 A, H_l, W_l]`."""
    proposals: Tensor
    """`[P, 4] float32`, xyxy in canvas pixels, by falling score."""
    proposal_count: Tensor
    """`[1] int32`: so many rows of `proposals` count."""
    box_region: Tensor
    """`[P, C, 7, 7]`, the box head's RoI feature."""
    class_logits: Tensor
    """`[P, classes + 1]`, background first."""
    box_deltas: Tensor
    """`[P, 4 (classes + 1)]`."""
    detections: Detections


class Routing(NamedTuple):
    """Which instance goes through which stage of the r-FPN. Positions are within the set of instances that the stage before had."""

    grids: Tensor
    """`[K] int64`, as in `RoutedMasks`."""
    onward: tuple[Tensor, Tensor, Tensor]
    """For the stages 28, 56 and 112: positions, in the stage before, of the instances that go on, `int64`."""
    here: tuple[Tensor, Tensor, Tensor, Tensor]
    """Per stage: positions, in the stage itself, of the instances that end there, `[n_g] int64`."""
    slots: tuple[Tensor, Tensor, Tensor, Tensor]
    """Per stage: the slots of those, `[n_g] int64`."""


class MaskPass(NamedTuple):
    """The mask branch's tensors at the seams of the exported graph, for n filled slots."""

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
    logits: tuple[Tensor, Tensor, Tensor, Tensor]
    """As in `RoutedMasks`."""


def detector_pass(model: DynaMask, image: Tensor, min_score: Tensor | float = 0.0) -> DetectorPass:
    """Backbone, i-FPN, RPN and box head on one normalised canvas `[1, 3, H, W]`; `min_score` as in `detect`."""
    canvas = _size(image)
    pyramid = model.backbone(image)
    rpn_logits, rpn_deltas = model.rpn.head(pyramid)
    proposals, count = select_proposals(model, rpn_logits, rpn_deltas, canvas)
    region = model.box_region(pyramid, _rois(proposals))
    logits, deltas = model.box_outputs(region)
    detections = select_detections(model, logits, deltas, proposals, count, canvas, min_score)
    return DetectorPass(pyramid, rpn_logits, rpn_deltas, proposals, count, region, logits, deltas, detections)


def select_proposals(model: DynaMask, logits: Sequence[Tensor], deltas: Sequence[Tensor], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The RPN's outputs -> `proposals` and `proposal_count` of `DetectorPass`: best anchors of each level, decoded, NMS per level."""
    config = model.config.model
    anchors = model.rpn.anchor_generator.grid_anchors(
        [tuple(x.shape[-2:]) for x in logits],
        [[torch.tensor(canvas[i] // x.shape[i - 2], device=x.device) for i in (0, 1)] for x in logits],
    )
    boxes, scores, levels = [], [], []
    for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
        logit = logit[0].permute(1, 2, 0).reshape(-1)
        per_cell = delta.shape[1] // 4
        delta = delta[0].view(per_cell, 4, *delta.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        top, index = logit.topk(min(config.proposals_per_level, logit.shape[0]))
        decoded = model.rpn.box_coder.decode_single(delta.index_select(0, index), anchor.to(delta.dtype).index_select(0, index))
        boxes.append(clip_boxes_to_image(decoded.reshape(-1, 4), canvas))
        scores.append(torch.sigmoid(top))
        levels.append(torch.full_like(top, level))
    box, score = torch.cat(boxes), torch.cat(scores)
    # NMS keeps to each level: boxes of different levels are moved apart, as torchvision's batched NMS does.
    apart = torch.cat(levels)[:, None] * float(2 * max(canvas))
    keep, valid = _nms_slots(box + apart, score, RPN_NMS_THRESHOLD, config.proposals)
    return box.index_select(0, keep), valid.sum(dtype=torch.int32)[None]


def select_detections(
    model: DynaMask,
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    proposal_count: Tensor,
    canvas: tuple[int, int],
    min_score: Tensor | float,
) -> Detections:
    """The box head's outputs -> K slots: best scores above `min_score`, decoded, NMS per class."""
    config = model.config.model
    valid = torch.arange(len(proposals), device=proposals.device) < proposal_count
    scores = (torch.softmax(logits, dim=-1) * valid[:, None])[:, 1:]
    boxes = model.roi_heads.box_coder.decode_single(deltas, proposals).view(len(proposals), -1, 4)[:, 1:]
    boxes = clip_boxes_to_image(boxes.reshape(-1, 4), canvas)
    classes = scores.shape[1]
    score, index = scores.reshape(-1).topk(min(10 * config.detections, scores.numel()))
    least = torch.as_tensor(min_score, dtype=score.dtype, device=score.device).clamp(min=config.score_threshold)
    score = torch.where(score > least, score, torch.zeros_like(score))
    box, label = boxes.index_select(0, index), index % classes
    apart = label[:, None].to(box.dtype) * float(2 * max(canvas))
    keep, valid = _nms_slots(box + apart, score, config.nms_threshold, config.detections)
    score = score.index_select(0, keep) * valid
    filled = score > 0
    label = torch.where(filled, label.index_select(0, keep), torch.full_like(keep, -1))
    return Detections(box.index_select(0, keep) * filled[:, None], score, label)


def mask_pass(
    branch: MaskBranch, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Tensor, override: Tensor
) -> MaskPass:
    """The routed mask branch; arguments as in `segment`."""
    slots = torch.nonzero(detections.scores > 0)[:, 0]
    mask_boxes, overrides = detections.boxes.index_select(0, slots), override.index_select(0, slots)
    region = branch.region(pyramid, _rois(mask_boxes))
    msm_logits = branch.msm(region)
    routing = plan_routing(msm_logits, mask_boxes, overrides, slots, budget, branch.costs, canvas, len(override))

    laterals = branch.rfpn.lateral(pyramid)
    feature, boxes, logits = branch.rfpn.tiny(region), mask_boxes, []
    for k in range(len(GRIDS)):
        if k > 0:
            feature, boxes = feature.index_select(0, routing.onward[k - 1]), boxes.index_select(0, routing.onward[k - 1])
            feature = branch.rfpn.stage(k, feature, laterals[k - 1], _rois(boxes))
        labels = detections.labels.index_select(0, routing.slots[k])
        logits.append(branch.heads.mask_logits(k, feature.index_select(0, routing.here[k]), labels))
    return MaskPass(slots, mask_boxes, overrides, region, msm_logits, routing, tuple(logits))  # type: ignore[arg-type]


def plan_routing(
    msm_logits: Tensor,
    boxes: Tensor,
    override: Tensor,
    slots: Tensor,
    budget: Tensor,
    costs: Tensor,
    canvas: tuple[int, int],
    detections: int,
) -> Routing:
    """The MSM's logits `[n, 4]` -> the grid of each instance, and who goes through which stage; K is `detections`."""
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0)
    sides = torch.sqrt(areas / float(canvas[0] * canvas[1]))
    grids = route(torch.log_softmax(msm_logits, dim=-1), costs, budget, sides, override)
    all_grids = torch.full((detections,), -1, dtype=torch.int64, device=grids.device).scatter(0, slots, grids)
    onward, here, ending = [], [], []
    for k in range(len(GRIDS)):
        if k > 0:
            onward.append(torch.nonzero(grids >= k)[:, 0])
            grids, slots = grids.index_select(0, onward[-1]), slots.index_select(0, onward[-1])
        here.append(torch.nonzero(grids == k)[:, 0])
        ending.append(slots.index_select(0, here[-1]))
    return Routing(all_grids, tuple(onward), tuple(here), tuple(ending))  # type: ignore[arg-type]


def propose(model: DynaMask, image: Tensor, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """RPN proposals of one image: boxes `[P, 4]` in a fixed number of rows and which of them count, `[P] bool`."""
    logits, deltas = model.rpn.head(pyramid)
    proposals, count = select_proposals(model, logits, deltas, _size(image))
    return proposals, torch.arange(len(proposals), device=proposals.device) < count


def detect(model: DynaMask, image: Tensor, min_score: Tensor | float = 0.0) -> tuple[list[Tensor], Detections]:
    """Backbone, i-FPN, RPN and box head on one normalised canvas `[1, 3, H, W]` -> P2..P5 and the detections.

    Detections at or below `min_score` (`[]`, or the model's own threshold where that is higher) leave their slots empty, so that the mask
    branch does no work for them.
    """
    found = detector_pass(model, image, min_score)
    return found.pyramid[:4], found.detections


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
    masks = mask_pass(branch, pyramid, detections, canvas, budget, override)
    return RoutedMasks(masks.routing.grids, masks.routing.slots, masks.logits)


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
