"""What this machine can run: its processor, memory, GPUs and the targets that are installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from runtime.cuda import open_driver
from runtime.errors import InputError

_GPU_FIELDS = ("name", "memory_mib", "driver", "compute_capability")
_GPU_QUERY = "name,memory.total,driver_version,compute_cap"


def examine() -> dict[str, Any]:
    """Look at this machine; nothing is changed, and a package that is broken is reported, not raised.

    Returns:
        `dynamask` (version), `machine` (`python`, `system`, `cpu`, `cores` usable by this process, `memory_gib` or None), `gpus` (list of
        `name`, `memory_mib`, `driver`, `compute_capability`) and `targets`: name -> `available`, `version` or None, `note` (one sentence:
        what it does here, or how to get it); `onnxruntime` also has `providers` and `deform_conv` (does it run that operator? None
        where onnx, with which engines are built, is not installed).
    """
    return {
        "dynamask": _version("dynamask") or "not installed as a package",
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpu": processor(),
            "cores": usable_cores(),
            "memory_gib": _memory_gib(),
        },
        "gpus": find_gpus(),
        "targets": {
            "onnxruntime": _onnxruntime(),
            "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
            "tensorrt": _tensorrt("tensorrt"),
            "torch": _torch(),
        },
    }


def usable_cores() -> int:
    """The cores that this process may run on; fewer than the machine has in a container that is pinned to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that the driver reports; an empty list where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines() if line.strip()]
    gpus = [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]
    # Boards with shared memory (Jetson) answer [N/A].
    return [{**gpu, "memory_mib": int(gpu["memory_mib"]) if gpu["memory_mib"].isdigit() else None} for gpu in gpus]


def _onnxruntime() -> dict[str, Any]:
    try:
        import onnxruntime
    except ImportError as error:
        return {**_missing(f"pip install onnxruntime ({error})"), "providers": [], "deform_conv": None}
    deform_conv = _deform_conv()
    if deform_conv is None:
        note = "Runs engines; to build them too: pip install onnx."
    elif deform_conv:
        note = "Builds and runs engines."
    else:
        note = "Builds and runs engines, more slowly than a release that has DeformConv: pip install --upgrade onnxruntime."
    return {
        "available": True,
        "version": onnxruntime.__version__,
        "note": note,
        "providers": onnxruntime.get_available_providers(),
        "deform_conv": deform_conv,
    }


def _deform_conv() -> bool | None:
    from runtime.targets.onnxruntime import has_deform_conv

    try:
        return has_deform_conv()
    except ImportError:
        return None


def _tensorrt(target: str) -> dict[str, Any]:
    from runtime.targets.tensorrt import library_version

    try:
        version = library_version(target)
    except InputError as error:
        return {"available": False, "version": None, "note": str(error)}
    try:
        driver = open_driver()
    except InputError as error:
        return {"available": False, "version": version, "note": f"Builds engines. {error}"}
    note = f"Builds engines, and runs them on {driver.device} of compute capability {driver.compute_capability}."
    return {"available": True, "version": version, "note": note}


def _torch() -> dict[str, Any]:
    # Its version is read from the package's metadata: to import PyTorch here would break the rule that the runtime never does.
    version = _version("torch")
    if version is None:
        return _missing("pip install torch torchvision")
    return {"available": True, "version": version, "note": "Trains and exports; the reference that engines are compared with."}


def _missing(install: str) -> dict[str, Any]:
    return {"available": False, "version": None, "note": f"Not installed: {install}."}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 2)
    except (OSError, ValueError):
        return None
