"""Builds engines into a bundle: for ONNX Runtime, the graph cut in two; for TensorRT, one engine and the kernels of its plugins.

An engine takes one image on the bundle's canvas or, for TensorRT, the batches and canvases of its profile. The number of instances may vary
from image to image. Building needs neither PyTorch nor, for TensorRT for RTX, a GPU.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from pydantic import ValidationError

import dynamask
import trt_plugins
from export import serialized_engine
from export.lowering import Lowered, lower
from export.onnxruntime_engine import build_onnxruntime
from export.precision import emulate_fp16, to_fp16
from export.seams import read_facts
from export.serialized_engine import Progress, build_serialized
from runtime.bundle import MANIFEST, MODEL, Bundle, Canvas, EngineEntry, Profile
from runtime.errors import InputError, first_line
from runtime.graph import GRIDS
from runtime.targets.registry import check_target
from trt_plugins.aot import compile_kernels
from trt_plugins.driver import Driver, open_driver
from trt_plugins.engine import ENGINE
from trt_plugins.kernels import COMPUTE_CAPABILITIES, KNOWN_CAPABILITIES, KernelLibrary
from trt_plugins.paste_masks.operator import paste_kernel
from trt_plugins.tensorrt import load

PRECISIONS = ("fp32", "fp16")
INPUTS = "inputs"
"""The key, among an engine's versions, of the digest of everything that it was built from."""


