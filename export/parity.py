"""Compares the results of an engine with those of PyTorch, on images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.utils
import torch

from dynamask.model import DynaMask, GraphOutput
from dynamask.roi import image_rois
from export.seams import RPN_DELTAS, RPN_LOGITS
from runtime.graph import GRIDS, MSM, PYRAMID, SIZE_BASED
from runtime.targets.base import Engine, EngineOutput
from runtime.targets.ort import ort

BOX_TOLERANCE = 0.1
"""Pixels of the canvas."""
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 1e-3
"""Mask probability."""
RAW_TOLERANCE = 1e-3
"""Of a raw output: the largest difference over the tensor's largest magnitude, or over 1 where that is less."""


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
    raw_outputs: dict[str, float] | None = None
    """By seam, the largest relative difference; compared only where there is no instance (`raw_differences`)."""

    def holds(self) -> bool:
        """Whether something was compared, every difference is within its tolerance and every instance has the same grid."""
        if not self.instances:
            return self.raw_outputs is not None and all(difference <= RAW_TOLERANCE for difference in self.raw_outputs.values())
        within = self.box_pixels <= BOX_TOLERANCE and self.score <= SCORE_TOLERANCE and self.mask_probability <= MASK_TOLERANCE
        return within and not self.unmatched and not self.other_grids

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, with `holds`; without `raw_outputs` where instances were compared."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        return {**figures, "holds": self.holds()}


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
    return parity


@torch.inference_mode()
def raw_differences(model: DynaMask, graph: Path, canvases: Iterable[npt.NDArray[np.float32]]) -> dict[str, float]:
    """By seam, the largest relative difference of the graph in ONNX Runtime from PyTorch (`RAW_TOLERANCE`).

    For models that find no instance yet. The detector's maps are compared on the canvases `[1, 3, H, W]`. The outputs of the box head and
    of the MSM are compared on the maps and proposals that PyTorch gives, because near-equal scores have no order.
    """
    maps, heads = (*PYRAMID, *RPN_LOGITS, *RPN_DELTAS), ("box_region", "class_logits", "box_deltas")
    detector, box_head, switch = _parts(
        graph, [(["image"], maps), ([*PYRAMID, "proposals"], heads), ([*PYRAMID, "mask_boxes"], ("region", "msm_logits"))]
    )
    largest: dict[str, float] = {}

    def compare(part: ort.InferenceSession, feeds: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
        found = part.run(list(expected), {name: tensor.numpy() for name, tensor in feeds.items()})
        for (name, wanted), array in zip(expected.items(), found, strict=True):
            difference = float(np.abs(array - wanted.numpy()).max()) / max(1.0, float(wanted.abs().max()))
            largest[name] = max(largest.get(name, 0.0), difference)

    branch = model.mask_branch
    assert branch.msm is not None
    for canvas in canvases:
        image = torch.from_numpy(canvas)
        seen = model.detect(image)
        pyramid = dict(zip(PYRAMID, seen.pyramid, strict=False))
        compare(detector, {"image": image}, {**pyramid, **_named(RPN_LOGITS, seen.rpn_logits), **_named(RPN_DELTAS, seen.rpn_deltas)})
        compare(box_head, {**pyramid, "proposals": seen.proposals}, {name: getattr(seen, name) for name in heads})
        boxes = seen.proposals[: model.sizes.detections]
        region = branch.region(seen.pyramid, image_rois(boxes))
        compare(switch, {**pyramid, "mask_boxes": boxes}, {"region": region, "msm_logits": branch.msm(region)})
    return largest


def _parts(graph: Path, ends: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[ort.InferenceSession]:
    """Sessions of the parts of a graph between the given inputs and outputs."""
    extractor = onnx.utils.Extractor(onnx.load(graph))
    models = [extractor.extract_model(list(inputs), list(outputs)) for inputs, outputs in ends]
    return [ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in models]


def _named(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(names, tensors, strict=True))


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
