"""The code that TensorRT for RTX compiles for the GPU when an engine first runs there, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runtime.errors import DynaMaskError
from runtime.files import atomic_path, user_cache
from trt_plugins.tensorrt import TensorRT

if TYPE_CHECKING:
    import tensorrt


class RuntimeCache:
    """The compiled code of an engine, read from a file and written back to it.

    The file only saves time. TensorRT ignores a file that does not fit; a file that cannot be written is not an error.
    """

    def __init__(self, trt: TensorRT, engine: tensorrt.ICudaEngine, path: Path) -> None:
        # Only TensorRT for RTX has this class; the stubs are TensorRT's.
        self.config = cast(Any, engine).create_runtime_config()
        """For `create_execution_context`."""
        # The number of instances changes from frame to frame: kernels specialised for one number would be compiled again and again.
        self.config.dynamic_shapes_kernel_specialization_strategy = cast(Any, trt).DynamicShapesKernelSpecializationStrategy.NONE
        self._cache = self.config.create_runtime_cache()
        self._path = path
        self._saved = b""
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if self._cache.deserialize(content):
                self._saved = content
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, if there is new code."""
        content = self._cache.serialize()
        if content is None or bytes(content) == self._saved:
            return
        self._saved = bytes(content)
        with contextlib.suppress(DynaMaskError), atomic_path(self._path) as temporary:
            temporary.write_bytes(self._saved)


def cache_path(engine_sha256: str, device: str) -> Path:
    """The cache's file for an engine, named by its file's SHA-256, on a GPU, named by `Driver.device`."""
    return user_cache("tensorrt-rtx") / f"{engine_sha256[:16]}-{re.sub('[^0-9A-Za-z]+', '-', device)}.bin"
