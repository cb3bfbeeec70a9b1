"""MsmRoute alone, and the mask branch with the kernels in it beside PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import sizes
from benchmarks.kernels.case import KERNEL, Case, bound, finest_map, launch, random, relative_error
from benchmarks.kernels.deform_conv import PLAIN
from benchmarks.kernels.roi_align import CROPS, REGION
from benchmarks.kernels.timing import Contender
from dynamask.msm import Budget
from runtime.graph import MSM
from trt_plugins.deform_conv.reference import packed_inputs
from trt_plugins.msm_route import MsmRoute

ROUTED, LARGEST = "mask branch, routed", "mask branch, all at 112"

Eager = Callable[[nn.Module, Sequence[Tensor], Tensor, Tensor, Tensor], Sequence[Tensor]]
"""PyTorch's mask branch on (branch, P2..P5, boxes `[n, 4]`, labels `[n]`, override `[n]`): the mask logits at each grid."""


def case(name: str, branch: nn.Module, eager: Eager, route: MsmRoute, boxes: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Case:
    """The mask branch with `counts` instances at the four grids."""
    peer = copy.deepcopy(branch).to(dtype)
    ours = with_kernels(peer)
    pyramid = [
        random(1, sizes.PYRAMID_CHANNELS, sizes.CANVAS[0] // stride, sizes.CANVAS[1] // stride, dtype=dtype) for stride in sizes.STRIDES[:4]
    ]
    labels = torch.randint(sizes.CLASSES, (len(boxes),), device="cuda")
    override = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[torch.randperm(len(boxes))].to("cuda")

    def by_kernels() -> list[Tensor]:
        return routed_masks(ours, route, pyramid, boxes, labels, override, counts)

    def by_pytorch() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
            return eager(peer, pyramid, boxes, labels, override)

    exact = eager(branch, [feature.float() for feature in pyramid], boxes, labels, override)
    error = max(relative_error(x, y) for x, y in zip(by_kernels(), exact, strict=True) if len(y))
    contenders = {
        KERNEL: Contender([by_kernels]),
        "kernel, called": Contender([by_kernels], graph=False),
        "PyTorch eager": Contender([by_pytorch], graph=False),
    }
    return Case(f"{name}: {' / '.join(map(str, counts))}", dtype, contenders, error=error)


def routing_case(route: MsmRoute, boxes: Tensor, budget: Budget) -> Case:
    """MsmRoute alone, on all boxes."""
    n = len(boxes)
    override = torch.full((n,), MSM, device="cuda")
    limits = [tensor.to("cuda") for tensor in budget]
    inputs = [random(n, 4), boxes, override, torch.arange(n, device="cuda"), *limits, finest_map()]
    name = "MsmRoute" if budget.mean == 0 else f"MsmRoute, budget {float(budget.mean):.2f}"
    return Case(name, torch.float32, {KERNEL: Contender([bound(launch, route, inputs)])})


def routed_masks(
    branch: Any, route: MsmRoute, pyramid: Sequence[Tensor], boxes: Tensor, labels: Tensor, override: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """The mask branch as an engine runs it: regions by RoiAlign, stages and their instances by MsmRoute.

    Args:
        branch: a result of `with_kernels`.
        route: for as many slots as there are boxes, of stride 4.
        pyramid: P2..P5, `[1, C, H_l, W_l]`.
        boxes: `[n, 4] float32`, xyxy in pixels of the canvas.
        labels: `[n] int64`.
        override: `[n] int64`, the grid of each.
        counts: the number of instances that exit at each grid. With it, the sizes that MsmRoute writes need not be read back.

    Returns:
        The mask logits at each grid, `[n_g, G, G]`.
    """
    [region] = launch(REGION, [*pyramid, boxes])
    slots = torch.arange(len(boxes), device=boxes.device)
    inputs = [branch.msm(region), boxes, override, slots, *branch.gmac_budget(), pyramid[0]]
    lists = dict(zip(route.outputs, launch(route, inputs), strict=True))
    laterals, feature, logits = branch.rfpn.lateral(pyramid), branch.rfpn.tiny(region), []
    for k, (_, grid) in enumerate(sizes.STAGES):
        if k > 0:
            continuing = lists[f"continue_{grid}"][: sum(counts[k:])]
            feature, boxes = feature.index_select(0, continuing), boxes.index_select(0, continuing)
            feature = branch.rfpn.stages[k - 1](feature, launch(CROPS[k - 1], [laterals[k - 1], boxes])[0])
        exiting, slots_out = (lists[f"{name}_{grid}"][: counts[k]] for name in ("exit", "slots"))
        logits.append(branch.heads.mask_logits(k, feature.index_select(0, exiting), labels.index_select(0, slots_out)))
    return logits


def with_kernels(branch: nn.Module) -> Any:
    """A copy of the mask branch whose deformable convolutions are the kernel's."""
    branch = copy.deepcopy(branch)
    for stage in branch.rfpn.stages:  # type: ignore[union-attr]
        stage.align, stage.attend = KernelDeformConv2d(stage.align), KernelDeformConv2d(stage.attend)
    return branch


class KernelDeformConv2d(nn.Module):
    """`dynamask.deform_conv.DeformConv2d` by the kernel: (x `[n, C, H, W]`, offset `[n, 18, H, W]`) -> `[n, O, H, W]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias = layer.bias
        _, self.weight = packed_inputs([self.bias, layer.weight])  # type: ignore[list-item]

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return launch(PLAIN, [x, self.weight, offset, self.bias])[0]  # type: ignore[list-item]
