"""How far an engine's results are from PyTorch's, on images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynamask.model import DynaMask, GraphOutput
from runtime.errors import DynaMaskError
from runtime.graph import GRIDS, MSM, SIZE_BASED
from runtime.targets.base import Engine, EngineOutput

BOX_TOLERANCE = 0.1
"""Pixels of the canvas."""
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 1e-3
"""Mask probability."""


@dataclass
class Parity:
    """The largest differences over the images and policies compared; counts are of instances."""

    images: int = 0
    instances: int = 0
    unmatched: int = 0
    """Detections of PyTorch with no counterpart of the same class within `BOX_TOLERANCE` and `SCORE_TOLERANCE`."""
    other_grids: int = 0
    box_pixels: float = 0.0
    score: float = 0.0
    mask_probability: float = 0.0

    def holds(self) -> bool:
        """Whether every difference is within its tolerance and every instance has the same grid."""
        within = self.box_pixels <= BOX_TOLERANCE and self.score <= SCORE_TOLERANCE and self.mask_probability <= MASK_TOLERANCE
        return within and not self.unmatched and not self.other_grids

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, with `holds`."""
        return {**asdict(self), "holds": self.holds()}


def measure_parity(model: DynaMask, engine: Engine, canvases: Iterable[npt.NDArray[np.float32]]) -> Parity:
    """Compare an engine with the model on normalised canvases `[1, 3, H, W]`, routed, at half the largest cost, and at each policy.

    Instances are matched by class and box, not by slot: near-equal scores may swap slots.
    """
    parity = Parity()
    half = float(model.mask_branch.costs[-1]) / 2
    for canvas in canvases:
        parity.images += 1
        for budget, override in [(0.0, MSM), (half, MSM), (0.0, len(GRIDS) - 1), (0.0, SIZE_BASED)]:
            wanted = model.predict(torch.from_numpy(canvas), budget, override)
            _compare(parity, wanted, engine.run(canvas, budget or None, override))
    if not parity.instances:
        raise DynaMaskError("No instance was found on the images that parity was to be measured on: give others with --images.")
    return parity


def _compare(parity: Parity, wanted: GraphOutput, found: EngineOutput) -> None:
    masks = {int(s): (grid, m) for grid, (slots, logits) in found.masks.items() for s, m in zip(slots, logits, strict=True)}
    boxes, scores, labels = (getattr(wanted, name).numpy() for name in ("boxes", "scores", "labels"))
    free = np.ones(len(found.scores), bool)
    for grid, slots, logits in zip(GRIDS, wanted.slots, wanted.logits, strict=True):
        for slot, logit in zip(slots.tolist(), logits.numpy(), strict=True):
            parity.instances += 1
            match = _match(boxes[slot], scores[slot], labels[slot], found, free)
            if match is None:
                parity.unmatched += 1
                continue
            free[match] = False
            parity.box_pixels = max(parity.box_pixels, float(np.abs(found.boxes[match] - boxes[slot]).max()))
            parity.score = max(parity.score, float(abs(found.scores[match] - scores[slot])))
            other_grid, other = masks[match]
            if other_grid != grid:
                parity.other_grids += 1
            else:
                difference = np.abs(_sigmoid(other) - _sigmoid(logit)).max()
                parity.mask_probability = max(parity.mask_probability, float(difference))


def _match(box: npt.NDArray[np.float32], score: float, label: int, found: EngineOutput, free: npt.NDArray[np.bool_]) -> int | None:
    """The nearest free detection of the same class, if it is near enough to be the same one."""
    distance = np.abs(found.boxes - box).max(axis=1) + np.where((found.labels == label) & free, 0.0, np.inf)
    nearest = int(distance.argmin())
    near = distance[nearest] <= 10 * BOX_TOLERANCE and abs(found.scores[nearest] - score) <= 10 * SCORE_TOLERANCE
    return nearest if near else None


def _sigmoid(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -50, 50)))
