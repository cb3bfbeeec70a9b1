"""The machine that figures are measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("onnxruntime", "numpy", "opencv-python-headless", "torch", "torchvision")


def machine() -> dict[str, Any]:
    """The machine of a measurement: `cpu`, `cores` (those this process may use), `system`, and `versions` of Python and libraries."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": processor(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}", "versions": versions}


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may run on; fewer than the machine has in a container that is pinned to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
