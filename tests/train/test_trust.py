"""Runs that go wrong say so: losses that explode leave their batch, broken images are skipped and counted, and resuming stays exact."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamask.config import Config
from dynamask.data.canvas import CanvasDataset
from dynamask.data.shapes import ShapesDataset
from dynamask.train import learner, trainer
from dynamask.train.checkpoint import load_checkpoint
from dynamask.train.progress import DIVERGED, DivergenceGuard
from dynamask.train.schedule import Schedule, StepSampler
from runtime.errors import DynaMaskError, InputError
from tests.train.runs import ENVIRONMENT, TORCHRUN, StandIn, losses, stop_after, tiny


def altered(monkeypatch: pytest.MonkeyPatch, steps: range, change: Any) -> None:
    """Pass the losses of the steps, counted from 1, through `change`."""
    forward, calls = StandIn.forward, 0

    def called(self: StandIn, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        values = forward(self, images, targets)
        return {name: change(value) for name, value in values.items()} if calls in steps else values

    monkeypatch.setattr(StandIn, "forward", called)


def saved(output: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safetensors.safe_open(output / "failed-batch.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


def expected_batch(config: Config, step: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """The items of a step, counted from 0, of a run on shapes."""
    model, data = config.model, config.data
    shapes = ShapesDataset(data.shapes_train, data.shapes_seed, *model.canvas)
    items = CanvasDataset(shapes, *model.canvas, model.mean, model.std, config.train.seed, data.scale_jitter, data.flip)
    keys = list(StepSampler(Schedule(config.train, len(shapes)), 0))[step]
    return [items.placed(index, epoch) for index, epoch in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss * math.nan, r"a loss is not finite \(loss_mask nan"),
        (lambda loss: loss * math.inf, r"a loss is not finite \(loss_mask inf"),
        (lambda loss: loss * 1e5, r"the loss diverges: its mean is \S+ and was"),
        (lambda loss: loss + (loss * 0).sqrt(), r"the gradient is not finite \(norm nan\)"),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_a_loss_not_finite_or_diverging_ends_the_run_and_saves_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    altered(monkeypatch, range(5, 6), change)
    with pytest.raises(
        DynaMaskError, match=rf"^Step 5: {message}.*its batch is in {tmp_path}/failed-batch\.safetensors.*train\.learning_rate"
    ):
        trainer.train(tiny(), tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "model.safetensors").extra["step"] == 3
    tensors, fields = saved(tmp_path)
    items = expected_batch(tiny(), step=4)
    assert (fields["step"], fields["phase"]) == (5, 2)
    assert torch.equal(tensors["images"], torch.stack([image for image, _ in items]))
    assert tensors["ids"].tolist() == [target["image_id"] for _, target in items]
    assert tensors["counts"].tolist() == [len(target["boxes"]) for _, target in items]
    for name in ("boxes", "labels", "masks"):
        assert torch.equal(tensors[name], torch.cat([target[name] for _, target in items]))


@pytest.mark.usefixtures("stand_in")
def test_a_batch_that_cannot_be_saved_does_not_hide_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, range(2, 3), lambda loss: loss * math.nan)
    (tmp_path / "failed-batch.safetensors").mkdir()  # cannot be replaced by a file
    with pytest.raises(DynaMaskError, match=r"Step 2: a loss is not finite .*its batch could not be saved \(.*could not be written"):
        trainer.train(tiny(), tmp_path, quiet=True)


@pytest.mark.usefixtures("stand_in")
def test_with_mixed_precision_a_gradient_may_overflow_but_not_at_every_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = learner.GradScaler
    monkeypatch.setattr(learner, "GradScaler", lambda device, enabled: scaler(device, init_scale=4.0, enabled=True))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with monkeypatch.context() as patch:
        altered(patch, range(2, 4), lambda loss: loss + (loss * 0).sqrt())
        assert trainer.train(tiny(), tmp_path / "twice", quiet=True)["steps"] == 6
    altered(monkeypatch, range(2, 9), lambda loss: loss + (loss * 0).sqrt())
    with pytest.raises(DynaMaskError, match=r"^Step 4: the gradient is not finite"):  # the scale was 4, 2, 1
        trainer.train(tiny(), tmp_path / "always", quiet=True)


@given(st.lists(st.floats(-5, DIVERGED), min_size=1, max_size=300), st.integers(1, 3))
def test_a_loss_within_the_bound_never_diverges(values: list[float], phase: int) -> None:
    guard = DivergenceGuard()
    assert not any(guard.diverges(phase, loss) for loss in values)


@given(st.floats(0.1, 100), st.floats(1.05, 3.0))
def test_a_loss_that_grows_without_end_diverges(first: float, growth: float) -> None:
    guard = DivergenceGuard()
    grown = (first * growth**step for step in range(400))
    assert any(guard.diverges(2, loss) for loss in grown if loss < 1e30)


def test_a_new_phase_begins_with_its_own_losses() -> None:
    guard = DivergenceGuard()
    assert not guard.diverges(1, 0.1)
    assert not guard.diverges(2, 500.0)
    assert not guard.diverges(2, 400.0)


def broken(images: Path, folder: Path, count: int) -> dict[str, Any]:
    """A copy of the images in which `count` are empty, truncated or of another size, as fields of a configuration."""
    shutil.copytree(images, folder)
    for index in range(count):
        path = folder / "images" / f"{4 + 7 * index:06d}.jpg"
        if index % 3 == 0:
            path.write_bytes(b"")
        elif index % 3 == 1:
            path.write_bytes(path.read_bytes()[:300])
        else:
            cv2.imwrite(str(path), np.zeros((32, 64, 3), np.uint8))
    annotations = str(folder / "instances.json")
    return {
        "data__kind": "coco",
        "data__train_annotations": annotations,
        "data__val_annotations": annotations,
        "data__train_images": str(folder / "images"),
        "data__val_images": str(folder / "images"),
        "data__copy_paste": 0.3,
    }


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.usefixtures("stand_in")
def test_broken_images_are_skipped_and_resuming_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    config = tiny(**broken(images, tmp_path / "data", 3))
    annotations = tmp_path / "data" / "instances.json"
    tree = json.loads(annotations.read_text())
    tree["annotations"].append(tree["annotations"][0] | {"id": 10**6, "category_id": 10**6})
    annotations.write_text(json.dumps(tree))
    straight = trainer.train(config, tmp_path / "straight", quiet=True)
    assert straight["skipped"] == 3
    written = json.loads((tmp_path / "straight" / "metrics.json").read_text())
    assert [written["data"][part]["annotations_left_out"] for part in ("train", "val")] == [{"unknown category": 1}] * 2
    listed = [json.loads(line) for line in (tmp_path / "straight" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["index"] for entry in listed) == [4, 11, 18]
    assert all(f"{entry['index']:06d}.jpg" in entry["reason"] and 1 <= entry["step"] <= 15 for entry in listed)

    first = min(entry["step"] for entry in listed)
    config = Config.model_validate(config.model_dump() | {"data": {**config.data.model_dump(), "workers": 2}})
    with monkeypatch.context() as patch:
        stop_after(patch, step=first)
        trainer.train(config, tmp_path / "halves", quiet=True)
    resumed = trainer.train(config, tmp_path / "halves", resume=True, quiet=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    assert resumed["skipped"] == 3
    assert (tmp_path / "halves" / "skipped.jsonl").read_text() == (tmp_path / "straight" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.usefixtures("stand_in")
def test_too_many_broken_images_end_the_run(tmp_path: Path, images: Path, count: int) -> None:
    fields = broken(images, tmp_path / "data", 4)
    if count == 30:
        for path in (tmp_path / "data" / "images").iterdir():
            path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^\d+ of the 30 training images are broken, more than 10% \(.*jpg.*\): repair .*skipped\.jsonl"):
        trainer.train(tiny(**fields), tmp_path / "run", quiet=True)
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) >= 4


@pytest.mark.usefixtures("stand_in")
def test_copy_paste_and_large_jitter_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(data__copy_paste=0.5, data__scale_jitter=[0.1, 2.0])
    trainer.train(config, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, step=2)
        trainer.train(config, tmp_path / "halves", quiet=True)
    trainer.train(config, tmp_path / "halves", resume=True, quiet=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")


SCRIPT = """
import json, os, sys
from pathlib import Path
from unittest import mock
import torch
torch.set_num_threads(1)
from dynamask.train import learner, trainer
from tests.train.runs import StandIn, tiny
forward, calls = StandIn.forward, 0
def poisoned(self, images, targets):
    global calls
    calls += 1
    values = forward(self, images, targets)
    return {name: value * (float("nan") if calls == 17 and os.environ["RANK"] == "1" else 1) for name, value in values.items()}
