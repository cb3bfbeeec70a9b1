"""The sizes of the preset r50, at which the kernels are timed."""

from __future__ import annotations

import torch

from dynamask.config import R50
from dynamask.detector import RPN_NMS_THRESHOLD
from dynamask.rfpn import STAGE_LEVELS
from runtime.graph import GRIDS

CANVAS = R50.canvas
STRIDES = (4, 8, 16, 32, 64)
"""Of P2 to P6."""
PYRAMID_CHANNELS = R50.fpn_channels
STAGES = tuple(zip(R50.stage_channels, GRIDS, strict=True))
"""Channels and grid of the r-FPN's stages."""
CROP_STRIDES = tuple(2**level for level in STAGE_LEVELS)
"""Strides of the maps that the stages after the first crop from."""
ANCHOR_SIZES = R50.anchor_sizes
CANONICAL_SIZE = R50.canonical_size
CLASSES = 80
PROPOSALS = R50.proposals
"""Anchors kept on each level, and proposals in all."""
NMS_THRESHOLDS = {"Proposals": RPN_NMS_THRESHOLD, "Detections": R50.nms_threshold}
SCORE_THRESHOLD = R50.score_threshold
PRECISIONS = (torch.float16, torch.float32)