def build_engine(
    bundle: str | os.PathLike[str],
    target: str,
    precision: str = "fp32",
    capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] = (1, 1, 1),
    canvas: tuple[Canvas, Canvas, Canvas] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Build the engine of a bundle for a target. It replaces an earlier one, unless nothing has changed since.

    Args:
        bundle: its folder.
        target: `onnxruntime`, `tensorrt-rtx`, `tensorrt`.
        precision: `fp32` (without TF32) or `fp16` (`export.precision`). For `onnxruntime`, fp16 emulates a GPU's rounding, to measure its
            cost in accuracy; it is not faster.
        capabilities: compute capabilities to compile kernels for (`8.9`); by default that of this machine's GPU, and without a GPU all of
            `COMPUTE_CAPABILITIES`. Engines for `tensorrt` are built on the GPU that runs them.
        batch: the minimum, optimum (which the engine is tuned for) and maximum number of images in a run; `onnxruntime` takes one image.
        canvas: minimum, optimum and maximum `(height, width)` in pixels, multiples of 32; the bundle's canvas by default, and always for
            `onnxruntime`.
        progress: called with a phase's name, the number of its finished steps, and the number of its steps.

    Returns:
        `engine` (its folder), `bytes` of its files, `seconds`, `target`, `precision`, `profile` (`batch`, `canvas`), `versions`,
        `plugins` (names of operators, sorted), `plugin_nodes` (name -> number of nodes), `rewrites` (`name`, `count`, `why`), `kernels`
        (`kernel`, `compute_capability`, `registers`, `spills` and `shared` in bytes), `reused` (True if nothing has changed since the
        engine was built, so that it was kept).

    Raises:
        InputError: the bundle is missing, damaged or of an earlier version; the target, precision or compute capability does not exist;
            the profile does not rise, or the target does not support it; a library or, for `tensorrt`, a GPU is missing.
        DynaMaskError: a kernel does not compile, the target does not take the graph, or the engine could not be written.
    """
    start = time.perf_counter()
    check_target(target)
    if precision not in PRECISIONS:
        raise InputError(f"{precision} is not a precision that engines are built in; take {' or '.join(PRECISIONS)}.")
    opened = Bundle.open(bundle)
    own = Profile(canvas=(opened.manifest.canvas,) * 3)
    profile = _profile(batch, canvas or own.canvas)
    if target == "onnxruntime":
        if profile != own:
            height, width = opened.manifest.canvas
            raise InputError(
                f"The target onnxruntime takes one image at a time on the bundle's canvas of {height}x{width}: leave batch and size out, "
                "and export another bundle for another canvas."
            )
        entry, details = _build_onnxruntime(opened, precision, capabilities)
    else:
        entry, details = _build_tensorrt(opened, target, precision, capabilities, profile, progress)
    return {
        "engine": str(opened.path / "engines" / target),
        "bytes": sum(file.bytes for file in entry.files.values()),
        "seconds": time.perf_counter() - start,
        "target": target,
        "precision": entry.precision,
        "profile": profile.model_dump(mode="json"),
        "versions": entry.versions,
        **details,
    }


def _profile(batch: tuple[int, int, int], canvas: tuple[Canvas, Canvas, Canvas]) -> Profile:
    try:
        return Profile(batch=batch, canvas=canvas)
    except ValidationError as error:
        name, given = str(error.errors()[0]["loc"][0]), {"batch": batch, "canvas": ["x".join(map(str, size)) for size in canvas]}
        raise InputError(
            f"No engine has the {name} {':'.join(map(str, given[name]))}: give minimum, optimum and maximum, each at least as "
            "large as the one before; batches are 1 or more, and sides multiples of 32."
        ) from error


def _build_onnxruntime(bundle: Bundle, precision: str, capabilities: Sequence[str]) -> tuple[EngineEntry, dict[str, Any]]:
    if capabilities:
        raise InputError(f"The target onnxruntime runs on the CPU and has no compute capability ({', '.join(capabilities)}); leave it out.")
    entry = build_onnxruntime(bundle, precision, (lambda part: emulate_fp16(to_fp16(part))) if precision == "fp16" else None)
    return entry, {"plugins": [], "plugin_nodes": {}, "rewrites": [], "kernels": [], "reused": False}


def _build_tensorrt(
    bundle: Bundle, target: str, precision: str, capabilities: Sequence[str], profile: Profile, progress: Progress
) -> tuple[EngineEntry, dict[str, Any]]:
    trt = load(target)
    driver = _driver(target)
    capabilities = _compute_capabilities(capabilities, driver)
    graph = _read_graph(bundle, precision)
    facts, manifest = read_facts(graph), bundle.manifest
    if (facts.canvas, facts.detections) != (manifest.canvas, manifest.detections):
        raise InputError(
            f"{bundle.path / MANIFEST} says a canvas of {manifest.canvas} and {manifest.detections} detections, and {MODEL} {facts.canvas} "
            f"and {facts.detections}: export the bundle again."
        )
    lowered = lower(graph, profile)
    versions = {target: trt.__version__, **_versions()}
    versions[INPUTS] = _digest(lowered.model, profile, precision, capabilities, versions)
    entry = _unchanged(bundle, target, versions)
    reused = entry is not None
    if entry is not None:
        library = _library(bundle, target, entry)
    else:
        specs = [spec for placed in lowered.operators for spec in placed.operator.kernels(placed.inputs)]
        specs += [paste_kernel(grid) for grid in GRIDS]
        library = compile_kernels(specs, capabilities, progress=lambda done, total: progress("Compiling kernels", done, total))
        with tempfile.TemporaryDirectory(prefix="dynamask-") as folder:
            model, engine = Path(folder, MODEL), Path(folder, ENGINE)
            onnx.save(lowered.model, model)
            build_serialized(target, model, engine, library, lowered.ranges, progress)
            entry = bundle.add_engine(target, {ENGINE: engine, **library.to_files()}, precision, versions, profile)
    return entry, {**_details(lowered, library), "reused": reused}


def _details(lowered: Lowered, library: KernelLibrary) -> dict[str, Any]:
    nodes = collections.Counter(placed.operator.name for placed in lowered.operators)
    figures = {"compute_capability", "registers", "spills", "shared"}
    return {
        "plugins": sorted(nodes),
        "plugin_nodes": dict(sorted(nodes.items())),
        "rewrites": [asdict(rewrite) for rewrite in lowered.rewrites],
        "kernels": [{"kernel": kernel.key, **kernel.model_dump(include=figures)} for kernel in library.kernels],
    }


def _read_graph(bundle: Bundle, precision: str) -> onnx.ModelProto:
    path = bundle.path / MODEL
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and onnx's exceptions share no public base.
        raise InputError(f"{path} could not be read as ONNX ({first_line(error)}); export the bundle again.") from error
    return to_fp16(model) if precision == "fp16" else model


def _driver(target: str) -> Driver | None:
    try:
        return open_driver()
    except InputError:
        if target == "tensorrt":
            raise
        return None


def _compute_capabilities(given: Sequence[str], driver: Driver | None) -> list[str]:
    for capability in given:
        if capability not in KNOWN_CAPABILITIES:
            raise InputError(f"{capability} is not a compute capability to compile for; choose one of {', '.join(KNOWN_CAPABILITIES)}.")
    if given:
        return sorted(set(given), key=float)
    return list(COMPUTE_CAPABILITIES) if driver is None else [driver.compute_capability]


def _versions() -> dict[str, str]:
    return {"dynamask": dynamask.__version__, **{package: _version(package) for package in ("triton", "onnx", "onnx-graphsurgeon")}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"Engines for TensorRT are built with {package}, which is not installed; run pip install {package}.") from None


def _digest(model: onnx.ModelProto, profile: Profile, precision: str, capabilities: Sequence[str], versions: dict[str, str]) -> str:
    """A digest of all that an engine depends on: the lowered graph, the options, the versions, and the sources of plugins and builder."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    digest.update(repr((profile, precision, list(capabilities), sorted(versions.items()))).encode())
    builder = (Path(__file__), Path(serialized_engine.__file__))
    for file in (*builder, *sorted(Path(trt_plugins.__path__[0]).rglob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _unchanged(bundle: Bundle, target: str, versions: dict[str, str]) -> EngineEntry | None:
    """The bundle's engine, if it is intact and was built from the same inputs."""
    try:
        entry = bundle.engine(target)
    except InputError:
        return None
    return entry if entry.versions == versions else None


def _library(bundle: Bundle, target: str, entry: EngineEntry) -> KernelLibrary:
    prefix = f"engines/{target}/"
    names = [name.removeprefix(prefix) for name in entry.files]
    return KernelLibrary.from_files({name: (bundle.path / prefix / name).read_bytes() for name in names if name != ENGINE})
