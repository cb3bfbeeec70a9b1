"""Opens an engine on host memory, and compares it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.lowering import lower
from export.precision import to_fp16
from runtime.bundle import MODEL, Bundle, Profile
from runtime.targets.base import EngineOutput
from tests.export.host_gpu import HostDriver, HostTensorRT, host_kernels
from trt_plugins import engine as engine_module
from trt_plugins.engine import ENGINE, TensorRTEngine
from trt_plugins.tensorrt import load

TOLERANCE = {"fp32": {"atol": 1e-3, "rtol": 1e-3}, "fp16": {"atol": 0.1, "rtol": 0.02}}
"""In fp16, ONNX Runtime rounds where a GPU does, but the sums are in another order."""


def open_chain(bundle: Path, precision: str, profile: Profile | None, patch: pytest.MonkeyPatch) -> TensorRTEngine:
    """The bundle's engine for TensorRT for RTX, on host memory."""
    graph = onnx.load(bundle / MODEL)
    lowered = lower(to_fp16(graph) if precision == "fp16" else graph, profile)
    library, specs = host_kernels(lowered)
    opened = Bundle.open(bundle)
    opened.add_engine("tensorrt-rtx", {ENGINE: b"an engine", **library.to_files()}, precision, {}, profile)
    driver = HostDriver(specs)
    module = HostTensorRT(load("tensorrt-rtx"), lowered, driver)
    patch.setattr(engine_module, "load", lambda target: module)
    patch.setattr(engine_module, "open_driver", lambda: driver)
    return TensorRTEngine(opened, "tensorrt-rtx")


def check_output(found: EngineOutput, expected: EngineOutput, precision: str) -> None:
    """Whether an output of the chain agrees with ONNX Runtime's."""
    tolerance: dict[str, Any] = TOLERANCE[precision]
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **tolerance, err_msg=name)
    for name in ("labels", "grids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.masks.keys() == expected.masks.keys()
    for grid, (slots, logits) in found.masks.items():
        np.testing.assert_array_equal(slots, expected.masks[grid][0], err_msg=f"slots {grid}")
        np.testing.assert_allclose(logits, expected.masks[grid][1], **tolerance, err_msg=f"masks {grid}")
