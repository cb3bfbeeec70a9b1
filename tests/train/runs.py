"""Small runs of the trainer, a stand-in for its model, and what a run leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamask.config import Config, load_config
from dynamask.train.log import RunLog
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FIELDS = {
    **TINY,
    "data.shapes_train": 6,
    "data.shapes_val": 1,
    "data.workers": 0,
    "train.batch": 2,
    "train.learning_rate": 0.05,
    "train.phase1_epochs": 1,
    "train.phase2_epochs": 1,
    "train.warmup_steps": 2,
    "train.pictures": 0,
}


def tiny(**overrides: Any) -> Config:
    return load_config("lite0-shapes", FIELDS | {name.replace("__", "."): value for name, value in overrides.items()})


class StandIn(nn.Module):
    """The smallest model that draws random numbers, has an MSM, and has other losses in each phase."""

    def __init__(self, config: Config, classes: list[dict[str, Any]]) -> None:
        super().__init__()
        self.body, self.msm, self.norm = nn.Conv2d(3, 2, 3), nn.Linear(2, 4), nn.BatchNorm2d(2)
        self.mask_branch = SimpleNamespace(msm=self.msm)
        self.classes = classes
        self.phase, self.statistics = 2, {"share_14": 0.5}

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert {"boxes", "labels", "masks"} <= set(targets[0])
        features = self.norm(self.body(images)).mean(dim=(2, 3)) + torch.randn(len(images), 2)
        losses = {"loss_mask": features.square().mean()}
        if self.phase == 2:
            losses["loss_budget"] = self.msm(features).square().mean()
        return losses


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process and its children, as one group, a signal while that step is being logged."""
    write = RunLog.step

    def log_and_signal(self: RunLog, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == step:
            for process in [*(child.pid for child in multiprocessing.active_children()), os.getpid()]:
                os.kill(process or 0, number)

    monkeypatch.setattr(RunLog, "step", log_and_signal)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in lines(output)]
