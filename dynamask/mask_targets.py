"""Target masks of the mask branch: the ground truth, cut by the RoI and rasterised at the four grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from dynamask.config import GRIDS


def grid_targets(masks: Tensor, rois: Tensor) -> list[Tensor]:
    """Binary targets `[N, G, G] float32` at the four grids, from masks `[N, H, W] uint8` and RoIs `[N, 5]` (xyxy pixels).

    The mask is sampled once, at the largest grid, for all instances together; a cell of a smaller grid is 1 where at least half
    of the cells that it covers are.
    """
    index = torch.arange(len(rois), dtype=rois.dtype, device=rois.device)
    boxes = torch.cat([index[:, None], rois[:, 1:]], dim=1)
    largest = roi_align(masks[:, None].float(), boxes, (GRIDS[-1], GRIDS[-1]), 1.0, 2, aligned=True)
    return [(F.avg_pool2d(largest, GRIDS[-1] // grid) >= 0.5).float()[:, 0] for grid in GRIDS]