FIELDS = json.loads(sys.argv[2])
with mock.patch.object(learner, "build_model", StandIn), mock.patch.object(StandIn, "forward", poisoned):
    try:
        trainer.train(tiny(**FIELDS), Path(sys.argv[1]), quiet=True)
    except trainer.DynaMaskError as error:
        Path(sys.argv[1], "said-" + os.environ["RANK"]).write_text(str(error))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_two_processes_skip_the_same_images_and_stop_together(tmp_path: Path, images: Path) -> None:
    fields, output, alone = broken(images, tmp_path / "data", 3), tmp_path / "two", tmp_path / "one"
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*TORCHRUN, str(tmp_path / "script.py"), str(output), json.dumps(fields)]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=600)
    assert (output / "said-0").read_text() == (output / "said-1").read_text()
    assert "Step 17: a loss is not finite" in (output / "said-0").read_text()

    trainer.train(tiny(**fields), alone, quiet=True)
    assert sorted((output / "skipped.jsonl").read_text().splitlines()) == sorted((alone / "skipped.jsonl").read_text().splitlines())
    tensors, fields = saved(output)
    assert (fields["step"], tensors["images"].shape) == (17, (2, 3, 64, 64))  # the whole batch, not one process's part
    assert len(np.unique(tensors["ids"])) == 2
