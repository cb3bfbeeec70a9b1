"""Some inputs of each kind; `make fuzz` runs more."""

from __future__ import annotations

import importlib
import itertools
import shutil

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzzing import KINDS, Files, write

_EXAMPLES = {"checkpoint": 20}
"""Of the kinds whose inputs take more than some hundredths of a second each."""


@pytest.mark.parametrize("kind", KINDS)
def test_any_input_is_read_or_refused(kind, tmp_path):
    module = importlib.import_module(f"tests.fuzzing.{kind}")
    numbers = itertools.count()

    # Without shrinking, which takes minutes with files: `python -m tests.fuzzing` saves the input as it is.
    @settings(
        max_examples=_EXAMPLES.get(kind, 100),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(files=module.inputs())
    def read(files: Files) -> None:
        folder = tmp_path / str(next(numbers))
        write(files, folder)
        module.check(folder)
        shutil.rmtree(folder)

    read()
