"""What each phase of training lets learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynamask.config import load_config
from dynamask.model import build_model
from runtime.errors import InputError
from tests.tiny import TINY


@pytest.mark.parametrize(
    ("phase", "losses"), [(1, {"loss_mask", "loss_edge"}), (2, {"loss_mask", "loss_edge", "loss_budget", "loss_entropy"})]
)
def test_with_a_frozen_detector_the_mask_branch_learns_alone(phase: int, losses: set[str]) -> None:
    torch.manual_seed(0)
    config = load_config("lite0-shapes", {**TINY, "weights": "a checkpoint", "train.frozen_detector": True})
    model = build_model(config, [{"id": 1, "name": "thing"}]).train()
    model.phase = phase
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 20:50] = 1
    found = model(torch.randn(1, 3, 64, 64), [{"boxes": torch.tensor([[20.0, 10, 50, 40]]), "labels": torch.tensor([1]), "masks": masks}])
    assert set(found) == losses
    sum(found.values()).backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    branch = {f"mask_branch.{name}" for name, _ in model.mask_branch.named_parameters()}
    assert touched == (branch if phase == 2 else {name for name in branch if ".msm." not in name})


@pytest.mark.parametrize("weights", ["none", "imagenet"])
@pytest.mark.parametrize("kept", [{"train.frozen_detector": True}, {"weights_part": "detector"}])
def test_a_detector_that_was_never_trained_cannot_be_kept(weights: str, kept: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"weights '{weights}' have no trained detector"):
        load_config("lite0-shapes", {"weights": weights, **kept})
