"""The benchmark of a training step: the same work for both models, figures that fit together, wrong calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import box_iou

from benchmarks.training_step import measurement as bench
from benchmarks.training_step.measurement import MaskRCNNPeer, bench_training, near_truths
from dynamask.config import PRESETS, load_config
from dynamask.mask_targets import grid_targets
from runtime.errors import InputError
from tests.tiny import TINY


def test_boxes_near_truths_overlap_them_by_the_promised_share() -> None:
    corners = torch.tensor([[3.0, 5.0], [60.0, 2.0], [20.0, 90.0]])
    truths = torch.cat([corners, corners + torch.tensor([[4.0, 30.0], [25.0, 25.0], [100.0, 7.0]])], dim=1)
    near, matched = near_truths(truths, 200)
    assert near.shape == (200, 4)
    assert matched.bincount().tolist() == [67, 67, 66]
    assert box_iou(near, truths)[torch.arange(200), matched].min() >= 0.7


def test_an_image_without_instances_gets_no_boxes() -> None:
    near, matched = near_truths(torch.zeros(0, 4), 8)
    assert (len(near), len(matched)) == (0, 0)


def test_the_peer_is_torchvisions_model_as_it_is_trained() -> None:
    peer = MaskRCNNPeer(load_config("r50-coco"), 80).model
    published = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    # The published function has statistics of batch norm where ours are frozen: the same but for a counter of batches.
    names = {name for name in published.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(peer.state_dict()) == names
    learning = {name.split(".")[2] for name, p in peer.backbone.body.named_parameters(prefix="backbone.body") if p.requires_grad}
    assert learning == {"layer2", "layer3", "layer4"}


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset `tiny`, whose memory is measured in this process."""
    fields = {name: value for name, value in TINY.items() if name.startswith("model.")}
    model = load_config("lite0-shapes", fields | {"model.preset": "tiny"}).model
    monkeypatch.setitem(PRESETS, "tiny", model)
    monkeypatch.setattr(bench, "_apart", bench._peak_memory)


@pytest.mark.usefixtures("tiny_preset")
def test_a_whole_measurement_fits_together(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []

    def counted(masks: Tensor, rois: Tensor, matched: Tensor) -> Any:
        reached.append(len(rois))
        return grid_targets(masks, rois, matched)

    monkeypatch.setattr("dynamask.model.grid_targets", counted)
    result = bench_training("tiny", batch=2, device="cpu", steps=2, warm_up=1, rois=16)
    assert list(result["step_ms"]) == ["DynaMask, phase 1", "DynaMask, phase 2"]
    assert result["ratio"] == {}
    assert result["rois"] == {"sampled": 16, "positive": 4, "mask": 4, "proposals": 50}
    assert set(reached) == {2 * 4}  # every step had its full share of positives
    assert 0 < result["targets_share"] == result["targets_ms"] / result["step_ms"]["DynaMask, phase 2"]
    assert 0 < result["loader_wait"] < 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"preset": "r5"}, "no preset r5"),
        ({"steps": 0}, "0 steps"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
        ({"size": (100, 320)}, "multiples of 32"),
        ({"preset": "lite0", "rois": 7}, "give 8 or more"),
    ],
)
def test_wrong_calls(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        bench_training(**({"device": "cpu"} | wrong))
