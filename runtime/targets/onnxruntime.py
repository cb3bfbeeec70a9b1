"""ONNX Runtime on the CPU: the graph cut into detector and mask branch, run as two sessions so that each is measured.

The instances of every stage are selected inside the graph, by standard operators.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.bundle import MANIFEST, MODEL, Bundle, EngineEntry, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import DETECTIONS, DETECTOR_INPUTS, GRIDS, MASK_CONTROLS, MASK_OUTPUTS, PYRAMID
from runtime.targets.base import EngineOutput, GridOverride, Masks, check_fits, slot_overrides

if TYPE_CHECKING:
    import onnx

TARGET = "onnxruntime"
DETECTOR = "detector.onnx"
MASKS = "masks.onnx"
_PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntimeEngine:
    """A bundle's two sessions; the pyramid passes from one to the other without a copy."""

    target = TARGET

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load the engine; `threads` per session, None for all cores.

        Raises:
            InputError: the engine is not built, is damaged or not the one that the manifest describes, or this ONNX Runtime cannot load it.
        """
        bundle.engine(TARGET)
        self.manifest = bundle.manifest
        self.profile = Profile(canvas=(bundle.manifest.canvas,) * 3)
        self._path = bundle.path
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that wait spin by default, and take the cores from the other session, the decoder and the encoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._detector, self._masks = (_session(bundle, name, options) for name in (DETECTOR, MASKS))
        shapes = {value.name: value.shape for session in (self._detector, self._masks) for value in session.get_inputs()}
        height, width = self.manifest.canvas
        if shapes["image"] != [1, 3, height, width] or shapes["grid_override"] != [self.manifest.detections]:
            raise InputError(
                f"{bundle.path / MANIFEST} says a canvas of {height}x{width} and {self.manifest.detections} detections, and the engine "
                f"takes {shapes['image']} and {shapes['grid_override']}: export the bundle again."
            )

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free both sessions."""
        self._detector = self._masks = None

    @property
    def feature_shapes(self) -> list[tuple[int, int, int, int]]:
        """`[1, C, H / s, W / s]` of P2..P5, as the mask branch takes them."""
        shapes = {value.name: value.shape for value in self._masks.get_inputs()}
        return [tuple(shapes[name]) for name in PYRAMID]

    def run(
        self, image: npt.NDArray[np.float32], budget: float | None = None, grid_override: GridOverride = None, min_score: float = 0.0
    ) -> EngineOutput:
        """As `Engine.run`, for one image on the bundle's canvas; `times_ms` are those of the two sessions."""
        check_fits(image.shape, self.profile, self._path, TARGET)
        start = time.perf_counter()
        inputs = {"image": _value(image), "min_score": _value(np.array(min_score, np.float32))}
        detected = self._detector.run_with_ort_values((*PYRAMID, *DETECTIONS), inputs)
        found = time.perf_counter()
        boxes, scores, labels = detected[4:]
        grids, masks = self.run_masks(detected[:4], boxes, scores, labels, budget, grid_override)
        end = time.perf_counter()
        times = {"detector": 1000 * (found - start), "masks": 1000 * (end - found)}
        return EngineOutput(boxes.numpy(), scores.numpy(), labels.numpy(), grids, masks, times)

    def run_masks(
        self, features: Sequence[Any], boxes: Any, scores: Any, labels: Any, budget: float | None = None, grid_override: GridOverride = None
    ) -> tuple[npt.NDArray[np.int64], Masks]:
        """The mask branch alone, on arrays or `OrtValue`s.

        Args:
            features: P2..P5, `[1, C, H / s, W / s] float32`, as `feature_shapes` says.
            boxes, scores, labels: K slots, as in `EngineOutput`.
            budget, grid_override: as in `run`.

        Returns:
            `grids [K]` (0..3, -1 in an empty slot) and the masks by grid.
        """
        override = slot_overrides(grid_override, self.manifest.detections)
        values = (*features, boxes, scores, labels, np.array(budget or 0, np.float32), override)
        inputs = {name: _value(value) for name, value in zip((*PYRAMID, *DETECTIONS, *MASK_CONTROLS), values, strict=True)}
        grids, *rest = (value.numpy() for value in self._masks.run_with_ort_values(MASK_OUTPUTS, inputs))
        return grids, dict(zip(GRIDS, zip(rest[: len(GRIDS)], rest[len(GRIDS) :], strict=True), strict=True))


