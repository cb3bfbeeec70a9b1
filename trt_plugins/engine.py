"""Runs an engine of TensorRT or TensorRT for RTX: the whole graph, routed on the GPU by this project's plugins.

An engine enqueues all its work to one CUDA stream. It cannot be captured in a CUDA graph: the sizes in the mask branch depend on the image,
and TensorRT waits for them while it enqueues, which ends a capture.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle, Canvas, EngineEntry, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import COST_CONTROLS, GRIDS, INPUTS, MASKS, OUTPUTS, SLOTS
from runtime.paste import Frame, PackedMask, covered_pixels
from runtime.targets.base import EngineOutput, GridOverride, Masks, check_fits, closed_engine, mask_limits, slot_overrides
from trt_plugins.driver import open_driver
from trt_plugins.kernels import CompiledKernel, KernelLibrary
from trt_plugins.launcher import KernelLauncher
from trt_plugins.mask_paster import GridMasks, MaskPaster
from trt_plugins.operator import DType
from trt_plugins.plugin import register
from trt_plugins.runtime_cache import RuntimeCache, cache_path
from trt_plugins.tensorrt import TensorRT, load, sizes

if TYPE_CHECKING:
    import tensorrt

ENGINE = "engine.bin"
UNKNOWN = (-1,)
DATA_DEPENDENT = frozenset((*SLOTS, *MASKS))
"""Outputs whose number of rows depends on the image. They have room for every slot: an instance has one mask."""
_LOADING = threading.Lock()
"""Held while an engine is loaded: its plugins take the launcher that is registered at that time."""


@dataclass(eq=False)
class Tensor:
    """An input or output of the engine, with buffers for its largest size on the device and in pinned memory."""

    address: int
    buffer: npt.NDArray[Any]
    """Pinned memory for the largest size, flat."""
    shape: tuple[int, ...]
    """The shape in the current run; `UNKNOWN` from its start until TensorRT tells the shape, where the image decides it."""

    @property
    def host(self) -> npt.NDArray[Any]:
        """The pinned memory in the tensor's shape."""
        return self.buffer[: math.prod(self.shape)].reshape(self.shape)


