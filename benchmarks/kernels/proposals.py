"""Proposals beside the proposal filter of torchvision's RPN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from benchmarks.kernels import sizes
from benchmarks.kernels.case import Case, against_calls, input_sets_beyond_cache, random, total_bytes
from trt_plugins.proposals import Proposals


def case(dtype: torch.dtype) -> Case:
    """All levels of one image."""
    shapes = [(-(-sizes.CANVAS[0] // stride), -(-sizes.CANVAS[1] // stride)) for stride in sizes.STRIDES]
    generator = AnchorGenerator(tuple((size,) for size in sizes.ANCHOR_SIZES), ((0.5, 1.0, 2.0),) * len(sizes.STRIDES))
    image = ImageList(torch.empty(1, 3, *sizes.CANVAS, device="cuda"), [sizes.CANVAS])
    anchors = generator(image, [torch.empty(1, 1, *shape, device="cuda") for shape in shapes])
    cells = torch.stack([cell.to("cuda") for cell in generator.cell_anchors])
    threshold = sizes.NMS_THRESHOLDS["Proposals"]
    operator = Proposals(strides=sizes.STRIDES, per_level=sizes.PROPOSALS, proposals=sizes.PROPOSALS, nms_threshold=threshold)
    limits = {"training": sizes.PROPOSALS, "testing": sizes.PROPOSALS}
    rpn = RegionProposalNetwork(generator, nn.Identity(), 0.7, 0.3, 256, 0.5, limits, limits, threshold).eval()

    def draw() -> list[Tensor]:
        """Logits that vary slowly from cell to cell, as a network's do."""
        logits = [torch.nn.functional.interpolate(random(1, 3, -(-h // 8), -(-w // 8)), (h, w), mode="bilinear") for h, w in shapes]
        logits = [logit + 0.1 * torch.randn_like(logit) for logit in logits]
        return [x.to(dtype) for x in (*logits, *(0.3 * random(1, 12, *shape) for shape in shapes))]

    def torchvision(maps: Sequence[Tensor]) -> object:
        """The filter of the region proposal network, in float32, on anchors that are computed beforehand."""
        logits, deltas = ([x.float() for x in part] for part in (maps[: len(shapes)], maps[len(shapes) :]))
        per_level = [logit.numel() for logit in logits]
        objectness, flat = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(flat, anchors).view(1, -1, 4)
        return rpn.filter_proposals(boxes, objectness, [sizes.CANVAS], per_level)

    maps = draw()
    sets = input_sets_beyond_cache(draw, maps, total_bytes(maps))
    return Case(f"Proposals: {sizes.PROPOSALS}", dtype, against_calls(operator, [[*each, cells] for each in sets], sets, torchvision))


def near(boxes: Tensor, count: int) -> Tensor:
    """`count` boxes `[count, 4]` on the canvas, each some pixels off one of `boxes [n, 4]`, as proposals are."""
    clusters = boxes[torch.arange(count, device=boxes.device) % len(boxes)]
    corner, side = clusters[:, :2], clusters[:, 2:] - clusters[:, :2]
    corner = corner + 0.1 * side * torch.randn_like(corner)
    moved = torch.cat([corner, corner + side * torch.exp(0.1 * torch.randn_like(side))], dim=1)
    height, width = sizes.CANVAS
    return moved.clamp(min=0).minimum(moved.new_tensor([width, height, width, height]))
