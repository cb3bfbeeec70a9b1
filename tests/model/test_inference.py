"""The static inference pass against torchvision's own, dynamic one; the training step's pieces."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from dynamask.config import LITE0, Config
from dynamask.detector import Detections
from dynamask.model import DynaMask, build_model
from runtime.graph import GRIDS

CLASSES = [{"id": i + 1, "name": f"class {i}"} for i in range(3)]


@pytest.fixture(scope="module")
def model() -> DynaMask:
    torch.manual_seed(0)
    config = LITE0.model_copy(update={"canvas": (128, 160), "score_threshold": 0.2, "detections": 40})
    model = build_model(Config(model=config), CLASSES).eval()
    # Spread-out scores and boxes, as a trained model's are: near-equal ones have no order to compare.
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.05)
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight, std=1.0)
    return model


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))


def proposals_of(model: DynaMask, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The RPN's proposals `[P, 4]`, and which rows are filled, `[P] bool`."""
    found = model.detect(image)
    return found.proposals, torch.arange(len(found.proposals)) < found.proposal_count


@torch.no_grad()
def test_proposals_are_torchvisions(model: DynaMask, image: torch.Tensor) -> None:
    pyramid = model.backbone(image)
    boxes, valid = proposals_of(model, image)
    wanted, _ = model.rpn(ImageList(image, [(128, 160)]), OrderedDict((str(i), p) for i, p in enumerate(pyramid)))
    count = int(valid.sum())
    assert count == len(wanted[0]) and valid[:count].all()
    torch.testing.assert_close(boxes[valid], wanted[0], atol=1e-3, rtol=0)


@torch.no_grad()
def test_detections_are_torchvisions(model: DynaMask, image: torch.Tensor) -> None:
    detected = model.detect(image)
    pyramid, found = detected.pyramid, detected.detections
    proposals, valid = proposals_of(model, image)
    rois = torch.cat([torch.zeros(len(proposals), 1), proposals], dim=1)[valid]
    logits, deltas = model.box_outputs(model.box_region(pyramid, rois))
    boxes, scores, labels = model.roi_heads.postprocess_detections(logits, deltas, [proposals[valid]], [(128, 160)])
    count = int((found.scores > 0).sum())
    assert count == len(scores[0]) > 5
    torch.testing.assert_close(found.scores[:count], scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.boxes[:count], boxes[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.labels[:count], labels[0] - 1)
    assert (found.labels[count:] == -1).all() and (found.boxes[count:] == 0).all()


@torch.no_grad()
def test_routed_masks_are_those_of_all_grids(model: DynaMask, image: torch.Tensor) -> None:
    """Skipping changes nothing: each instance's logits equal those of the pass that computes every grid for everyone."""
    detected = model.detect(image)
    pyramid, found = detected.pyramid, detected.detections
    override = torch.arange(40) % 4
    masks = model.mask_branch.segment(pyramid, found, (128, 160), model.mask_branch.gmac_budget(), override)
    count = int((found.scores > 0).sum())
    assert masks.grids[:count].tolist() == override[:count].tolist() and (masks.grids[count:] == -1).all()
    rois = torch.cat([torch.zeros(count, 1), found.boxes[:count]], dim=1)
    every = model.mask_branch.mask_logits(pyramid, rois, found.labels[:count])
    for k, (slots, logits) in enumerate(zip(masks.slots, masks.logits, strict=True)):
        assert slots.tolist() == [i for i in range(count) if i % 4 == k]
        torch.testing.assert_close(logits, every[k][slots], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("override", [-1, 0, 3, 4])
def test_an_image_without_detections_gives_empty_masks(model: DynaMask, image: torch.Tensor, override: int) -> None:
    detected = model.detect(image)
    pyramid, found = detected.pyramid, detected.detections
    empty = Detections(torch.zeros_like(found.boxes), torch.zeros_like(found.scores), torch.full_like(found.labels, -1))
    masks = model.mask_branch.segment(pyramid, empty, (128, 160), model.mask_branch.gmac_budget(0.01), torch.full((40,), override))
    assert (masks.grids == -1).all()
    assert [tuple(x.shape) for x in masks.logits] == [(0, g, g) for g in GRIDS]


def test_the_budget_bounds_the_mean_cost(model: DynaMask, image: torch.Tensor) -> None:
    costs = model.mask_branch.costs
    for share in (0.15, 0.4, 0.8):
        output = model.predict(image, share * float(costs[-1]))
        chosen = output.grids[output.grids >= 0]
        assert float(costs[chosen].mean()) <= share * float(costs[-1]) * (1 + 1e-5)


@pytest.mark.parametrize("phase", [1, 2])
def test_a_training_step_reaches_every_trainable_part(phase: int) -> None:
    torch.manual_seed(0)
    model = build_model(Config(model=LITE0.model_copy(update={"canvas": (128, 128)})), CLASSES).train()
    model.phase = phase
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    masks[0, 20:60, 30:70] = 1
    masks[1, 70:110, 10:50] = 1
    boxes = torch.tensor([[30.0, 20, 70, 60], [10, 70, 50, 110]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    losses = model(torch.randn(2, 3, 128, 128), [target, nothing])
    sum(losses.values()).backward()
    untouched = {n.split(".")[1] for n, p in model.mask_branch.named_parameters(prefix="m") if p.grad is None}
    assert untouched == ({"msm"} if phase == 1 else set())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if phase == 2:
        assert sum(model.statistics[f"share_{g}"] for g in GRIDS) == pytest.approx(1.0)


def test_a_batch_without_any_instance_trains() -> None:
    torch.manual_seed(0)
    model = build_model(Config(model=LITE0.model_copy(update={"canvas": (64, 64)})), CLASSES).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}
    losses = model(torch.randn(1, 3, 64, 64), [nothing])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
