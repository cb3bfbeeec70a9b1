"""Multiply-accumulates, counted from the modules themselves (paper, Table 7, calls them FLOPs)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynamask.baselines import MaskRCNNConvolutions, MaskRCNNPredictor
from dynamask.config import Config, ModelConfig
from dynamask.deform_conv import DeformConv2d
from runtime.graph import GRIDS

if TYPE_CHECKING:
    from dynamask.model import MaskBranch

PAPER_GMACS: tuple[float, float, float, float] = (0.23, 0.62, 1.01, 1.40)
"""Table 7: cost per instance at 14, 28, 56 and 112."""


class MacCounter:
    """Counts the multiply-accumulates of the convolutions (deformable, transposed) and linear layers that run while it is open.

    The counts stand under the modules' names, `{name: MACs}`. Element-wise work, sampling and pooling are not counted, as in the paper.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.macs: dict[str, int] = {}

    def __enter__(self) -> MacCounter:
        self._handles = [
            layer.register_forward_hook(self._hook(name))
            for name, layer in self.module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, DeformConv2d))
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            # Each tap of a transposed convolution is applied to every input position, of the others to every output position.
            applied = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            positions = applied.numel() // applied.shape[-1 if isinstance(layer, nn.Linear) else 1]
            self.macs[name] = self.macs.get(name, 0) + positions * weight.numel()

        return count

    def total(self) -> float:
        """All of it, in GMAC."""
        return sum(self.macs.values()) / 1e9


@torch.no_grad()
def grid_gmacs(branch: MaskBranch) -> list[float]:
    """The cumulative cost of one instance at each grid, GMAC: r-FPN up to the grid, and that grid's head for the instance's own class.

    What is done once an image (`image_gmacs`) and the MSM are not in it. For a Mask R-CNN head: what this head costs at each grid.
    """
    rfpn = branch.rfpn
    if isinstance(rfpn, MaskRCNNConvolutions):
        return _mask_rcnn_gmacs(branch)
    cumulative, spent = [], 0.0
    feature = torch.zeros(1, branch.pyramid_channels, GRIDS[0], GRIDS[0])
    for k, (grid, channels) in enumerate(zip(GRIDS, branch.stage_channels, strict=True)):
        module = rfpn.tiny if k == 0 else rfpn.stages[k - 1]
        with MacCounter(module) as counter:
            crop = [torch.zeros(1, channels, grid, grid)] if k > 0 else []
            feature = module(feature, *crop)
        spent += counter.total()
        cumulative.append(spent + channels * grid * grid / 1e9)
    return cumulative


def _mask_rcnn_gmacs(branch: MaskBranch) -> list[float]:
    """Counted at the smallest grid: a head of convolutions alone costs in proportion to its area."""
    smallest, channels = GRIDS[0], branch.pyramid_channels
    heads = branch.heads
    assert isinstance(heads, MaskRCNNPredictor)
    with MacCounter(branch) as counter:
        heads.upsample(branch.rfpn.tiny(torch.zeros(1, channels, smallest // 2, smallest // 2)))
    return [(counter.total() + channels * smallest**2 / 1e9) * (grid / smallest) ** 2 for grid in GRIDS]


@torch.no_grad()
def image_gmacs(branch: MaskBranch, canvas: tuple[int, int]) -> float:
    """What the mask branch does once an image of `canvas` (height, width, pixels): its pyramid and the lateral reductions, GMAC."""
    pyramid = [torch.zeros(1, branch.pyramid_channels, canvas[0] // stride, canvas[1] // stride) for stride in (4, 8, 16, 32)]
    with MacCounter(branch) as counter:
        branch.rfpn.lateral(pyramid)
    return counter.total()


@torch.no_grad()
def msm_gmacs(branch: MaskBranch) -> float:
    """The cost of one instance's switching, GMAC."""
    with MacCounter(branch.msm) as counter:
        branch.msm(torch.zeros(1, branch.pyramid_channels, GRIDS[0], GRIDS[0]))
    return counter.total()


def count(config: ModelConfig, classes: int = 80) -> dict[str, Any]:
    """The preset's costs: `cumulative_gmacs` and `paper_gmacs` by grid, `msm` per instance, and `detector` per image, in GMAC."""
    from dynamask.inference import detect
    from dynamask.model import build_model

    model = build_model(Config(model=config), [{"id": i + 1, "name": str(i + 1)} for i in range(classes)]).eval()
    with torch.inference_mode(), MacCounter(model) as counter:
        detect(model, torch.zeros(1, 3, *config.canvas))
    return {
        "model": config.preset,
        "canvas": list(config.canvas),
        "cumulative_gmacs": dict(zip(map(str, GRIDS), grid_gmacs(model.mask_branch), strict=True)),
        "paper_gmacs": dict(zip(map(str, GRIDS), PAPER_GMACS, strict=True)),
        "msm": msm_gmacs(model.mask_branch),
        "detector": counter.total(),
    }
