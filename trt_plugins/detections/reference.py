"""Detections in PyTorch, with torchvision's box coder and NMS."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms


def detect(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    count: Tensor,
    min_score: Tensor,
    canvas: tuple[int, int],
    detections: int,
    score_threshold: float,
    nms_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class logits `[P, C + 1]`, box deltas `[P, 4 (C + 1)]`, proposals `[P, 4]`, `[1]`, `[]` -> boxes `[K, 4]`, scores `[K]`,
    labels `[K]`, slots `[n]` and n `[]`."""
    rows, classes = int(count), class_logits.shape[1] - 1
    score = torch.softmax(class_logits[:rows].float(), dim=-1)[:, 1:].reshape(-1)
    boxes = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(box_deltas[:rows].float(), proposals[:rows])
    boxes = clip_boxes_to_image(boxes.view(rows, classes + 1, 4)[:, 1:].reshape(-1, 4), canvas)
    best = score.sort(descending=True, stable=True).indices[: 10 * detections]
    best = best[score[best] > max(float(min_score), score_threshold)]
    keep = torch.zeros(len(best), dtype=torch.bool)
    for label in range(classes):
        places = torch.nonzero(best % classes == label)[:, 0]
        keep[places[nms(boxes[best[places]], score[best[places]], nms_threshold)]] = True
    best = best[keep][:detections]
    filled = len(best)
    slot_boxes, scores, labels = torch.zeros(detections, 4), torch.zeros(detections), torch.full((detections,), -1)
    slot_boxes[:filled], scores[:filled], labels[:filled] = boxes[best], score[best], best % classes
    return slot_boxes, scores, labels, torch.arange(filled), torch.tensor(filled)
