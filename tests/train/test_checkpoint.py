"""Checkpoints are read back as they were written, and what is not one is refused in a sentence."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from dynamask.config import CONFIGS, EARLIER_NAMES, load_config
from dynamask.train import checkpoint as checkpoints
from dynamask.train.progress import Progress
from runtime.errors import DynaMaskError, InputError

CONFIG = CONFIGS["lite0-shapes"]
CLASSES = [{"id": 3, "name": "star"}, {"id": 7, "name": "gear"}]


def small_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)).to(memory_format=torch.channels_last)


def test_a_checkpoint_holds_weights_config_and_classes(tmp_path: Path) -> None:
    model = small_model()
    checkpoints.save_checkpoint(tmp_path / "m.safetensors", model, CONFIG, CLASSES, {"step": 5})
    read = checkpoints.load_checkpoint(tmp_path / "m.safetensors")
    assert (read.config, read.classes, read.extra) == (CONFIG, CLASSES, {"step": 5})
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.tensors[name], tensor)
        assert read.tensors[name].dtype == tensor.dtype


def test_a_half_checkpoint_is_stored_in_float16_and_read_in_float32(tmp_path: Path) -> None:
    model = small_model()
    checkpoints.save_checkpoint(tmp_path / "m.safetensors", model, CONFIG, CLASSES, half=True)
    read = checkpoints.load_checkpoint(tmp_path / "m.safetensors").tensors
    assert read["0.weight"].dtype == torch.float32
    assert torch.equal(read["0.weight"], model.state_dict()["0.weight"].half().float())
    assert read["1.num_batches_tracked"].dtype == torch.int64


def test_momentum_is_restored(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    state = {"config": CONFIG.model_dump(mode="json"), "classes": CLASSES, "scaler": {}, "progress": {"step": 1}}
    checkpoints.save_state(tmp_path / "state.safetensors", model, optimizer, state)

    other = small_model()
    fresh = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    read = checkpoints.load_state(tmp_path / "state.safetensors")
    checkpoints.load_tensors(other, read.weights, "state.safetensors")
    checkpoints.restore_momentum(other, fresh, read.momentum)
    assert read.progress == {"step": 1}
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], fresh.state[theirs]["momentum_buffer"])


def test_a_state_of_an_earlier_version_has_todays_names(tmp_path: Path) -> None:
    tree = CONFIG.model_dump(mode="json")
    for earlier, current in EARLIER_NAMES.items():
        tree["train"][earlier.removeprefix("train.")] = tree["train"].pop(current.removeprefix("train."))
    progress = {
        "step": 6,
        "seconds": 1.5,
        "evaluations": [{"step": 6, "taught": True, "segm": {"AP": 40.0}}],
        "loss_watch": {"phase": 2, "mean": 3.0, "lowest": 2.0},
        "lessons": {"step": 6, "wanted": 12, "detections": 9, "allowed_cost": 0.1, "explained": 0.8, "mean_cost": 0.09, "lambda": 7.0},
    }
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
    state = {"config": tree, "classes": CLASSES, "scaler": {}, "progress": progress}
    checkpoints.save_state(tmp_path / "state.safetensors", small_model(), optimizer, state)
    read = checkpoints.load_state(tmp_path / "state.safetensors")
    found = Progress.from_json(read.progress)
    assert read.config == CONFIG
    assert found.calibration == {
        "step": 6,
        "requested": 12,
        "detections": 9,
        "target_gmacs": 0.1,
        "variance_explained": 0.8,
        "mean_gmacs": 0.09,
        "lambda": 7.0,
    }
    assert found.evaluated and found.evaluations[0]["calibrated"] and found.guard.lowest == 2.0
    assert Progress.from_json(found.to_json()) == found


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "newer", "state"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.safetensors"
    checkpoints.save_checkpoint(path, small_model(), CONFIG, CLASSES)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "text":
        path.write_bytes(b"not a checkpoint at all")
    elif damage == "foreign":
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    elif damage == "newer":
        path.write_bytes(content.replace(b'"format":"1"', b'"format":"9"'))
    else:
        optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
        checkpoints.save_state(path, small_model(), optimizer, {"config": {}, "classes": [], "scaler": {}, "progress": {}})
    with pytest.raises(InputError, match=r"m\.safetensors"):
        checkpoints.load_checkpoint(path)


def test_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"f\.safetensors: the tensor 0\.bias is \[6\] where the model has \[4\]"):
        checkpoints.load_tensors(small_model(), small_model(6).state_dict(), "f.safetensors")
    short = {name: tensor for name, tensor in small_model().state_dict().items() if name != "1.bias"}
    with pytest.raises(InputError, match=r"lacks the tensor 1\.bias"):
        checkpoints.load_tensors(small_model(), short, "f.safetensors")


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("classes", "[null]", "classes is not a list of ids and names"),
        ("classes", '[{"id": 1}]', "classes is not a list of ids and names"),
        ("classes", '[{"id": "1", "name": "a"}]', "classes is not a list of ids and names"),
        ("classes", '[{"id": true, "name": "a"}]', "classes is not a list of ids and names"),
        ("classes", '[{"id": 1, "name": "\\ud800"}]', "classes is not a list of ids and names"),
        ("classes", "[]", "classes is empty"),
        ("classes", '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "two have one id"),
        ("config", "[]", "config is not a JSON object"),
        ("config", "[" * 100_000, "recursion"),
        ("config", '{"model": {"canvas": 1}}', "model.canvas"),
        ("extra", "null", "extra is not a JSON object"),
    ],
    ids=["null", "no name", "text", "flag", "surrogate", "none", "duplicate", "list", "nested", "canvas", "no extra"],
)
def test_damaged_metadata_are_refused(tmp_path: Path, field: str, text: str, said: str) -> None:
    metadata = {"dynamask": "checkpoint", "format": "1", "config": CONFIG.model_dump_json(), "classes": json.dumps(CLASSES), "extra": "{}"}
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors", {**metadata, field: text})
    with pytest.raises(InputError, match=rf"m\.safetensors.*{said}") as caught:
        checkpoints.load_checkpoint(tmp_path / "m.safetensors")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [2**20, 2**40, 2**62])
def test_a_configuration_of_a_model_that_no_memory_holds_is_refused(tmp_path: Path, size: int) -> None:
    config = load_config("lite0-shapes", {"model.box_features": size})
    checkpoints.save_checkpoint(tmp_path / "m.safetensors", small_model(), config, CLASSES)
    with pytest.raises(InputError, match=r"m\.safetensors"):
        checkpoints.load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_tensors_of_another_kind_of_numbers_are_refused(dtype: torch.dtype) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"the tensor 0\.weight is {dtype} where the model has torch\.float32"):
        checkpoints.load_tensors(model, {**small_model(4).state_dict(), "0.weight": before["0.weight"].to(dtype)}, "f.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fine_tuning_takes_no_tensor_of_another_kind_of_numbers() -> None:
    model = small_model()
    kept = model[0].weight.detach().clone()
    tensors = {**model.state_dict(), "0.weight": torch.ones_like(kept, dtype=torch.int32)}
    assert checkpoints.start_from(model, checkpoints.Checkpoint(CONFIG, CLASSES, tensors, {}), "m.safetensors") == ["0.weight"]
    assert torch.equal(model[0].weight, kept)


def test_fine_tuning_takes_tensors_that_fit(tmp_path: Path) -> None:
    class Segmenter(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, classes)

    source, target = Segmenter(2), Segmenter(5)
    checkpoints.save_checkpoint(tmp_path / "m.safetensors", source, CONFIG, CLASSES)
    others = checkpoints.start_from(target, checkpoints.load_checkpoint(tmp_path / "m.safetensors"), "m.safetensors")
    assert others == ["head.weight", "head.bias"]
    assert torch.equal(target.body.weight, source.body.weight)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    checkpoints.save_checkpoint(path, small_model(), CONFIG, CLASSES, {"step": 1})

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DynaMaskError, match="No space left"):
        checkpoints.save_checkpoint(path, small_model(), CONFIG, CLASSES, {"step": 2})
    assert checkpoints.load_checkpoint(path).extra == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
