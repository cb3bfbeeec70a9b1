"""Proposals in PyTorch, image by image, with torchvision's box coder and NMS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms


def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    strides: Sequence[int],
    per_level: int,
    proposals: int,
    nms_threshold: float,
) -> tuple[Tensor, Tensor]:
    """Logits `[B, A, H_l, W_l]`, deltas `[B, 4 A, H_l, W_l]` and cell anchors `[L, A, 4]` -> `[B * proposals, 4] float32`, `[B] int32`."""
    canvas = (logits[0].shape[2] * strides[0], logits[0].shape[3] * strides[0])
    rows, counts = [], []
    for image in range(len(logits[0])):
        own_logits, own_deltas = ([level[image] for level in part] for part in (logits, deltas))
        boxes = _of_image(own_logits, own_deltas, anchors, canvas, per_level, nms_threshold)[:proposals]
        rows.append(torch.cat([boxes, torch.zeros(proposals - len(boxes), 4)]))
        counts.append(len(boxes))
    return torch.cat(rows), torch.tensor(counts, dtype=torch.int32)


def _of_image(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Tensor, canvas: tuple[int, int], per_level: int, nms_threshold: float
) -> Tensor:
    """All boxes of an image that NMS keeps, `[n, 4]`, best first."""
    kept_boxes, kept_scores = [], []
    for logit, delta, cell_anchors in zip(logits, deltas, anchors, strict=True):
        height, width = logit.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height) * (canvas[0] // height), torch.arange(width) * (canvas[1] // width), indexing="ij")
        shifted = (torch.stack([x, y, x, y], dim=-1)[:, :, None] + cell_anchors).reshape(-1, 4)
        score = logit.float().permute(1, 2, 0).reshape(-1)
        delta = delta.float().view(-1, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)
        best = score.sort(descending=True, stable=True).indices[:per_level]
        boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(delta[best], shifted[best])
        boxes = clip_boxes_to_image(boxes, canvas)
        kept = nms(boxes, score[best], nms_threshold)
        kept_boxes.append(boxes[kept])
        kept_scores.append(score[best][kept])
    return torch.cat(kept_boxes)[torch.cat(kept_scores).sort(descending=True, stable=True).indices]
