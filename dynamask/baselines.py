"""What DynaMask is compared with: Mask R-CNN's plain mask head (Table 1), and other pyramids in place of the r-FPN's fusion (Table 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.initialise import gaussian, kaiming
from dynamask.rfpn import own_class_logits
from runtime.errors import InputError
from runtime.graph import GRIDS

NEVER = -1e4
"""The logit of a grid that a Mask R-CNN head has not."""


class MaskRCNNConvolutions(nn.Module):
    """The four 3 x 3 convolutions of Mask R-CNN's head (He et al., ICCV 2017), at half the masks' resolution: `[N, C, G / 2, G / 2]`.

    `tiny` holds them, and there are no stages behind: called as an r-FPN, it hands its feature on to whichever grid is asked for.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tiny = nn.Sequential()
        for _ in range(4):
            self.tiny.extend([nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)])
        kaiming(self.tiny)

    def lateral(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """P2..P5 -> three maps for stages that look at none."""
        return [pyramid[0]] * 3

    def stage(self, k: int, region: Tensor, lateral: Tensor, rois: Tensor) -> Tensor:
        """`region`, as it is."""
        return region


class MaskRCNNPredictor(nn.Module):
    """Mask logits at one grid: a 2 x 2 transposed convolution of stride 2, and a 1 x 1 convolution with a row a class."""

    def __init__(self, channels: int, outputs: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.masks = nn.Conv2d(channels, outputs, 1)
        # An output pixel sees one tap: He's variance is that of a 1 x 1 convolution.
        nn.init.normal_(self.upsample.weight, std=(2 / channels) ** 0.5)
        nn.init.zeros_(self.upsample.bias)  # type: ignore[arg-type]
        gaussian(0.02, self.masks)

    def mask_logits(self, k: int, features: Tensor, labels: Tensor) -> Tensor:
        """The logits `[N, G, G]` of each instance's own class (`labels [N]`, from 0) at `GRIDS[k]`.

        Raises:
            InputError: there are instances, and that is not the head's grid.
        """
        if GRIDS[k] == self.grid:
            return own_class_logits(self.masks, F.relu(self.upsample(features)), labels)
        if len(features):
            raise InputError(f"A Mask R-CNN head of {self.grid} x {self.grid} makes no masks of {GRIDS[k]} x {GRIDS[k]}: ask for its own.")
        return features.new_zeros(0, GRIDS[k], GRIDS[k])


class OneGrid(nn.Module):
    """In place of the MSM: logits `[N, 4]` that leave no choice but `grid`."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.index = GRIDS.index(grid)

    def forward(self, region: Tensor) -> Tensor:
        logits = torch.full((len(region), len(GRIDS)), NEVER, device=region.device)
        logits[:, self.index] = 0.0
        return logits


class PathAggregation(nn.Module):
    """PANet's bottom-up path (Liu et al., CVPR 2018, section 3.1) over P2..P4, the levels that the r-FPN crops from.

    `N2 = P2`, and from each level to the next `N = conv(P + conv(N of the level before, stride 2))`, all 3 x 3 with ReLU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2))
        self.fuse = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        kaiming(self.down, self.fuse)

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """P2..P5 `[B, C, H_l, W_l]` -> N2..N4, of their shapes."""
        levels = [pyramid[0]]
        for down, fuse, level in zip(self.down, self.fuse, pyramid[1:], strict=False):
            levels.append(F.relu(fuse(level + F.relu(down(levels[-1])))))
        return levels


class WeightedSum(nn.Module):
    """A node of a BiFPN (Tan et al., CVPR 2020, section 3.3): fast normalised fusion of its inputs, then a separable convolution."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        kaiming(self.depthwise, self.pointwise)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tensors of one shape `[B, C, H, W]` -> one of that shape."""
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        mixed = torch.stack([w * x for w, x in zip(weights, inputs, strict=True)]).sum(dim=0)
        return F.relu(self.pointwise(self.depthwise(mixed)))


class BidirectionalPyramid(nn.Module):
    """One BiFPN layer (Tan et al., CVPR 2020) over P2..P5, up to P4, the coarsest level that the r-FPN crops from; without batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.top_down = nn.ModuleList(WeightedSum(2, channels) for _ in range(3))
        self.bottom_up = nn.ModuleList(WeightedSum(3, channels) for _ in range(2))

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """P2..P5 `[B, C, H_l, W_l]` -> P2..P4, of their shapes."""
        p2, p3, p4, p5 = pyramid[:4]
        middle4 = self.top_down[0](p4, F.interpolate(p5, scale_factor=2.0))
        middle3 = self.top_down[1](p3, F.interpolate(middle4, scale_factor=2.0))
        out2 = self.top_down[2](p2, F.interpolate(middle3, scale_factor=2.0))
        out3 = self.bottom_up[0](p3, middle3, F.max_pool2d(out2, 3, stride=2, padding=1))
        out4 = self.bottom_up[1](p4, middle4, F.max_pool2d(out3, 3, stride=2, padding=1))
        return [out2, out3, out4]


PYRAMIDS: dict[str, Callable[[int], nn.Module]] = {"panet": PathAggregation, "bifpn": BidirectionalPyramid}
"""`model.pyramid` -> what P2..P5 go through before the r-FPN's stages crop from them; `fpn` goes through nothing."""
