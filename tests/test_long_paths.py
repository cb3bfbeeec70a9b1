"""Paths that are too long for the system: every function that takes one refuses it with `InputError`."""

from __future__ import annotations

from pathlib import Path

import pytest

import dynamask
from dynamask.ablation import read_plan
from dynamask.config import load_config, load_run_config
from dynamask.data.labels.reader import read_labels
from dynamask.data.miniatures import write_miniature
from dynamask.data.shapes import write_dataset
from dynamask.train.checkpoint import load_checkpoint
from dynamask.train.checkpointer import state_to_resume
from dynamask.weights import read_state_dict
from runtime.bundle import Bundle, check_replaceable
from runtime.images import frame_count, image_size
from runtime.sinks import FolderSink

FUNCTIONS = {
    "load": dynamask.load,
    "read_image": dynamask.read_image,
    "read_coco": dynamask.read_coco,
    "open_source": dynamask.open_source,
    "image_size": image_size,
    "frame_count": frame_count,
    "Bundle.open": Bundle.open,
    "check_replaceable": lambda path: check_replaceable(Path(path)),
    "FolderSink": FolderSink,
    "load_config": load_config,
    "load_run_config": lambda path: load_run_config(Path(path)),
    "load_checkpoint": load_checkpoint,
    "read_plan": lambda path: read_plan(Path(path)),
    "read_state_dict": lambda path: read_state_dict(Path(path)),
    "read_labels": lambda path: read_labels(Path(path)),
    "state_to_resume": lambda path: state_to_resume(load_config("lite0-shapes"), Path(path), resume=True),
    "new run": lambda path: state_to_resume(load_config("lite0-shapes"), Path(path), resume=False),
    "write_dataset": lambda path: write_dataset(path, 1, seed=0, height=64, width=64),
    "write_miniature": lambda path: write_miniature("lvis", Path(path)),
}


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000 + "x.jpg"], ids=["name", "path"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_path_that_is_too_long_is_refused(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dynamask.InputError, match=r"its name is too long|File name too long"):
        FUNCTIONS[name](path)
    assert not list(tmp_path.iterdir())


def test_an_address_that_is_too_long_for_a_path_is_refused_as_one():
    with pytest.raises(dynamask.InputError, match="rtsp:// addresses are not read") as caught:
        dynamask.open_source("rtsp://user:secret@" + "x" * 300)
    assert "secret" not in str(caught.value)


def test_an_image_whose_path_is_too_long_is_missing(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "instances.json").write_text(
        '{"images": [{"id": 1, "file_name": "%s", "height": 4, "width": 4}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'
        % ("x/" * 3000 + "a.png")
    )
    data = dynamask.read_coco(tmp_path)
    assert data.missing_files() == [data.images[0].file_name]
