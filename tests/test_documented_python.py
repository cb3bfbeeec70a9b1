"""The Python that README and the guide to one's own photos show runs as it stands, with the files that the text names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import pytest

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.fixture
def named_files(example_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`demo/bundle`, `demo/everyday`, `mine.bundle` and `photo.jpg` in the current folder."""
    (tmp_path / "demo").mkdir()
    for name, target in (("demo/bundle", "bundle"), ("demo/everyday", "bundle"), ("mine.bundle", "bundle"), ("photo.jpg", "photo")):
        (tmp_path / name).symlink_to(example_files[target])
    monkeypatch.chdir(tmp_path)
    return example_files


def test_readme_finds_instances_in_a_photo(named_files: dict[str, Any]) -> None:
    names: dict[str, Any] = {}
    exec(compile(python_blocks("README.md"), "README.md", "exec"), names)
    count = len(names["instances"])
    assert count > 0
    assert names["masks"].shape == (count, *named_files["image"].shape[:2])
    assert len(names["detections"]) == len(names["tracked"]) == count
    assert names["annotated"].shape == named_files["image"].shape
    costs = names["limited"].bundle.manifest.grid_gmacs
    assert names["limited"].budget_gmacs < max(costs.values())


def test_the_guide_reads_a_camera(named_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A video stands in for camera 0."""
    opened = cv2.VideoCapture(str(named_files["clip"]))
    monkeypatch.setattr(cv2, "VideoCapture", {0: opened}.__getitem__)
    exec(compile(python_blocks("docs/your-photos.md"), "docs/your-photos.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # the clip's frames
    assert all("leaf" in line and line.endswith(" ms") for line in lines)
