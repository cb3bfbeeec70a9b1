"""Baselines of the paper: Mask R-CNN's mask head (Table 1), and other pyramids for the r-FPN to crop from (Table 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.config import TrainConfig
from dynamask.detector import Detections
from dynamask.flops import MacCounter
from dynamask.initialise import gaussian, kaiming
from dynamask.losses import grid_cross_entropy, switched_loss
from dynamask.mask_branch import MaskBranch, MaskLosses, RoutedMasks
from dynamask.msm import Budget
from dynamask.rfpn import own_class_logits
from dynamask.roi import image_rois
from runtime.errors import InputError
from runtime.graph import GRIDS, MSM


class MaskRCNNBranch(MaskBranch):
    """Mask R-CNN's mask head (He et al., ICCV 2017): masks of one grid for all instances.

    Four 3 x 3 convolutions at half the masks' resolution, a 2 x 2 transposed convolution of stride 2, and a 1 x 1 convolution
    that has a row for each class.

    Args:
        channels: of the i-FPN.
        outputs: rows of the last convolution, one for each class, or one in all.
        grid: of the masks, one of `GRIDS`.
        canonical_size: as in `MaskBranch`.
    """

    msm = None

    def __init__(self, channels: int, outputs: int, grid: int, canonical_size: float) -> None:
        super().__init__(grid // 2, canonical_size)
        self.grids = (grid,)
        self.channels = channels
        # The names of the parts are those of DynamicMaskBranch: `rfpn.tiny`, `heads.masks`.
        self.rfpn = nn.ModuleDict({"tiny": _four_convolutions(channels)})
        self.heads = MaskRCNNPredictor(channels, outputs)
        self.register_buffer("costs", torch.tensor(self.grid_gmacs()), persistent=False)

    def losses(
        self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor, targets: Sequence[Tensor], phase: int, recipe: TrainConfig
    ) -> MaskLosses:
        """Mask R-CNN's mask loss: cross-entropy at the head's own grid, averaged over cells and instances; the same in both phases."""
        (logits,), (grid,) = self.mask_logits(pyramid, rois, labels), self.grids
        loss = grid_cross_entropy([logits], [targets[GRIDS.index(grid)]])
        losses = {"loss_mask": switched_loss(torch.ones_like(loss), loss)}
        return MaskLosses(losses, {f"mask_{grid}": float(loss.detach().mean())})

    def segment(
        self, pyramid: Sequence[Tensor], detections: Detections, canvas: tuple[int, int], budget: Budget, override: Tensor
    ) -> RoutedMasks:
        """As `MaskBranch.segment`; every instance gets the branch's grid, whatever the budget.

        Raises:
            InputError: `override` asks for another grid.
        """
        (grid,) = self.grids
        index = GRIDS.index(grid)
        filled = detections.scores > 0
        if bool((filled & (override != MSM) & (override != index)).any()):
            raise InputError(f"A Mask R-CNN head of {grid} x {grid} makes masks of no other grid: let the model choose.")
        slots = torch.nonzero(filled)[:, 0]
        (logits,) = self.mask_logits(pyramid, image_rois(detections.boxes[slots]), detections.labels[slots])
        grids = torch.where(filled, index, -1)
        by_grid = [(slots, logits) if g == grid else (slots[:0], logits.new_zeros(0, g, g)) for g in GRIDS]
        return RoutedMasks(grids, *map(tuple, zip(*by_grid, strict=True)))

    def mask_logits(self, pyramid: Sequence[Tensor], rois: Tensor, labels: Tensor) -> list[Tensor]:
        """As `MaskBranch.mask_logits`: one tensor."""
        return [self.heads(self.rfpn["tiny"](self.region(pyramid, rois)), labels)]

    def edge_logits(self, pyramid: Sequence[Tensor], rois: Tensor) -> list[Tensor]:
        """None: Mask R-CNN predicts no edges."""
        return []

    @torch.no_grad()
    def grid_gmacs(self) -> list[float]:
        """As `MaskBranch.grid_gmacs`: the cost that the head would have at each grid.

        It is counted at the smallest grid, because convolutions cost in proportion to their area.
        """
        smallest = GRIDS[0]
        with MacCounter(self) as counter:
            self.heads.upsample(self.rfpn["tiny"](torch.zeros(1, self.channels, smallest // 2, smallest // 2)))
        return [(counter.total() + self.channels * smallest**2 / 1e9) * (grid / smallest) ** 2 for grid in GRIDS]


class MaskRCNNPredictor(nn.Module):
    """Features `[N, C, G / 2, G / 2]` and labels `[N]` (from 0) -> the logits `[N, G, G]` of each instance's own class."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.masks = nn.Conv2d(channels, outputs, 1)
        # An output pixel sees one tap: He's variance is that of a 1 x 1 convolution.
        nn.init.normal_(self.upsample.weight, std=(2 / channels) ** 0.5)
        nn.init.zeros_(self.upsample.bias)  # type: ignore[arg-type]
        gaussian(0.02, self.masks)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return own_class_logits(self.masks, F.relu(self.upsample(features)), labels)


def _four_convolutions(channels: int) -> nn.Sequential:
    layers = nn.Sequential()
    for _ in range(4):
        layers.extend([nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)])
    kaiming(layers)
    return layers


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
"""`model.pyramid` -> a module on P2..P5, made from their channels, whose outputs the r-FPN's stages crop from. `fpn` has none."""
