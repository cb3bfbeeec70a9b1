"""The smallest configuration in which a model has every part."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "weights": "none",
    "model.canvas": [64, 64],
    "model.fpn_channels": 16,
    "model.stage_channels": [16, 8, 8, 8],
    "model.box_features": 16,
    "model.anchor_sizes": [8, 16, 32, 64, 128],
    "model.proposals_training": 50,
    "model.proposals_per_level": 20,
    "model.proposals": 20,
    "model.rois_per_image": 16,
    "model.mask_rois_per_image": 4,
    "model.detections": 5,
    "train.evaluate_every_epochs": 0,
    "train.evaluate_images": 1,
    "train.calibration_detections": 0,
}
"""For `load_config`, over the fields of a configuration of `lite0`."""
