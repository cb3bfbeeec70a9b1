"""TensorRT, and TensorRT for RTX: the whole graph as one engine, routed on the GPU by this project's plugins.

All of an engine's work is in one CUDA stream. CUDA graphs cannot hold it, TensorRT for RTX's own neither: the sizes of the mask branch
depend on the image, and TensorRT waits for them while it enqueues, which ends a capture.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle, Canvas, EngineEntry, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import GRIDS, INPUTS, OUTPUTS
from runtime.targets.base import EngineOutput, GridOverride, check_fits, closed_engine, slot_overrides
from trt_plugins.driver import open_driver
from trt_plugins.kernels import CompiledKernel, KernelLibrary
from trt_plugins.launcher import KernelLauncher
from trt_plugins.plugin import register
from trt_plugins.runtime_cache import RuntimeCache, cache_path
from trt_plugins.tensorrt import TensorRT, load, sizes

if TYPE_CHECKING:
    import tensorrt

ENGINE = "engine.bin"
_LOADING = threading.Lock()
"""Plugins take the launcher that is registered while their engine is loaded: one engine at a time."""


@dataclass(eq=False)
class Tensor:
    """An input or output of the engine, with room for its largest size on the device and in pinned memory."""

    address: int
    room: npt.NDArray[Any]
    """`[most items]`, pinned."""
    shape: tuple[int, ...]
    """In the last run, or the one that begins."""

    @property
    def host(self) -> npt.NDArray[Any]:
        """The pinned memory in the tensor's shape."""
        return self.room[: math.prod(self.shape)].reshape(self.shape)


