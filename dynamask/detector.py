"""The detector: backbone with FPN, RPN and box head. Its parts and their names are torchvision's, so that torchvision's weights fit.

Training uses torchvision's sampling and losses. Inference is written here with a fixed number of rows everywhere, because that is the form
that exports: PyTorch evaluates the same code that becomes the ONNX graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms

from dynamask.backbone import build_backbone
from dynamask.config import ModelConfig
from dynamask.roi import batch_rois, image_rois, pyramid_roi_align

BOX_REGION = 7
"""Side of the box head's RoI feature, cells."""
RPN_NMS_THRESHOLD = 0.7
"""IoU above which the RPN's NMS drops a proposal, in training and at inference (Ren et al., NeurIPS 2015)."""
CANDIDATES_PER_DETECTION = 10
"""At inference, this many scores per detection slot go through the box head's NMS."""


class Detections(NamedTuple):
    """K slots by falling score; an empty slot has score 0 and label -1."""

    boxes: Tensor
    """`[K, 4] float32`, xyxy in canvas pixels."""
    scores: Tensor
    """`[K] float32`."""
    labels: Tensor
    """`[K] int64`, from 0."""


class DetectorPass(NamedTuple):
    """The detector's tensors for one canvas. They are the seams of the exported graph (`export/seams.py`)."""

    pyramid: list[Tensor]
    """P2..P6, `[1, C, H_l, W_l]`."""
    rpn_logits: list[Tensor]
    """Per level, `[1, A, H_l, W_l]` for A anchors per cell."""
    rpn_deltas: list[Tensor]
    """Per level, `[1, 4 A, H_l, W_l]`."""
    proposals: Tensor
    """`[P, 4] float32`, xyxy in canvas pixels, by falling score."""
    proposal_count: Tensor
    """`[1] int32`: the number of rows of `proposals` that are filled."""
    box_region: Tensor
    """`[P, C, 7, 7]`, the box head's RoI feature."""
    class_logits: Tensor
    """`[P, classes + 1]`, background first."""
    box_deltas: Tensor
    """`[P, 4 (classes + 1)]`."""
    detections: Detections


class Samples(NamedTuple):
    """The RoIs that torchvision sampled for training, one entry per image."""

    proposals: list[Tensor]
    """`[R, 4]`, xyxy in canvas pixels."""
    matched: list[Tensor]
    """`[R] int64`: the index of the ground truth that each RoI overlaps most."""
    labels: list[Tensor]
    """`[R] int64`, from 1; 0 is background."""
    regression: list[Tensor]
    """`[R, 4]`, the box head's targets."""


