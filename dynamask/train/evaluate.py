"""Average precision of a model during training: PyTorch, image by image, with the runtime's letterbox, masks and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynamask.config import Config
from dynamask.data.coco import LabelledDataset
from dynamask.model import DynaMask
from runtime.budget import BudgetKeeper
from runtime.coco_metrics import evaluate_coco
from runtime.graph import GRIDS, MSM
from runtime.instances import ClassName, Instances
from runtime.policies import Policy
from runtime.preprocess import letterbox_normalise
from runtime.statistics import grid_statistics

ROUTED = Policy("routed")
"""The MSM's argmax (Eq. 1)."""


def evaluate(
    model: DynaMask,
    dataset: LabelledDataset,
    config: Config,
    images: int | None = None,
    grid: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    policy: Policy = ROUTED,
    iou_types: Sequence[str] = ("bbox", "segm"),
) -> dict[str, Any] | None:
    """AP of the model on the first `images` images of a data set. The model keeps its mode (training or evaluation).

    Args:
        grid: one of `GRIDS` for every instance; None follows `policy`. A Mask R-CNN head uses its own grid in any case.
        stop: asked before each image.
        policy: how the grids are chosen (`runtime.policies.parse_policy`); a budget is kept over all images, as `dynamask validate` does.
        iou_types: of `runtime.coco_metrics.evaluate_coco`.

    Returns:
        By IoU type AP, AP50, AP75, AP_S, AP_M, AP_L, of LVIS also AP_r, AP_c, AP_f, times 100; `share` of each grid among the detections,
        `images`, `detections`; None if `stop` returned True.
    """
    if model.mask_branch.msm is None:
        policy = ROUTED
    elif grid is not None:
        policy = Policy(f"uniform-{grid}", grid_override=GRIDS.index(grid))
    grid_gmacs = dict(zip(GRIDS, model.mask_branch.costs.tolist(), strict=True))
    keeper = BudgetKeeper(policy.budget_gmacs, grid_gmacs)
    count = len(dataset) if images is None else min(images, len(dataset))
    results: list[dict[str, Any]] = []
    image_ids: list[int] = []
    grids: Counter[int] = Counter()
    training = model.training
    model.eval()
    try:
        for index in range(count):
            if stop():
                return None
            image, target = dataset[index]
            found = detect(model, image, config, dataset.classes, keeper.budget_gmacs(), policy.grid_override)
            keeper.spend(found.grids)
            image_ids.append(int(target["image_id"]))
            results += found.to_coco(image_ids[-1])
            grids.update(found.grids.tolist())
    finally:
        model.train(training)
    figures = evaluate_coco(dataset.coco_dict, results, iou_types, image_ids)
    return {**figures, "share": grid_statistics(grids, grid_gmacs)["share"], "images": count, "detections": len(results)}


def detect(
    model: DynaMask,
    image: npt.NDArray[np.uint8],
    config: Config,
    classes: Sequence[dict[str, Any]],
    budget_gmacs: float = 0.0,
    grid_override: int = MSM,
) -> Instances:
    """The instances in an image `[H, W, 3] uint8` RGB, found by the PyTorch model in evaluation mode; boxes in the image's pixels.

    `budget_gmacs` and `grid_override` are those of `DynaMask.predict`.
    """
    device = next(model.parameters()).device
    canvas, scale = letterbox_normalise(image, *config.model.canvas, config.model.mean, config.model.std)
    output = model.predict(torch.from_numpy(canvas).to(device), budget_gmacs, grid_override)
    filled = output.scores > 0
    logits: dict[int, npt.NDArray[np.float32]] = {}
    for slots, crops in zip(output.slots, output.logits, strict=True):
        logits.update(zip(slots.tolist(), crops.float().cpu().numpy(), strict=True))
    return Instances(
        boxes=(output.boxes[filled] / scale).cpu().numpy(),
        scores=output.scores[filled].cpu().numpy(),
        labels=output.labels[filled].cpu().numpy(),
        grids=np.array(GRIDS)[output.grids[filled].cpu().numpy()],
        mask_data=[logits[slot] for slot in filled.nonzero()[:, 0].tolist()],
        size=(image.shape[0], image.shape[1]),
        classes=[ClassName(entry["id"], entry["name"]) for entry in classes],
    )
