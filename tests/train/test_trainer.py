"""Training runs: exact resuming, Ctrl-C, losses that explode, and what is left in the output folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask.config import load_config
from dynamask.train import learner, trainer, validator
from dynamask.train.checkpoint import load_checkpoint, load_model, load_state
from dynamask.train.log import RunLog
from runtime.errors import DynaMaskError, InputError
from tests.runtime.known_costs import costs
from tests.train.runs import StandIn, lines, losses, stop_after, tiny


@pytest.mark.usefixtures("fixed_figures")
def test_a_resumed_run_of_the_model_repeats_the_straight_one_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = trainer.train(tiny(), tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, step=2)
        stopped = trainer.train(tiny(), tmp_path / "halves", quiet=True)
    assert (stopped["interrupted"], stopped["steps"]) == (True, 2)
    resumed = trainer.train(tiny(), tmp_path / "halves", resume=True, quiet=True)
    assert (resumed["interrupted"], resumed["steps"], straight["steps"]) == (False, 6, 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    one, other = (load_checkpoint(tmp_path / name / "model.safetensors").tensors for name in ("straight", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    model, config, classes = load_model(resumed["checkpoint"])
    assert (model.training, config, len(classes)) == (False, tiny(), 7)


@pytest.mark.usefixtures("stand_in")
def test_a_run_that_was_killed_repeats_the_steps_after_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.train(tiny(), tmp_path / "straight", quiet=True)

    def die(self: RunLog, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    write = RunLog.step
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", die)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tiny(), tmp_path / "killed", quiet=True)
    assert load_state(tmp_path / "killed" / "state.safetensors").progress["step"] == 3  # the epoch's end
    trainer.train(tiny(), tmp_path / "killed", resume=True, quiet=True)
    assert [line["step"] for line in lines(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("stand_in")
def test_sigterm_ends_a_run_with_everything_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_after(monkeypatch, step=4, number=signal.SIGTERM)
    result = trainer.train(tiny(data__workers=workers), tmp_path)
    assert result["interrupted"]
    assert f"dynamask train --output {tmp_path} --resume" in capsys.readouterr().err
    assert load_checkpoint(result["checkpoint"]).extra["step"] == 4
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("stand_in")
def test_a_run_leaves_its_figures(tmp_path: Path) -> None:
    result = trainer.train(tiny(train__evaluate_every_epochs=1), tmp_path, quiet=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert [entry["epoch"] for entry in result["ap_by_epoch"]] == [1.0, 2.0]
    assert set(result["uniform"]) == {"14", "112"}
    assert load_checkpoint(result["best"]).extra["step"] == 3  # the second evaluation was no better
    assert [line["phase"] for line in lines(tmp_path)] == [1, 1, 1, 2, 2, 2]
    assert load_config(str(tmp_path / "config.yaml")) == tiny(train__evaluate_every_epochs=1)
    assert any((tmp_path / "tensorboard").iterdir())
    means = [sum(line["loss"] for line in lines(tmp_path)[first : first + 3]) / 3 for first in (0, 3)]
    assert [epoch["total"] for epoch in result["losses"]] == pytest.approx(means)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.usefixtures("stand_in")
def test_a_loader_with_workers_gives_the_same_run(tmp_path: Path) -> None:
    trainer.train(tiny(), tmp_path / "alone", quiet=True)
    trainer.train(tiny(data__workers=2), tmp_path / "workers", quiet=True)
    assert losses(tmp_path / "workers") == losses(tmp_path / "alone")


@pytest.mark.usefixtures("stand_in")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StandIn.forward

    def explode(self: StandIn, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        values = forward(self, images, targets)
        return values | ({"loss_budget": values["loss_budget"] * float("nan")} if self.phase == 2 else {})

    monkeypatch.setattr(StandIn, "forward", explode)
    with pytest.raises(DynaMaskError, match=r"Step 4: a loss is not finite \(.*loss_budget nan"):
        trainer.train(tiny(), tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "model.safetensors").extra["step"] == 3


@pytest.mark.usefixtures("stand_in")
def test_a_schedule_without_a_step_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^0\.1 epochs come to no step of 2 images: raise train\.phase2_epochs"):
        trainer.train(tiny(train__phase1_epochs=0, train__phase2_epochs=0.1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("stand_in")
def test_an_output_folder_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        trainer.train(tiny(), tmp_path, resume=True, quiet=True)
    trainer.train(tiny(train__phase1_epochs=0), tmp_path, quiet=True)
    with pytest.raises(InputError, match="--resume"):
        trainer.train(tiny(), tmp_path, quiet=True)
    with pytest.raises(InputError, match=r"train\.learning_rate 0\.05, not 0\.1"):
        trainer.train(tiny(train__phase1_epochs=0, train__learning_rate=0.1), tmp_path, resume=True, quiet=True)
    assert trainer.train(tiny(train__phase1_epochs=0, train__phase2_epochs=2), tmp_path, resume=True, quiet=True)["steps"] == 6


def test_norms_and_biases_do_not_decay_and_the_msm_has_its_own_rate() -> None:
    config = tiny(train__msm_rate_factor=3.0)
    model = StandIn(config, [])
    model.norm.weight.requires_grad_(False)
    groups = learner.parameter_groups(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table = {names[id(p)]: (group["weight_decay"], group["rate_factor"]) for group in groups for p in group["params"]}
    decay = config.train.weight_decay
    assert table == {
        "body.weight": (decay, 1.0),
        "body.bias": (0.0, 1.0),
        "msm.weight": (decay, 3.0),
        "msm.bias": (0.0, 3.0),
        "norm.bias": (0.0, 1.0),
    }


def test_coco_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train_annotations"):
        trainer.train(tiny(data__kind="coco"), tmp_path / "none", quiet=True)


def test_classes_that_differ_between_training_and_validation_are_named(tmp_path: Path, images: Path) -> None:
    tree = json.loads((images / "instances.json").read_text())
    tree["categories"][1]["name"] = "moon"
    (tmp_path / "val.json").write_text(json.dumps(tree))
    files = {"train_annotations": images / "instances.json", "val_annotations": tmp_path / "val.json"}
    folders = dict.fromkeys(("train_images", "val_images"), images / "images")
    config = tiny(data__kind="coco", **{f"data__{name}": str(path) for name, path in (files | folders).items()})
    with pytest.raises(InputError, match=r"val\.json: class 2 is 'moon' for the validation images and 'rounded_box' for the training"):
        trainer.train(config, tmp_path / "run", quiet=True)


def test_the_msm_is_calibrated_once_after_the_last_step(tmp_path: Path, fixed_figures: None, informative: None) -> None:
    config = tiny(train__calibration_detections=8, model__score_threshold=0.0)
    result = trainer.train(config, tmp_path, quiet=True)
    figures = result["calibration"]
    assert (figures["step"], figures["detections"]) == (result["steps"], 8) and figures["mean_gmacs"] <= figures["target_gmacs"]
    before = tiny(model__score_threshold=0.0)
    assert trainer.train(before, tmp_path / "uncalibrated", quiet=True)["calibration"] is None
    calibrated, uncalibrated = (load_checkpoint(folder / "model.safetensors").tensors for folder in (tmp_path, tmp_path / "uncalibrated"))
    changed = {name for name in calibrated if not torch.equal(calibrated[name], uncalibrated[name])}
    assert changed and all(".msm." in name for name in changed)
    assert trainer.train(config, tmp_path, resume=True, quiet=True)["calibration"] == figures
    again = load_checkpoint(tmp_path / "model.safetensors").tensors
    assert all(torch.equal(again[name], calibrated[name]) for name in calibrated)


def test_a_finished_run_is_calibrated_again_without_steps(tmp_path: Path, fixed_figures: None, informative: None) -> None:
    """With another number of detections, and with measured milliseconds as costs."""
    config = tiny(train__calibration_detections=8, model__score_threshold=0.0)
    first = trainer.train(config, tmp_path, quiet=True)
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"bundle": "b", "target": "onnxruntime", **costs().model_dump(mode="json")}))
    for changes, unit in (({"train__calibration_detections": 12}, "gmacs"), ({"train__calibration_costs": times}, "ms")):
        config = tiny(**{"train__calibration_detections": 12, "model__score_threshold": 0.0} | changes)
        result = trainer.train(config, tmp_path, resume=True, quiet=True)
        figures = result["calibration"]
        assert result["steps"] == first["steps"] and figures["detections"] == 12
        assert figures["costs"] == (str(times) if unit == "ms" else None) and figures[f"mean_{unit}"] <= figures[f"target_{unit}"]
    assert figures["target_ms"] == pytest.approx(config.train.target_paper_gmacs / 1.4 * 4) and "mean_gmacs" not in figures
    times.write_text("{}")
    with pytest.raises(InputError, match="holds no measured times"):
        trainer.train(tiny(train__calibration_detections=9, train__calibration_costs=times), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_the_best_checkpoint_is_the_best_of_the_calibrated_models(
    tmp_path: Path, informative: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter(range(90, 0, -1))
    figures = {"bbox": {"AP": 2.0}, "share": {"14": 1.0}, "images": 1, "detections": 1}
    monkeypatch.setattr(validator, "evaluate", lambda *_, **__: {**figures, "segm": {"AP": float(next(falling)), "AP_L": None}})
    config = tiny(train__calibration_detections=8, model__score_threshold=0.0, train__evaluate_every_epochs=0.5)
    result = trainer.train(config, tmp_path, quiet=True)
    assert len(result["ap_by_epoch"]) > 1 and [entry["calibrated"] for entry in result["ap_by_epoch"][-2:]] == [False, True]
    best, latest = (load_checkpoint(tmp_path / f"{name}.safetensors").tensors for name in ("best", "model"))
    assert all(torch.equal(best[name], latest[name]) for name in latest)


def test_a_run_may_have_no_step_and_only_calibrate(tmp_path: Path, fixed_figures: None) -> None:
    alone = {"train__phase1_epochs": 0, "train__phase2_epochs": 0, "train__rate_drop_epochs": []}
    result = trainer.train(tiny(**alone, train__calibration_detections=8, model__score_threshold=0.0), tmp_path / "alone", quiet=True)
    assert result["steps"] == 0 and not result["interrupted"]
    plain_head = {"train__calibration_detections": 8, "model__mask_head": "maskrcnn", "model__mask_grid": 14}
    for fields in ({}, plain_head):
        with pytest.raises(InputError, match="no step"):
            trainer.train(tiny(**alone, **fields), tmp_path / "nothing", quiet=True)


def test_an_interrupted_calibration_is_done_by_the_resumed_run(
    tmp_path: Path, fixed_figures: None, informative: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(train__calibration_detections=8, model__score_threshold=0.0)
    trainer.train(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.ProgressReport, "calibration", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        result = trainer.train(config, tmp_path / "stopped", quiet=True)
    assert result["interrupted"] and result["steps"] == result["total_steps"]
    trainer.train(config, tmp_path / "stopped", resume=True, quiet=True)
    whole, stopped = (load_checkpoint(tmp_path / name / "model.safetensors").tensors for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_new_mask_branch_trains_on_a_detector_that_stays_as_it_is(tmp_path: Path, fixed_figures: None) -> None:
    trainer.train(tiny(), tmp_path / "source", quiet=True)
    source = tmp_path / "source" / "model.safetensors"
    kept = {"weights": str(source), "weights_part": "detector", "train__frozen_detector": True, "train__seed": 5}
    trainer.train(tiny(**kept), tmp_path / "run", quiet=True)
    before, after = (load_checkpoint(path).tensors for path in (source, tmp_path / "run" / "model.safetensors"))
    assert {name for name in before if not torch.equal(before[name], after[name])} >= {"mask_branch.rfpn.tiny.0.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("mask_branch."))


def test_a_detector_that_is_not_whole_is_not_kept(tmp_path: Path, fixed_figures: None) -> None:
    trainer.train(tiny(), tmp_path / "source", quiet=True)
    source, kept = tmp_path / "source" / "model.safetensors", {"train__frozen_detector": True}
    with pytest.raises(InputError, match="that fits this model, whose detector is to be kept"):
        trainer.train(tiny(weights=str(source), model__box_features=24, **kept), tmp_path / "other", quiet=True)
    backbone = tmp_path / "backbone.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, backbone)
    with pytest.raises(InputError, match=r"backbone\.pth is no DynaMask checkpoint"):
        trainer.train(tiny(weights=str(backbone), **kept), tmp_path / "none", quiet=True)