def _value(value: Any) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _session(bundle: Bundle, name: str, options: Any) -> Any:
    path = bundle.path / "engines" / TARGET / name
    try:
        return ort.InferenceSession(str(path), options, providers=_PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no public base.
        built = bundle.manifest.engines[TARGET].versions.get("onnxruntime", "?")
        raise InputError(
            f"{path}, built for ONNX Runtime {built}, does not load in {ort.__version__} ({_first_line(error)}); "
            f"build it again with dynamask build-engine {bundle.path} --target {TARGET}."
        ) from error


def build(bundle: Bundle, precision: str = "fp32", convert: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None) -> EngineEntry:
    """Cut the bundle's graph into detector and mask branch, and add both to the bundle as its `onnxruntime` engine.

    Where the installed ONNX Runtime has no `DeformConv`, its nodes are replaced by standard operators.

    Args:
        precision: of the weights, as the manifest will name it.
        convert: makes it so; takes each of the two parts, and keeps the types of its inputs and outputs.

    Raises:
        InputError: onnx is not installed, or the model is damaged or lacks the graph's tensors.
        DynaMaskError: ONNX Runtime does not load what was built, or it could not be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError("building an ONNX Runtime engine needs onnx, which is not installed; run pip install onnx.") from error
    model = _load(bundle.path / MODEL)
    if not has_deform_conv():
        from runtime.targets.deform_conv_fallback import replace_deform_conv

        replace_deform_conv(model)
    parts = {
        DETECTOR: _cut(bundle, model, DETECTOR_INPUTS, (*PYRAMID, *DETECTIONS)),
        MASKS: _cut(bundle, model, (*PYRAMID, *DETECTIONS, *MASK_CONTROLS), MASK_OUTPUTS),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in parts}
        for name, part in parts.items():
            onnx.save(convert(part) if convert else part, files[name])
            _check_loads(files[name])
        return bundle.add_engine(TARGET, files, precision, {"onnxruntime": ort.__version__, "onnx": onnx.__version__})


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        # Where the graph is cut, its tensors need their types and shapes.
        return onnx.shape_inference.infer_shapes(onnx.load(path))
    except Exception as error:  # protobuf's and onnx's exceptions share no public base.
        raise InputError(f"{path} could not be read as ONNX ({_first_line(error)}); export the bundle again.") from error


def _cut(bundle: Bundle, model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    import onnx.utils

    try:
        return onnx.utils.Extractor(model).extract_model(list(inputs), list(outputs))
    except (ValueError, KeyError) as error:
        raise InputError(f"{bundle.path / MODEL} is not a DynaMask graph ({_first_line(error)}); export the bundle again.") from error


def _check_loads(path: Path) -> None:
    try:
        ort.InferenceSession(str(path), providers=_PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no public base.
        raise DynaMaskError(f"ONNX Runtime {ort.__version__} does not load the {path.stem} it was given ({_first_line(error)}).") from error


def has_deform_conv() -> bool:
    """Whether the installed ONNX Runtime runs the operator `DeformConv` (opset 19), on the CPU."""
    from onnx import TensorProto, helper

    shapes = {"x": [1, 1, 4, 4], "weight": [1, 1, 3, 3], "offset": [1, 18, 4, 4], "y": [1, 1, 4, 4]}
    x, weight, offset, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    node = helper.make_node("DeformConv", ["x", "weight", "offset"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "deform_conv", [x, weight, offset], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=_PROVIDERS)
    except Exception:  # NotImplemented and Fail share no public base; any of them means no.
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
