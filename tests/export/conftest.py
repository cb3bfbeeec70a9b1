"""What the tests of export share: one portable graph, of a model small in everything but its operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from dynamask.backbone import PyramidBackbone
from dynamask.config import LITE0, Config
from dynamask.model import DynaMask, build_model
from export.graph import export_graph
from tests.export.portable import CANVAS

CLASSES = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(3)]


class Body(nn.Module):
    """C2..C5 by four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        strides = (4, 2, 2, 2)
        self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, s + 1, s, s // 2) for i, s in enumerate(strides))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for i, stage in enumerate(self.stages):
            x = maps[str(i)] = torch.relu(stage(x))
        return maps


@pytest.fixture(scope="session")
def model() -> DynaMask:
    """20 slots, 50 proposals, 3 classes; predictions spread out as a trained model's are, for near-equal ones have no order to compare."""
    torch.manual_seed(0)
    sizes = {"canvas": CANVAS, "fpn_channels": 32, "stage_channels": (32, 16, 16, 8), "box_features": 64}
    counts = {"detections": 20, "proposals_per_level": 60, "proposals": 50, "score_threshold": 0.3}
    model = build_model(Config(model=LITE0.model_copy(update=sizes | counts)), CLASSES).eval()
    model.backbone = PyramidBackbone(Body(), [16] * 4, 32)
    branch, classifier, rpn = model.mask_branch, model.roi_heads.box_predictor.cls_score, model.rpn.head
    for layer, std in ((classifier, 8.0), (rpn.cls_logits, 3.0), (rpn.bbox_pred, 0.3), (branch.msm.fc2, 1.0)):
        nn.init.normal_(layer.weight, std=std)
    for stage in branch.rfpn.stages:
        nn.init.normal_(stage.align_offset.bias, std=1.0)
        nn.init.normal_(stage.attend_offset.bias, std=1.0)
    with torch.no_grad():
        found = model.detect(torch.randn(1, 3, *CANVAS))
        classifier.bias -= found.class_logits.mean(dim=0)
        found = model.detect(torch.randn(1, 3, *CANVAS))
        masks = branch.mask_pass(found.pyramid, found.detections, CANVAS, branch.gmac_budget(), torch.full((20,), -1))
        branch.msm.fc2.bias -= masks.msm_logits.mean(dim=0)
    return model


@pytest.fixture(scope="session")
def portable(model: DynaMask, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The model's portable graph."""
    path: Path = tmp_path_factory.mktemp("portable") / "model.onnx"
    export_graph(model, path, CANVAS)
    return onnx.load(path)
