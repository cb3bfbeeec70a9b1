"""The bundle of a checkpoint that comes with the package."""

from __future__ import annotations

from pathlib import Path

from dynamask.config import load_config
from dynamask.model import build_model
from dynamask.train.checkpoint import save_checkpoint
from export.carried import make_bundle
from runtime import carried
from runtime.bundle import Bundle
from tests.tiny import TINY


def test_a_checkpoint_becomes_a_bundle_with_an_engine(tmp_path: Path) -> None:
    config = load_config("lite0-shapes", TINY)
    classes = [{"id": 1, "name": "leaf"}]
    save_checkpoint(tmp_path / "tiny.safetensors", build_model(config, classes), config, classes, half=True)
    make_bundle(tmp_path / "tiny.safetensors", tmp_path / "bundle")
    assert list(Bundle.open(tmp_path / "bundle").manifest.engines) == ["onnxruntime"]


def test_the_maker_is_found_by_its_name() -> None:
    assert f"{make_bundle.__module__}:{make_bundle.__name__}" == carried.MAKER
