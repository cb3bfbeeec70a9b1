"""`dynamask finetune`, from photos to a bundle that runs."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import cli.finetune as commands
import cli.main
from dynamask.config import load_config
from dynamask.data.shapes import write_dataset
from dynamask.finetune import plan as plans
from dynamask.model import build_model
from dynamask.train.checkpoint import load_checkpoint, save_checkpoint
from runtime.bundle import Bundle
from runtime.errors import INTERRUPTED
from tests.tiny import TINY
from tests.train.runs import stop_after


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """An untrained checkpoint of a tiny model."""
    config = load_config("lite0-shapes", TINY)
    classes = [{"id": 1, "name": "smooth"}]
    save_checkpoint(tmp_path / "tiny.safetensors", build_model(config, classes), config, classes)
    return str(tmp_path / "tiny.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "photos", 6, seed=3, height=96, width=96)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run of six steps, without a process that reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "measure_speed", lambda config: plans.Speed(step_s=60 / 6.4, image_s=0.01))
    monkeypatch.setattr(plans, "base_config", lambda *args, base=plans.base_config: base(*args, workers=0))
    monkeypatch.setattr(plans, "SHORTEST_EXPORT_S", 0.0)


def test_photos_become_a_bundle_that_predicts(photos: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main.main(["finetune", str(photos), "--minutes", "1", "--weights", weights, "--json", "result.json"]) == 0
    result = json.loads(Path("result.json").read_text())
    bundle = Path("photos-model", "bundle")
    assert result["bundle"] == str(bundle)
    assert 3 <= result["steps"] == result["total_steps"] <= 6
    assert (result["train_photos"], result["val_photos"], result["interrupted"]) == (5, 1, False)
    assert set(result["figures"]) == {"segm", "bbox", "boundary", "share", "gmacs"}
    assert [entry.name for entry in Bundle.open(bundle).manifest.classes] == result["classes"]
    out = capsys.readouterr().out
    assert f"dynamask stream {bundle} VIDEO" in out
    assert cli.main.main(["predict", str(bundle), str(next((photos / "images").iterdir()))]) == 0


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above exports."""
    monkeypatch.setattr(commands, "_finish", lambda *_: None)


def test_ctrl_c_keeps_what_was_learnt(photos: Path, weights: str, no_export: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2, signal.SIGINT)
    assert cli.main.main(["finetune", str(photos), "--minutes", "1", "--weights", weights, "--json", "result.json"]) == INTERRUPTED
    result = json.loads(Path("result.json").read_text())
    assert (result["steps"], result["interrupted"]) == (2, True)
    assert load_checkpoint("photos-model/run/model.safetensors").extra["step"] == 2


def test_the_time_that_is_up_ends_the_training(photos: Path, weights: str, no_export: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take longer than measured: the run ends early, and that is no interruption."""
    monkeypatch.setattr(plans, "plan", lambda *args, plan=plans.plan: replace(plan(*args), deadline=time.monotonic()))
    assert cli.main.main(["finetune", "photos", "--minutes", "1", "--weights", weights, "--json", "result.json"]) == 0
    result = json.loads(Path("result.json").read_text())
    assert (result["steps"], result["interrupted"]) == (0, False)
    assert result["total_steps"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes 0 is no time to train for"),
        (["--minutes", "0.01"], "0.01 minutes are too few for one epoch of 5 photos on this machine"),
        (["--output", "photos"], "photos holds files already"),
        (["--format", "yolo"], "holds no labels in the format yolo; they look like coco"),
        (["--weights", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--val", "gone"], "gone does not exist"),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(
    arguments: list[str], sentence: str, photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main.main(["finetune", "photos", "--weights", weights, *arguments]) == 2
    assert sentence in capsys.readouterr().err
