"""Rows of layers that depend on the classes, for a model of other classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dynamask.config import load_config
from dynamask.model import build_model
from dynamask.train.checkpoint import load_checkpoint, save_checkpoint, start_from
from dynamask.train.transfer import with_rows_of_classes
from tests.tiny import TINY

THEIRS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
OURS = [{"id": 7, "name": "Dog"}, {"id": 8, "name": "fern"}]


def test_a_class_of_the_same_name_takes_its_rows_and_another_the_mean() -> None:
    rng = np.random.default_rng(0)
    cls, box, mask = rng.normal(size=(4, 5)), rng.normal(size=16), rng.normal(size=(3, 6, 1, 1))
    prefix = "roi_heads.box_predictor."
    names = (f"{prefix}cls_score.weight", f"{prefix}bbox_pred.bias", "mask_branch.heads.masks.2.weight")
    tensors = {name: torch.from_numpy(array) for name, array in zip(names, (cls, box, mask), strict=True)}
    found = with_rows_of_classes(tensors, THEIRS, OURS)
    by_class = box[4:].reshape(3, 4)
    expected = (
        np.stack([cls[0], cls[2], cls[1:].mean(axis=0)]),
        np.concatenate([box[:4], by_class[1], by_class.mean(axis=0)]),
        np.stack([mask[1], mask.mean(axis=0)]),
    )
    for name, wanted in zip(names, expected, strict=True):
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-12)


def test_every_tensor_of_a_model_of_other_classes_is_taken_over(tmp_path: Path) -> None:
    config = load_config("lite0-shapes", TINY)
    source, target = build_model(config, THEIRS), build_model(config, OURS)
    save_checkpoint(tmp_path / "source.safetensors", source, config, THEIRS)
    checkpoint = load_checkpoint(tmp_path / "source.safetensors")
    assert start_from(target, checkpoint, "source.safetensors", classes=OURS) == []
    expected = with_rows_of_classes(source.state_dict(), THEIRS, OURS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in target.state_dict().items())


def test_a_mask_head_that_all_classes_share_stays() -> None:
    shared = torch.zeros(1, 6, 1, 1)
    assert with_rows_of_classes({"mask_branch.heads.masks.3.weight": shared}, THEIRS, OURS)["mask_branch.heads.masks.3.weight"] is shared
