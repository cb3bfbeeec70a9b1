"""ONNX Runtime, imported after its telemetry was switched off: it reads the environment while it is imported."""

from __future__ import annotations

from runtime.environment import prepare

prepare()

import onnxruntime as ort  # noqa: E402

# For an ONNX Runtime that was imported before, by others.
ort.disable_telemetry_events()

__all__ = ["ort"]
