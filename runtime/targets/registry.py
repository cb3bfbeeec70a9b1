"""The targets by name. A target's module is imported when it is first needed, so that only its own users need its packages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.targets.base import Engine, Target

TARGETS = {
    "tensorrt-rtx": "trt_plugins.target:TensorRTTarget",
    "tensorrt": "trt_plugins.target:TensorRTTarget",
    "onnxruntime": "runtime.targets.onnxruntime:OnnxRuntimeTarget",
}
"""Name -> `module:class` of its `runtime.targets.base.Target`; the fastest first."""
MAX_THREADS = 1024
"""More CPU threads are refused: to start them takes minutes."""
DEFAULT = "onnxruntime"
"""Runs everywhere."""


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        InputError: there is no such target, or a package that its module imports is not installed.
    """
    if name not in TARGETS:
        raise InputError(f"{name} is not a target; take one of {', '.join(TARGETS)}.")
    module, _, kind = TARGETS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), kind)(name)
    except ModuleNotFoundError as error:
        raise InputError(f"The target {name} needs {error.name}, which is not installed; run pip install {error.name}.") from error
    except ImportError as error:
        raise InputError(f"The target {name} does not load ({error}); install its packages again.") from error


def check_target(name: str) -> None:
    """Check that a target's library is installed. The device need not be there: engines are built without it.

    Raises:
        InputError: there is no such target, or its library is not installed or does not load.
    """
    find_target(name).check_installed()


def open_engine(bundle: Bundle, target: str = "auto", threads: int | None = None) -> Engine:
    """The bundle's engine for a target, loaded.

    Args:
        bundle: an opened one.
        target: its name; `auto` takes the fastest target that is built and can run here.
        threads: CPU threads; None leaves the choice to the target. TensorRT ignores it.

    Raises:
        InputError: no such target, its library, its driver or its GPU is missing, or its engine is not built or does not load.
    """
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise InputError(f"{threads} threads cannot run an engine; give 1 to {MAX_THREADS}.")
    if target == "auto":
        target = next((name for name in TARGETS if name in bundle.manifest.engines and _runs_here(name)), DEFAULT)
    found = find_target(target)
    found.check_installed()
    return found.open(bundle, threads)


def _runs_here(name: str) -> bool:
    try:
        target = find_target(name)
        target.check_device()  # Before the library, which takes longer to load.
        target.check_installed()
    except InputError:
        return False
    return True
