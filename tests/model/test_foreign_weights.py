"""Detectors of other libraries, by their own formulas written out here, against ours with their weights."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from dynamask import weights
from dynamask.config import R50, Config
from dynamask.data.canvas import to_canvas
from dynamask.model import DynaMask, build_model
from dynamask.origins import (
    BODY,
    DETECTRON2,
    DYNAMASK,
    MMDETECTION,
    PREDICTOR,
    RESNET,
    TORCHVISION,
    class_rows,
    of_our_classes,
    origin_of,
    resnet_pixels,
    without_epsilon,
)
from dynamask.weights import load_weights, take_over
from runtime.errors import InputError

C, FC, CLASSES = 16, 24, 5
"""Of the small detectors here: channels of the pyramid, features of the box head, classes."""
HEIGHT, WIDTH = 128, 160


def small(backbone: str = "resnet18", classes: int = CLASSES, names: list[str] | None = None) -> DynaMask:
    torch.manual_seed(0)
    config = R50.model_copy(
        update={"backbone": backbone, "canvas": (64, 64), "fpn_channels": C, "stage_channels": (C, 8, 8, 8), "box_features": FC}
    )
    names = names or [f"class {i}" for i in range(classes)]
    return build_model(Config(model=config), [{"id": i + 1, "name": name} for i, name in enumerate(names)]).eval()


@pytest.fixture(scope="module")
def model() -> DynaMask:
    return small()


class Numbers:
    """Tensors of a trained detector's scale."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def layer(self, name: str, *shape: int, scale: float = 1.0) -> dict[str, Tensor]:
        std = scale / math.prod(shape[1:]) ** 0.5
        return {f"{name}.weight": std * self(*shape), f"{name}.bias": 0.1 * self(shape[0])}

    def norm(self, name: str, channels: int, folded: bool = False) -> dict[str, Tensor]:
        statistics = {"running_mean": 0.1 * self(channels), "running_var": 0.5 + self(channels).abs()}
        if folded:
            statistics = {"running_mean": torch.zeros(channels), "running_var": torch.full((channels,), 1 - 1e-5)}
        affine = {"weight": 0.6 + 0.1 * self(channels), "bias": 0.1 * self(channels)}
        return {f"{name}.{kind}": tensor for kind, tensor in {**affine, **statistics}.items()}

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def torchvision_body(prefix: str, numbers: Numbers) -> dict[str, Tensor]:
    """A ResNet-18's names and shapes from torchvision, with numbers of a trained one's scale, and without what counts batches."""
    state: dict[str, Tensor] = {}
    for name, module in torchvision.models.resnet18(weights=None).named_modules():
        if isinstance(module, nn.Conv2d):
            state[f"{prefix}{name}.weight"] = numbers(*module.weight.shape) * (1.4 / module.weight[0].numel() ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            state |= numbers.norm(prefix + name, module.num_features)
    return state


@pytest.fixture(scope="module")
def mmdetection() -> dict[str, Tensor]:
    """Mask R-CNN as mmdetection 2 and 3 name it, of ResNet-18."""
    numbers = Numbers()
    state = torchvision_body("backbone.", numbers)
    for i, channels in enumerate((64, 128, 256, 512)):
        state |= numbers.layer(f"neck.lateral_convs.{i}.conv", C, channels, 1, 1) | numbers.layer(f"neck.fpn_convs.{i}.conv", C, C, 3, 3)
    state |= numbers.layer("rpn_head.rpn_conv", C, C, 3, 3) | numbers.layer("rpn_head.rpn_cls", 3, C, 1, 1)
    state |= numbers.layer("rpn_head.rpn_reg", 12, C, 1, 1)
    head = "roi_head.bbox_head."
    state |= numbers.layer(head + "shared_fcs.0", FC, C * 49) | numbers.layer(head + "shared_fcs.1", FC, FC)
    state |= numbers.layer(head + "fc_cls", CLASSES + 1, FC) | numbers.layer(head + "fc_reg", 4 * CLASSES, FC)
    for i in range(4):
        state |= numbers.layer(f"roi_head.mask_head.convs.{i}.conv", C, C, 3, 3)
    return (
        state | numbers.layer("roi_head.mask_head.upsample", C, C, 2, 2) | numbers.layer("roi_head.mask_head.conv_logits", CLASSES, C, 1, 1)
    )


def conv(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[name + ".weight"]
    return F.conv2d(x, weight, state.get(name + ".bias"), stride, weight.shape[-1] // 2)


# torchvision -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    """torchvision's Mask R-CNN with random weights, which are only scaled so that features stay finite and scores differ.

    Its mask head is taken off after construction: what is compared are boxes.
    """
    torch.manual_seed(0)
    built = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        min_size=HEIGHT,
        max_size=WIDTH,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=60,
        box_score_thresh=0.2,
        box_detections_per_img=40,
    ).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(0.25)
        nn.init.normal_(built.rpn.head.cls_logits.weight, std=0.3)
        nn.init.normal_(built.rpn.head.bbox_pred.weight, std=0.05)
        nn.init.normal_(built.roi_heads.box_predictor.cls_score.weight, std=0.3)
        nn.init.normal_(built.roi_heads.box_predictor.bbox_pred.weight, std=0.3)
    return built


@pytest.fixture(scope="module")
def ours(peer: nn.Module) -> DynaMask:
    """Our `r50` with torchvision's weights."""
    limits = {"proposals_per_level": 100, "proposals": 60, "score_threshold": 0.2, "detections": 40}
    config = R50.model_copy(update={"canvas": (HEIGHT, WIDTH), **limits})
    built = build_model(Config(model=config), [{"id": i, "name": f"class {i}"} for i in range(CLASSES)]).eval()
    report = take_over(built, peer.state_dict(), TORCHVISION, "maskrcnn.pth")
    assert not report.renamed and not report.changed and {name.split(".")[0] for name in report.missing} == {"mask_branch"}
    assert {".".join(name.split(".")[:2]) for name in report.left} == {"roi_heads.mask_head", "roi_heads.mask_predictor"}
    return built


def assert_same_detections(peer: nn.Module, ours: DynaMask, image: np.ndarray[Any, Any]) -> None:
    """torchvision sees the canvas before normalising, and does that itself; the canvas has the size it resizes to."""
    nothing = {"image_id": 0, "boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "masks": np.zeros((0, *image.shape[:2]), np.uint8)}
    config = ours.config.model
    canvas, _ = to_canvas(image, nothing, HEIGHT, WIDTH, config.mean, config.std)
    visible = canvas * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
    heads: Any = peer.roi_heads
    mask_pool, heads.mask_roi_pool = heads.mask_roi_pool, None
    try:
        with torch.no_grad():
            wanted = peer([visible])[0]
            found = ours.detect(canvas[None]).detections
    finally:
        heads.mask_roi_pool = mask_pool
    count = int((found.scores > 0).sum())
    assert count == len(wanted["boxes"]) >= 5
    torch.testing.assert_close(found.boxes[:count], wanted["boxes"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.scores[:count], wanted["scores"], atol=1e-5, rtol=0)
    assert found.labels[:count].tolist() == (wanted["labels"] - 1).tolist()


def test_torchvisions_weights_give_torchvisions_boxes(peer: nn.Module, ours: DynaMask) -> None:
    image = np.zeros((96, 120, 3), np.uint8)
    cv2.circle(image, (40, 50), 25, (200, 80, 20), -1)
    cv2.rectangle(image, (70, 20), (110, 80), (30, 90, 220), -1)
    noise = np.random.default_rng(0).integers(0, 40, image.shape, dtype=np.uint8)
    assert_same_detections(peer, ours, image + noise)


def test_torchvisions_weights_give_torchvisions_boxes_on_real_images(peer: nn.Module, ours: DynaMask, shared_data: Path) -> None:
    paths = [sorted((shared_data / folder).glob("*.jpg"))[0] for folder in ("coco_mini/val", "fruits_nuts/images")]
    for path in paths:
        assert_same_detections(peer, ours, cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))


def older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in torchvision's published file: the convolutions of pyramid and RPN were no sequences yet, frozen batch norm counted nothing."""
    names = {name: name.replace("blocks.0.0.", "blocks.0.").replace("head.conv.0.0.", "head.conv.") for name in state}
    for level in "123":
        names = {name: older.replace(f"blocks.{level}.0.", f"blocks.{level}.") for name, older in names.items()}
    return {names[name]: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_torchvisions_older_names_are_known(model: DynaMask, mmdetection: dict[str, Tensor]) -> None:
    loaded = copy.deepcopy(model)
    take_over(loaded, mmdetection, MMDETECTION, "m.pth")
    newer = {name: tensor.clone() for name, tensor in loaded.state_dict().items() if not name.startswith("mask_branch.")}
    older = older_names(newer)
    assert len(set(older) - set(newer)) == 18  # eight convolutions of the pyramid and one of the RPN, weight and bias
    fresh = small()
    report = take_over(fresh, older, origin_of(older, "t.pth"), "t.pth")
    assert len(report.renamed) == 18
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in newer.items() if not name.endswith("num_batches_tracked"))


def test_batch_norm_without_epsilon_is_folded() -> None:
    """torchvision's COCO_V1 runs with `FrozenBatchNorm2d(eps=0)`; tiny variances, as of dead channels, show the difference."""
    theirs, own = FrozenBatchNorm2d(6, eps=0.0), nn.BatchNorm2d(6).eval()
    numbers = Numbers().norm("bn1", 6)
    numbers["bn1.running_var"] = torch.tensor([1.0, 1e-2, 1e-4, 1e-5, 1e-7, 1e-12])
    theirs.load_state_dict({name.removeprefix("bn1."): tensor for name, tensor in numbers.items()})
    converted = without_epsilon({BODY + name: tensor for name, tensor in numbers.items()}, own.eps)
    own.load_state_dict({name.removeprefix(BODY + "bn1."): tensor for name, tensor in converted.items()}, strict=False)
    x = Numbers()(2, 6, 3, 3)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_published_file_is_known_by_its_hash(
    model: DynaMask, mmdetection: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = copy.deepcopy(model)
    take_over(loaded, mmdetection, MMDETECTION, "m.pth")
    path = tmp_path / "coco.pth"
    torch.save({name: t for name, t in loaded.state_dict().items() if not name.startswith("mask_branch.")}, path)
    name = "backbone.body.layer1.0.bn1.weight"
    plain = loaded.state_dict()[name].clone()
    assert "epsilon" not in load_weights(loaded, str(path))
    assert torch.equal(loaded.state_dict()[name], plain)
    monkeypatch.setattr(weights, "EPSILON_FREE", (hashlib.sha256(path.read_bytes()).hexdigest()[:8],))
    assert "epsilon" in load_weights(loaded, str(path))
    assert (loaded.state_dict()[name] > plain).all()


# mmdetection and the DynaMask release ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mmdetections_pyramid_and_rpn(model: DynaMask, mmdetection: dict[str, Tensor]) -> None:
    state, loaded = mmdetection, copy.deepcopy(model)
    report = take_over(loaded, state, origin_of(state, "m.pth"), "m.pth")
    assert report.origin == "mmdetection" and not report.changed and len(report.left) == 12
    assert {name.split(".")[0] for name in report.missing} == {"mask_branch"}
    image = Numbers()(1, 3, 64, 64)
    reference = torchvision.models.resnet18(weights=None).eval()
    reference.load_state_dict({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}, strict=False)
    stages = [reference.maxpool(reference.relu(reference.bn1(reference.conv1(image))))]
    for stage in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        stages.append(stage(stages[-1]))
    merged = [conv(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(stages[1:])]
    for i in (3, 2, 1):
        merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[2:], mode="nearest")
    wanted = [conv(state, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(merged)]
    wanted.append(F.max_pool2d(wanted[-1], 1, stride=2))
    pyramid = loaded.backbone(image)
    for found, level in zip(pyramid, wanted, strict=True):
        torch.testing.assert_close(found, level, atol=1e-4, rtol=1e-4)
    logits, deltas = loaded.rpn.head(pyramid)
    hidden = F.relu(conv(state, "rpn_head.rpn_conv", wanted[1]))
    torch.testing.assert_close(logits[1], conv(state, "rpn_head.rpn_cls", hidden), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deltas[1], conv(state, "rpn_head.rpn_reg", hidden), atol=1e-4, rtol=1e-4)


def decode(boxes: np.ndarray[Any, Any], deltas: np.ndarray[Any, Any], stds: list[float]) -> np.ndarray[Any, Any]:
    """Boxes `[N, 4]`, deltas `[N, C, 4]` -> `[N, C, 4]`: mmdetection's delta2bbox (R-CNN, appendix C, with standard deviations)."""
    dx, dy, dw, dh = np.moveaxis(deltas * np.array(stds), -1, 0)
    width, height = (boxes[:, 2] - boxes[:, 0])[:, None], (boxes[:, 3] - boxes[:, 1])[:, None]
    x, y = (boxes[:, 0] + boxes[:, 2])[:, None] / 2 + dx * width, (boxes[:, 1] + boxes[:, 3])[:, None] / 2 + dy * height
    half_width, half_height = width * np.exp(dw) / 2, height * np.exp(dh) / 2
    return np.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)


@torch.no_grad()
def test_mmdetections_box_head_with_background_last(model: DynaMask, mmdetection: dict[str, Tensor]) -> None:
    state, loaded = mmdetection, copy.deepcopy(model)
    take_over(loaded, state, MMDETECTION, "m.pth")
    region, proposals = Numbers()(9, C, 7, 7), torch.tensor([[4.0, 6, 40, 30]]).repeat(9, 1) + torch.arange(9)[:, None]
    x = region.flatten(1)
    for name in ("shared_fcs.0", "shared_fcs.1"):
        x = F.relu(F.linear(x, state[f"roi_head.bbox_head.{name}.weight"], state[f"roi_head.bbox_head.{name}.bias"]))
    scores = F.linear(x, state["roi_head.bbox_head.fc_cls.weight"], state["roi_head.bbox_head.fc_cls.bias"]).softmax(-1)
    deltas = F.linear(x, state["roi_head.bbox_head.fc_reg.weight"], state["roi_head.bbox_head.fc_reg.bias"]).view(9, CLASSES, 4)
    wanted = decode(proposals.numpy(), deltas.numpy(), [0.1, 0.1, 0.2, 0.2])
    logits, found = loaded.roi_heads.box_predictor(loaded.roi_heads.box_head(region))
    torch.testing.assert_close(logits.softmax(-1)[:, 1:], scores[:, :CLASSES], atol=1e-6, rtol=1e-4)
    boxes = loaded.roi_heads.box_coder.decode(found, [proposals])[:, 1:]
    np.testing.assert_allclose(boxes.numpy(), wanted, atol=1e-3)


def test_mmdetections_and_detectron2s_anchors_are_ours_up_to_rounding(model: DynaMask) -> None:
    """Both: centred on the cell's corner, height over width 0.5, 1, 2 in this order, sides of 32 to 512, and not rounded."""
    for size, cell in zip((32, 64, 128, 256, 512), model.rpn.anchor_generator.cell_anchors, strict=True):
        for ratio, anchor in zip((0.5, 1.0, 2.0), cell, strict=True):
            width, height = size / ratio**0.5, size * ratio**0.5
            np.testing.assert_allclose(anchor.numpy(), [-width / 2, -height / 2, width / 2, height / 2], atol=0.5)


@pytest.fixture(scope="module")
def release(mmdetection: dict[str, Tensor]) -> dict[str, Tensor]:
    """The DynaMask release's names, with some of each part of its mask branch."""
    numbers, head = Numbers(), "roi_head.mask_head."
    state = {name: tensor for name, tensor in mmdetection.items() if not name.startswith(head)}
    for i in (0, 1):
        state |= numbers.layer(f"{head}instance_convs.{i}.conv", C, C, 3, 3)
    for i in (0, 1, 2):
        state |= numbers.layer(f"{head}stages.{i}.instance_logits", CLASSES, C >> i, 1, 1)
        state |= numbers.layer(f"{head}stages.{i}.detail_logits", CLASSES, C >> i, 1, 1)
        state |= numbers.layer(f"{head}stages.{i}.fuse_conv.1.conv_offset", 36, C >> i, 3, 3)
    state |= numbers.layer(head + "final_instance_logits", 1, C >> 3, 1, 1) | numbers.layer(head + "final_detail_logits", 1, C >> 3, 1, 1)
    return state | numbers.norm("roi_head.mask_predictor.bn1", 8) | numbers.layer("roi_head.mask_predictor.fc2", 4, 8)


@torch.no_grad()
def test_the_dynamask_releases_coarsest_masks(model: DynaMask, release: dict[str, Tensor]) -> None:
    loaded, head = copy.deepcopy(model), "roi_head.mask_head."
    report = take_over(loaded, release, origin_of(release, "d.pth"), "d.pth")
    assert report.origin == DYNAMASK.name and "mask predictor" in str(report)
    region, labels = Numbers()(4, C, 14, 14), torch.tensor([3, 0, 4, 3])
    x = region
    for i in (0, 1):
        x = F.relu(conv(release, f"{head}instance_convs.{i}.conv", x))
    wanted = conv(release, head + "stages.0.instance_logits", x)[torch.arange(4), labels]
    branch = loaded.mask_branch
    torch.testing.assert_close(branch.heads.mask_logits(0, branch.rfpn.tiny(region), labels), wanted, atol=1e-5, rtol=1e-5)
    untouched = {name for name, _ in loaded.mask_branch.named_parameters(prefix="mask_branch")} - set(report.matched)
    assert {".".join(name.split(".")[1:3]) for name in untouched} >= {"rfpn.stages", "heads.edges", "msm.fc2"}


def test_mmdetection_1_is_refused() -> None:
    with pytest.raises(InputError, match=r"mmdetection 1.*upgrade_model_version"):
        origin_of({"backbone.conv1.weight": torch.ones(1), "bbox_head.fc_cls.weight": torch.ones(1)}, "old.pth")


# Detectron2 ------------------------------------------------------------------------------------------------------------------------


def detectron2_body(numbers: Numbers) -> dict[str, Tensor]:
    """A ResNet-50 by Detectron2's names, its batch norm folded to scale and shift, as all that descends from MSRA's."""
    body = "backbone.bottom_up."
    state = {body + "stem.conv1.weight": numbers(64, 3, 7, 7) * 0.002} | numbers.norm(body + "stem.conv1.norm", 64, folded=True)
    inputs = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=2):
        for block in range(blocks):
            prefix = f"{body}res{stage}.{block}."
            shapes = {"conv1": (width, inputs, 1, 1), "conv2": (width, width, 3, 3), "conv3": (4 * width, width, 1, 1)}
            if block == 0:
                shapes["shortcut"] = (4 * width, inputs, 1, 1)
            for name, shape in shapes.items():
                state[f"{prefix}{name}.weight"] = numbers(*shape) / math.prod(shape[1:]) ** 0.5
                state |= numbers.norm(f"{prefix}{name}.norm", shape[0], folded=True)
            inputs = 4 * width
    return state


@pytest.fixture(scope="module")
def detectron2() -> dict[str, Tensor]:
    """Detectron2's Mask R-CNN of MSRA's ResNet-50."""
    numbers = Numbers()
    state = detectron2_body(numbers)
    for level, channels in zip((2, 3, 4, 5), (256, 512, 1024, 2048), strict=True):
        state |= numbers.layer(f"backbone.fpn_lateral{level}", C, channels, 1, 1) | numbers.layer(f"backbone.fpn_output{level}", C, C, 3, 3)
    rpn, heads = "proposal_generator.rpn_head.", "roi_heads."
    state |= numbers.layer(rpn + "conv", C, C, 3, 3) | numbers.layer(rpn + "objectness_logits", 3, C, 1, 1)
    state |= numbers.layer(rpn + "anchor_deltas", 12, C, 1, 1)
    state |= numbers.layer(heads + "box_head.fc1", FC, C * 49) | numbers.layer(heads + "box_head.fc2", FC, FC)
    state |= numbers.layer(heads + "box_predictor.cls_score", CLASSES + 1, FC) | numbers.layer(
        heads + "box_predictor.bbox_pred", 4 * CLASSES, FC
    )
    return state | numbers.layer(heads + "mask_head.predictor", CLASSES, C, 1, 1)


def detectron2_pyramid(state: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """Its backbone on a BGR image of 0..255, less the mean: strides in the first 1 x 1 convolutions, norms that scale and shift."""

    def block_conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        y = conv(state, name, x, stride)
        return y * state[name + ".norm.weight"][:, None, None] + state[name + ".norm.bias"][:, None, None]

    x = image - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    x = F.max_pool2d(F.relu(block_conv("backbone.bottom_up.stem.conv1", x, 2)), 3, 2, 1)
    outputs = []
    for stage, blocks in enumerate((3, 4, 6, 3), start=2):
        for block in range(blocks):
            prefix, stride = f"backbone.bottom_up.res{stage}.{block}.", 2 if stage > 2 and block == 0 else 1
            inner = F.relu(block_conv(prefix + "conv2", F.relu(block_conv(prefix + "conv1", x, stride))))
            shortcut = block_conv(prefix + "shortcut", x, stride) if block == 0 else x
            x = F.relu(block_conv(prefix + "conv3", inner) + shortcut)
        outputs.append(x)
    merged = [conv(state, f"backbone.fpn_lateral{i}", y) for i, y in enumerate(outputs, start=2)]
    for i in (3, 2, 1):
        merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], scale_factor=2, mode="nearest")
    return [conv(state, f"backbone.fpn_output{i}", y) for i, y in enumerate(merged, start=2)]


@torch.no_grad()
def test_detectron2s_pyramid_of_msras_resnet(detectron2: dict[str, Tensor]) -> None:
    model = small("resnet50_caffe")
    report = take_over(model, detectron2, origin_of(detectron2, "d2.pth"), "d2.pth")
    assert report.origin == "Detectron2" and "BGR" in str(report) and len(report.left) == 2
    rgb = 255 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    config = model.config.model
    own = (rgb / 255 - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    wanted = detectron2_pyramid(detectron2, rgb.flip(0)[None])
    for found, level in zip(model.backbone(own[None])[:4], wanted, strict=True):
        torch.testing.assert_close(found, level, atol=1e-3 * float(level.std()), rtol=1e-3)
    own_head, x = model.rpn.head([wanted[1]]), wanted[1]
    hidden = F.relu(conv(detectron2, "proposal_generator.rpn_head.conv", x))
    wanted_logits, wanted_deltas = (
        conv(detectron2, f"proposal_generator.rpn_head.{n}", hidden) for n in ("objectness_logits", "anchor_deltas")
    )
    torch.testing.assert_close(own_head[0][0], wanted_logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(own_head[1][0], wanted_deltas, atol=1e-3, rtol=1e-4)
    region = Numbers()(3, C, 7, 7)
    x = region.flatten(1)
    for name in ("fc1", "fc2"):
        x = F.relu(F.linear(x, detectron2[f"roi_heads.box_head.{name}.weight"], detectron2[f"roi_heads.box_head.{name}.bias"]))
    scores = F.linear(x, detectron2["roi_heads.box_predictor.cls_score.weight"], detectron2["roi_heads.box_predictor.cls_score.bias"])
    logits, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(region))
    torch.testing.assert_close(logits.softmax(-1)[:, 1:], scores.softmax(-1)[:, :-1], atol=1e-6, rtol=1e-4)


def test_msras_strides_in_another_resnet_are_refused(detectron2: dict[str, Tensor]) -> None:
    tensors = {BODY + "bn1." + name.rpartition(".")[2]: t for name, t in detectron2.items() if "stem.conv1.norm" in name}
    for origin in (DETECTRON2, MMDETECTION, RESNET):
        with pytest.raises(InputError, match=r"model\.backbone=resnet50_caffe"):
            resnet_pixels(origin, {}, tensors, "resnet50", "f.pth")
    with pytest.raises(InputError, match=r"model\.backbone=resnet50"):
        resnet_pixels(RESNET, {}, Numbers().norm(BODY + "bn1", 64), "resnet50_caffe", "f.pth")


def test_the_normalisation_is_that_of_the_weights_origin() -> None:
    """Detectron's ResNeXt: BGR with std; not folded: RGB; and what a file of Detectron2 says itself."""
    folded, plain = Numbers().norm(BODY + "bn1", 64, folded=True), Numbers().norm(BODY + "bn1", 64)
    resnext = resnet_pixels(MMDETECTION, {}, folded, "resnext101_32x8d", "f.pth")
    assert resnext.bgr and resnext.std == (58.395, 57.12, 57.375)
    assert not resnet_pixels(MMDETECTION, {}, plain, "resnet50", "f.pth").bgr
    said = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675])[:, None, None], "pixel_std": torch.tensor([57.375, 57.12, 58.395])}
    pixels = resnet_pixels(DETECTRON2, said, plain, "resnet50", "f.pth")
    assert pixels.bgr and pixels.mean == (123.675, 116.28, 103.53) and pixels.std == (58.395, 57.12, 57.375)
    said = {name: tensor.flip(0) for name, tensor in said.items()}
    assert not resnet_pixels(DETECTRON2, said, plain, "resnet50", "f.pth").bgr


# Classes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreground", "names", "rows"),
    [
        (90, ["zebra", "person", "toothbrush"], [23, 0, 89]),  # category ids 24, 1, 90
        (80, ["zebra", "person", "toothbrush"], [22, 0, 79]),
        (80, ["person", "hazelnut"], None),
        (2, ["hazelnut", "fig"], [0, 1]),
        (3, ["hazelnut", "fig"], None),
    ],
)
def test_classes_are_found(foreground: int, names: list[str], rows: list[int] | None) -> None:
    assert class_rows(foreground, [{"id": 1, "name": name} for name in names]) == rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), foreground=st.integers(1, 6), background_last=st.booleans(), shared=st.booleans())
