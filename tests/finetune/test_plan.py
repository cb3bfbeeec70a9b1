"""The schedule that ends in the time given."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dynamask.config import load_config
from dynamask.finetune import plan as plans
from dynamask.finetune.photos import PhotoSets
from dynamask.finetune.plan import Speed, base_config, plan
from dynamask.model import build_model
from dynamask.train.checkpoint import save_checkpoint
from dynamask.train.schedule import Schedule
from runtime.errors import InputError
from tests.tiny import TINY

NOW = 1000.0
SETS = PhotoSets([{"id": 1, "name": "leaf"}], (Path("train.json"), Path("photos")), None, 12, 0, [])


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: NOW)


@pytest.mark.usefixtures("still_clock")
def test_steps_fill_the_time_that_export_and_calibration_leave() -> None:
    """After 20 seconds, 3 minutes leave 160: less the start, export, calibration of 12 photos, all but 7 %."""
    config = base_config("imagenet", SETS, seed=0)
    speed = Speed(step_s=0.5, image_s=0.06)
    planned = plan(config, speed, SETS, NOW - 20, 3)
    export_s, calibration_s = 18.0, 12 * 8 * 0.06
    assert planned.steps == int(0.93 * (160 - 2 - export_s - calibration_s) / 0.5)
    assert Schedule(planned.config.train, 12).total_steps == planned.steps
    assert planned.epochs == pytest.approx(planned.steps / 3)
    assert planned.deadline == pytest.approx(NOW + 160 - export_s)


@pytest.mark.usefixtures("still_clock")
@pytest.mark.parametrize("minutes", [0.1, 0.5])
def test_too_few_minutes_are_refused_with_the_number_that_does(minutes: float) -> None:
    config = base_config("imagenet", SETS, seed=0)
    with pytest.raises(InputError, match=r"too few for one epoch of 12 photos on this machine: give --minutes") as error:
        plan(config, Speed(2.0, 0.03), SETS, NOW - 20, minutes)
    enough = float(str(error.value).split("--minutes ")[1].split(" or")[0])
    assert plan(config, Speed(2.0, 0.03), SETS, NOW - 20, enough).steps >= 3
    assert enough < 1.1


def test_fewer_photos_than_a_batch_make_a_smaller_batch() -> None:
    assert base_config("imagenet", PhotoSets([], (Path("a"), Path("b")), None, 1, 0, []), 0).train.batch == 1


def test_the_model_has_the_sizes_of_the_checkpoint(tmp_path: Path) -> None:
    config = load_config("lite0-shapes", TINY)
    classes = [{"id": 1, "name": "leaf"}]
    save_checkpoint(tmp_path / "tiny.safetensors", build_model(config, classes), config, classes)
    assert base_config(str(tmp_path / "tiny.safetensors"), SETS, 0).model.fpn_channels == config.model.fpn_channels
    baseline = load_config("lite0-shapes", {**TINY, "model.mask_head": "maskrcnn", "model.mask_grid": 28})
    save_checkpoint(tmp_path / "baseline.safetensors", build_model(baseline, classes), baseline, classes)
    with pytest.raises(InputError, match="Mask R-CNN head"):
        base_config(str(tmp_path / "baseline.safetensors"), SETS, 0)
    with pytest.raises(InputError, match="does not exist"):
        base_config(str(tmp_path / "gone.safetensors"), SETS, 0)


def test_the_measurement_takes_steps_of_the_run() -> None:
    """Real steps of a tiny model; the number of threads is the same afterwards."""
    config = load_config("lite0-shapes", {**TINY, "data.shapes_train": 6, "train.batch": 2, "data.workers": 0})
    threads = torch.get_num_threads()
    speed = plans.measure_speed(config)
    assert speed.image_s > 0 and speed.step_s > 0
    assert torch.get_num_threads() == threads


def test_constants_fit_each_other() -> None:
    assert plans.MAX_CALIBRATION % plans.CALIBRATION_PER_PHOTO == 0
