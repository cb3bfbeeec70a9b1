"""Where `dynamask demo` writes: it replaces its own files and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.demo import PRODUCTS, clear
from runtime.errors import InputError


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
