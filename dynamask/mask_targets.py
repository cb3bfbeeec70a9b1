"""Target masks of the mask branch: the ground truth, cut by the RoI and rasterised at the four grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from runtime.graph import GRIDS


def grid_targets(masks: Tensor, rois: Tensor, matched: Tensor | None = None) -> list[Tensor]:
    """Binary targets `[N, G, G] float32` at the four grids, from masks `[M, H, W] uint8` and RoIs `[N, 5]` (xyxy pixels).

    `matched [N] int64` is the mask of each RoI; without it, RoI i has mask i. The mask is sampled once, at the largest grid, for all
    instances together; a cell of a smaller grid is 1 where at least half of the cells that it covers are.
    """
    if matched is None:
        matched = torch.arange(len(rois), device=rois.device)
    # Many RoIs share a mask: each mask is converted once, not once per RoI, which would take 4 MB per RoI at 800 x 1344.
    used, index = torch.unique(matched, return_inverse=True)
    boxes = torch.cat([index[:, None].to(rois.dtype), rois[:, 1:]], dim=1)
    largest = roi_align(masks[used, None].float(), boxes, (GRIDS[-1], GRIDS[-1]), 1.0, 2, aligned=True)
    return [(F.avg_pool2d(largest, GRIDS[-1] // grid) >= 0.5).float()[:, 0] for grid in GRIDS]
