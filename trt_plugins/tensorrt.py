"""TensorRT's Python module, imported when it is needed."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from runtime.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt
    import tensorrt

_MODULES: dict[str, tuple[str, ...]] = {
    # The second is what the first re-exports; its wheels install where the first, a source package, may not.
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt": ("tensorrt",),
}
MINIMUM_VERSIONS: dict[str, tuple[tuple[int, ...], str]] = {
    "tensorrt-rtx": ((1, 7, 1), "earlier ones do not take the plugins; run pip install --upgrade tensorrt-rtx-cu13"),
    "tensorrt": ((10, 3), "earlier ones lack parts of the plugins' interface; upgrade it with pip, or take JetPack 6.1 or later"),
}
"""By target: the lowest version, and what to do about a lower one. JetPack 6.1 and 6.2 have TensorRT 10.3."""
_INSTALL = {
    "tensorrt-rtx": "needs TensorRT for RTX, which is not installed; run pip install tensorrt-rtx-cu13",
    "tensorrt": "needs TensorRT, which is not installed; run pip install tensorrt, "
    "or on a Jetson take JetPack's: make the environment with python -m venv --system-site-packages",
}


class TensorRT(Protocol):
    """The part of `tensorrt` and `tensorrt_rtx` that this project uses, with the types of `tensorrt-stubs`."""

    __name__: str
    __version__: str
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    DimensionOperation: type[tensorrt.DimensionOperation]
    Dims: type[tensorrt.Dims]
    DimsExprs: type[tensorrt.DimsExprs]
    ILogger: type[tensorrt.ILogger]
    IOutputAllocator: type[tensorrt.IOutputAllocator]
    IPluginCreatorV3One: type[tensorrt.IPluginCreatorV3One]
    IPluginV3: type[tensorrt.IPluginV3]
    IPluginV3OneBuild: type[tensorrt.IPluginV3OneBuild]
    IPluginV3OneCore: type[tensorrt.IPluginV3OneCore]
    IPluginV3OneRuntime: type[tensorrt.IPluginV3OneRuntime]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    Logger: type[tensorrt.Logger]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    PluginField: type[tensorrt.PluginField]
    PluginFieldCollection: type[tensorrt.PluginFieldCollection]
    PluginFieldType: type[tensorrt.PluginFieldType]
    Runtime: type[tensorrt.Runtime]
    TensorFormat: type[tensorrt.TensorFormat]
    bool: tensorrt.DataType
    float16: tensorrt.DataType
    float32: tensorrt.DataType
    int32: tensorrt.DataType
    int64: tensorrt.DataType

    def get_plugin_registry(self) -> tensorrt.IPluginRegistry:
        """The registry of this process."""

    def nptype(self, trt_type: tensorrt.DataType) -> npt.DTypeLike:
        """The NumPy type of a TensorRT type."""


def load(target: str) -> TensorRT:
    """TensorRT's Python module for the target `tensorrt-rtx` or `tensorrt`: `tensorrt_rtx` or `tensorrt`.

    Raises:
        InputError: it is not installed, too old or does not load, or TensorRT for RTX would abort this process at the first plugin.
    """
    name = next((name for name in _MODULES[target] if _is_installed(name)), None)
    if name is None:
        raise InputError(f"The target {target} {_INSTALL[target]}.")
    if target == "tensorrt-rtx":
        _name_library()
    try:
        module = cast(TensorRT, importlib.import_module(name))
    except (ImportError, OSError) as error:
        raise InputError(f"The target {target} is installed but does not load ({error}); install {name} again.") from error
    minimum, remedy = MINIMUM_VERSIONS[target]
    if version_numbers(module.__version__) < minimum:
        required = ".".join(map(str, minimum))
        raise InputError(f"The target {target} needs {name} {required} or later, and {module.__version__} is installed: {remedy}.")
    return module


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 1.7.1.116 or 3.5.0+git is (1, 7, 1, 116) or (3, 5, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def sizes(dims: tensorrt.Dims) -> tuple[int, ...]:
    """A shape's sizes. The stubs do not say that it can be iterated."""
    return tuple(cast(Iterable[int], dims))


def _is_installed(name: str) -> bool:
    # Type stubs alone make a folder of that name, which Python imports as an empty namespace: it has no origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _name_library() -> None:
    """Let TensorRT for RTX find itself as `libtensorrt_rtx.so`.

    Its ONNX parser opens that name the moment a plugin is created; the wheel ships `libtensorrt_rtx.so.1` alone, and where the name
    is not found the process is aborted. The libraries search the folder they were loaded from ($ORIGIN): a link there is enough.
    Where the wheel's folder cannot be written, they are loaded through links in a folder of our own, before Python's module loads them.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return  # Not from wheels: NVIDIA's archives hold the name.
    folder = Path(spec.origin).parent
    link = folder / "libtensorrt_rtx.so"
    libraries = sorted(folder.glob("libtensorrt*_rtx.so.*"), reverse=True)
    library = next((file for file in libraries if file.name.startswith(f"{link.name}.")), None)
    if library is None or link.exists():
        return
    try:
        link.symlink_to(library.name)
    except OSError:  # A read-only folder, or another process was faster.
        if not link.exists():
            _load_through_links(link, library, libraries)


def _load_through_links(link: Path, library: Path, libraries: list[Path]) -> None:
    way_out = f"run ln -s {library.name} {link} as the owner of that folder"
    if "tensorrt_rtx_bindings" in sys.modules:
        raise InputError(f"{link} is missing, without which TensorRT for RTX aborts, and tensorrt_rtx was imported before; {way_out}.")
    try:
        folder = Path(tempfile.mkdtemp(prefix="dynamask-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name, file in [(link.name, library), *((file.name, file) for file in libraries)]:
            (folder / name).symlink_to(file)
        for file in libraries:  # "libtensorrt_rtx" comes before "libtensorrt_onnxparser_rtx", which needs it.
            ctypes.CDLL(str(folder / file.name))
    except OSError as error:
        raise InputError(f"{link} is missing, without which TensorRT for RTX aborts ({error}); {way_out}.") from error