class TensorRTEngine:
    """A bundle's engine on the first visible GPU: its execution context, its stream, and its buffers at their largest size.

    One thread may use it at a time; it need not be the thread that opened it.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        """Load the engine of a target, `tensorrt-rtx` or `tensorrt`.

        Raises:
            InputError: the engine is not built or damaged; TensorRT or a GPU is missing; the engine was built by another
                version of TensorRT or for other GPUs, or the free memory is too small for it.
            DynaMaskError: TensorRT or CUDA failed.
        """
        entry = bundle.engine(target)
        trt = load(target)
        self.target = target
        self.manifest = bundle.manifest
        self.profile = entry.profile or Profile(canvas=(bundle.manifest.canvas,) * 3)
        self.costs, self.threads = entry.costs, 0
        self._bundle = bundle.path
        self._path = bundle.path / "engines" / target / ENGINE
        self._remedy = f"build it again with dynamask build-engine {bundle.path} --target {target}."
        self._driver = open_driver()
        self.processor = self._driver.device
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
                with self._explaining_out_of_memory(self._path.stat().st_size):
                    self._engine = self._deserialise(trt, entry)
                names = self._check_names()
                self._inputs = [name for name in INPUTS if name in names]
                self.takes_costs = COST_CONTROLS[0] in names
                self._cache = self._runtime_cache(trt, entry) if target == "tensorrt-rtx" else None
                with self._explaining_out_of_memory(self._engine.device_memory_size_v2):
                    self._context = self._create_context()
            # TensorRT keeps only pointers to them.
            self._allocators: dict[str, tensorrt.IOutputAllocator] = {}
            self._tensors = self._create_tensors(trt, resources)
            self._paster = MaskPaster(self._driver, self._launcher)
            resources.callback(self._paster.free)
            self._resources = resources.pop_all()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and all its memory. The GPU's context stays: all engines of the process share it."""
        with self._driver.current():
            if self._cache is not None:
                self._cache.save()
            # The context first: it does not keep the runtime configuration alive, which the cache owns.
            self._context = self._engine = cast(Any, None)
            self._start = self._detected = self._cache = None
            self._resources.close()

    def run(
        self,
        image: npt.NDArray[np.float32],
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
        frames: Sequence[Frame] | None = None,
        masks_ms: float | None = None,
    ) -> EngineOutput:
        """As `Engine.run`: with frames, all masks are pasted on the GPU. `times_ms` are split at the time when the GPU has the detections,
        and include the copies; `paste` begins when the masks are there.

        If there are fewer images than the profile's minimum, empty canvases are added and their results dropped.

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
        limits = mask_limits(self, budget_gmacs, masks_ms)
        with driver.current():
            self._set_input_shapes(max(images, self.profile.batch[0]), (height, width))
            shapes = self._shapes(max(images, self.profile.batch[0]), (height, width))
            for name, shape in shapes.items():
                tensors[name].shape = UNKNOWN if name in DATA_DEPENDENT else shape
            canvases, min_scores, given = (tensors[name].host for name in ("image", "min_score", "grid_override"))
            canvases[:images], canvases[images:] = image, 0
            # Detections on an empty canvas get a fixed grid, so that the budget does not count them; the smallest grid costs least.
            given[:slots], given[slots:] = overrides, 0
            min_scores[...] = min_score
            for name in limits.keys() & tensors:
                tensors[name].host[...] = limits[name]
            # The stream is idle: the event's time is now.
            filled = time.perf_counter()
            driver.record(self._start, stream)
            for name in self._inputs:
                driver.to_device(tensors[name].address, tensors[name].host, stream)
            self._execute(shapes)
            # TensorRT waited for the sizes itself, so they are known.
            for name in OUTPUTS if frames is None else (*OUTPUTS[:4], *SLOTS):
                if tensors[name].host.size:
                    driver.to_host(tensors[name].host, tensors[name].address, stream)
            driver.synchronize(stream)
            segmented = time.perf_counter()
            pasted = {} if frames is None else self._paste(frames, slots)
            paste_ms = 1000 * (time.perf_counter() - segmented)
            detected_ms = driver.elapsed_ms(self._start, self._detected)
            if self._cache is not None and not self._has_run:
                self._cache.save()
            self._has_run = True
        boxes, scores, labels, grids = (tensors[name].host[:slots].copy() for name in OUTPUTS[:4])
        masks: Masks = {}
        if frames is None:
            masks = {grid: (rows, tensors[f"masks_{grid}"].host[: len(rows)].copy()) for grid, rows in self._rows(slots).items()}
        detector = 1000 * (filled - start) + detected_ms
        times_ms = {"detector": detector, "masks": 1000 * (time.perf_counter() - start) - detector}
        if frames is not None:
            times_ms = {**times_ms, "masks": times_ms["masks"] - paste_ms, "paste": paste_ms}
        return EngineOutput(boxes, scores, labels, grids, masks, times_ms, pasted)

    def _rows(self, slots: int) -> dict[int, npt.NDArray[np.int64]]:
        """Grid -> copies of its rows below `slots` in the current run. The rows of a grid are in rising order, as are its logits."""
        hosts = {grid: self._tensors[f"slots_{grid}"].host for grid in GRIDS}
        return {grid: host[: int(np.searchsorted(host, slots))].astype(np.int64) for grid, host in hosts.items()}

    def _paste(self, frames: Sequence[Frame], slots: int) -> dict[int, PackedMask]:
        """Row -> its mask, of the rows below `slots` of the current run."""
        tensors = self._tensors
        rows = self._rows(slots)
        boxes = tensors["boxes"].host
        own = np.zeros((slots, 4), np.float32)
        pixels = np.zeros((slots, 4), np.int64)
        for index, frame in enumerate(frames):
            of_image = slice(self.manifest.detections * index, self.manifest.detections * (index + 1))
            own[of_image] = frame.boxes(boxes[:slots][of_image])
            pixels[of_image] = covered_pixels(own[of_image], *frame.size)
        masks = []
        for grid, of_grid in rows.items():
            logits = tensors[f"masks_{grid}"]
            masks.append(GridMasks(logits.address, grid, cast(DType, logits.buffer.dtype.name), own[of_grid], pixels[of_grid]))
        pasted: dict[int, PackedMask] = {}
        for of_grid, found in zip(rows.values(), self._paster.paste(masks, self._stream), strict=True):
            pasted |= dict(zip(of_grid.tolist(), found, strict=True))
        return pasted

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
        return engine

    def _check_names(self) -> set[str]:
        """The names of the engine's inputs and outputs; models of earlier versions lack `COST_CONTROLS`."""
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if names not in ({*INPUTS, *OUTPUTS}, {*INPUTS, *OUTPUTS}.difference(COST_CONTROLS)):
            raise InputError(f"{self._path} takes and gives {', '.join(sorted(names))}, and is not a DynaMask engine; {self._remedy}")
        return names

    def _runtime_cache(self, trt: TensorRT, entry: EngineEntry) -> RuntimeCache:
        sha256 = next(file.sha256 for name, file in entry.files.items() if Path(name).name == ENGINE)
        return RuntimeCache(trt, self._engine, cache_path(sha256, self._driver.device))

    def _create_context(self) -> tensorrt.IExecutionContext:
        with self._plugins.raising():
            created = self._engine.create_execution_context(*([] if self._cache is None else [self._cache.config]))
        context = cast("tensorrt.IExecutionContext | None", created)
        if context is None:
            raise DynaMaskError(f"TensorRT could not create an execution context for {self._path} ({self._logger.reason}).")
        return context

    def _shapes(self, images: int, canvas: Canvas) -> dict[str, tuple[int, ...]]:
        """The shape of each input and output for a number of images, data-dependent outputs at their largest size."""
        slots = images * self.manifest.detections
        shapes: dict[str, tuple[int, ...]] = {"image": (images, 3, *canvas), "min_score": (), "budget": (), "boxes": (slots, 4)}
        shapes |= dict(zip(COST_CONTROLS, ((), (2, len(GRIDS))), strict=True))
        shapes |= {name: (slots, grid, grid) for name, grid in zip(MASKS, GRIDS, strict=True)}
        return {name: shapes.get(name, (slots,)) for name in (*self._inputs, *OUTPUTS)}

    def _set_input_shapes(self, images: int, canvas: Canvas) -> None:
        """Tell TensorRT the input shapes of a run, if they differ from the last run's."""
        for name, shape in {"image": (images, 3, *canvas), "grid_override": (images * self.manifest.detections,)}.items():
            if shape != sizes(self._context.get_tensor_shape(name)) and not self._context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._path} does not take {list(shape)} as its {name}, although the manifest says so "
                    f"({self._logger.reason}); {self._remedy}"
                )

    def _create_tensors(self, trt: TensorRT, resources: contextlib.ExitStack) -> dict[str, Tensor]:
        images, canvas = self.profile.batch[-1], self.profile.canvas[-1]
        self._set_input_shapes(images, canvas)
        # Not TensorRT's get_max_output_size: it is -1 for some data-dependent outputs, whose largest size is known here.
        largest = {
            name: np.empty(shape, trt.nptype(self._engine.get_tensor_dtype(name))) for name, shape in self._shapes(images, canvas).items()
        }
        with self._explaining_out_of_memory(sum(array.nbytes for array in largest.values())):
            return {name: self._create_tensor(trt, name, array, resources) for name, array in largest.items()}

    def _create_tensor(self, trt: TensorRT, name: str, largest: npt.NDArray[Any], resources: contextlib.ExitStack) -> Tensor:
        """A tensor with buffers like `largest`; TensorRT gets its address or, where the image decides its size, an allocator."""
        address, memory = self._driver.allocate(_round_up(largest.nbytes)), self._driver.allocate_pinned(largest.nbytes)
        resources.callback(self._driver.free, address)
        resources.callback(self._driver.free_pinned, memory)
        tensor = Tensor(address, memory.view(largest.dtype), largest.shape)
        if name in DATA_DEPENDENT:
            self._allocators[name] = _output_allocator(trt, tensor)
            self._context.set_output_allocator(name, self._allocators[name])
        else:
            self._context.set_tensor_address(name, address)
        return tensor

    @contextlib.contextmanager
    def _explaining_out_of_memory(self, size: int) -> Iterator[None]:
        """Re-raise a failure in this block as out-of-memory if `size` exceeds the free memory.

        Nothing is refused beforehand: the free memory of a Jetson does not count Linux's file cache, which shrinks when memory is needed.
        """
        free = self._driver.memory().free
        try:
            yield
        except DynaMaskError as error:
            if size <= free:
                raise
            raise InputError(
                f"{self._path} needs {_mib(size)} MiB of the memory of {self._driver.device}, and {_mib(free)} MiB are free; "
                "end other programs that use the GPU, or build it with --precision fp16."
            ) from error

    def _execute(self, largest: Mapping[str, tuple[int, ...]]) -> None:
        """Enqueue the run, and check the shapes that TensorRT tells against the largest of this run."""
        with self._plugins.raising():
            done = self._context.execute_async_v3(self._stream)
        if not done:
            raise DynaMaskError(f"TensorRT could not run {self._path} ({self._logger.reason}).")
        for name in self._allocators:
            (most, *rest), (rows, *others) = largest[name], self._tensors[name].shape
            if not 0 <= rows <= most or others != rest:  # That it tells -1 was reported of TensorRT 10.16 on a Jetson.
                raise DynaMaskError(
                    f"TensorRT says that the output {name} of {self._path} is {[rows, *others]}, and at most {[most, *rest]} is possible; "
                    "install another version of TensorRT."
                )


def _logger(trt: TensorRT) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Keeps the first error since `reason` was last read; prints nothing."""

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


def _round_up(size: int) -> int:
    """A size in bytes, rounded up to TensorRT's unit of 512 bytes."""
    return -(-size // 512) * 512


def _output_allocator(trt: TensorRT, tensor: Tensor) -> tensorrt.IOutputAllocator:
    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[name-defined]
        """Gives TensorRT the buffer of an output, and notes the output's shape."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            # 0 tells TensorRT that there is no memory.
            return tensor.address if size <= _round_up(tensor.buffer.nbytes) else 0

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(name, memory, size, alignment, 0)

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            tensor.shape = tuple(shape)

    return OutputAllocator()


def _mib(size: int) -> int:
    return -(-size // 2**20)
