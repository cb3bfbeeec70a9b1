"""RoiAlign in PyTorch: each RoI by torchvision's operator, on its own level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align


def roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    strides: Sequence[int],
    size: int,
    samples: int,
    aligned: bool,
    canonical_size: float = 0.0,
    per_image: int = 0,
    places: Tensor | None = None,
) -> Tensor:
    """Maps `[B, C, H_l, W_l]`, RoIs `[n, 4] float32` xyxy and their places `[n] int64` (by default 0..n - 1) -> `[n, C, size, size]` of the
    maps' type, computed in fp32."""
    places = torch.arange(len(rois)) if places is None else places
    regions = maps[0].new_empty((len(rois), maps[0].shape[1], size, size))
    for index, roi in enumerate(rois):
        level = pyramid_level(roi, len(maps), canonical_size) if len(maps) > 1 else 0
        image = int(places[index]) // per_image if per_image else 0
        feature = maps[level][image : image + 1].float()
        regions[index] = torchvision_roi_align(feature, [roi[None]], size, 1.0 / strides[level], samples, aligned)[0]
    return regions


def pyramid_level(roi: Tensor, levels: int, canonical_size: float) -> int:
    """The index of a RoI's level, `[4] float32` -> 0..levels - 1, in fp32 as `dynamask.roi.pyramid_level` has it."""
    side = torch.sqrt(((roi[2] - roi[0]) * (roi[3] - roi[1])).clamp(min=1e-6))
    level = torch.floor(4 + torch.log2(side) - math.log2(canonical_size) + 1e-6)
    return int(level.clamp(2, levels + 1)) - 2
