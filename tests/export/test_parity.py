"""Parity where no instance is found: raw outputs are compared instead, and a graph that differs does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dynamask.config import load_config
from dynamask.model import DynaMask, build_model
from dynamask.train.checkpoint import save_checkpoint
from export.export import export_bundle
from export.parity import RAW_TOLERANCE, Parity, raw_differences
from export.seams import RPN_DELTAS, RPN_LOGITS
from runtime.bundle import Bundle
from runtime.graph import PYRAMID
from tests.tiny import TINY

RAW = {*PYRAMID, *RPN_LOGITS, *RPN_DELTAS, "box_region", "class_logits", "box_deltas", "region", "msm_logits"}


@pytest.fixture(scope="module")
def blind_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a model that finds nothing: untrained, with a threshold that no score reaches."""
    folder = tmp_path_factory.mktemp("blind")
    torch.manual_seed(0)
    config = load_config("lite0-shapes", {**TINY, "model.score_threshold": 0.9})
    classes = [{"id": i + 1, "name": f"class {i}"} for i in range(40)]
    save_checkpoint(folder / "model.safetensors", build_model(config, classes), config, classes)
    export_bundle(folder / "model.safetensors", folder / "bundle")
    return folder / "bundle"


def test_a_model_that_finds_nothing_exports_and_its_bundle_says_so(blind_bundle: Path) -> None:
    parity = Bundle.open(blind_bundle).manifest.parity
    assert parity is not None and parity["instances"] == 0 and parity["images"] > 0 and parity["holds"]
    assert set(parity["raw_outputs"]) == RAW and max(parity["raw_outputs"].values()) <= RAW_TOLERANCE


@pytest.mark.parametrize("weight", ["model.mask_branch.msm.fc2.weight", "model.rpn.head.cls_logits.weight"])
def test_a_raw_output_that_differs_is_seen(model: DynaMask, portable: onnx.ModelProto, tmp_path: Path, weight: str) -> None:
    canvas = np.random.default_rng(0).standard_normal((1, 3, 128, 160), np.float32)
    changed = onnx.ModelProto()
    changed.CopyFrom(portable)
    (tensor,) = (entry for entry in changed.graph.initializer if entry.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(10.0), weight))
    for graph, holds in ((portable, True), (changed, False)):
        onnx.save(graph, tmp_path / "model.onnx")
        assert Parity(images=1, raw_outputs=raw_differences(model, tmp_path / "model.onnx", [canvas])).holds() is holds


def test_parity_does_not_hold_where_nothing_was_compared() -> None:
    assert not Parity(images=4).holds()
