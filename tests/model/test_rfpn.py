"""The r-FPN's parts against torchvision's operators, and the costs against the paper's table."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, deform_conv2d, roi_align

from dynamask.config import LITE0, R50
from dynamask.deform_conv import DeformConv2d, sampled_deform_conv2d
from dynamask.fam import FeatureAggregation
from dynamask.flops import PAPER_GMACS
from dynamask.mask_targets import grid_targets
from dynamask.model import build_mask_branch
from dynamask.rfpn import GridHeads
from dynamask.roi import pyramid_roi_align
from runtime.graph import GRIDS


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 14, 14), (0, 4, 6, 6)])
def test_sampled_deformable_convolution_is_torchvisions(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    n, c, h, w = shape
    x = torch.randn(shape, dtype=torch.float64)
    offset = 2 * torch.randn(n, 18, h, w, dtype=torch.float64)
    weight, bias = torch.randn(5, c, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(sampled_deform_conv2d(x, offset, weight, bias), deform_conv2d(x, offset, weight, bias, padding=1))


def test_its_gradients_are_torchvisions() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 6, 6), torch.randn(2, 18, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)]
    ours = [v.double().requires_grad_() for v in values]
    theirs = [v.double().requires_grad_() for v in values]
    sampled_deform_conv2d(*ours).square().sum().backward()
    deform_conv2d(*theirs, padding=1).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_zero_offsets_are_an_ordinary_convolution() -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(6, 4)
    x = torch.randn(2, 6, 9, 9)
    wanted = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, torch.zeros(2, 18, 9, 9)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 16, 37])
def test_many_instances_without_a_gradient_agree_with_torchvision(count: int) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(6, 4).eval()
    x, offset = torch.randn(count, 6, 9, 9), torch.randn(count, 18, 9, 9)
    with torch.no_grad():
        ours = layer(x, offset)
        layer.by_torchvision = True
        torch.testing.assert_close(ours, layer(x, offset), atol=1e-4, rtol=1e-4)


def test_a_stage_doubles_the_grid_and_looks_at_both_features() -> None:
    torch.manual_seed(0)
    stage = FeatureAggregation(16, 8)
    region, crop = torch.randn(3, 16, 7, 7, requires_grad=True), torch.randn(3, 8, 14, 14, requires_grad=True)
    out = stage(region, crop)
    assert out.shape == (3, 8, 14, 14)
    out.sum().backward()
    assert region.grad.abs().sum() > 0 and crop.grad.abs().sum() > 0
    assert stage.align_offset.weight.grad.abs().sum() > 0 and stage.attend_offset.weight.grad.abs().sum() > 0


def test_pyramid_roi_align_is_torchvisions() -> None:
    torch.manual_seed(0)
    pyramid = [torch.randn(2, 4, 320 // s, 320 // s) for s in (4, 8, 16, 32)]
    corner = torch.rand(30, 2) * 200
    boxes = torch.cat([corner, corner + torch.rand(30, 2) * 300 + 2], dim=1)
    index = torch.arange(30) % 2
    peer = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    wanted = peer({str(i): p for i, p in enumerate(pyramid)}, [boxes[index == 0], boxes[index == 1]], [(320, 320)] * 2)
    order = torch.argsort(index, stable=True)
    rois = torch.cat([index[:, None].float(), boxes], dim=1)[order]
    torch.testing.assert_close(pyramid_roi_align(pyramid, rois, 7, canonical_size=224.0, aligned=False), wanted)
    assert pyramid_roi_align(pyramid, rois[:0], 7, 224.0).shape == (0, 4, 7, 7)


def test_the_head_computes_the_own_class_alone_and_alike() -> None:
    torch.manual_seed(0)
    heads = GridHeads((8, 8, 4, 4), classes=5, class_agnostic_largest=True)
    features, labels = torch.randn(6, 8, 14, 14), torch.tensor([0, 4, 2, 2, 1, 3])
    every = heads.masks[0](features)
    torch.testing.assert_close(heads.mask_logits(0, features, labels), every[torch.arange(6), labels])
    large = torch.randn(2, 4, 112, 112)
    torch.testing.assert_close(heads.mask_logits(3, large, labels[:2]), heads.masks[3](large)[:, 0])


def test_targets_of_an_aligned_rectangle_are_exact_at_every_grid() -> None:
    mask = torch.zeros(1, 128, 128, dtype=torch.uint8)
    mask[0, 8:64, 8:120] = 1
    rois = torch.tensor([[0.0, 8.0, 8.0, 120.0, 120.0]])
    for grid, target in zip(GRIDS, grid_targets(mask, rois), strict=True):
        wanted = torch.zeros(grid, grid)
        wanted[: grid // 2] = 1
        torch.testing.assert_close(target[0], wanted)


def test_rois_that_share_a_mask_get_the_targets_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 64, 96, generator=generator).gt(0.6).to(torch.uint8)
    matched = torch.tensor([3, 0, 3, 4, 0, 3])
    corners = torch.rand(6, 2, generator=generator) * 40
    rois = torch.cat([torch.tensor([[0.0], [0], [0], [1], [1], [1]]), corners, corners + 20], dim=1)
    for shared, own in zip(grid_targets(masks, rois, matched), grid_targets(masks[matched], rois), strict=True):
        assert torch.equal(shared, own)
        assert 0 < shared.mean() < 1


def test_targets_agree_with_torchvisions_rasterisation() -> None:
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    mask = ((((rows - 50) / 30) ** 2 + ((columns - 40) / 25) ** 2) < 1).to(torch.uint8)[None]
    rois = torch.tensor([[0.0, 13.3, 18.9, 70.2, 83.1]])
    for grid, target in zip(GRIDS, grid_targets(mask, rois), strict=True):
        peer = roi_align(mask[:, None].float(), rois, (grid, grid), 1.0, aligned=True)[:, 0] >= 0.5
        assert (target.bool() == peer).float().mean() > 0.98


def test_r50_has_the_papers_cost() -> None:
    branch = build_mask_branch(R50, classes=80)
    for cost, paper, tolerance in zip(branch.grid_gmacs(), PAPER_GMACS, (0.05, 0.15, 0.15, 0.05), strict=True):
        assert cost == pytest.approx(paper, rel=tolerance)
    assert branch.msm_gmacs() <= 0.03 * branch.grid_gmacs()[-1]


def test_a_stage_with_halved_channels_has_the_cost_of_the_formula() -> None:
    """The sum of spec: two deformable 3 x 3, 1 x 1 reduction and fusion, two offset convolutions of 18 channels."""
    costs = build_mask_branch(LITE0, classes=80).grid_gmacs()
    for k, (grid, c) in enumerate(zip(GRIDS[1:], LITE0.stage_channels[1:], strict=True), start=1):
        half = (grid // 2) ** 2
        wanted = 2 * 9 * c * c * grid**2 + 2 * c * c * half + 2 * c * c * grid**2 + 9 * 18 * (2 * c + c) * grid**2
        head = c * grid**2 - LITE0.stage_channels[k - 1] * half
        assert costs[k] - costs[k - 1] == pytest.approx((wanted + head) / 1e9, rel=1e-6)
