"""The examples in the docstrings of the public API run, and every public function and class has one.

An example may use these names: `bundle` (a small bundle with an engine), `image` (`[H, W, 3] uint8`), `photo` (a JPEG's path),
`clip` (a short MP4's path), `folder` (an empty folder). What an example prints is not compared where it shows no output.
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

import dynamask
from export.engine import build_engine
from tests.runtime import synthetic_bundle

PUBLIC = sorted(name for name in dynamask.__all__ if inspect.isroutine(getattr(dynamask, name)) or inspect.isclass(getattr(dynamask, name)))
FINDER = doctest.DocTestFinder(exclude_empty=True)


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`bundle`, `image`, `photo` and `clip`."""
    root = tmp_path_factory.mktemp("examples")
    bundle = synthetic_bundle.create(root / "bundle")
    build_engine(bundle.path, "onnxruntime")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    cv2.imwrite(str(root / "photo.jpg"), image)
    with av.open(str(root / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in np.random.default_rng(1).integers(0, 256, (4, 48, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return {"bundle": bundle.path, "image": image, "photo": root / "photo.jpg", "clip": root / "clip.mp4"}


def examples(name: str) -> Iterator[doctest.DocTest]:
    """The examples of a public name, and for a class those of its public methods."""
    target = getattr(dynamask, name)
    found = FINDER.find(target, name, module=inspect.getmodule(target), globs={})
    yield from (test for test in found if test.examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_run(name: str, example_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for test in examples(name):
        test.globs = {"dynamask": dynamask, "np": np, "folder": tmp_path / "folder", **example_files}
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
