"""Feature Aggregation Module (paper, Figure 3): aligns the r-FPN's feature to the i-FPN's crop and fuses them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.deform_conv import TAPS, DeformConv2d
from dynamask.initialise import gaussian, kaiming


class FeatureAggregation(nn.Module):
    """One stage of the r-FPN: `(region [N, C_in, S, S], crop [N, C, 2S, 2S]) -> [N, C, 2S, 2S]`.

    The region feature is reduced to the stage's channels before it is upsampled (a quarter of the cost of doing it after).
    Deformable convolution 1 aligns it to the crop with offsets seen from both; deformable convolution 2, with offsets of its
    own, adds what it gathers from the salient parts to the fused feature (the sum is our choice; the paper leaves it open).
    Offsets start at zero, so that training starts from two ordinary convolutions.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.align_offset = nn.Conv2d(2 * channels, 2 * TAPS, 3, padding=1)
        self.align = DeformConv2d(channels, channels)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        self.attend_offset = nn.Conv2d(channels, 2 * TAPS, 3, padding=1)
        self.attend = DeformConv2d(channels, channels)
        kaiming(self.reduce, self.fuse)
        gaussian(0.0, self.align_offset, self.attend_offset)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        region = F.interpolate(self.reduce(region), scale_factor=2.0, mode="bilinear", align_corners=False)
        aligned = F.relu(self.align(region, self.align_offset(torch.cat([region, crop], dim=1))))
        fused = F.relu(self.fuse(torch.cat([aligned, crop], dim=1)))
        return F.relu(fused + self.attend(fused, self.attend_offset(fused)))
