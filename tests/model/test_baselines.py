"""The baselines: costs from formulas, Mask R-CNN's head against torchvision's, other fusions written out; the default as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor as TorchvisionPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss

from dynamask.baselines import BidirectionalPyramid, MaskRCNNBranch, PathAggregation, WeightedSum
from dynamask.config import R50, Config, ModelConfig, load_config
from dynamask.fam import (
    FUSIONS,
    AdditiveFusion,
    AlignedFusion,
    CoarseFusion,
    ConvolutionFusion,
    FeatureAggregation,
    HalfAlignedFusion,
)
from dynamask.mask_branch import DynamicMaskBranch
from dynamask.mask_targets import grid_targets
from dynamask.model import DynaMask, build_mask_branch, build_model
from runtime.errors import InputError
from runtime.graph import GRIDS
from tests.tiny import TINY

FIELDS = {
    **TINY,
    "model.score_threshold": 0.0,
}
CLASSES = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"maskrcnn-{grid}": {"model.mask_head": "maskrcnn", "model.mask_grid": grid} for grid in GRIDS},
    **{fusion: {"model.fusion": fusion} for fusion in FUSIONS if fusion != "fam"},
    **{pyramid: {"model.pyramid": pyramid, "model.fusion": "add"} for pyramid in ("panet", "bifpn")},
}


def variant(name: str) -> DynaMask:
    torch.manual_seed(0)
    return build_model(load_config("lite0-shapes", FIELDS | VARIANTS[name]), CLASSES)


def maskrcnn_branch(grid: int, model: ModelConfig = R50) -> MaskRCNNBranch:
    branch = build_mask_branch(model.model_copy(update={"mask_head": "maskrcnn", "mask_grid": grid}), classes=3)
    assert isinstance(branch, MaskRCNNBranch)
    return branch


def target() -> dict[str, Tensor]:
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 10:30, 15:35] = 1
    masks[1, 35:55, 5:25] = 1
    return {"boxes": torch.tensor([[15.0, 10, 35, 30], [5, 35, 25, 55]]), "labels": torch.tensor([1, 2]), "masks": masks}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("phase", [1, 2])
def test_a_step_reaches_every_trainable_part(name: str, phase: int) -> None:
    model = variant(name).train()
    model.phase = phase
    losses = model(torch.randn(2, 3, 64, 64), [target(), {key: value[:0] for key, value in target().items()}])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    untouched = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert untouched == ({n for n, _ in model.named_parameters() if ".msm." in n} if phase == 1 else set())
    # In phase 2 only the grids that an instance was given are reached by more than zeros.
    reached = [
        float(p.grad.abs().sum()) > 0
        for n, p in model.mask_branch.get_submodule("heads").named_parameters()
        if "masks" in n and "weight" in n
    ]
    assert all(reached) if phase == 1 else any(reached)


@pytest.mark.parametrize("name", VARIANTS)
def test_inference_gives_masks_at_the_grids_that_there_are(name: str) -> None:
    model = variant(name).eval()
    output = model.predict(torch.randn(1, 3, 64, 64))
    found = int((output.scores > 0).sum())
    assert found == 5 and [tuple(x.shape) for x in output.logits] == [(len(s), g, g) for s, g in zip(output.slots, GRIDS, strict=True)]
    if name.startswith("maskrcnn"):
        assert set(output.grids.tolist()) == {GRIDS.index(int(name.removeprefix("maskrcnn-")))}
    else:
        assert (model.predict(torch.randn(1, 3, 64, 64), 0.0, 2).grids == 2).all()


def test_a_mask_rcnn_head_is_torchvisions() -> None:
    branch = maskrcnn_branch(28, R50.model_copy(update={"fpn_channels": 8}))
    peer = torch.nn.Sequential(MaskRCNNHeads(8, (8,) * 4, 1), TorchvisionPredictor(8, 8, 3))
    ours = [*branch.rfpn.state_dict().values(), *branch.heads.state_dict().values()]
    peer.load_state_dict(dict(zip(peer.state_dict(), ours, strict=True)))
    region, labels = torch.randn(4, 8, 14, 14), torch.tensor([2, 0, 1, 1])
    logits = branch.heads(branch.rfpn["tiny"](region), labels)
    torch.testing.assert_close(logits, peer(region)[torch.arange(4), labels])


def test_its_tensors_keep_the_names_of_checkpoints() -> None:
    tiny = [f"rfpn.tiny.{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")]
    heads = [f"heads.{layer}.{kind}" for layer in ("upsample", "masks") for kind in ("weight", "bias")]
    assert list(maskrcnn_branch(28).state_dict()) == [*tiny, *heads]


def test_its_loss_is_torchvisions() -> None:
    model = variant("maskrcnn-28").train()
    branch = model.mask_branch
    assert isinstance(branch, MaskRCNNBranch)
    # Masks that fill the image or nothing: torchvision rasterises others half a pixel apart, and with soft borders.
    truth = {**target(), "masks": torch.stack([torch.ones(64, 64), torch.zeros(64, 64)]).to(torch.uint8)}
    pyramid = model.backbone(torch.randn(1, 3, 64, 64))
    rois = torch.cat([torch.zeros(2, 1), truth["boxes"]], dim=1)
    targets = grid_targets(truth["masks"], rois)
    loss = branch.losses(pyramid, rois, truth["labels"] - 1, targets, 2, model.config.train).losses["loss_mask"]
    features = branch.heads.upsample(branch.rfpn["tiny"](branch.region(pyramid, rois)))
    every = branch.heads.masks(F.relu(features))
    peer = maskrcnn_loss(every, [truth["boxes"]], [truth["masks"]], [truth["labels"] - 1], [torch.arange(2)])
    torch.testing.assert_close(loss, peer)


def test_a_mask_rcnn_head_has_no_other_grid() -> None:
    with pytest.raises(InputError, match="28 x 28 makes masks of no other grid"):
        variant("maskrcnn-28").eval().predict(torch.randn(1, 3, 64, 64), 0.0, 3)


def test_mask_rcnn_has_the_papers_cost() -> None:
    """Four 3 x 3 and a transposed 2 x 2 convolution of 256 channels at half the grid, a row of 256 a cell; Table 1 has one digit."""
    costs = maskrcnn_branch(56).grid_gmacs()
    wanted = [((4 * 9 + 4) * 256**2 * (g // 2) ** 2 + 256 * g**2) / 1e9 for g in GRIDS]
    assert costs == pytest.approx(wanted, rel=1e-9)
    assert costs[1:] == pytest.approx([0.5, 2.0, 8.0], rel=0.06)
    assert maskrcnn_branch(56).msm_gmacs() == 0 == maskrcnn_branch(56).image_gmacs((320, 320))


def test_fusions_have_the_costs_of_the_formulas() -> None:
    inputs, c, grid = 256, 128, 28
    reduce, head = inputs * c * (grid // 2) ** 2, (c * grid**2 - inputs * (grid // 2) ** 2) / 1e9
    per_cell = {
        "fam": 2 * 9 * c * c + 2 * c * c + 9 * 18 * 3 * c,
        "one_deform": 9 * c * c + 2 * c * c + 9 * 18 * 2 * c,
        "conv": 2 * 9 * c * c + 2 * c * c,
        "add": 9 * c * c,
    }
    coarse_cell = {
        "half_fam": 9 * c * c + 9 * 18 * 2 * c + inputs * c,
        "coarse": 9 * c * inputs,
        "coarse_add": 9 * c * inputs,
    }
    fine_cell = {"half_fam": 18 * c * c, "coarse": 18 * c * c, "coarse_add": 9 * c * c}
    wanted = {fusion: macs * grid**2 + reduce for fusion, macs in per_cell.items()}
    wanted |= {fusion: macs * (grid // 2) ** 2 + fine_cell[fusion] * grid**2 for fusion, macs in coarse_cell.items()}
    assert wanted.keys() == FUSIONS.keys()
    for fusion, macs in wanted.items():
        costs = build_mask_branch(R50.model_copy(update={"fusion": fusion}), classes=3).grid_gmacs()
        assert costs[1] - costs[0] - head == pytest.approx(macs / 1e9, rel=1e-9), fusion


def test_pyramids_have_the_costs_of_the_formulas() -> None:
    canvas, c = (64, 96), R50.fpn_channels
    cells = [64 * 96 // stride**2 for stride in (4, 8, 16)]
    lateral = sum(n * c * out for n, out in zip(cells, (32, 64, 128), strict=True))
    wanted = {
        "fpn": lateral,
        "panet": lateral + 2 * 9 * c * c * (cells[1] + cells[2]),
        "bifpn": lateral + (9 * c + c * c) * (cells[0] + 2 * cells[1] + 2 * cells[2]),
    }
    for pyramid, macs in wanted.items():
        branch = build_mask_branch(R50.model_copy(update={"pyramid": pyramid}), classes=3)
        assert branch.image_gmacs(canvas) == pytest.approx(macs / 1e9, rel=1e-9), pyramid


@torch.no_grad()
def test_with_no_offsets_two_deformable_convolutions_are_two_ordinary_ones() -> None:
    """The FAM begins as the same function as its variant without deformation, if they have the same weights; so does half of it."""
    fam, plain, half = FeatureAggregation(16, 8).eval(), ConvolutionFusion(16, 8).eval(), AlignedFusion(16, 8).eval()
    weights = {name: tensor for name, tensor in fam.state_dict().items() if "offset" not in name}
    plain.load_state_dict(weights)
    half.load_state_dict(weights, strict=False)
    region, crop = torch.randn(2, 16, 7, 7), torch.randn(2, 8, 14, 14)
    torch.testing.assert_close(fam(region, crop), plain(region, crop), atol=1e-5, rtol=1e-5)
    torch.nn.init.zeros_(plain.attend.weight)
    torch.testing.assert_close(half(region, crop), plain(region, crop), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_addition_is_symmetric_in_its_inputs() -> None:
    stage = AdditiveFusion(8, 8).eval()
    torch.nn.init.dirac_(stage.reduce.weight)
    small, other = torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7)
    large, larger = (F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False) for x in (small, other))
    torch.testing.assert_close(stage(small, larger), stage(other, large))


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_sees_both_of_its_inputs_where_they_are(fusion: str) -> None:
    """A change of one cell reaches the output there, and nothing far from it: resolutions and layouts are not mixed up."""
    torch.manual_seed(0)
    stage = FUSIONS[fusion](6, 4).eval()
    region, crop = torch.rand(1, 6, 14, 14), torch.rand(1, 4, 28, 28)
    before = stage(region, crop)
    assert before.shape == crop.shape
    changed_region, changed_crop = region.clone(), crop.clone()
    changed_region[0, :, 3, 9] += 5
    changed_crop[0, :, 7, 19] += 5
    for after in (stage(changed_region, crop), stage(region, changed_crop)):
        rows, columns = torch.nonzero((after - before).abs().amax(dim=(0, 1)) > 1e-4).unbind(1)
        assert 0 <= rows.min() <= 7 <= rows.max() <= 14 and 12 <= columns.min() <= 19 <= columns.max() <= 26


@torch.no_grad()
def test_half_aligned_without_offsets_is_a_convolution_before_upsampling() -> None:
    half, plain = HalfAlignedFusion(4, 4).eval(), CoarseFusion(4, 4).eval()
    torch.nn.init.dirac_(half.reduce.weight)
    plain.load_state_dict({name: value for name, value in half.state_dict().items() if name.split(".")[0] in ("align", "fuse")})
    region, crop = torch.randn(2, 4, 7, 7), torch.randn(2, 4, 14, 14)
    torch.testing.assert_close(half(region, crop), plain(region, crop), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_panet_carries_the_finest_level_to_the_coarsest() -> None:
    neck, pyramid = PathAggregation(4), [torch.randn(1, 4, 32 // 2**i, 32 // 2**i) for i in range(4)]
    out = neck(pyramid)
    assert [x.shape for x in out] == [x.shape for x in pyramid[:3]] and torch.equal(out[0], pyramid[0])
    wanted = F.relu(neck.fuse[0](pyramid[1] + F.relu(neck.down[0](pyramid[0]))))
    torch.testing.assert_close(out[1], wanted)
    touched = neck([pyramid[0] + 1, *pyramid[1:]])
    assert not torch.allclose(touched[2], out[2])


@torch.no_grad()
def test_bifpn_joins_every_level_with_every_other() -> None:
    neck, pyramid = BidirectionalPyramid(4), [torch.randn(1, 4, 32 // 2**i, 32 // 2**i) for i in range(4)]
    out = neck(pyramid)
    assert [x.shape for x in out] == [x.shape for x in pyramid[:3]]
    for level in range(4):
        touched = neck([x + (i == level) for i, x in enumerate(pyramid)])
        assert all(not torch.allclose(a, b) for a, b in zip(touched, out, strict=True)), level


@torch.no_grad()
def test_a_bifpn_node_ignores_an_input_with_a_negative_weight() -> None:
    node = WeightedSum(2, 4)
    node.weights.copy_(torch.tensor([2.0, -1.0]))
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(node(x, y), F.relu(node.pointwise(node.depthwise(x * (2 / 2.0001)))))


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_head": "maskrcnn"},
        {"mask_grid": 28},
        {"mask_head": "maskrcnn", "mask_grid": 28, "fusion": "add"},
        {"mask_head": "maskrcnn", "mask_grid": 28, "pyramid": "panet"},
        {"mask_head": "maskrcnn", "mask_grid": 32},
        {"fusion": "sum"},
    ],
)
def test_contradictory_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"mask_|fusion|pyramid"):
        load_config("lite0-shapes", {f"model.{name}": value for name, value in fields.items()})


def test_the_default_is_the_papers_model() -> None:
    assert FUSIONS[ModelConfig().fusion] is FeatureAggregation
    branch = build_mask_branch(Config().model, classes=3)
    assert isinstance(branch, DynamicMaskBranch) and branch.rfpn.pyramid is None and branch.region_size == 14
