"""The examples in the docstrings of the public API run, and every public function and class has one.

An example may use these names: `bundle` (a small bundle with an engine), `image` (`[H, W, 3] uint8`), `photo` (a JPEG's path),
`clip` (a short MP4's path), `folder` (an empty folder), `dynamask` and `np`.
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynamask

PUBLIC = sorted(name for name in dynamask.__all__ if inspect.isroutine(getattr(dynamask, name)) or inspect.isclass(getattr(dynamask, name)))
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples(name: str) -> Iterator[doctest.DocTest]:
    """The examples of a public name, and for a class those of its public methods."""
    target = getattr(dynamask, name)
    found = FINDER.find(target, name, module=inspect.getmodule(target), globs={})
    yield from (test for test in found if test.examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name: str) -> None:
    assert list(examples(name)), f"dynamask.{name} has no >>> example in its docstring"


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
