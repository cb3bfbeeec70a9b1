"""Detections in PyTorch, image by image, with torchvision's box coder and NMS."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms


def detect(
    class_logits: Tensor,
    box_deltas: Tensor,
    boxes: Tensor,
    count: Tensor,
    min_score: Tensor,
    feature: Tensor,
    proposals: int,
    stride: int,
    detections: int,
    candidates: int,
    score_threshold: float,
    nms_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class logits `[B P, C + 1]`, box deltas `[B P, 4 (C + 1)]`, proposals' boxes `[B P, 4]`, `[B]`, `[]` and a map `[B, any, H, W]` ->
    boxes `[B K, 4]`, scores `[B K]`, labels `[B K]`, slots `[n]` and n `[]`."""
    canvas, images = (feature.shape[2] * stride, feature.shape[3] * stride), len(feature)
    least = max(float(min_score), score_threshold)
    slot_boxes, scores = torch.zeros(images, detections, 4), torch.zeros(images, detections)
    labels = torch.full((images, detections), -1)
    for image, rows in enumerate(count.tolist()):
        own = slice(image * proposals, image * proposals + rows)
        found = _of_image(class_logits[own], box_deltas[own], boxes[own], canvas, detections, candidates, least, nms_threshold)
        for slot, each in zip((slot_boxes, scores, labels), found, strict=True):
            slot[image, : len(each)] = each
    slots = torch.nonzero(labels.flatten() >= 0)[:, 0]
    return slot_boxes.flatten(0, 1), scores.flatten(), labels.flatten(), slots, torch.tensor(len(slots))


def _of_image(
    class_logits: Tensor,
    box_deltas: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    detections: int,
    candidates: int,
    least: float,
    nms_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes `[n, 4]`, scores `[n]` and labels `[n]` of an image's detections, best first."""
    rows, classes = len(class_logits), class_logits.shape[1] - 1
    score = torch.softmax(class_logits.float(), dim=-1)[:, 1:].reshape(-1)
    boxes = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(box_deltas.float(), boxes)
    boxes = clip_boxes_to_image(boxes.view(rows, classes + 1, 4)[:, 1:].reshape(-1, 4), canvas)
    best = score.sort(descending=True, stable=True).indices[:candidates]
    best = best[score[best] > least]
    keep = torch.zeros(len(best), dtype=torch.bool)
    for label in range(classes):
        places = torch.nonzero(best % classes == label)[:, 0]
        keep[places[nms(boxes[best[places]], score[best[places]], nms_threshold)]] = True
    best = best[keep][:detections]
    return boxes[best], score[best], best % classes