def test_chosen_classes_keep_their_scores_and_boxes(data: st.DataObject, foreground: int, background_last: bool, shared: bool) -> None:
    """Probabilities stand in the ratio they stood in; every class keeps its deltas, or all have the shared ones."""
    shared = shared and background_last
    rows = data.draw(st.lists(st.integers(0, foreground - 1), min_size=1, max_size=foreground, unique=True))
    numbers, x = Numbers(), Numbers()(3, 4)
    boxes = 4 if shared else 4 * (foreground + (not background_last))
    tensors = numbers.layer(PREDICTOR + "cls_score", foreground + 1, 4) | numbers.layer(PREDICTOR + "bbox_pred", boxes, 4)
    ours = of_our_classes(tensors, rows, background_last, "f.pth")
    theirs_exp, ours_exp = (F.linear(x, t[PREDICTOR + "cls_score.weight"], t[PREDICTOR + "cls_score.bias"]).exp() for t in (tensors, ours))
    background, first = (foreground, 0) if background_last else (0, 1)
    assert torch.allclose(ours_exp[:, 0], theirs_exp[:, background], atol=1e-6)
    theirs, found = (F.linear(x, t[PREDICTOR + "bbox_pred.weight"], t[PREDICTOR + "bbox_pred.bias"]) for t in (tensors, ours))
    assert found.shape[1] == 4 * (len(rows) + 1)
    for i, row in enumerate(rows):
        assert torch.allclose(ours_exp[:, i + 1], theirs_exp[:, row + first], atol=1e-6)
        start = 0 if shared else 4 * (row + first)
        assert torch.allclose(found[:, 4 * i + 4 : 4 * i + 8], theirs[:, start : start + 4], atol=1e-6)


