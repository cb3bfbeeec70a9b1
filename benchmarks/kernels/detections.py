"""Detections beside the postprocessing of torchvision's RoI heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from benchmarks.kernels import sizes
from benchmarks.kernels.case import Case, against_calls, finest_map, input_sets_beyond_cache, random, total_bytes
from dynamask.detector import CANDIDATES_PER_DETECTION
from trt_plugins.detections import Detections


def case(proposals: Tensor, slots: int, dtype: torch.dtype) -> Case:
    """`slots` detections from `proposals [P, 4]` of one image."""
    rows, threshold = len(proposals), sizes.NMS_THRESHOLDS["Detections"]
    limits: dict[str, Any] = {"proposals": rows, "detections": slots, "candidates": CANDIDATES_PER_DETECTION * slots}
    limits |= {"score_threshold": sizes.SCORE_THRESHOLD, "nms_threshold": threshold}
    operator = Detections(stride=sizes.STRIDES[0], **limits)
    heads = RoIHeads(nn.Identity(), None, None, 0.5, 0.5, 512, 0.25, None, sizes.SCORE_THRESHOLD, threshold, slots).eval()
    count, no_score = torch.tensor([rows], dtype=torch.int32, device="cuda"), torch.zeros((), device="cuda")

    def draw() -> list[Tensor]:
        """The logits favour the same class for proposals of the same object, by amounts that vary."""
        logits = random(rows, sizes.CLASSES + 1)
        index = torch.arange(rows, device="cuda")
        logits[index, 1 + index % slots % sizes.CLASSES] += 4 + 2 * random(rows)
        return [logits.to(dtype), random(rows, 4 * (sizes.CLASSES + 1), dtype=dtype)]

    def torchvision(inputs: Sequence[Tensor]) -> object:
        """The postprocessing of the RoI heads, in float32."""
        return heads.postprocess_detections(*(x.float() for x in inputs), [proposals], [sizes.CANVAS])

    outputs = draw()
    sets = input_sets_beyond_cache(draw, outputs, total_bytes(outputs))
    ours = [[*each, proposals, count, no_score, finest_map()] for each in sets]
    return Case(f"Detections: {slots} of {rows} × {sizes.CLASSES}", dtype, against_calls(operator, ours, sets, torchvision))
