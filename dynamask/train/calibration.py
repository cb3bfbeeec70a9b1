"""Calibration of the MSM after training: its logits are regressed on the measured IoU of each grid's mask.

In phase 2 the MSM learns from Eq. 3 and 4 through one sampled grid per instance (Eq. 2). That signal is noisy, and it measures each grid
against a target of the grid's own resolution, so that a 14 x 14 mask of a fern counts as right (docs/results/shapes.md). Calibration
comes after the last step, when the features no longer change. It detects on training images, measures the IoU of each detection's mask at
all four grids in pixels, as average precision does, and regresses the MSM's logits on that. `log p_k` is then, up to a constant, the
expected IoU of grid k times `LOGITS_PER_IOU`, so that `argmax_k (log p_k - lambda c_k)` (`dynamask.msm.route`) is the best choice of grids
for its mean cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.data.augment import TrainingItems
from dynamask.model import DynaMask
from dynamask.msm import MaskSwitch
from dynamask.roi import image_rois
from dynamask.train.schedule import mixed_seed
from runtime.graph import GRIDS
from runtime.paste import mask_crop

IOU_RANGE = (0.45, 0.95)
"""IoUs are clipped to this range: average precision counts the thresholds 0.50, 0.55, .. 0.95, and sees no difference beyond it."""
LOGITS_PER_IOU = 10.0
"""Difference of `log p_k` for a difference of 1 in IoU: a step of 0.05, from one of AP's thresholds to the next, makes a grid 1.65 times
as likely."""
EPOCHS, BATCH, RATE, DECAY = 12, 128, 2e-3, 1e-2
"""Of AdamW, which fits the MSM."""
HELD_OUT = 10
"""One in so many detections is held out of the fit."""
_AUGMENTATION_EPOCH = 1_000_000
"""The epoch number that seeds the augmentation of the calibration images; no training epoch has it."""


class CalibrationSamples(NamedTuple):
    """N detections on training images."""

    regions: Tensor
    """`[N, C, 14, 14] float16`, the MSM's input."""
    ious: Tensor
    """`[N, 4] float32`, the IoU of the mask at each grid, clipped to `IOU_RANGE`."""

    @property
    def informative(self) -> bool:
        """Whether the IoU of at least one detection depends on the grid."""
        return bool((self.ious != self.ious[:, :1]).any())

    def split(self) -> tuple[CalibrationSamples, CalibrationSamples]:
        """The detections to fit, and those held out: the last tenth, which are of other images but for one. A single one is both."""
        held_out = max(1, len(self.ious) // HELD_OUT)
        fitted = max(1, len(self.ious) - held_out)
        return CalibrationSamples(self.regions[:fitted], self.ious[:fitted]), CalibrationSamples(
            self.regions[-held_out:], self.ious[-held_out:]
        )


def collect_samples(
    model: DynaMask,
    items: TrainingItems,
    count: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> CalibrationSamples | None:
    """Detect on training images, each at most once and in a random order, until there are `count` detections.

    The detections are those of the model in evaluation mode, false ones included: their IoU is the lowest of `IOU_RANGE` at every grid.

    Args:
        model: back in its mode afterwards.
        items: the training images.
        count: the number of detections wanted; there are fewer if the images do not give as many.
        seed: of the order of the images.
        progress: called with the number of detections so far, and `count`, after each image.
        stop: asked before each image.

    Returns:
        The samples, or None if `stop` returned True.
    """
    device, training = next(model.parameters()).device, model.training
    # "switch" is part of the seed of every run so far: another word would give other images.
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(mixed_seed(seed, "switch"))).tolist()
    regions: list[Tensor] = []
    ious: list[Tensor] = []
    found = 0
    model.eval()
    try:
        for index in order:
            if found >= count:
                break
            if stop():
                return None
            image, target = items[index, _AUGMENTATION_EPOCH]
            image_regions, image_ious = _image_samples(model, image.to(device), target)
            regions.append(image_regions)
            ious.append(image_ious)
            found += len(image_ious)
            progress(min(found, count), count)
    finally:
        model.train(training)
    return CalibrationSamples(torch.cat(regions)[:count], torch.cat(ious)[:count])


@torch.inference_mode()
def _image_samples(model: DynaMask, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The regions and IoUs of the detections in one image `[3, H, W]`."""
    branch = model.mask_branch
    found = model.detect(image[None])
    detections = found.detections
    filled = detections.scores > 0
    boxes, labels = detections.boxes[filled], detections.labels[filled]
    rois = image_rois(boxes)
    region = branch.region(found.pyramid, rois)
    logits = [x.float().cpu().numpy() for x in branch.mask_logits(found.pyramid, rois, labels)]
    ious = iou_by_grid(
        logits, boxes.cpu().numpy(), labels.cpu().numpy(), target["masks"].numpy().astype(bool), target["labels"].numpy() - 1
    )
    return region.half().cpu(), torch.from_numpy(ious)


def iou_by_grid(
    logits: Sequence[npt.NDArray[np.float32]],
    boxes: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    true_masks: npt.NDArray[np.bool_],
    true_labels: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """IoU, in pixels, of each detection's pasted mask at each grid with the true mask of its class that it fits best.

    Args:
        logits: by grid, `[N, G, G] float32`.
        boxes: `[N, 4] float32`, xyxy in pixels.
        labels: `[N] int64`.
        true_masks: `[M, H, W] bool`.
        true_labels: `[M] int64`, numbered as `labels` are.

    Returns:
        `[N, 4] float32`, clipped to `IOU_RANGE`.
    """
    height, width = true_masks.shape[1:]
    areas = true_masks.sum(axis=(1, 2))
    ious = np.full((len(boxes), len(GRIDS)), IOU_RANGE[0], np.float32)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        same_class = np.flatnonzero(true_labels == label)
        if not len(same_class):
            continue
        overlaps = np.empty((len(GRIDS), len(same_class)))
        for k in range(len(GRIDS)):
            x0, y0, crop = mask_crop(logits[k][i], box, height, width)
            shared = (true_masks[same_class, y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] & crop).sum(axis=(1, 2))
            overlaps[k] = shared / np.maximum(areas[same_class] + crop.sum() - shared, 1)
        ious[i] = overlaps[:, overlaps.max(axis=0).argmax()]
    return ious.clip(*IOU_RANGE)


def calibrate(msm: MaskSwitch, samples: CalibrationSamples, costs: Tensor, target: float, seed: int) -> dict[str, float]:
    """Regress the MSM's logits on the IoUs, then shift them by `-lambda c_k` so that their argmax keeps to a mean cost.

    The regression starts from the weights that the MSM has, and ends with those of the epoch after which it predicts the detections held
    out best; these may be the weights that it started from. Its target is `LOGITS_PER_IOU` times the IoU; both sides are centred over the
    grids, because the softmax does not see a constant. Lambda is the smallest for which the mean of `c_k` at
    `argmax_k (log p_k - lambda c_k)` over all samples is at most `target`; `-lambda c_k` goes into the last layer's bias. C_t is thus met
    without a budget at inference, and a lower budget continues from there.

    Args:
        msm: changed in place.
        costs: `[4] float32`, ascending, of an instance at each grid: GMAC or milliseconds.
        target: the mean cost of an instance, in the same unit.
        seed: of the order of the samples.

    Returns:
        `variance_explained`: the share of the IoUs' variance between grids that the MSM predicts on the detections that it was fitted to;
        `variance_explained_held_out`: the same on the `held_out` others, negative if the mean would predict them better; `epoch`, whose
        weights it has (0 are those that it started from); `mean_cost` of an instance, on all samples; `lambda`.
    """
    fitted, held_out = samples.split()
    epoch = _regress(msm, fitted, held_out, costs.device, seed)
    with torch.inference_mode():
        logits = _logits(msm, samples, costs.device)
        lambda_ = smallest_lambda(torch.log_softmax(logits, dim=-1), costs, target)
    explained = {
        "variance_explained": _explained(msm, fitted, costs.device),
        "variance_explained_held_out": _explained(msm, held_out, costs.device),
        "held_out": len(held_out.ious),
    }
    with torch.no_grad():
        msm.fc2.bias.sub_(lambda_ * costs)
    mean_cost = float(costs[(logits - lambda_ * costs).argmax(dim=-1)].mean())
    return {**explained, "epoch": epoch, "mean_cost": mean_cost, "lambda": lambda_}


def _regress(msm: MaskSwitch, fitted: CalibrationSamples, held_out: CalibrationSamples, device: torch.device, seed: int) -> int:
    """Least squares on the centred logits, with AdamW; returns the epoch after which `held_out` was predicted best, whose weights stay."""
    regions, wanted = fitted.regions, _centred(LOGITS_PER_IOU * fitted.ious)
    optimizer = torch.optim.AdamW(msm.parameters(), weight_decay=DECAY)
    steps = EPOCHS * max(1, len(regions) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    # "fit switch" is part of the seed of every run so far: another word would give another order.
    generator = torch.Generator().manual_seed(mixed_seed(seed, "fit switch"))
    best, best_epoch, best_weights = _residual(msm, held_out, device), 0, copy.deepcopy(msm.state_dict())
    for epoch in range(1, EPOCHS + 1):
        with torch.enable_grad():
            for rows in _batches(len(regions), generator):
                predicted = _centred(msm(regions[rows].float().to(device)))
                loss = F.mse_loss(predicted, wanted[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        if (residual := _residual(msm, held_out, device)) < best:
            best, best_epoch, best_weights = residual, epoch, copy.deepcopy(msm.state_dict())
    optimizer.zero_grad(set_to_none=True)
    msm.load_state_dict(best_weights)
    return best_epoch


def _logits(msm: MaskSwitch, samples: CalibrationSamples, device: torch.device) -> Tensor:
    return torch.cat([msm(part.float().to(device)) for part in samples.regions.split(8 * BATCH)])


@torch.inference_mode()
def _residual(msm: MaskSwitch, samples: CalibrationSamples, device: torch.device) -> float:
    """The sum of squared differences between the centred logits and their targets."""
    return float((_centred(_logits(msm, samples, device)).cpu() - _centred(LOGITS_PER_IOU * samples.ious)).square().sum())


def _explained(msm: MaskSwitch, samples: CalibrationSamples, device: torch.device) -> float:
    """The share of the variance of IoU between grids that the MSM predicts; 0 where the IoUs do not differ between grids."""
    variance = float(_centred(LOGITS_PER_IOU * samples.ious).square().sum())
    return 1 - _residual(msm, samples, device) / variance if variance else 0.0


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _batches(count: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Row numbers in a random order, in whole batches; one smaller batch if there are fewer rows than a batch."""
    order = torch.randperm(count, generator=generator)
    return order.split(BATCH)[: max(1, count // BATCH)]


def smallest_lambda(log_probabilities: Tensor, costs: Tensor, target: float) -> float:
    """The smallest lambda for which the mean cost of `argmax_k (log p_k - lambda c_k)` is at most `target`, by bisection.

    Exact to a millionth of the largest lambda that makes a difference. Below the smallest grid's cost, that largest lambda.

    Args:
        log_probabilities: `[N, 4] float32`.
        costs: `[4] float32`, ascending.
        target: in the unit of the costs.
    """

    def within_target(lambda_: float) -> bool:
        return float(costs[(log_probabilities - lambda_ * costs).argmax(dim=-1)].mean()) <= target

    if within_target(0.0):
        return 0.0
    spread = float((log_probabilities.max(dim=-1).values - log_probabilities.min(dim=-1).values).max())
    low, high = 0.0, 1.01 * spread / float((costs[1:] - costs[:-1]).min())
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if within_target(middle) else (middle, high)
    return high
