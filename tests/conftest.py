"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

# Tests run side by side: each process keeps to one core. Read by NumPy, OpenMP and PyTorch when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's kernels are interpreted on CPU tensors; `make test-gpu` sets 0. Read when Triton is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and videos that some checkouts have beside them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images: {SHARED_DATA} does not exist")
    return SHARED_DATA


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module `synthetic_bundle`: a bundle with known boxes and masks."""
    from tests.runtime import synthetic_bundle

    return synthetic_bundle


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU that PyTorch can use")
