"""Where `dynamask demo` writes: it replaces its own files and nobody else's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dynamask
from cli.demo import CLIP, PHOTO_FRAME, PRODUCTS, _copy_clip, clear
from runtime.errors import InputError
from runtime.images import read_image
from runtime.sources import open_source


def test_earlier_demo_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    clear(output)
    (output / "bundle").mkdir()
    (output / "bundle" / "model.onnx").touch()
    (output / "report.html").touch()
    (output / "notes.txt").touch()
    clear(output)
    assert not any((output / name).exists() for name in PRODUCTS)
    assert (output / "notes.txt").exists()


def test_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="--output"):
        clear(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    path.touch()
    with pytest.raises(InputError, match="is a file"):
        clear(path)


def test_the_clip_is_short_and_its_photo_is_one_of_its_frames(tmp_path: Path) -> None:
    _copy_clip(tmp_path)
    clip = tmp_path / "video.mp4"
    assert clip.stat().st_size <= 1_500_000
    with open_source(clip) as source:
        assert source.frame_count is not None
        assert source.frame_count / source.frame_rate <= 10
        frames = [frame.image for frame in source]
    differences = [np.abs(frame.astype(int) - read_image(tmp_path / "photo.jpg")).mean() for frame in frames]
    assert int(np.argmin(differences)) == PHOTO_FRAME and min(differences) < 3


def test_the_clip_is_attributed() -> None:
    text = (Path(dynamask.__path__[0]) / "assets" / "README.md").read_text(encoding="utf-8")
    assert CLIP in text and "CC BY 4.0" in text
