"""The part of the CUDA driver API that an engine needs: memory, copies, streams, events and kernels on the first visible GPU.

It is called through its own library, with no Python package between. Where the library is not on the loader's path, pycuda may find it.
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

LIBRARY = "libcuda.so.1"
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

    Addresses and streams are plain integers, as TensorRT takes them; events and kernels are objects of the implementation.
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
    """The driver, through its library or, where the library is not on the loader's path, through pycuda.

    Raises:
        InputError: there is no NVIDIA driver, it is too old, or there is no GPU.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        try:
            module = importlib.import_module("pycuda.driver")
        except ImportError:  # Not installed, or it does not find the library either.
            raise _no_gpu(f"its library {LIBRARY} does not load: {error}") from error
        return PyCuda(module)
    return LibCuda(library)


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


_POINTER, _ADDRESS, _INT, _UINT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_POINTER, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDeviceGetDefaultMemPool": (_POINTER, _INT),
    "cuMemPoolSetAttribute": (_POINTER, _INT, _POINTER),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_POINTER, ctypes.c_size_t, _UINT),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, ctypes.c_size_t, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, ctypes.c_size_t, _POINTER),
    "cuStreamCreate": (_POINTER, _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuEventCreate": (_POINTER, _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventElapsedTime": (_POINTER, _POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
    "cuModuleLoadData": (_POINTER, _POINTER),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuModuleUnload": (_POINTER,),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuLaunchKernel": (_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER),
}
"""The functions that are called, by the names that every driver since CUDA 11.2 exports, and the types of their arguments. Each returns a
status. cuda-python asks for the newest form of each function instead, which older drivers do not have."""
_MULTIPROCESSOR_MAJOR, _MULTIPROCESSOR_MINOR, _MEMORY_POOLS_SUPPORTED = 75, 76, 115
"""`CUdevice_attribute`."""
_POOL_RELEASE_THRESHOLD = 4
"""`CUmemPool_attribute`."""
_MAX_DYNAMIC_SHARED_BYTES = 8
"""`CUfunction_attribute`."""


class LibCuda:
    """`Driver` by the driver's own library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Start the driver and take the first GPU.

        Raises:
            InputError: there is none, or the driver lacks a function.
        """
        try:
            self._functions = {name: getattr(library, name) for name in _FUNCTIONS}
        except AttributeError as error:
            raise _no_gpu(f"it is older than CUDA 11.2: {error}") from error
        for name, function in self._functions.items():
            function.argtypes, function.restype = _FUNCTIONS[name], _INT
        try:
            self._call("cuInit", 0)
            device = self._get(_INT, "cuDeviceGet", 0)
        except DynaMaskError as error:
            raise _no_gpu(str(error)) from error
        self._context = self._get(_POINTER, "cuDevicePrimaryCtxRetain", device)
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), device)
        self.device = text.value.decode()
        major, minor, pools = (
            self._get(_INT, "cuDeviceGetAttribute", attribute, device)
            for attribute in (_MULTIPROCESSOR_MAJOR, _MULTIPROCESSOR_MINOR, _MEMORY_POOLS_SUPPORTED)
        )
        self.compute_capability = f"{major}.{minor}"
        if pools:
            pool = self._get(_POINTER, "cuDeviceGetDefaultMemPool", device)
            self._call("cuMemPoolSetAttribute", pool, _POOL_RELEASE_THRESHOLD, ctypes.byref(ctypes.c_uint64(POOL_BYTES)))

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status != 0:
            texts = []
            for kind in ("cuGetErrorString", "cuGetErrorName"):
                text = ctypes.c_char_p()
                self._functions[kind](status, ctypes.byref(text))
                texts.append((text.value or b"unknown error").decode())
            raise DynaMaskError(f"{name.removesuffix('_v2')} failed: {texts[0]} ({texts[1]}, {status}).")

    def _get(self, kind: Any, name: str, *arguments: Any) -> Any:
        """The value that a function writes to its first argument."""
        value = kind()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._get(_POINTER, "cuCtxPopCurrent_v2")

    def memory(self) -> Memory:
        total = ctypes.c_size_t()
        return Memory(self._get(ctypes.c_size_t, "cuMemGetInfo_v2", ctypes.byref(total)), total.value)

    def allocate(self, size: int) -> int:
        return int(self._get(_ADDRESS, "cuMemAlloc_v2", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def allocate_pinned(self, size: int) -> Bytes:
        address = self._get(_POINTER, "cuMemHostAlloc", size, 0)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        self._call("cuMemFreeHost", memory.ctypes.data)

    def to_device(self, address: int, source: npt.NDArray[Any], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, source.nbytes, stream)

    def to_host(self, destination: npt.NDArray[Any], address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", destination.ctypes.data, address, destination.nbytes, stream)

    def create_stream(self) -> int:
        return int(self._get(_POINTER, "cuStreamCreate", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> Any:
        return _Owner(self._get(_POINTER, "cuEventCreate", 0), self._functions["cuEventDestroy_v2"])

    def record(self, event: Any, stream: int) -> None:
        self._call("cuEventRecord", event.handle, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._get(ctypes.c_float, "cuEventElapsedTime", start.handle, end.handle))

    def load_kernel(self, cubin: bytes, entry: str, arguments: str, threads: int, shared: int) -> Any:
        module = _Owner(self._get(_POINTER, "cuModuleLoadData", cubin), self._functions["cuModuleUnload"])
        function = self._get(_POINTER, "cuModuleGetFunction", module.handle, entry.encode())
        if shared > MAX_SHARED_BYTES:
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, shared)
        layout = struct.Struct(arguments)
        values = ctypes.create_string_buffer(layout.size)
        places = [ctypes.addressof(values) + offset for offset in argument_offsets(arguments)]
        return _Kernel(module, function, threads, shared, layout, values, (ctypes.c_void_p * len(arguments))(*places))

    def launch(self, kernel: Any, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        # The driver has read the arguments when the call returns.
        kernel.layout.pack_into(kernel.values, 0, *arguments)
        self._call("cuLaunchKernel", kernel.function, *grid, kernel.threads, 1, 1, kernel.shared, stream, kernel.pointers, None)


def argument_offsets(arguments: str) -> list[int]:
    """Where each argument of a kernel lies among its parameters, in bytes; types as in `Driver.load_kernel`."""
    return [struct.calcsize(arguments[: index + 1]) - struct.calcsize(kind) for index, kind in enumerate(arguments)]


def _named(method: Method) -> Method:
    """A method whose errors, whatever their class, become `DynaMaskError`; pycuda's own name the CUDA function."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except DynaMaskError:
            raise
        except Exception as error:
            raise DynaMaskError(f"{error}.") from error

    return cast(Method, call)


class PyCuda:
    """`Driver` by `pycuda.driver`, which launches kernels on its own streams only: an engine must use no auxiliary streams, and its builder
    gets a stream of this driver to time plugins on."""

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
            raise DynaMaskError(f"pycuda cannot launch on a stream that TensorRT made; put {LIBRARY} on the loader's path, which can.")
        return self._streams[stream]
