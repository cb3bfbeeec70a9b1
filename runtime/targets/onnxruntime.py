"""ONNX Runtime on the CPU: the graph cut into detector and mask branch, run as two sessions so that each is measured.

The instances of every stage are selected inside the graph, by standard operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bundle import MANIFEST, Bundle, Profile
from runtime.errors import DynaMaskError, InputError, first_line
from runtime.graph import COST_CONTROLS, DETECTIONS, DETECTOR_INPUTS, GRIDS, MASK_CONTROLS, MASK_OUTPUTS, PYRAMID
from runtime.machine import processor, usable_cores
from runtime.paste import Frame
from runtime.targets.base import EngineOutput, GridOverride, Masks, check_fits, closed_engine, mask_limits, slot_overrides
from runtime.targets.ort import ort

TARGET = "onnxruntime"
DETECTOR = "detector.onnx"
MASKS = "masks.onnx"
PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntimeTarget:
    """ONNX Runtime on the CPU; a `runtime.targets.base.Target`."""

    def __init__(self, name: str = TARGET) -> None:
        self.name = name

    def check_installed(self) -> None:
        """As `Target.check_installed`: this module imports ONNX Runtime."""

    def check_device(self) -> None:
        """As `Target.check_device`: the CPU is always there."""

    def open(self, bundle: Bundle, threads: int | None) -> OnnxRuntimeEngine:
        """As `Target.open`."""
        return OnnxRuntimeEngine(bundle, threads)

    def status(self) -> dict[str, Any]:
        """As `Target.status`, and `providers` and `deform_conv`: whether it runs that operator, None where onnx is not installed."""
        deform_conv: bool | None
        try:
            deform_conv = has_deform_conv()
        except ImportError:
            deform_conv = None
            note = "Runs engines; to build them too: pip install onnx."
        else:
            slower = ", more slowly than a release that has DeformConv: pip install --upgrade onnxruntime"
            note = f"Builds and runs engines{'' if deform_conv else slower}."
        providers = ort.get_available_providers()
        return {"available": True, "version": ort.__version__, "note": note, "providers": providers, "deform_conv": deform_conv}


class OnnxRuntimeEngine:
    """A bundle's two sessions; the pyramid passes from one to the other without a copy."""

    target = TARGET

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load the engine; `threads` per session, None for all cores.

        Raises:
            InputError: the engine is not built, is damaged or not the one that the manifest describes, or this ONNX Runtime cannot load it.
        """
        self.costs = bundle.engine(TARGET).costs
        self.threads, self.processor = threads or usable_cores(), processor()
        self.manifest = bundle.manifest
        self.profile = Profile(canvas=(bundle.manifest.canvas,) * 3)
        self._path = bundle.path
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that wait spin by default, and take the cores from the other session, the decoder and the encoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._detector, self._masks = (_session(bundle, name, options) for name in (DETECTOR, MASKS))
        _check_interface(bundle, DETECTOR, self._detector, DETECTOR_INPUTS, (*PYRAMID, *DETECTIONS))
        self.takes_costs = COST_CONTROLS[0] in _names(self._masks.get_inputs)
        self._controls = [name for name in MASK_CONTROLS if self.takes_costs or name not in COST_CONTROLS]
        _check_interface(bundle, MASKS, self._masks, (*PYRAMID, *DETECTIONS, *self._controls), MASK_OUTPUTS)
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

    def _check_open(self) -> None:
        if self._masks is None:
            raise closed_engine(self._path, TARGET)

    @property
    def feature_shapes(self) -> list[tuple[int, int, int, int]]:
        """`[1, C, H / s, W / s]` of P2..P5, as the mask branch takes them."""
        self._check_open()
        shapes = {value.name: value.shape for value in self._masks.get_inputs()}
        return [tuple(shapes[name]) for name in PYRAMID]

    def run(
        self,
        image: npt.NDArray[np.float32],
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
        frames: Sequence[Frame] | None = None,
        masks_ms: float | None = None,
    ) -> EngineOutput:
        """As `Engine.run`, for one image on the bundle's canvas; masks are logits, `times_ms` are those of the two sessions."""
        self._check_open()
        start = time.perf_counter()
        features, boxes, scores, labels = self.run_detector(image, min_score)
        found = time.perf_counter()
        grids, masks = self.run_masks(features, boxes, scores, labels, budget_gmacs, grid_override, masks_ms)
        end = time.perf_counter()
        times = {"detector": 1000 * (found - start), "masks": 1000 * (end - found)}
        return EngineOutput(boxes.numpy(), scores.numpy(), labels.numpy(), grids, masks, times)

    def run_detector(self, image: npt.NDArray[np.float32], min_score: float = 0.0) -> tuple[Any, Any, Any, Any]:
        """The detector alone: P2..P5, and boxes, scores and labels of K slots, as `run_masks` takes them; arguments as in `run`."""
        self._check_open()
        check_fits(image.shape, self.profile, self._path, TARGET)
        inputs = {"image": _value(image), "min_score": _value(np.array(min_score, np.float32))}
        detected = self._run(self._detector, DETECTOR, (*PYRAMID, *DETECTIONS), inputs)
        boxes, scores, labels = detected[4:]
        return detected[:4], boxes, scores, labels

    def run_masks(
        self,
        features: Sequence[Any],
        boxes: Any,
        scores: Any,
        labels: Any,
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        masks_ms: float | None = None,
    ) -> tuple[npt.NDArray[np.int64], Masks]:
        """The mask branch alone, on arrays or `OrtValue`s.

        Args:
            features: P2..P5, `[1, C, H / s, W / s] float32`, as `feature_shapes` says.
            boxes, scores, labels: K slots, as in `EngineOutput`.
            budget_gmacs, grid_override, masks_ms: as in `run`.

        Returns:
            `grids [K]` (0..3, -1 in an empty slot) and the masks by grid.
        """
        self._check_open()
        controls: dict[str, npt.NDArray[Any]] = {**mask_limits(self, budget_gmacs, masks_ms)}
        controls["grid_override"] = slot_overrides(grid_override, self.manifest.detections)
        values = (*features, boxes, scores, labels, *(controls[name] for name in self._controls))
        inputs = {name: _value(value) for name, value in zip((*PYRAMID, *DETECTIONS, *self._controls), values, strict=True)}
        grids, *rest = (value.numpy() for value in self._run(self._masks, MASKS, MASK_OUTPUTS, inputs))
        return grids, dict(zip(GRIDS, zip(rest[: len(GRIDS)], rest[len(GRIDS) :], strict=True), strict=True))

    def _run(self, session: Any, name: str, outputs: Sequence[str], inputs: dict[str, Any]) -> Any:
        try:
            return session.run_with_ort_values(outputs, inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no public base.
            raise DynaMaskError(
                f"ONNX Runtime stopped in {self._path / 'engines' / TARGET / name} ({first_line(error)}); if enough memory is free, the "
                f"graph does not fit together: export the bundle again."
            ) from error


def _value(value: Any) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _session(bundle: Bundle, name: str, options: Any) -> Any:
    path = bundle.path / "engines" / TARGET / name
    try:
        return ort.InferenceSession(str(path), options, providers=PROVIDERS, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base.
        built = bundle.manifest.engines[TARGET].versions.get("onnxruntime", "?")
        raise InputError(
            f"{path}, built for ONNX Runtime {built}, does not load in {ort.__version__} ({first_line(error)}); "
            f"build it again with dynamask build-engine {bundle.path} --target {TARGET}."
        ) from error


def _names(values: Callable[[], Sequence[Any]]) -> list[str]:
    try:
        return [value.name for value in values()]
    except UnicodeDecodeError:  # A damaged file.
        return []


def _check_interface(bundle: Bundle, name: str, session: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    found_inputs, found_outputs = _names(session.get_inputs), _names(session.get_outputs)
    if set(found_inputs) != set(inputs) or not set(found_outputs) >= set(outputs):
        missing = sorted({*inputs, *outputs} - {*found_inputs, *found_outputs})
        without = f" (without {', '.join(missing)})" if missing else ""
        raise InputError(
            f"{bundle.path / 'engines' / TARGET / name} has other inputs or outputs than an engine of this version"
            f"{without}; build it again with dynamask build-engine {bundle.path} --target {TARGET}."
        )


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
        ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
    except Exception:  # NotImplemented and Fail share no public base; any of them means no.
        return False
    return True
