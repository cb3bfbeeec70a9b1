"""RoIAlign on one level and over the levels of a pyramid, in a form that trains and exports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align


def roi_align(feature: Tensor, rois: Tensor, size: int, stride: int, samples: int = 2, aligned: bool = True) -> Tensor:
    """RoIAlign of a map `[B, C, H, W]` at RoIs `[N, 5]` (batch index, xyxy pixels): `[N, C, size, size]`.

    Each bin is the mean of `samples` x `samples` bilinear samples.
    """
    return torchvision_roi_align(feature, rois, (size, size), 1.0 / stride, samples, aligned)


def image_rois(boxes: Tensor) -> Tensor:
    """Boxes `[n, 4]` of a single image -> RoIs `[n, 5]`, with image index 0."""
    return torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)


def batch_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes `[n_b, 4]` of each image -> RoIs `[sum n_b, 5]`, the image's index first."""
    index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    return torch.cat([index, torch.cat(list(boxes))], dim=1)


def pyramid_level(rois: Tensor, canonical_size: float) -> Tensor:
    """The usual FPN rule (Lin et al., CVPR 2017, Eq. 1): index into P2..P5, `[N] int64`, of each RoI `[N, 5]`.

    A RoI of `canonical_size` pixels a side belongs to P4.
    """
    side = torch.sqrt(((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6))
    level = torch.floor(4 + torch.log2(side) - math.log2(canonical_size) + 1e-6)
    return level.clamp(2, 5).to(torch.int64) - 2


def pyramid_roi_align(pyramid: Sequence[Tensor], rois: Tensor, size: int, canonical_size: float, aligned: bool = True) -> Tensor:
    """RoIAlign of each RoI on its own level: pyramid P2..P5, rois `[N, 5]` -> `[N, C, size, size]`, in the RoIs' order.

    Each level's RoIs are gathered, cropped and put back, so that nothing is cropped twice.
    """
    level = pyramid_level(rois, canonical_size)
    crops, order = [], []
    for index, feature in enumerate(pyramid):
        chosen = torch.nonzero(level == index)[:, 0]
        crops.append(roi_align(feature, rois.index_select(0, chosen), size, 4 * 2**index, aligned=aligned))
        order.append(chosen)
    position = torch.argsort(torch.cat(order))
    # The position of each RoI among the concatenated crops; argsort inverts the permutation. In training the gradient flows back.
    return torch.cat(crops).index_select(0, position)
