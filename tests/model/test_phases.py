"""What each phase of training lets learn."""

from __future__ import annotations

import torch

from dynamask.config import LITE0, Config
from dynamask.model import build_model


def test_in_phase_three_the_switch_learns_alone() -> None:
    torch.manual_seed(0)
    model = build_model(Config(model=LITE0.model_copy(update={"canvas": (128, 128)})), [{"id": 1, "name": "thing"}]).train()
    model.phase = 3
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[0, 20:60, 30:70] = 1
    target = {"boxes": torch.tensor([[30.0, 20, 70, 60]]), "labels": torch.tensor([1]), "masks": masks}
    losses = model(torch.randn(1, 3, 128, 128), [target])
    assert set(losses) == {"loss_mask", "loss_edge", "loss_budget", "loss_entropy"}
    sum(losses.values()).backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {f"mask_branch.msm.{name}" for name, _ in model.mask_branch.msm.named_parameters()}
    assert float(model.mask_branch.msm.fc2.bias.grad.abs().sum()) > 0
