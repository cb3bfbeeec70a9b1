"""The carried `lite0` whole on host memory, with the tiles that a GPU gets; minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamask.data.shapes import draw_image
from export.engine import build_engine
from export.export import export_bundle
from runtime.bundle import Bundle
from runtime.carried import carried_checkpoint
from runtime.preprocess import letterbox_normalise
from runtime.targets.registry import open_engine
from tests.export.chain import check_output, open_chain

pytest.importorskip("tensorrt_rtx")


@pytest.mark.minutes
@pytest.mark.parametrize("case", ["mixed", "none"])
def test_lite0_agrees_with_onnx_runtime(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_bundle(carried_checkpoint("lite0-shapes"), tmp_path / "bundle")
    build_engine(tmp_path / "bundle", "onnxruntime")
    opened = Bundle.open(tmp_path / "bundle")
    height, width = opened.manifest.canvas
    drawn, _ = draw_image(np.random.default_rng([77100, 0]), height, width)
    canvas = letterbox_normalise(drawn, height, width, opened.manifest.mean, opened.manifest.std)[0]
    with open_engine(opened, "onnxruntime", 1) as peer:
        scores = np.sort(peer.run(canvas).scores)[::-1]
        few = float(scores[3] + scores[4]) / 2 if case == "mixed" else 1.0
        options: dict[str, Any] = {"min_score": few, "grid_override": np.arange(len(scores)) % 4}
        expected = peer.run(canvas, **options)
    with open_chain(tmp_path / "bundle", "fp32", None, monkeypatch) as engine:
        check_output(engine.run(canvas, **options), expected, "fp32")
