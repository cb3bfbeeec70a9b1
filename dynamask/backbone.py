"""Backbones with the image-level FPN on top: C2..C5 (strides 4 to 32) -> P2..P6, named as torchvision names them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dynamask.config import ModelConfig

CAFFE = "_caffe"
"""Ending of the ResNets that have a stage's stride in its first 1 x 1 convolution, as MSRA's original ones, not in the 3 x 3."""


class PyramidBackbone(nn.Module):
    """Image `[B, 3, H, W]` -> the i-FPN's P2..P6, five maps `[B, C, H / 2^l, W / 2^l]`.

    Batch norm keeps its ImageNet statistics, as in Mask R-CNN: batches are too small to estimate others.
    """

    def __init__(self, body: nn.Module, body_channels: list[int], channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body_channels, channels, extra_blocks=LastLevelMaxPool())
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        maps = features.values() if isinstance(features, dict) else features
        return list(self.fpn({str(i): x for i, x in enumerate(maps)}).values())

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def _resnet(name: str, frozen_stages: int) -> tuple[nn.Module, list[int]]:
    """torchvision's ResNet or ResNeXt `name`, with MSRA's strides if the name ends in `_caffe`."""
    resnet = torchvision.models.get_model(name.removesuffix(CAFFE), weights=None)
    if name.endswith(CAFFE):
        for block in resnet.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    body = IntermediateLayerGetter(resnet, {f"layer{i}": str(i - 1) for i in range(1, 5)})
    stages = [[body["conv1"], body["bn1"]], *([body[f"layer{i}"]] for i in range(1, 5))]
    _freeze(stages[:frozen_stages])
    return body, [resnet.inplanes // 2**i for i in (3, 2, 1, 0)]


def _efficientnet(name: str, frozen_stages: int) -> tuple[nn.Module, list[int]]:
    """timm's EfficientNet-Lite, in TensorFlow's form."""
    body: Any = timm.create_model(f"tf_{name}", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
    blocks = body.blocks
    stages = [[body.conv_stem, body.bn1, blocks[0]], [blocks[1]], [blocks[2]], [blocks[3], blocks[4]], [blocks[5], blocks[6]]]
    _freeze(stages[:frozen_stages])
    return body, list(body.feature_info.channels())


def _freeze(stages: list[list[nn.Module]]) -> None:
    for module in (module for stage in stages for module in stage):
        module.requires_grad_(False)


BODIES: dict[str, Callable[[int], tuple[nn.Module, list[int]]]] = {
    **{
        name: partial(_resnet, name)
        for name in ("resnet18", "resnet50", "resnet50_caffe", "resnet101", "resnet101_caffe", "resnext101_32x8d")
    },
    **{name: partial(_efficientnet, name) for name in ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")},
}
"""Name in the configuration -> a function of the number of frozen stages that makes the body and says the channels of C2..C5."""


def build_backbone(config: ModelConfig) -> PyramidBackbone:
    """The backbone that `config` names, with random weights (`dynamask.weights` brings ImageNet's)."""
    body, channels = BODIES[config.backbone](config.frozen_stages)
    return PyramidBackbone(body, channels, config.fpn_channels)
