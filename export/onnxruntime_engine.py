"""Builds the ONNX Runtime engine of a bundle: its graph, cut into detector and mask branch. Needs onnx, not PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx.utils

from export.deform_conv_fallback import replace_deform_conv
from runtime.bundle import MODEL, Bundle, EngineEntry
from runtime.errors import DynaMaskError, InputError, first_line
from runtime.graph import DETECTIONS, DETECTOR_INPUTS, MASK_CONTROLS, MASK_OUTPUTS, PYRAMID
from runtime.targets.onnxruntime import DETECTOR, MASKS, PROVIDERS, TARGET, has_deform_conv
from runtime.targets.ort import ort


def build_onnxruntime(
    bundle: Bundle, precision: str = "fp32", convert: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None
) -> EngineEntry:
    """Cut the bundle's graph into detector and mask branch, and add both to the bundle as its `onnxruntime` engine.

    Where the installed ONNX Runtime has no `DeformConv`, its nodes are replaced by standard operators.

    Args:
        precision: the name of the weights' precision, for the manifest.
        convert: gives a part's graph that precision; the types of its inputs and outputs must stay as they are.

    Raises:
        InputError: the model is damaged or lacks the graph's tensors.
        DynaMaskError: ONNX Runtime does not load what was built, or it could not be written.
    """
    model = _load(bundle.path / MODEL)
    if not has_deform_conv():
        replace_deform_conv(model)
    # Graphs of earlier versions lack some of the controls.
    controls = [value.name for value in model.graph.input if value.name in MASK_CONTROLS]
    parts = {
        DETECTOR: _cut(bundle, model, DETECTOR_INPUTS, (*PYRAMID, *DETECTIONS)),
        MASKS: _cut(bundle, model, (*PYRAMID, *DETECTIONS, *controls), MASK_OUTPUTS),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in parts}
        for name, part in parts.items():
            onnx.save(convert(part) if convert else part, files[name])
            _check_loads(files[name])
        return bundle.add_engine(TARGET, files, precision, {"onnxruntime": ort.__version__, "onnx": onnx.__version__})


def _load(path: Path) -> onnx.ModelProto:
    try:
        # Where the graph is cut, its tensors need their types and shapes.
        return onnx.shape_inference.infer_shapes(onnx.load(path))
    except Exception as error:  # protobuf's and onnx's exceptions share no public base.
        raise InputError(f"{path} could not be read as ONNX ({first_line(error)}); export the bundle again.") from error


def _cut(bundle: Bundle, model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    try:
        return onnx.utils.Extractor(model).extract_model(list(inputs), list(outputs))
    except Exception as error:  # onnx raises ValueError, KeyError, AssertionError and others on damaged graphs.
        raise InputError(f"{bundle.path / MODEL} is not a DynaMask graph ({first_line(error)}); export the bundle again.") from error


def _check_loads(path: Path) -> None:
    try:
        ort.InferenceSession(str(path), providers=PROVIDERS, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base.
        raise DynaMaskError(f"ONNX Runtime {ort.__version__} does not load the {path.stem} it was given ({first_line(error)}).") from error
