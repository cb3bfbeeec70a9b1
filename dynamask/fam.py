"""Feature Aggregation Module (paper, Figure 3): aligns the r-FPN's feature to the i-FPN's crop and fuses them; and simpler fusions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.deform_conv import TAPS, DeformConv2d
from dynamask.initialise import gaussian, kaiming


class AlignedFusion(nn.Module):
    """The FAM without its second deformable convolution: `(region [N, C_in, S, S], crop [N, C, 2S, 2S]) -> [N, C, 2S, 2S]`.

    The region feature is reduced to the stage's channels before it is upsampled (a quarter of the cost of doing it after).
    Deformable convolution 1 aligns it to the crop with offsets seen from both. Offsets start at zero, so that training starts from an
    ordinary convolution.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.align_offset = nn.Conv2d(2 * channels, 2 * TAPS, 3, padding=1)
        self.align = DeformConv2d(channels, channels)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        kaiming(self.reduce, self.fuse)
        gaussian(0.0, self.align_offset)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        region = upsampled(self.reduce(region))
        aligned = F.relu(self.align(region, self.align_offset(torch.cat([region, crop], dim=1))))
        return F.relu(self.fuse(torch.cat([aligned, crop], dim=1)))


class FeatureAggregation(AlignedFusion):
    """One stage of the r-FPN: `(region [N, C_in, S, S], crop [N, C, 2S, 2S]) -> [N, C, 2S, 2S]`.

    Deformable convolution 2, with offsets of its own, adds its samples of the salient parts to the aligned and fused feature. The paper
    does not say how the two are combined; the sum is our choice.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__(inputs, channels)
        self.attend_offset = nn.Conv2d(channels, 2 * TAPS, 3, padding=1)
        self.attend = DeformConv2d(channels, channels)
        gaussian(0.0, self.attend_offset)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        fused = super().forward(region, crop)
        return F.relu(fused + self.attend(fused, self.attend_offset(fused)))


class ConvolutionFusion(nn.Module):
    """The FAM with ordinary 3 x 3 convolutions in place of both deformable ones, and so without offsets."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.align = nn.Conv2d(channels, channels, 3, padding=1)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        self.attend = nn.Conv2d(channels, channels, 3, padding=1)
        kaiming(self.reduce, self.align, self.fuse, self.attend)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        aligned = F.relu(self.align(upsampled(self.reduce(region))))
        fused = F.relu(self.fuse(torch.cat([aligned, crop], dim=1)))
        return F.relu(fused + self.attend(fused))


class AdditiveFusion(nn.Module):
    """The fusion of an FPN (Lin et al., CVPR 2017): both features added, then a 3 x 3 convolution."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        kaiming(self.reduce, self.smooth)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        return F.relu(self.smooth(upsampled(self.reduce(region)) + crop))


class HalfAlignedFusion(nn.Module):
    """Deformable alignment at the region's own resolution, a quarter of the cells that the FAM aligns.

    The crop is averaged over 2 x 2 cells for the offsets; the aligned feature is upsampled and fused with the whole crop by a 3 x 3
    convolution.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.align_offset = nn.Conv2d(2 * channels, 2 * TAPS, 3, padding=1)
        self.align = DeformConv2d(channels, channels)
        self.fuse = nn.Conv2d(2 * channels, channels, 3, padding=1)
        kaiming(self.reduce, self.fuse)
        gaussian(0.0, self.align_offset)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        region = self.reduce(region)
        offset = self.align_offset(torch.cat([region, F.avg_pool2d(crop, 2)], dim=1))
        aligned = upsampled(F.relu(self.align(region, offset)))
        return F.relu(self.fuse(torch.cat([aligned, crop], dim=1)))


class CoarseFusion(nn.Module):
    """A 3 x 3 convolution at the region's resolution, and one that fuses it with the crop at the crop's."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.align = nn.Conv2d(inputs, channels, 3, padding=1)
        self.fuse = nn.Conv2d(2 * channels, channels, 3, padding=1)
        kaiming(self.align, self.fuse)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        aligned = upsampled(F.relu(self.align(region)))
        return F.relu(self.fuse(torch.cat([aligned, crop], dim=1)))


class CoarseAddition(nn.Module):
    """`CoarseFusion` with the crop added, not concatenated."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.align = nn.Conv2d(inputs, channels, 3, padding=1)
        self.fuse = nn.Conv2d(channels, channels, 3, padding=1)
        kaiming(self.align, self.fuse)

    def forward(self, region: Tensor, crop: Tensor) -> Tensor:
        return F.relu(self.fuse(upsampled(F.relu(self.align(region))) + crop))


def upsampled(region: Tensor) -> Tensor:
    """Twice the resolution, bilinear: `[N, C, S, S] -> [N, C, 2S, 2S]`."""
    return F.interpolate(region, scale_factor=2.0, mode="bilinear", align_corners=False)


FUSIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "fam": FeatureAggregation,
    "one_deform": AlignedFusion,
    "conv": ConvolutionFusion,
    "add": AdditiveFusion,
    "half_fam": HalfAlignedFusion,
    "coarse": CoarseFusion,
    "coarse_add": CoarseAddition,
}
"""`model.fusion` -> a stage's module, made from its numbers of input and output channels."""
