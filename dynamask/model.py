"""DynaMask assembled: a detector and a mask branch. `build_model` and `build_mask_branch` are the only places that choose parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamask.baselines import PYRAMIDS, MaskRCNNBranch
from dynamask.config import Config, ModelConfig
from dynamask.detector import Detector, Samples
from dynamask.fam import FUSIONS
from dynamask.flops import MacCounter
from dynamask.mask_branch import DynamicMaskBranch, FourTensors, MaskBranch
from dynamask.mask_targets import grid_targets
from dynamask.msm import Budget, MaskSwitch
from dynamask.rfpn import GridHeads, RegionFPN
from dynamask.roi import batch_rois
from runtime.errors import InputError
from runtime.graph import GRIDS, MSM
from runtime.instances import ClassName
from runtime.paste import Frame, PackedMask, probability_crop
from runtime.predictor import to_instances
from runtime.preprocess import letterbox_normalise
from runtime.targets.base import EngineOutput


class GraphOutput(NamedTuple):
    """The outputs of the exported graph for one image: `Detections` and `RoutedMasks` together."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    grids: Tensor
    slots: FourTensors
    logits: FourTensors


class DynaMask(Detector):
    """Two-stage instance segmenter whose masks have the grid that each instance needs.

    In evaluation mode, `model(images)` takes and returns what torchvision's detectors do: a list of images `[3, H, W]` of any sizes, RGB
    from 0 to 1, and a list of dictionaries with `boxes`, `labels`, `scores`, `masks`, and also `grids` (`instances`).

    In training mode, `model(images, targets)` takes a batch of canvases and returns the losses (`losses`). `phase` 1 trains without the
    MSM, at all grids; `phase` 2 trains everything. `statistics` then holds the step's share of each grid and mean cost. With
    `train.frozen_detector` only the mask branch has losses and gradients.

    Example:
        >>> import torch
        >>> classes = [{"id": 1, "name": "leaf"}]
        >>> model = dynamask.build_model(dynamask.load_config("lite0-shapes", {"model.canvas": [64, 64]}), classes).eval()
        >>> found, other = model([torch.rand(3, 48, 80), torch.rand(3, 100, 60)])
        >>> sorted(found)
        ['boxes', 'grids', 'labels', 'masks', 'scores']
        >>> found["masks"].shape == (len(found["boxes"]), 1, 48, 80)
        True
    """

    def __init__(self, config: Config, classes: Sequence[dict[str, Any]]) -> None:
        super().__init__(config.model, len(classes))
        self.config = config
        self.classes = list(classes)
        if config.train.frozen_detector:
            self.requires_grad_(False)  # The mask branch, which trains, is added after this.
        self.mask_branch = build_mask_branch(config.model, len(classes))
        self.phase = 2
        self.statistics: dict[str, float] = {}

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """In training mode `losses(images, targets)`, in evaluation mode `instances(image)` of each image.

        Raises:
            InputError: in training mode there are no targets or the images are not one batch of canvases, or an image is not
                `[3, H, W]` of values from 0 to 1.
        """
        if not self.training:
            return [self.instances(image) for image in images]
        if targets is None or not isinstance(images, Tensor):
            raise InputError("In training mode the model takes canvases [B, 3, H, W] and targets; call model.eval() to find instances.")
        return self.losses(images, targets)

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of a batch of normalised canvases, weighted and to be summed.

        Args:
            images: `[B, 3, H, W] float32`.
            targets: of each image `boxes [G, 4] float32` (xyxy in canvas pixels), `labels [G] int64` (from 1), `masks [G, H, W] uint8`.
        """
        pyramid = self.backbone(images)
        samples, losses = self.sample(images, pyramid, targets)
        losses = {} if self.config.train.frozen_detector else losses | self.box_losses(pyramid, samples)
        rois, labels, masks, truths = self._mask_samples(samples, targets)
        mask_targets = grid_targets(masks, rois, truths)
        mask_losses = self.mask_branch.losses(pyramid, rois, labels, mask_targets, self.phase, self.config.train)
        self.statistics = mask_losses.statistics
        return losses | mask_losses.losses

    def instances(self, image: Tensor) -> dict[str, Tensor]:
        """The instances in an image, by falling score, as the exported bundle finds them.

        The image is rounded to 8 bits, letterboxed and normalised as in `runtime/preprocess.py`.

        Args:
            image: `[3, H, W]`, RGB from 0 to 1, floating point.

        Returns:
            Tensors on the model's device: `boxes [N, 4] float32` (xyxy in pixels of the image), `labels [N] int64` (from 1; 0 is
            background), `scores [N] float32`, `grids [N] int64` (14, 28, 56 or 112), and `masks [N, 1, H, W] float32`: the probability
            that a pixel belongs to the instance, sampled bilinearly from its grid, and 0 where the pixel's centre is outside the box.

        Raises:
            InputError: the image is not as above.
        """
        pixels = _pixels(image)
        size, sizes = (pixels.shape[0], pixels.shape[1]), self.sizes
        canvas, scale = letterbox_normalise(pixels, *sizes.canvas, sizes.mean, sizes.std)
        device = self.mask_branch.costs.device
        output = self.predict(torch.from_numpy(canvas).to(device))
        found = to_instances(
            _engine_output(output), Frame(scale, size), [ClassName(entry["id"], entry["name"]) for entry in self.classes], {}
        )
        masks = torch.zeros(len(found), 1, *size)
        for mask, logits, box in zip(masks, found.mask_data, found.boxes, strict=True):
            assert not isinstance(logits, PackedMask)
            x0, y0, crop = probability_crop(logits, box, *size)
            mask[0, y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = torch.from_numpy(crop)
        arrays = {"boxes": found.boxes, "labels": found.labels + 1, "scores": found.scores, "grids": found.grids}
        return {**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()}, "masks": masks.to(device)}

    @torch.inference_mode()
    def predict(
        self, image: Tensor, budget_gmacs: Tensor | float = 0.0, grid_override: Tensor | int = MSM, budget: Budget | None = None
    ) -> GraphOutput:
        """Detections and masks of one normalised canvas, as the exported graph gives them; the model is in evaluation mode.

        Args:
            image: `[1, 3, H, W] float32`, on the model's device.
            budget_gmacs: mean GMAC per instance; 0 or less for the paper's argmax.
            grid_override: one value for all slots, or `[K] int64` (`dynamask.msm.route`).
            budget: other limits or costs in place of `budget_gmacs`.
        """
        override = torch.as_tensor(grid_override, dtype=torch.int64, device=image.device).expand(self.sizes.detections)
        limits = self.mask_branch.gmac_budget(budget_gmacs) if budget is None else budget
        found = self.detect(image)
        canvas = (int(image.shape[-2]), int(image.shape[-1]))
        return GraphOutput(*found.detections, *self.mask_branch.segment(found.pyramid, found.detections, canvas, limits, override))

    def _mask_samples(self, samples: Samples, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The positives that reach the mask branch: RoIs `[N, 5]`, labels `[N]` from 0; all masks `[M, H, W]`, and each RoI's `[N]`."""
        limit = self.sizes.mask_rois_per_image
        kept = [torch.nonzero(label > 0)[:, 0] for label in samples.labels]
        kept = [index[torch.randperm(len(index), device=index.device)[:limit]] for index in kept]
        rois = batch_rois([p[i] for p, i in zip(samples.proposals, kept, strict=True)])
        labels = torch.cat([label[i] for label, i in zip(samples.labels, kept, strict=True)]) - 1
        masks = [target["masks"] for target in targets]
        first = [sum(map(len, masks[:i])) for i in range(len(masks))]
        truths = torch.cat([start + m[i] for start, m, i in zip(first, samples.matched, kept, strict=True)])
        return rois, labels, torch.cat(masks), truths


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """`[3, H, W]` from 0 to 1 -> `[H, W, 3] uint8`."""
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.numel():
        given = f"{list(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"An image must be a floating point tensor [3, H, W], and this is {given}; divide 8-bit values by 255.")
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise InputError(f"An image must have values from 0 to 1, and this one has {low:g} to {high:g}; divide 8-bit values by 255.")
    return (image.detach().permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()


def _engine_output(output: GraphOutput) -> EngineOutput:
    """The same arrays as an engine gives them."""
    boxes, scores, labels, grids = (tensor.cpu().numpy() for tensor in output[:4])
    masks = {
        grid: (slots.cpu().numpy(), logits.float().cpu().numpy())
        for grid, slots, logits in zip(GRIDS, output.slots, output.logits, strict=True)
    }
    return EngineOutput(boxes, scores, labels, grids, masks, {})


def build_mask_branch(sizes: ModelConfig, classes: int) -> MaskBranch:
    """The mask branch that a configuration names, with random weights: the paper's, or a baseline."""
    agnostic = sizes.class_agnostic_largest
    if sizes.mask_grid is not None:
        outputs = 1 if agnostic and sizes.mask_grid == GRIDS[-1] else classes
        return MaskRCNNBranch(sizes.fpn_channels, outputs, sizes.mask_grid, sizes.canonical_size)
    pyramid = None if sizes.pyramid == "fpn" else PYRAMIDS[sizes.pyramid](sizes.fpn_channels)
    rfpn = RegionFPN(sizes.fpn_channels, sizes.stage_channels, FUSIONS[sizes.fusion], pyramid)
    heads = GridHeads(sizes.stage_channels, classes, agnostic)
    return DynamicMaskBranch(rfpn, heads, MaskSwitch(sizes.fpn_channels), sizes.canonical_size)


def build_model(config: Config, classes: Sequence[dict[str, Any]]) -> DynaMask:
    """Build a DynaMask with random weights; `dynamask.weights.load_weights` gives it trained ones.

    Args:
        config: sizes and recipe; `model` decides what is built.
        classes: `{"id": category id, "name": name}` each, in the order of the labels. Background is not among them.

    Example:
        >>> model = dynamask.build_model(dynamask.load_config("lite0-shapes"), classes=[{"id": 1, "name": "leaf"}])
        >>> model.config.model.canvas
        (320, 320)
    """
    return DynaMask(config, classes)


class Gmacs(NamedTuple):
    """A model's costs, GMAC."""

    grids: dict[int, float]
    """Grid -> cost of an instance that exits there, cumulative."""
    msm: float
    """Cost of choosing an instance's grid."""
    detector: float
    """Cost of the detector, per image."""


def count_gmacs(model: DynaMask) -> Gmacs:
    """Count a model's multiply-accumulates from its modules, for its canvas; the model is in evaluation mode."""
    with torch.inference_mode(), MacCounter(model) as counter:
        model.detect(torch.zeros(1, 3, *model.sizes.canvas))
    grids = dict(zip(GRIDS, model.mask_branch.grid_gmacs(), strict=True))
    return Gmacs(grids, model.mask_branch.msm_gmacs(), counter.total())
