"""What the runtime's tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def synthetic():
    """The module `synthetic_bundle`: a bundle with known boxes and masks."""
    pytest.importorskip("onnx")
    spec = importlib.util.spec_from_file_location("synthetic_bundle", Path(__file__).with_name("synthetic_bundle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
