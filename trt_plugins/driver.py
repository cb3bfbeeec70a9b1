"""The part of the CUDA driver API that an engine needs: memory, copies, streams, events and kernels on the first visible GPU.

Two Python packages give access to it: cuda-python (`cuda.bindings`), and pycuda, which is common on a Jetson.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import struct
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from runtime.errors import DynaMaskError, InputError

Bytes = npt.NDArray[np.uint8]
Method = TypeVar("Method", bound=Callable[..., Any])

POOL_BYTES = 512 << 20
"""Freed memory that the device's memory pool keeps. Its default is to keep none: TensorRT's mask branch, whose sizes depend on the image,
would then allocate memory from the operating system again in every frame."""
MAX_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel may use without a function attribute that allows more."""
_NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: the stream does not wait for the default stream, nor the default stream for it."""


class Memory(NamedTuple):
    """The device's memory, bytes."""

    free: int
    total: int


class Driver(Protocol):
    """The first visible GPU in its primary context, which TensorRT uses too.

    Addresses and streams are plain integers, as TensorRT takes them; events and kernels are objects of the Python package.
    Call everything but `current` inside `with driver.current()`, from one thread at a time. A call that fails raises `DynaMaskError`
    with the name of the CUDA function.
    """

    device: str
    """Its name: `Orin`, `NVIDIA H200`."""
    compute_capability: str
    """`8.7`."""

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the context current in this thread; at the end of the block, the previous one is current again."""

    def memory(self) -> Memory:
        """Free and total memory of the device, over all processes."""

    def allocate(self, size: int) -> int:
        """The address of new memory on the device, `size` bytes, aligned to 256."""

    def free(self, address: int) -> None:
        """Free memory of `allocate`."""

    def allocate_pinned(self, size: int) -> Bytes:
        """Page-locked host memory, `[size] uint8`: copies from and to it run beside other work."""

    def free_pinned(self, memory: Bytes) -> None:
        """Free memory of `allocate_pinned`; no array may use it any more."""

    def to_device(self, address: int, source: npt.NDArray[Any], stream: int) -> None:
        """Enqueue a copy of an array in pinned memory; the array must not change until the copy is done."""

    def to_host(self, destination: npt.NDArray[Any], address: int, stream: int) -> None:
        """Enqueue a copy into an array in pinned memory."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream of `create_stream`."""

    def synchronize(self, stream: int) -> None:
        """Wait until all work in a stream is done."""

    def create_event(self) -> Any:
        """An event that records a time; it frees itself."""

    def record(self, event: Any, stream: int) -> None:
        """Enqueue an event: it records the time at which all earlier work in the stream is done."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have been reached."""

    def load_kernel(self, cubin: bytes, entry: str, arguments: str, threads: int, shared: int) -> Any:
        """A kernel of a cubin; it stays loaded as long as something refers to it.

        Args:
            entry: its name in the cubin.
            arguments: their types, one letter each, as in Python's `struct`: `P` (address), `i`, `q`, `f`.
            threads: threads of a block.
            shared: dynamic shared memory of a block, in bytes.
        """

    def launch(self, kernel: Any, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        """Enqueue a kernel of `load_kernel`."""


def open_driver() -> Driver:
    """The driver, through the package that is installed; cuda-python if both are.

    Raises:
        InputError: neither is installed, or there is no NVIDIA driver or no GPU.
    """
    packages: list[tuple[str, Callable[[ModuleType], Driver]]] = [("cuda.bindings.driver", CudaPython), ("pycuda.driver", PyCuda)]
    for name, driver in packages:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # pycuda is linked with the driver's library.
            raise _no_gpu(str(error)) from error
        return driver(module)
    raise InputError("TensorRT's engines run through cuda-python, which is not installed; run pip install cuda-bindings (Jetson: pycuda).")


def _no_gpu(reason: str) -> InputError:
    return InputError(
        f"TensorRT's engines run on an NVIDIA GPU, and no driver for one starts here ({reason.rstrip('.')}); "
        "install the GPU's driver, or take the target onnxruntime."
    )


class _Kernel(NamedTuple):
    """A function of a loaded module, and the memory that holds its arguments in each launch."""

    module: Any
    """Unloads itself."""
    function: Any
    threads: int
    shared: int
    layout: struct.Struct
    values: Any
    pointers: Any
    """The address of each argument in `values`, as `cuLaunchKernel` wants them."""


class _Owner:
    """A handle that is destroyed when nothing refers to it."""

    def __init__(self, handle: Any, destroy: Callable[[Any], object]) -> None:
        self.handle = handle
        self._destroy = destroy

    def __del__(self) -> None:
        self._destroy(self.handle)


class CudaPython:
    """`Driver` by cuda-python's `cuda.bindings.driver`."""

    def __init__(self, cuda: ModuleType) -> None:
        """Start the driver and take the first GPU.

        Raises:
            InputError: there is none.
        """
        self._cuda = cuda
        try:
            self._call("cuInit", 0)
            device = self._call("cuDeviceGet", 0)
        except RuntimeError as error:
            raise _no_gpu("its library libcuda.so.1 is not found") from error
        except DynaMaskError as error:
            raise _no_gpu(str(error)) from error
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self.device = self._call("cuDeviceGetName", 256, device).rstrip(b"\0").decode()
        kinds = cuda.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = f"{major}.{minor}"
        if self._call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device):
            pool, threshold = self._call("cuDeviceGetDefaultMemPool", device), cuda.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            self._call("cuMemPoolSetAttribute", pool, threshold, cuda.cuuint64_t(POOL_BYTES))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != 0:
            reason = self._cuda.cuGetErrorString(status)[1] or b"unknown error"
            raise DynaMaskError(f"{name} failed: {reason.decode()} ({status.name}).")
        return results[0] if len(results) == 1 else tuple(results)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def memory(self) -> Memory:
        return Memory(*self._call("cuMemGetInfo"))

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, size: int) -> Bytes:
        address = self._call("cuMemHostAlloc", size, 0)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def free_pinned(self, memory: Bytes) -> None:
        self._call("cuMemFreeHost", memory.ctypes.data)

    def to_device(self, address: int, source: npt.NDArray[Any], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, stream)

    def to_host(self, destination: npt.NDArray[Any], address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", destination.ctypes.data, address, destination.nbytes, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> Any:
        return _Owner(self._call("cuEventCreate", 0), self._cuda.cuEventDestroy)

    def record(self, event: Any, stream: int) -> None:
        self._call("cuEventRecord", event.handle, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start.handle, end.handle))

    def load_kernel(self, cubin: bytes, entry: str, arguments: str, threads: int, shared: int) -> Any:
        module = _Owner(self._call("cuModuleLoadData", cubin), self._cuda.cuModuleUnload)
        function = self._call("cuModuleGetFunction", module.handle, entry.encode())
        if shared > MAX_SHARED_BYTES:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, shared)
        layout = struct.Struct(arguments)
        values = ctypes.create_string_buffer(layout.size)
        ends = (struct.calcsize(arguments[: index + 1]) for index in range(len(arguments)))
        places = (ctypes.addressof(values) + end - struct.calcsize(kind) for end, kind in zip(ends, arguments, strict=True))
        return _Kernel(module, function, threads, shared, layout, values, (ctypes.c_void_p * len(arguments))(*places))

    def launch(self, kernel: Any, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        # The driver has read the arguments when the call returns.
        kernel.layout.pack_into(kernel.values, 0, *arguments)
        block, pointers = (kernel.threads, 1, 1), ctypes.addressof(kernel.pointers)
        self._call("cuLaunchKernel", kernel.function, *grid, *block, kernel.shared, stream, pointers, 0)


def _named(method: Method) -> Method:
    """A method whose pycuda errors, which name the CUDA function, become `DynaMaskError`."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except self._cuda.Error as error:
            raise DynaMaskError(f"{error}.") from error

    return cast(Method, call)


class PyCuda:
    """`Driver` by `pycuda.driver`, which launches kernels on its own streams only: the engine must use no auxiliary streams."""

    def __init__(self, cuda: ModuleType) -> None:
        """Start the driver and take the first GPU.

        Raises:
            InputError: there is none.
        """
        self._cuda: Any = cuda
        try:
            cuda.init()
            device = cuda.Device(0)
        except cuda.Error as error:
            raise _no_gpu(str(error)) from error
        self._context = device.retain_primary_context()
        self.device: str = device.name()
        self.compute_capability = "{}.{}".format(*device.compute_capability())
        # pycuda frees an object when nothing refers to it any more.
        self._allocations: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    @_named
    def memory(self) -> Memory:
        return Memory(*self._cuda.mem_get_info())

    @_named
    def allocate(self, size: int) -> int:
        allocation = self._cuda.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    @_named
    def free(self, address: int) -> None:
        self._allocations.pop(address).free()

    @_named
    def allocate_pinned(self, size: int) -> Bytes:
        return cast(Bytes, self._cuda.pagelocked_empty(size, np.uint8))

    @_named
    def free_pinned(self, memory: Bytes) -> None:
        cast(Any, memory.base).free()

    @_named
    def to_device(self, address: int, source: npt.NDArray[Any], stream: int) -> None:
        self._cuda.memcpy_htod_async(address, source, self._streams[stream])

    @_named
    def to_host(self, destination: npt.NDArray[Any], address: int, stream: int) -> None:
        self._cuda.memcpy_dtoh_async(destination, address, self._streams[stream])

    @_named
    def create_stream(self) -> int:
        stream = self._cuda.Stream(_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    @_named
    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    @_named
    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    @_named
    def create_event(self) -> Any:
        return self._cuda.Event()

    @_named
    def record(self, event: Any, stream: int) -> None:
        event.record(self._streams[stream])

    @_named
    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(end.time_since(start))

    @_named
    def load_kernel(self, cubin: bytes, entry: str, arguments: str, threads: int, shared: int) -> Any:
        module = self._cuda.module_from_buffer(cubin)
        function = module.get_function(entry)
        if shared > MAX_SHARED_BYTES:
            function.set_attribute(self._cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        return module, function.prepare(arguments), (threads, 1, 1), shared

    @_named
    def launch(self, kernel: Any, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        _, function, block, shared = kernel
        function.prepared_async_call(grid, block, self._own_stream(stream), *arguments, shared_size=shared)

    def _own_stream(self, stream: int) -> Any:
        if stream not in self._streams:
            raise DynaMaskError("pycuda cannot launch on a stream that TensorRT made; run pip install cuda-bindings, which can.")
        return self._streams[stream]
