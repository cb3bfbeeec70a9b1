"""Proposals in PyTorch, with torchvision's box coder and NMS."""

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
    canvas: tuple[int, int],
    per_level: int,
    proposals: int,
    nms_threshold: float,
) -> tuple[Tensor, Tensor]:
    """Logits `[1, A, H_l, W_l]`, deltas `[1, 4 A, H_l, W_l]` and cell anchors `[L, A, 4]` -> `[proposals, 4] float32`, `[1] int32`."""
    kept_boxes, kept_scores = [], []
    for logit, delta, cell_anchors in zip(logits, deltas, anchors, strict=True):
        height, width = logit.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height) * (canvas[0] // height), torch.arange(width) * (canvas[1] // width), indexing="ij")
        shifted = (torch.stack([x, y, x, y], dim=-1)[:, :, None] + cell_anchors).reshape(-1, 4)
        score = logit[0].float().permute(1, 2, 0).reshape(-1)
        delta = delta[0].float().view(-1, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)
        best = score.sort(descending=True, stable=True).indices[:per_level]
        boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(delta[best], shifted[best])
        boxes = clip_boxes_to_image(boxes, canvas)
        kept = nms(boxes, score[best], nms_threshold)
        kept_boxes.append(boxes[kept])
        kept_scores.append(score[best][kept])
    best = torch.cat(kept_scores).sort(descending=True, stable=True).indices[:proposals]
    rows = torch.zeros(proposals, 4)
    rows[: len(best)] = torch.cat(kept_boxes)[best]
    return rows, torch.tensor([len(best)], dtype=torch.int32)
