"""Examines this machine: processor, memory, GPUs and the installed targets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from runtime.carried import models
from runtime.errors import InputError
from runtime.machine import processor, usable_cores
from runtime.targets.registry import TARGETS, find_target

_GPU_FIELDS = ("name", "memory_mib", "driver", "compute_capability")
_GPU_QUERY = "name,memory.total,driver_version,compute_cap"


def examine() -> dict[str, Any]:
    """Examine this machine. Nothing is changed; a broken package is reported, not raised.

    Returns:
        `dynamask` (version), `machine` (`python`, `system`, `cpu`, `cores` usable by this process, `memory_gib` or None), `gpus` (list of
        `name`, `memory_mib`, `driver`, `compute_capability`), `models` (that come with the package, as `runtime.carried.models` gives
        them) and `targets`: name -> `available`, `version` or None, `note` (one sentence: its use here, or how to install it);
        `onnxruntime` also has `providers` and `deform_conv` (does it run that operator? None
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
        "models": models(),
        "targets": {**{target: _status(target) for target in TARGETS}, "torch": _torch()},
    }


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


def _status(target: str) -> dict[str, Any]:
    try:
        return find_target(target).status()
    except InputError as error:
        return {"available": False, "version": None, "note": str(error)}


def _torch() -> dict[str, Any]:
    # Its version is read from the package's metadata: to import PyTorch here would break the rule that the runtime never does.
    version = _version("torch")
    if version is None:
        return {"available": False, "version": None, "note": "Not installed: pip install torch torchvision."}
    return {"available": True, "version": version, "note": "Trains and exports; the reference that engines are compared with."}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 2)
    except (OSError, ValueError):
        return None
