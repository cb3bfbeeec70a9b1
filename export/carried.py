"""Makes the bundle of a model that comes with the package (`runtime/carried.py`)."""

from __future__ import annotations

from pathlib import Path

from export.export import export_bundle
from export.onnxruntime_engine import build_onnxruntime
from runtime.bundle import Bundle


def make_bundle(checkpoint: Path, bundle: Path) -> None:
    """Export a checkpoint to a bundle, with an engine for ONNX Runtime.

    Raises:
        DynaMaskError: the exported graph does not agree with PyTorch, or the folder cannot be written.
    """
    export_bundle(checkpoint, bundle)
    build_onnxruntime(Bundle.open(bundle))
