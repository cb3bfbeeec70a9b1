"""What every target has in common: an engine is opened, run on a canvas, and closed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from runtime.cuda import open_driver
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.bundle import Bundle, Manifest

MSM = -1
"""The value of `grid_override` that leaves the choice of the grid to the model."""
SIZE_BASED = 4
"""The value of `grid_override` that chooses the grid by the instance's size (paper, Eq. 8)."""

TARGETS = ("tensorrt-rtx", "tensorrt", "onnxruntime")
"""The best first."""

GridOverride = int | npt.NDArray[np.int64] | None
"""One value for all slots or `[K]`: -1 the model decides, 0..3 that grid, 4 the size-based rule; None is -1."""
Masks = dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
"""Grid (14, 28, 56, 112) -> its slots `[n]` and their mask logits `[n, grid, grid]`."""


@dataclass(frozen=True, eq=False)
class EngineOutput:
    """K detection slots by falling score, and the masks of those that are filled."""

    boxes: npt.NDArray[np.float32]
    """`[K, 4]`, xyxy in canvas pixels."""
    scores: npt.NDArray[np.float32]
    """`[K]`; 0 in an empty slot."""
    labels: npt.NDArray[np.int64]
    """`[K]`; -1 in an empty slot."""
    grids: npt.NDArray[np.int64]
    """`[K]`: 0..3; -1 in an empty slot."""
    masks: Masks
    times_ms: Mapping[str, float]
    """`detector` and `masks`, milliseconds."""


class Engine(Protocol):
    """A bundle's model, ready to run on one target; a context manager that frees what it holds."""

    target: str
    manifest: Manifest

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def close(self) -> None:
        """Free the engine; it cannot run any more."""

    def run(
        self, image: npt.NDArray[np.float32], budget: float | None = None, grid_override: GridOverride = None, min_score: float = 0.0
    ) -> EngineOutput:
        """Detect and segment one normalised canvas `[1, 3, H, W]`.

        `budget` is the mean GMAC an instance, none where None or 0; what scores `min_score` or less is left out before the mask branch.
        """


def open_engine(bundle: Bundle, target: str = "auto", threads: int | None = None) -> Engine:
    """The bundle's engine for a target, loaded.

    Args:
        bundle: an opened one.
        target: `auto` takes the best target that is built and can run here.
        threads: CPU threads; None leaves the target's choice, and TensorRT has none.

    Raises:
        InputError: no such target, its library, its driver or its GPU is missing, or its engine is not built or does not load.
    """
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads cannot run an engine; give 1 or more.")
    if target == "auto":
        target = next((name for name in TARGETS if name in bundle.manifest.engines and _runs_here(name)), "onnxruntime")
    check_target(target)
    if target == "onnxruntime":
        from runtime.targets.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, threads)
    from runtime.targets.tensorrt import TensorRTEngine

    return TensorRTEngine(bundle, target)


def check_target(target: str) -> None:
    """Refuse what is not installed here. Engines for a GPU are built without one: its driver is looked for when they are opened.

    Raises:
        InputError: no such target, or its library is not installed or does not load.
    """
    if target not in TARGETS:
        raise InputError(f"{target} is not a target; take auto or {', '.join(TARGETS)}.")
    if target != "onnxruntime":
        from runtime.targets.tensorrt import library_version

        library_version(target)
    elif importlib.util.find_spec("onnxruntime") is None:
        raise InputError(f"the target {target} needs ONNX Runtime, which is not installed; run pip install onnxruntime.")


def _runs_here(target: str) -> bool:
    try:
        if target != "onnxruntime":
            open_driver()  # Before TensorRT, which takes longer to import.
        check_target(target)
    except InputError:
        return False
    return True
