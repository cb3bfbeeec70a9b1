"""RoiAlign beside torchvision's `roi_align`, level by level, and its `MultiScaleRoIAlign`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benchmarks.kernels import sizes
from benchmarks.kernels.case import KERNEL, Case, bound, input_sets_beyond_cache, launch, random, relative_error, total_bytes
from benchmarks.kernels.timing import Contender
from trt_plugins.roi_align import RoiAlign
from trt_plugins.roi_align.reference import pyramid_level
from trt_plugins.roi_align.reference import roi_align as reference_roi_align

REGION = RoiAlign(strides=sizes.STRIDES[:4], size=sizes.STAGES[0][1], samples=2, aligned=1, canonical_size=sizes.CANONICAL_SIZE)

CROPS = [
    RoiAlign(strides=(stride,), size=grid, samples=1, aligned=1)
    for stride, (_, grid) in zip(sizes.CROP_STRIDES, sizes.STAGES[1:], strict=True)
]


def case(name: str, operator: RoiAlign, channels: int, rois: Tensor, dtype: torch.dtype) -> Case:
    """One or several levels of one image, with `rois [n, 4]`."""
    values = operator.values
    strides, levels, size = values["strides"], len(values["strides"]), values["size"]

    def draw() -> list[Tensor]:
        return [random(1, channels, -(-sizes.CANVAS[0] // stride), -(-sizes.CANVAS[1] // stride), dtype=dtype) for stride in strides]

    maps = draw()
    [regions] = launch(operator, [*maps, rois])
    error = relative_error(regions, reference_roi_align(maps, rois, **values))
    level = torch.tensor([pyramid_level(roi, levels, values["canonical_size"]) if levels > 1 else 0 for roi in rois.cpu()])
    with_image = torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1).to(dtype)
    split = [with_image[(level == index).to(rois.device)] for index in range(levels)]

    def by_level(maps: Sequence[Tensor]) -> list[Tensor]:
        """Crops by level. The RoIs are in the maps' type, as torchvision requires, and are split by level beforehand."""
        return [
            roi_align(feature, part, size, 1 / stride, values["samples"], bool(values["aligned"]))
            for feature, part, stride in zip(maps, split, strides, strict=True)
            if len(part)
        ]

    sets = input_sets_beyond_cache(draw, maps, total_bytes([*maps, regions]))
    contenders = {
        KERNEL: Contender([bound(launch, operator, [*each, rois]) for each in sets]),
        "torchvision by level": Contender([bound(by_level, each) for each in sets]),
    }
    if levels > 1 and not values["aligned"]:
        names = [str(index) for index in range(levels)]
        pooler = MultiScaleRoIAlign(names, size, values["samples"], canonical_scale=values["canonical_size"])
        named = [{str(index): feature for index, feature in enumerate(each)} for each in sets]
        contenders["torchvision MultiScaleRoIAlign"] = Contender(
            [bound(pooler, each, [rois.to(dtype)], [sizes.CANVAS]) for each in named], graph=False
        )
    return Case(f"RoiAlign, {name}: {len(rois)} × {channels} @ {size}", dtype, contenders, error=error)
