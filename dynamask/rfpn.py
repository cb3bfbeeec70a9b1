"""The region-level FPN (paper, section 3.1): from a 14 x 14 RoI feature, three stages up to 112 x 112."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.fam import FeatureAggregation
from dynamask.initialise import gaussian, kaiming
from dynamask.roi import roi_align
from runtime.graph import GRIDS

STAGE_LEVELS: tuple[int, int, int] = (4, 3, 2)
"""The i-FPN level that each stage (28, 56, 112) is fused with."""


class RegionFPN(nn.Module):
    """r-FPN: `tiny` makes L_tiny from the RoI feature, `stage(k, …)` makes the feature of grid `GRIDS[k]` from that of `GRIDS[k - 1]`.

    The i-FPN levels that the stages need are reduced to the stages' channels on the pyramid, once per image (`lateral`).

    Args:
        pyramid_channels: of the i-FPN.
        channels: of the four grids' features.
        fusion: makes the module of a stage from its numbers of input and output channels (`dynamask.fam`).
        pyramid: P2..P5 -> the levels that the stages crop from (`dynamask.baselines`); the i-FPN's own where None.
    """

    def __init__(
        self,
        pyramid_channels: int,
        channels: Sequence[int],
        fusion: Callable[[int, int], nn.Module] = FeatureAggregation,
        pyramid: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pyramid_channels, self.channels = pyramid_channels, tuple(channels)
        self.tiny = nn.Sequential(
            nn.Conv2d(pyramid_channels, channels[0], 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels[0], channels[0], 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.laterals = nn.ModuleList(nn.Conv2d(pyramid_channels, c, 1) for c in channels[1:])
        self.stages = nn.ModuleList(fusion(channels[k], channels[k + 1]) for k in range(3))
        kaiming(self.tiny, self.laterals)
        self.pyramid = pyramid

    def lateral(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """P2..P5 `[B, C, H_l, W_l]` -> the maps that stages 1, 2, 3 crop from, at their channels (P4, P3, P2)."""
        if self.pyramid is not None:
            pyramid = self.pyramid(pyramid)
        return [F.relu(layer(pyramid[level - 2])) for layer, level in zip(self.laterals, STAGE_LEVELS, strict=True)]

    def stage(self, k: int, region: Tensor, lateral: Tensor, rois: Tensor) -> Tensor:
        """The feature `[N, C_k, GRIDS[k], GRIDS[k]]` of stage `k` in 1..3, for instances `rois [N, 5]` (batch index, xyxy pixels)."""
        # One sample per bin: for boxes of up to 448 pixels a side, a stage's bins are no wider than a cell of its pyramid level.
        crop = roi_align(lateral, rois, GRIDS[k], stride=2 ** STAGE_LEVELS[k - 1], samples=1)
        features: Tensor = self.stages[k - 1](region, crop)
        return features


class GridHeads(nn.Module):
    """Mask logits and edge logits at the four grids, from 1 x 1 convolutions.

    `masks[k]` has one channel for each class, or a single one at 112 x 112 if the model is class-agnostic there.
    """

    def __init__(self, channels: Sequence[int], classes: int, class_agnostic_largest: bool) -> None:
        super().__init__()
        outputs = [classes, classes, classes, 1 if class_agnostic_largest else classes]
        self.masks = nn.ModuleList(nn.Conv2d(c, o, 1) for c, o in zip(channels, outputs, strict=True))
        self.edges = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in channels)
        gaussian(0.02, self.masks, self.edges)

    def mask_logits(self, k: int, features: Tensor, labels: Tensor) -> Tensor:
        """The logits `[N, G, G]` of each instance's own class (`labels [N]`, from 0), and of no other."""
        layer: nn.Conv2d = self.masks[k]  # type: ignore[assignment]
        return own_class_logits(layer, features, labels)

    def edge_logits(self, k: int, features: Tensor) -> Tensor:
        """Edge logits `[N, G, G]`."""
        edges: Tensor = self.edges[k](features)
        return edges[:, 0]


def own_class_logits(layer: nn.Conv2d, features: Tensor, labels: Tensor) -> Tensor:
    """The 1 x 1 convolution `layer` on features `[N, C, G, G]`, for the row of each instance's class alone: `[N, G, G]`.

    `labels [N]` count from 0; a layer of one row is that of all classes.
    """
    _, channels, height, width = features.shape
    rows = labels if layer.out_channels > 1 else torch.zeros_like(labels)
    weight = layer.weight.view(layer.out_channels, 1, channels).index_select(0, rows)
    bias = layer.bias.index_select(0, rows)[:, None, None]  # type: ignore[union-attr]
    logits = torch.matmul(weight, features.flatten(2)) + bias
    return logits.reshape(-1, height, width)
