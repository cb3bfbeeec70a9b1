"""Exports a checkpoint to a bundle: the ONNX graph, its manifest, and its parity with PyTorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

import dynamask
from dynamask.config import CANVAS_SIDES, PRESETS, Config, canvas_fits
from dynamask.model import DynaMask, build_model, count_gmacs
from dynamask.train.checkpoint import load_model
from export.graph import export_graph
from export.onnxruntime_engine import build_onnxruntime
from export.parity import measure_parity, raw_differences
from runtime.bundle import MODEL, Bundle, Manifest
from runtime.errors import DynaMaskError, InputError
from runtime.images import read_image
from runtime.preprocess import letterbox_normalise
from runtime.targets.registry import open_engine

PARITY_IMAGES = 4
"""Generated images that parity is measured on where no others are given."""


def export_bundle(
    checkpoint: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    canvas: tuple[int, int] | None = None,
    parity_images: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """Export a checkpoint to a bundle, and compare the graph in ONNX Runtime with the model in PyTorch.

    Args:
        checkpoint: a `.safetensors` file of `dynamask train`, or a preset's name (`r50`, `lite0`) for random weights, to measure speed.
        bundle: the folder to make; an earlier bundle there is replaced once the new one is whole.
        canvas: height and width in pixels, multiples of 32; the checkpoint's own by default.
        parity_images: images to compare on; generated shapes by default. With random weights nothing is compared, because near-equal scores
            have no order.

    Returns:
        `bundle`, `bytes` of the graph, `canvas`, `operators` (name -> count), `gmacs`, `parity` (differences, `holds`), `precision`.

    Raises:
        InputError: the checkpoint or an image cannot be read, or the canvas does not fit.
        DynaMaskError: the exported graph does not agree with PyTorch; no bundle is left.
    """
    model, trained = read_model(checkpoint, canvas)
    config = model.config.model
    if model.mask_branch.msm is None:
        raise InputError(f"{checkpoint} has a Mask R-CNN head, a baseline that can be trained and evaluated only: export a DynaMask.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MODEL)
        operators = export_graph(model, file, config.canvas)
        manifest = _manifest(model)
        if trained:
            draft = Bundle.create(Path(folder, "bundle"), manifest, {MODEL: file})
            manifest = manifest.model_copy(update={"parity": _parity(model, draft, parity_images)})
        finished = Bundle.create(bundle, manifest, {MODEL: file})
    return {
        "bundle": str(bundle),
        "bytes": finished.manifest.files[MODEL].bytes,
        "canvas": list(config.canvas),
        "precision": manifest.precision,
        "operators": operators,
        "gmacs": {**{str(g): c for g, c in manifest.grid_gmacs.items()}, "msm": manifest.msm_gmacs, "detector": manifest.detector_gmacs},
        "parity": manifest.parity,
    }


def read_model(checkpoint: str | os.PathLike[str], canvas: tuple[int, int] | None = None) -> tuple[DynaMask, bool]:
    """The model of a checkpoint, or of a preset with random weights, in evaluation mode on the wanted canvas; and whether it was trained.

    Raises:
        InputError: the checkpoint cannot be read, or the canvas does not fit.
    """
    trained = str(checkpoint) not in PRESETS or Path(checkpoint).is_file()
    if trained:
        loaded, config, classes = load_model(checkpoint)
        if canvas is None:
            assert isinstance(loaded, DynaMask)
            return loaded, True
        state = loaded.state_dict()
    else:
        torch.manual_seed(0)
        config = Config(model=PRESETS[str(checkpoint)])
        classes = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(80)]
        state = {}
    if canvas is not None:
        if not canvas_fits(canvas):
            raise InputError(f"--size {canvas[0]}x{canvas[1]} does not fit: height and width must be {CANVAS_SIDES}.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"canvas": canvas})})
    model = build_model(config, classes)
    if state:
        model.load_state_dict(state)
    return model.eval(), trained


def _manifest(model: DynaMask) -> Manifest:
    config = model.config.model
    gmacs = count_gmacs(model)
    return Manifest.model_validate(
        {
            "preset": config.preset,
            "classes": model.classes,
            "canvas": config.canvas,
            "mean": config.mean,
            "std": config.std,
            "detections": config.detections,
            "score_threshold": config.score_threshold,
            "grid_gmacs": gmacs.grids,
            "msm_gmacs": gmacs.msm,
            "detector_gmacs": gmacs.detector,
            "versions": {"dynamask": dynamask.__version__, "torch": torch.__version__, "onnx": onnx.__version__},
        }
    )


def _parity(model: DynaMask, draft: Bundle, images: Sequence[Path] | None) -> dict[str, Any]:
    build_onnxruntime(draft)
    with open_engine(draft, "onnxruntime") as engine:
        measured = measure_parity(model, engine, _canvases(model, images))
    if not measured.instances:
        measured.raw_outputs = raw_differences(model, draft.path / MODEL, _canvases(model, images))
    parity = measured.as_dict()
    if not parity["holds"]:
        raise DynaMaskError(f"The exported graph does not agree with PyTorch ({parity}): no bundle was written; please report it.")
    return parity


def _canvases(model: DynaMask, images: Sequence[Path] | None) -> Iterable[npt.NDArray[np.float32]]:
    from dynamask.data.shapes import draw_image

    config = model.config.model
    if images is None:
        pixels = [draw_image(np.random.default_rng([7, i]), 320, 320)[0] for i in range(PARITY_IMAGES)]
    else:
        pixels = [read_image(path) for path in images]
    for image in pixels:
        yield letterbox_normalise(image, *config.canvas, config.mean, config.std)[0]
