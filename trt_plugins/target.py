"""The targets `tensorrt-rtx` and `tensorrt`, as `runtime.targets.registry` finds them by name."""

from __future__ import annotations

from typing import Any

from runtime.bundle import Bundle
from runtime.errors import InputError
from trt_plugins.driver import open_driver
from trt_plugins.engine import TensorRTEngine
from trt_plugins.tensorrt import load


class TensorRTTarget:
    """TensorRT, or TensorRT for RTX, on the first visible GPU; a `runtime.targets.base.Target`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check_installed(self) -> None:
        """As `Target.check_installed`."""
        load(self.name)

    def check_device(self) -> None:
        """As `Target.check_device`."""
        open_driver()

    def open(self, bundle: Bundle, threads: int | None) -> TensorRTEngine:
        """As `Target.open`; TensorRT has no CPU threads to set."""
        return TensorRTEngine(bundle, self.name)

    def status(self) -> dict[str, Any]:
        """As `Target.status`."""
        try:
            version = str(load(self.name).__version__)
        except InputError as error:
            return {"available": False, "version": None, "note": str(error)}
        try:
            driver = open_driver()
        except InputError as error:
            return {"available": False, "version": version, "note": f"Builds engines. {error}"}
        note = f"Builds engines, and runs them on {driver.device} of compute capability {driver.compute_capability}."
        return {"available": True, "version": version, "note": note}
