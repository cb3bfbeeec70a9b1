"""Masks as bits, made from the masks that the host pastes; and an engine that gives them."""

from __future__ import annotations

import dataclasses

import numpy as np

from runtime.instances import Instances
from runtime.paste import Crop, PackedMask
from runtime.predictor import to_instances


def pack(crop: Crop) -> PackedMask:
    """The bits of a mask that is given as pixels: each row is padded to 32 pixels."""
    left, top, mask = crop
    rows, columns = mask.shape
    words = (columns + 31) // 32
    weights = (np.int64(1) << np.arange(32)).astype(np.uint32)
    padded = np.zeros((rows, 32 * words), np.uint32)
    padded[:, :columns] = mask
    bits = (padded.reshape(rows, words, 32) * weights).sum(axis=2, dtype=np.uint32)
    return PackedMask(left, top, columns, bits.view(np.int32))


def packed(instances: Instances) -> Instances:
    """The same instances with bits in place of logits."""
    return dataclasses.replace(instances, mask_data=[pack(crop) for crop in instances.crops()])


class PackingEngine:
    """Another engine, as one that pastes masks on its device."""

    def __init__(self, engine):
        self.engine, self.target, self.manifest, self.profile = engine, engine.target, engine.manifest, engine.profile
        self.costs, self.threads, self.takes_costs, self.processor = engine.costs, engine.threads, engine.takes_costs, engine.processor

    def run(self, image, budget_gmacs=None, grid_override=None, min_score=0.0, frames=None, masks_ms=None):
        output = self.engine.run(image, budget_gmacs, grid_override, min_score, masks_ms=masks_ms)
        if frames is None:
            return output
        slots, masks = self.manifest.detections, {}
        for b, (part, frame) in enumerate(zip(output.per_image(len(image)), frames, strict=True)):
            own = packed(to_instances(part, frame, self.manifest.classes, {})).mask_data
            masks |= {slots * b + slot: mask for slot, mask in enumerate(own)}
        return dataclasses.replace(output, masks={}, pasted=masks, times_ms={**output.times_ms, "paste": 1.0 * len(image)})

    def close(self):
        self.engine.close()
