"""The portable graph that the tests of export share: its size, and a bundle of it."""

from __future__ import annotations

from pathlib import Path

import onnx

from dynamask.model import DynaMask
from runtime.bundle import MODEL, Bundle, Manifest

CANVAS = (128, 160)
"""Height and width. The stride of P6's cells is canvas // map: 64 along this height, 53 along this width."""


def create_bundle(folder: Path, graph: onnx.ModelProto, model: DynaMask) -> Path:
    """A bundle without engines in `folder / "bundle"`, of a graph and the model that it was exported from."""
    onnx.save(graph, folder / "graph.onnx")
    config = model.config.model
    manifest = {
        "preset": "small",
        "classes": model.classes,
        "canvas": config.canvas,
        "mean": config.mean,
        "std": config.std,
        "detections": config.detections,
        "score_threshold": config.score_threshold,
        "grid_gmacs": {14: 0.1, 28: 0.2, 56: 0.3, 112: 0.4},
        "msm_gmacs": 0.01,
    }
    Bundle.create(folder / "bundle", Manifest.model_validate(manifest), {MODEL: folder / "graph.onnx"})
    return folder / "bundle"