class TensorRTEngine:
    """A bundle's engine on the first visible GPU: its execution context, its stream, and its buffers at their largest size.

    For one thread at a time, which need not be the one that opened it.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        """Load the engine of a target, `tensorrt-rtx` or `tensorrt`.

        Raises:
            InputError: the engine is not built or damaged; TensorRT, cuda-python or a GPU is missing; the engine was built by another
                TensorRT or for other GPUs, or does not fit the memory that is free.
            DynaMaskError: TensorRT or CUDA failed.
        """
        entry = bundle.engine(target)
        trt = load(target)
        self.target = target
        self.manifest = bundle.manifest
        self.profile = entry.profile or Profile(canvas=(bundle.manifest.canvas,) * 3)
        self._bundle = bundle.path
        self._path = bundle.path / "engines" / target / ENGINE
        self._remedy = f"build it again with dynamask build-engine {bundle.path} --target {target}."
        self._driver = open_driver()
        self._logger = _logger(trt)
        self._has_run = False
        with self._driver.current(), contextlib.ExitStack() as resources:
            self._stream = self._driver.create_stream()
            resources.callback(self._driver.destroy_stream, self._stream)
            self._start, self._detected = self._driver.create_event(), self._driver.create_event()
            self._launcher = KernelLauncher(self._driver, self._kernels(bundle, entry), self._detected, self._remedy)
            resources.callback(self._launcher.unload)
            with _LOADING:
                self._plugins = register(trt, self._launcher)
                with self._needing(self._path.stat().st_size):
                    self._engine = self._deserialise(trt, entry)
                self._cache = self._runtime_cache(trt, entry) if target == "tensorrt-rtx" else None
                with self._needing(self._engine.device_memory_size_v2):
                    self._context = self._create_context()
            # TensorRT keeps pointers to them, nothing more.
            self._allocators: dict[str, tensorrt.IOutputAllocator] = {}
            self._tensors = self._create_tensors(trt, resources)
            self._resources = resources.pop_all()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and all its memory; the GPU's context stays, as the process has one for all."""
        with self._driver.current():
            if self._cache is not None:
                self._cache.save()
            # The context first: it does not hold the runtime's configuration, which the cache has.
            self._context = self._engine = cast(Any, None)
            self._start = self._detected = self._cache = None
            self._resources.close()

    @property
    def memory_bytes(self) -> int:
        """GPU memory that the engine holds: weights (the size of the engine's file), activations and workspaces, inputs and outputs.

        It does not grow. On top come what CUDA itself takes for its context, code that TensorRT for RTX compiles, and the mask branch's
        activations, as many as an image has instances: TensorRT takes them from the device's pool, which keeps up to
        `trt_plugins.driver.POOL_BYTES` from one run to the next.
        """
        buffers = sum(tensor.room.nbytes for tensor in self._tensors.values())
        return self._path.stat().st_size + self._engine.device_memory_size_v2 + buffers

    def run(
        self, image: npt.NDArray[np.float32], budget_gmacs: float | None = None, grid_override: GridOverride = None, min_score: float = 0.0
    ) -> EngineOutput:
        """As `Engine.run`; `times_ms` are apart where the GPU has the detections, and include the copies.

        Fewer images than the profile's least are filled up with empty canvases, which are left out of what is given.

        Raises:
            InputError: as there, or the engine's kernels are not those of this version.
            DynaMaskError: TensorRT or CUDA failed.
        """
        if self._context is None:
            raise closed_engine(self._bundle, self.target)
        start = time.perf_counter()
        check_fits(image.shape, self.profile, self._bundle, self.target)
        driver, stream, tensors = self._driver, self._stream, self._tensors
        images, _, height, width = image.shape
        slots = images * self.manifest.detections
        overrides = slot_overrides(grid_override, slots)
        with driver.current():
            self._set_input_shapes(max(images, self.profile.batch[0]), (height, width))
            for name in tensors.keys() - self._allocators.keys():
                tensors[name].shape = sizes(self._context.get_tensor_shape(name))
            canvases, least, limit, given = (tensors[name].host for name in INPUTS)
            canvases[:images], canvases[images:] = image, 0
            # With a grid given, what is found on an empty canvas has no part in the budget; the smallest costs least.
            given[:slots], given[slots:] = overrides, 0
            least[...], limit[...] = min_score, budget_gmacs or 0.0
            # The stream is idle: the event's time is now.
            filled = time.perf_counter()
            driver.record(self._start, stream)
            for name in INPUTS:
                driver.to_device(tensors[name].address, tensors[name].host, stream)
            self._execute()
            # TensorRT has told the sizes: it waited for them itself.
            for name in OUTPUTS:
                if tensors[name].host.size:
                    driver.to_host(tensors[name].host, tensors[name].address, stream)
            driver.synchronize(stream)
            detected_ms = driver.elapsed_ms(self._start, self._detected)
            if self._cache is not None and not self._has_run:
                self._cache.save()
            self._has_run = True
        boxes, scores, labels, grids = (tensors[name].host[:slots].copy() for name in OUTPUTS[:4])
        masks = {grid: _masks(tensors[f"slots_{grid}"].host, tensors[f"masks_{grid}"].host, slots) for grid in GRIDS}
        detector = 1000 * (filled - start) + detected_ms
        times_ms = {"detector": detector, "masks": 1000 * (time.perf_counter() - start) - detector}
        return EngineOutput(boxes, scores, labels, grids, masks, times_ms)

    def _kernels(self, bundle: Bundle, entry: EngineEntry) -> dict[str, CompiledKernel]:
        folder = self._path.parent
        files = {(bundle.path / name).relative_to(folder).as_posix(): bundle.path / name for name in entry.files}
        library = KernelLibrary.from_files({name: file.read_bytes() for name, file in files.items() if name != ENGINE})
        return library.for_device(self._driver.compute_capability)

    def _deserialise(self, trt: TensorRT, entry: EngineEntry) -> tensorrt.ICudaEngine:
        with self._plugins.raising():
            loaded = trt.Runtime(self._logger).deserialize_cuda_engine(self._path.read_bytes())
        engine = cast("tensorrt.ICudaEngine | None", loaded)
        if engine is None:
            built = entry.versions.get(self.target, "?")
            device, reason = f"{self._driver.device} of compute capability {self._driver.compute_capability}", self._logger.reason
            # TensorRT for RTX leaves out whole kinds of GPUs: building again would not help there.
            unknown = "does not support this compute capability" in reason
            remedy = f"build the bundle for another target there, with dynamask build-engine {self._bundle}." if unknown else self._remedy
            raise InputError(
                f"{self._path}, built for {trt.__name__} {built}, does not load in {trt.__version__} on this {device} ({reason}); {remedy}"
            )
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != {*INPUTS, *OUTPUTS}:
            raise InputError(f"{self._path} takes and gives {', '.join(sorted(names))}, which is no DynaMask; {self._remedy}")
        return engine

    def _runtime_cache(self, trt: TensorRT, entry: EngineEntry) -> RuntimeCache:
        sha256 = next(file.sha256 for name, file in entry.files.items() if Path(name).name == ENGINE)
        return RuntimeCache(trt, self._engine, cache_path(sha256, self._driver.device))

    def _create_context(self) -> tensorrt.IExecutionContext:
        with self._plugins.raising():
            created = self._engine.create_execution_context(*([] if self._cache is None else [self._cache.config]))
        context = cast("tensorrt.IExecutionContext | None", created)
        if context is None:
            raise DynaMaskError(f"TensorRT could not prepare {self._path} to run ({self._logger.reason}).")
        return context

    def _set_input_shapes(self, images: int, canvas: Canvas) -> None:
        """Tell TensorRT the sizes of a run, where they are not those that it has."""
        for name, shape in {"image": (images, 3, *canvas), "grid_override": (images * self.manifest.detections,)}.items():
            if shape != sizes(self._context.get_tensor_shape(name)) and not self._context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._path} does not take {list(shape)} as its {name}, which the manifest says that it does "
                    f"({self._logger.reason}); {self._remedy}"
                )

    def _create_tensors(self, trt: TensorRT, resources: contextlib.ExitStack) -> dict[str, Tensor]:
        self._set_input_shapes(self.profile.batch[-1], self.profile.canvas[-1])
        shapes = {name: sizes(self._context.get_tensor_shape(name)) for name in (*INPUTS, *OUTPUTS)}
        types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in shapes}
        room = {name: math.prod(shapes[name]) * types[name].itemsize for name in INPUTS}
        room |= {name: self._context.get_max_output_size(name) for name in OUTPUTS}
        for name, size in room.items():
            if size < 0:  # TensorRT knows no largest size of what has no profile.
                raise DynaMaskError(f"TensorRT does not tell how large the output {name} of {self._path} can be; {self._remedy}")
        with self._needing(sum(room.values())):
            return {name: self._create_tensor(trt, name, shapes[name], types[name], room[name], resources) for name in room}

    def _create_tensor(
        self, trt: TensorRT, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, resources: contextlib.ExitStack
    ) -> Tensor:
        address, memory = self._driver.allocate(_whole(size)), self._driver.allocate_pinned(size)
        resources.callback(self._driver.free, address)
        resources.callback(self._driver.free_pinned, memory)
        tensor = Tensor(address, memory.view(dtype), shape)
        if -1 in shape:
            # Not the inputs' shapes but their values decide.
            self._allocators[name] = _output_allocator(trt, tensor)
            self._context.set_output_allocator(name, self._allocators[name])
        else:
            self._context.set_tensor_address(name, address)
        return tensor

    @contextlib.contextmanager
    def _needing(self, size: int) -> Iterator[None]:
        """What fails inside, and would take more memory than is free, fails for that.

        Nothing is refused beforehand: what is free on a Jetson leaves out the files that Linux keeps in memory, which make room.
        """
        free = self._driver.memory().free
        try:
            yield
        except DynaMaskError as error:
            if size <= free:
                raise
            raise InputError(
                f"{self._path} needs {_mib(size)} MiB more of the memory of {self._driver.device}, and {_mib(free)} MiB are free; "
                "end what else runs there, or build it with --precision fp16."
            ) from error

    def _execute(self) -> None:
        with self._plugins.raising():
            done = self._context.execute_async_v3(self._stream)
        if not done:
            raise DynaMaskError(f"TensorRT could not run {self._path} ({self._logger.reason}).")
        for name in self._allocators:
            if -1 in self._tensors[name].shape:  # TensorRT 10.16 is said to do so on a Jetson.
                raise DynaMaskError(f"TensorRT did not tell how large the output {name} of {self._path} is; take another version of it.")