def test_deltas_of_other_boxes_are_refused() -> None:
    numbers = Numbers()
    tensors = numbers.layer(PREDICTOR + "cls_score", 4, 2) | numbers.layer(PREDICTOR + "bbox_pred", 15, 2)  # turned boxes: 5 numbers each
    with pytest.raises(InputError, match="15 box deltas for 3 classes"):
        of_our_classes(tensors, [0, 1, 2], True, "f.pth")


def test_other_classes_keep_random_weights_and_are_reported(mmdetection: dict[str, Tensor], tmp_path: Path) -> None:
    model = small(classes=2)
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    torch.save({"state_dict": mmdetection, "meta": {"epoch": 12}}, tmp_path / "m.pth")
    text = load_weights(model, str(tmp_path / "m.pth"))
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, before)
    assert torch.equal(model.roi_heads.box_head.fc7.weight, mmdetection["roi_head.bbox_head.shared_fcs.1.weight"])
    lines = {line[:33].strip(): line[33:].split() for line in text.splitlines()}
    assert lines["random: other classes or shape"] == ["4", "roi_heads.box_predictor"]
    assert lines["left out"] == ["12", "roi_head.mask_head"]
    assert "5 classes, other ones than the model's 2" in text and len(text.splitlines()) < 10


# What does not fit -----------------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named_and_change_nothing(model: DynaMask, mmdetection: dict[str, Tensor]) -> None:
    wide = dict(mmdetection) | Numbers().layer("neck.fpn_convs.2.conv", 2 * C, C, 3, 3)
    strange = dict(mmdetection) | {"roi_head.bbox_head.shared_convs.0.conv.weight": torch.ones(1)}
    lacking = {name: tensor for name, tensor in mmdetection.items() if name != "rpn_head.rpn_reg.bias"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state, sentence in [
        (wide, r"backbone\.fpn\.layer_blocks\.2\.0\.weight would be \[32, 16, 3, 3\]"),
        (strange, r"holds roi_head\.bbox_head\.shared_convs\.0\.conv\.weight"),
        (lacking, r"nothing for rpn\.head\.bbox_pred\.bias"),
    ]:
        with pytest.raises(InputError, match=sentence):
            take_over(model, state, MMDETECTION, "m.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
