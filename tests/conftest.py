"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Tests run side by side: each process keeps to one core. Read by NumPy, OpenMP and PyTorch when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests import ONNX Runtime themselves too: nothing is sent from them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
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


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a model with known boxes and masks: `bundle`, with an engine; beside it `image` (an array), `photo` (JPEG) and `clip` (MP4)."""
    import av
    import cv2
    import numpy as np

    from export.engine import build_engine
    from tests.runtime import synthetic_bundle

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU that PyTorch can use")
