"""Teaching the switch what each grid is worth, once the masks have been learnt.

In phase 2 the MSM learns from Eq. 3 and 4 through one sampled grid an instance (Eq. 2). That teacher is noisy, and it measures each grid
against a target as coarse as the grid itself, so that 14 x 14 is "right" about a fern (docs/results/shapes.md). Here, on features that no
longer change, the masks of all four grids of every detection are measured as they will be judged, in pixels, and the MSM's logits are
regressed on that: `log p_k` is then, up to a constant, what grid k is expected to be worth, which makes `argmax_k (log p_k - lambda c_k)`
(`dynamask.msm.route`) the best there is to be had at any mean cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.data.augment import TrainingItems
from dynamask.inference import detect
from dynamask.model import DynaMask, batch_rois
from dynamask.msm import MaskSwitch
from dynamask.train.schedule import mixed_seed
from runtime.graph import GRIDS
from runtime.paste import mask_crop

WORTH = (0.45, 0.95)
"""Average precision counts the IoU thresholds 0.50, 0.55, .. 0.95 that a mask passes: IoU beyond these two is worth no more and no less."""
SHARPNESS = 10.0
"""`log p_k` for a worth of 1: a step from one of AP's thresholds to the next makes a grid 1.65 times as likely."""
EPOCHS, BATCH, RATE, DECAY = 12, 128, 2e-3, 1e-2
_EPOCH = 1_000_000
"""The epoch whose augmentation the lessons are drawn with: none that a run learns from."""


class Lessons(NamedTuple):
    """What the switch learns from: N detections on training images."""

    regions: Tensor
    """`[N, C, 14, 14] float16`, the MSM's input."""
    worths: Tensor
    """`[N, 4] float32`: IoU of the mask at each grid, held to `WORTH`."""

    @property
    def teach(self) -> bool:
        """Whether some detection is worth more at one grid than at another."""
        return bool((self.worths != self.worths[:, :1]).any())


def collect_lessons(
    model: DynaMask,
    items: TrainingItems,
    count: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Lessons | None:
    """Detect on training images, each at most once and in a random order, until there are `count` detections; None if `stop` said so.

    Detections are those of the model in evaluation mode, false ones among them: no grid is worth anything to these.
    """
    device, training = next(model.parameters()).device, model.training
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(mixed_seed(seed, "switch"))).tolist()
    regions: list[Tensor] = []
    worths: list[Tensor] = []
    found = 0
    model.eval()
    try:
        for index in order:
            if found >= count:
                break
            if stop():
                return None
            image, target = items[index, _EPOCH]
            region, worth = _lesson(model, image.to(device), target)
            regions.append(region)
            worths.append(worth)
            found += len(worth)
            progress(min(found, count), count)
    finally:
        model.train(training)
    return Lessons(torch.cat(regions)[:count], torch.cat(worths)[:count])


@torch.inference_mode()
def _lesson(model: DynaMask, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, Tensor]:
    branch = model.mask_branch
    pyramid, detections = detect(model, image[None])
    filled = detections.scores > 0
    boxes, labels = detections.boxes[filled], detections.labels[filled]
    rois = batch_rois([boxes])
    region = branch.region(pyramid, rois)
    logits = [branch.heads.mask_logits(k, x, labels).float().cpu().numpy() for k, x in enumerate(branch.all_grids(pyramid, rois, region))]
    worths = grid_worths(
        logits, boxes.cpu().numpy(), labels.cpu().numpy(), target["masks"].numpy().astype(bool), target["labels"].numpy() - 1
    )
    return region.half().cpu(), torch.from_numpy(worths)


def grid_worths(
    logits: Sequence[npt.NDArray[np.float32]],
    boxes: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    masks: npt.NDArray[np.bool_],
    classes: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """IoU of every detection's mask at every grid, pasted, with the truth of its class that it fits best, held to `WORTH`.

    Args:
        logits: by grid, `[N, G, G]`.
        boxes: `[N, 4]`, xyxy in pixels.
        labels: `[N]`.
        masks: `[M, H, W]`, the truths.
        classes: `[M]`, counted as `labels` are.

    Returns:
        `[N, 4]`.
    """
    height, width = masks.shape[1:]
    areas = masks.sum(axis=(1, 2))
    worths = np.full((len(boxes), len(GRIDS)), WORTH[0], np.float32)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        own = np.flatnonzero(classes == label)
        if not len(own):
            continue
        overlaps = np.empty((len(GRIDS), len(own)))
        for k in range(len(GRIDS)):
            x0, y0, crop = mask_crop(logits[k][i], box, height, width)
            shared = (masks[own, y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] & crop).sum(axis=(1, 2))
            overlaps[k] = shared / np.maximum(areas[own] + crop.sum() - shared, 1)
        worths[i] = overlaps[:, overlaps.max(axis=0).argmax()]
    return worths.clip(*WORTH)


def fit_switch(msm: MaskSwitch, lessons: Lessons, costs: Tensor, mean_cost: float, seed: int) -> dict[str, float]:
    """Regress the MSM's logits on `SHARPNESS` times the worths, from the weights it has; then price the grids so that its argmax costs
    at most `mean_cost` on the lessons.

    Both are centred over the grids first, as the softmax does not see a constant. The price is the smallest lambda for which the mean of
    `c_k` at `argmax_k (log p_k - lambda c_k)` keeps to `mean_cost`; `- lambda c_k` goes into the last layer's bias. So C_t is met
    without a budget at deployment, and a smaller budget goes on from there.

    Args:
        msm: changed in place.
        costs: `[4]`, ascending, GMAC an instance.
        mean_cost: GMAC an instance.
        seed: of the order of the lessons.

    Returns:
        `explained`, the share of the worths' variance between grids that the MSM predicts on the lessons; `mean_cost` on them; `lambda`.
    """
    device = costs.device
    regions, wanted = lessons.regions, _centred(SHARPNESS * lessons.worths)
    optimizer = torch.optim.AdamW(msm.parameters(), weight_decay=DECAY)
    steps = EPOCHS * max(1, len(regions) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(mixed_seed(seed, "fit switch"))
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for rows in _batches(len(regions), generator):
                predicted = _centred(msm(regions[rows].float().to(device)))
                loss = F.mse_loss(predicted, wanted[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.inference_mode():
        logits = torch.cat([msm(part.float().to(device)) for part in regions.split(8 * BATCH)])
        residual = (_centred(logits).cpu() - wanted).square().sum()
        price = _price(torch.log_softmax(logits, dim=-1), costs, mean_cost)
        explained = 1 - float(residual / wanted.square().sum())
    with torch.no_grad():
        msm.fc2.bias.sub_(price * costs)
    return {"explained": explained, "mean_cost": float(costs[(logits - price * costs).argmax(dim=-1)].mean()), "lambda": price}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _batches(count: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Whole batches in a random order, or all that there is."""
    order = torch.randperm(count, generator=generator)
    return order.split(BATCH)[: max(1, count // BATCH)]


def _price(log_probabilities: Tensor, costs: Tensor, mean_cost: float) -> float:
    """The smallest lambda, to a millionth of the largest that can matter, for which the mean cost of the argmax is at most `mean_cost`."""

    def keeps(price: float) -> bool:
        return float(costs[(log_probabilities - price * costs).argmax(dim=-1)].mean()) <= mean_cost

    if keeps(0.0):
        return 0.0
    spread = float((log_probabilities.max(dim=-1).values - log_probabilities.min(dim=-1).values).max())
    low, high = 0.0, 1.01 * spread / float((costs[1:] - costs[:-1]).min())
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high