def _logger(trt: TensorRT) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Keeps the first error since `reason` was last asked for; says nothing itself."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._first = ""

        def log(self, severity: tensorrt.ILogger.Severity, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._first = self._first or message

        @property
        def reason(self) -> str:
            first, self._first = self._first, ""
            return (first.strip().splitlines() or ["TensorRT gave no reason"])[0].rstrip(".")

    return Logger()


def _whole(size: int) -> int:
    """In whole units of 512 bytes, as TensorRT divides memory."""
    return -(-size // 512) * 512


def _output_allocator(trt: TensorRT, tensor: Tensor) -> tensorrt.IOutputAllocator:
    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[name-defined]
        """Gives TensorRT the room that an output has, and notes the shape it turns out to have."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            # 0 tells TensorRT that there is no more.
            return tensor.address if size <= _whole(tensor.room.nbytes) else 0

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(name, memory, size, alignment, 0)

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            tensor.shape = tuple(shape)

    return OutputAllocator()


def _masks(places: npt.NDArray[Any], logits: npt.NDArray[Any], slots: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Copies of the places, which rise, below `slots`, and of their logits."""
    count = int(np.searchsorted(places, slots))
    return places[:count].copy(), logits[:count].copy()


def _mib(size: int) -> int:
    return -(-size // 2**20)
