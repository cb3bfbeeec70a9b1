"""The backbones: their maps, their sizes against published ones, what is frozen, and MSRA's strides."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dynamask.backbone import BODIES, build_backbone
from dynamask.config import CONFIGS, PRESETS, R50, ModelConfig


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50_caffe", "efficientnet_lite1", "efficientnet_lite2"])
def test_maps_are_p2_to_p6(name: str) -> None:
    backbone = build_backbone(R50.model_copy(update={"backbone": name, "fpn_channels": 8})).eval()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, 8, 64 // stride, -(-96 // stride)) for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_caffe", "resnet101", "resnext101_32x8d"])
def test_resnets_have_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        body, channels = BODIES[name](0)
    published = torchvision.models.get_model_weights(name.removesuffix("_caffe"))["IMAGENET1K_V1"].meta["num_params"]
    classifier = 1000 * channels[-1] + 1000
    assert sum(p.numel() for p in body.parameters()) + classifier == published


@pytest.mark.parametrize(("name", "millions"), [("efficientnet_lite0", 4.7), ("efficientnet_lite1", 5.4), ("efficientnet_lite2", 6.1)])
def test_efficientnets_have_as_many_parameters_as_published(name: str, millions: float) -> None:
    """Published: the table of github.com/tensorflow/tpu, models/official/efficientnet/lite."""
    with torch.device("meta"):
        body, channels = BODIES[name](0)
    head = channels[-1] * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert (sum(p.numel() for p in body.parameters()) + head) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite1"])
def test_frozen_stages_and_batch_norm_stay_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(R50.model_copy(update={"backbone": name, "fpn_channels": 8, "frozen_stages": 2})).train()
    norms = [module for module in backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64))).backward()  # type: ignore[union-attr]
    assert not any(norm.training for norm in norms)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    learnt = {key for key, p in backbone.body.named_parameters() if p.grad is not None}
    frozen = ("conv1", "layer1") if name == "resnet18" else ("conv_stem", "blocks.0", "blocks.1")
    convolutions = {f"{key}.weight" for key, module in backbone.body.named_modules() if isinstance(module, nn.Conv2d)}
    assert learnt == {key for key in convolutions if not key.startswith(frozen)} != set()


@torch.no_grad()
def test_caffe_blocks_stride_in_their_first_convolution() -> None:
    """The first block of a stage, written out: 1 x 1 with the stride, 3 x 3, 1 x 1; batch norm as initialised divides by sqrt(1 + eps)."""
    torch.manual_seed(0)
    body, _ = BODIES["resnet50_caffe"](0)
    block = body.eval()["layer2"][0]  # type: ignore[index]
    x = torch.randn(1, 256, 8, 8)

    def convolve(value: Tensor, layer: nn.Conv2d, stride: int) -> Tensor:
        return F.conv2d(value, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2) / (1 + 1e-5) ** 0.5

    inner = F.relu(convolve(F.relu(convolve(x, block.conv1, 2)), block.conv2, 1))
    wanted = F.relu(convolve(inner, block.conv3, 1) + convolve(x, block.downsample[0], 2))
    torch.testing.assert_close(block(x), wanted, atol=1e-4, rtol=1e-4)


def test_presets_and_configurations_fit_together() -> None:
    assert set(typing.get_args(ModelConfig.model_fields["backbone"].annotation)) == set(BODIES)
    assert {"r50", "r101", "x101", "r18", "lite0", "lite1", "lite2"} == set(PRESETS)
    assert {f"{name}-coco" for name in PRESETS} <= set(CONFIGS)
    for name, model in PRESETS.items():
        assert model.preset == name and ModelConfig.model_validate(model.model_dump()) == model