class Detector(nn.Module):
    """Faster R-CNN with an FPN for `classes` classes, of the sizes in a `ModelConfig`, with random weights."""

    def __init__(self, sizes: ModelConfig, classes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.backbone = build_backbone(sizes)
        anchors = AnchorGenerator(tuple((size,) for size in sizes.anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(sizes.fpn_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": sizes.proposals_training, "testing": sizes.proposals_per_level},
            post_nms_top_n={"training": sizes.proposals_training, "testing": sizes.proposals},
            nms_thresh=RPN_NMS_THRESHOLD,
        )
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(["0", "1", "2", "3"], BOX_REGION, 2),
            TwoMLPHead(sizes.fpn_channels * BOX_REGION**2, sizes.box_features),
            FastRCNNPredictor(sizes.box_features, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sizes.rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=sizes.score_threshold,
            nms_thresh=sizes.nms_threshold,
            detections_per_img=sizes.detections,
        )

    def box_region(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        """The box head's RoI feature `[N, C, 7, 7]` of RoIs `[N, 5]`, each from its own level; the sampling is torchvision's."""
        return pyramid_roi_align(pyramid[:4], rois, BOX_REGION, self.sizes.canonical_size, aligned=False)

    def box_outputs(self, region: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[N, C + 1]` and box deltas `[N, 4 (C + 1)]` from the feature that `box_region` gives."""
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(region))
        return logits, deltas

    def sample(self, images: Tensor, pyramid: Sequence[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Samples, dict[str, Tensor]]:
        """The RoIs to train on, and the RPN's losses; arguments as in `DynaMask.losses`."""
        sizes = [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
        proposals, losses = self.rpn(ImageList(images, sizes), {str(i): x for i, x in enumerate(pyramid)}, targets)
        return Samples(*self.roi_heads.select_training_samples(proposals, targets)), losses

    def box_losses(self, pyramid: Sequence[Tensor], samples: Samples) -> dict[str, Tensor]:
        """The box head's losses on the sampled RoIs."""
        logits, deltas = self.box_outputs(self.box_region(pyramid, batch_rois(samples.proposals)))
        classifier, box = fastrcnn_loss(logits, deltas, samples.labels, samples.regression)
        return {"loss_classifier": classifier, "loss_box": box}

    def detect(self, image: Tensor, min_score: Tensor | float = 0.0) -> DetectorPass:
        """Run backbone, FPN, RPN and box head on one normalised canvas.

        Args:
            image: `[1, 3, H, W] float32`.
            min_score: `[]`; detections that score this or less, or the model's own threshold or less, leave their slots empty, so that the
                mask branch does no work for them.
        """
        canvas = (int(image.shape[-2]), int(image.shape[-1]))
        pyramid = self.backbone(image)
        rpn_logits, rpn_deltas = self.rpn.head(pyramid)
        proposals, count = select_proposals(self, rpn_logits, rpn_deltas, canvas)
        region = self.box_region(pyramid, image_rois(proposals))
        logits, deltas = self.box_outputs(region)
        detections = select_detections(self, logits, deltas, proposals, count, canvas, min_score)
        return DetectorPass(pyramid, rpn_logits, rpn_deltas, proposals, count, region, logits, deltas, detections)


def select_proposals(
    detector: Detector, logits: Sequence[Tensor], deltas: Sequence[Tensor], canvas: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The RPN's outputs -> `proposals` and `proposal_count` of `DetectorPass`: best anchors of each level, decoded, NMS per level."""
    sizes = detector.sizes
    anchors = detector.rpn.anchor_generator.grid_anchors(
        [tuple(x.shape[-2:]) for x in logits],
        [[torch.tensor(canvas[i] // x.shape[i - 2], device=x.device) for i in (0, 1)] for x in logits],
    )
    boxes, scores, levels = [], [], []
    for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
        logit = logit[0].permute(1, 2, 0).reshape(-1)
        per_cell = delta.shape[1] // 4
        delta = delta[0].view(per_cell, 4, *delta.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        top, index = logit.topk(min(sizes.proposals_per_level, logit.shape[0]))
        decoded = detector.rpn.box_coder.decode_single(delta.index_select(0, index), anchor.to(delta.dtype).index_select(0, index))
        boxes.append(clip_boxes_to_image(decoded.reshape(-1, 4), canvas))
        scores.append(torch.sigmoid(top))
        levels.append(torch.full_like(top, level))
    box, score = torch.cat(boxes), torch.cat(scores)
    # Boxes of different levels are moved apart, so that one NMS treats each level by itself, as torchvision's batched NMS does.
    apart = torch.cat(levels)[:, None] * float(2 * max(canvas))
    keep, valid = _nms_slots(box + apart, score, RPN_NMS_THRESHOLD, sizes.proposals)
    return box.index_select(0, keep), valid.sum(dtype=torch.int32)[None]


def select_detections(
    detector: Detector,
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    proposal_count: Tensor,
    canvas: tuple[int, int],
    min_score: Tensor | float,
) -> Detections:
    """The box head's outputs -> K slots: best scores above `min_score`, decoded, NMS per class."""
    sizes = detector.sizes
    valid = torch.arange(len(proposals), device=proposals.device) < proposal_count
    scores = (torch.softmax(logits, dim=-1) * valid[:, None])[:, 1:]
    boxes = detector.roi_heads.box_coder.decode_single(deltas, proposals).view(len(proposals), -1, 4)[:, 1:]
    boxes = clip_boxes_to_image(boxes.reshape(-1, 4), canvas)
    classes = scores.shape[1]
    score, index = scores.reshape(-1).topk(min(CANDIDATES_PER_DETECTION * sizes.detections, scores.numel()))
    least = torch.as_tensor(min_score, dtype=score.dtype, device=score.device).clamp(min=sizes.score_threshold)
    score = torch.where(score > least, score, torch.zeros_like(score))
    box, label = boxes.index_select(0, index), index % classes
    apart = label[:, None].to(box.dtype) * float(2 * max(canvas))
    keep, valid = _nms_slots(box + apart, score, sizes.nms_threshold, sizes.detections)
    score = score.index_select(0, keep) * valid
    filled = score > 0
    label = torch.where(filled, label.index_select(0, keep), torch.full_like(keep, -1))
    return Detections(box.index_select(0, keep) * filled[:, None], score, label)


def _nms_slots(boxes: Tensor, scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """NMS into a fixed number of rows: indices `[count]` by falling score, and which of them are filled, `[count] bool`."""
    keep = nms(boxes, scores, threshold)
    slots = torch.arange(count, device=boxes.device)
    padded = torch.cat([keep, torch.zeros_like(slots)])[:count]
    return padded, slots < keep.shape[0]
