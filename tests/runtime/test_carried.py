"""The models that come with the package: their bundles are made once, in the user's cache."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cli.main
import dynamask
from runtime import carried
from runtime.bundle import Bundle
from runtime.errors import DynaMaskError, InputError

NAME = "lite0-shapes"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic: ModuleType) -> list[Path]:
    """The bundles made so far, of a model with known boxes and masks, into an empty cache."""
    from export.onnxruntime_engine import build_onnxruntime

    calls: list[Path] = []

    def make(checkpoint: Path, bundle: Path) -> None:
        calls.append(bundle)
        time.sleep(0.05)
        build_onnxruntime(synthetic.create(bundle))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    maker = ModuleType("stand_in_maker")
    maker.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_maker", maker)
    monkeypatch.setattr(carried, "MAKER", "stand_in_maker:make")
    return calls


def test_a_name_is_a_bundle_that_is_made_once(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    with dynamask.load(NAME) as predictor:
        first = predictor(image)
        folder = predictor.bundle.path
    assert f"Making the bundle of the model {NAME}, once, in {folder}" in capsys.readouterr().err
    with dynamask.load(NAME) as predictor:
        np.testing.assert_array_equal(predictor(image).boxes, first.boxes)
    assert len(made) == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == [folder.name]


def test_callers_at_the_same_time_make_one_bundle(made: list[Path]) -> None:
    """The lock is the file's, not the process's: threads stand for processes."""
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(Bundle.open(NAME).path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(folders) == 4 and len(set(folders)) == 1


def test_a_bundle_that_cannot_be_made_leaves_nothing(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(checkpoint: Path, bundle: Path) -> None:
        bundle.mkdir()
        raise DynaMaskError("no")

    monkeypatch.setattr(sys.modules["stand_in_maker"], "make", failing)
    with pytest.raises(DynaMaskError, match="no"):
        Bundle.open(NAME)
    folder = carried.cached_bundle(NAME)
    assert [path.suffix for path in folder.parent.iterdir()] == [".lock"]


def test_other_code_or_another_checkpoint_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("dynamask/assets", "export", "runtime"):
        (tmp_path / package).mkdir(parents=True)
    checkpoint, source = tmp_path / "dynamask" / "assets" / carried.CHECKPOINTS[NAME], tmp_path / "export" / "graph.py"
    monkeypatch.setattr(carried, "_package", lambda name: tmp_path / name)
    folders = set()
    for content, code in (("a", "x"), ("b", "x"), ("b", "y")):
        checkpoint.write_text(content)
        source.write_text(code)
        folders.add(carried.cached_bundle(NAME))
    assert len(folders) == 3


def test_a_folder_of_that_name_comes_first(made: list[Path], synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.create(tmp_path / NAME)
    assert Bundle.open(NAME).path == Path(NAME)
    assert not made


def test_what_is_missing_is_said(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "MAKER", "no_such_package:make")
    with pytest.raises(InputError, match=r"made on first use, which needs no_such_package.*run pip install -e '\.\[export\]'"):
        Bundle.open(NAME)
    monkeypatch.setitem(carried.CHECKPOINTS, NAME, "gone.safetensors")
    with pytest.raises(InputError, match=r"gone\.safetensors is missing, so this installation has no model lite0-shapes"):
        Bundle.open(NAME)


def test_doctor_says_where_the_bundles_are(made: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main.main(["doctor"]) == 0
    folder = carried.cached_bundle(NAME)
    assert f"model {NAME}: its bundle will be made on first use, as {folder}" in capsys.readouterr().out
    Bundle.open(NAME)
    monkeypatch.setitem(carried.CHECKPOINTS, "other", "gone.safetensors")
    assert cli.main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"model {NAME}: its bundle is {folder}" in out
    assert "model other: not in this installation" in out


def test_commands_take_the_name(made: list[Path], example_files: dict[str, Any], tmp_path: Path) -> None:
    assert cli.main.main(["predict", NAME, str(example_files["photo"])]) == 0
    assert cli.main.main(["stream", NAME, str(example_files["clip"]), "--output", str(tmp_path / "annotated.mp4")]) == 0
    assert cli.main.main(["build-engine", NAME]) == 0
    assert len(made) == 1
