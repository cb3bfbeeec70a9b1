"""The driver interface: its library against a CUDA driver of our own that computes on the CPU, pycuda against a stand-in of its module.

The driver of our own exports the functions of CUDA 12.4 that are called, and no newer forms of them.

Run as a program, this file plays `scenario` on whatever `open_driver` finds.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import DynaMaskError, InputError
from trt_plugins.driver import MAX_SHARED_BYTES, LibCuda, open_driver

CUBIN = b"cubin with scale"
"""The one module that both stand-ins load. Its kernel: y[i] = a x[i] + offset for i < n, one thread an item."""
ARGUMENTS = "PPifqPP"
TOO_MUCH = 1 << 40

LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
enum { OK, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, NO_BINARY = 209, NO_CONTEXT = 201, NOT_FOUND = 500 };
static void *stack[8]; static int depth; static double now; static int scale, shared_limit = 49152;
#define CURRENT if (!depth) return NO_CONTEXT
int cuGetErrorString(int error, const char **text) { *text = error == 2 ? "out of memory" : "some error"; return OK; }
int cuGetErrorName(int error, const char **text) { *text = error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR"; return OK; }
int cuInit(unsigned flags) { return getenv("NO_GPU") ? NO_DEVICE : OK; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal ? INVALID : OK; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Host", size); return device == 7 ? OK : INVALID; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 7; return OK; }
int cuDeviceGetDefaultMemPool(void **pool, int device) { *pool = &now; return device == 7 ? OK : INVALID; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
  return pool == &now && attribute == 4 && *(ptr *)value == 512 << 20 ? OK : INVALID;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &depth; return OK; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = context; return context == &depth ? OK : INVALID; }
int cuCtxPopCurrent_v2(void **context) { CURRENT; *context = stack[--depth]; return OK; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { CURRENT; *free = 3000; *total = 4000; return OK; }
int cuMemAlloc_v2(ptr *address, size_t size) {
  CURRENT;
  if (size >= 1ull << 40) return NO_MEMORY;
  *address = (ptr)aligned_alloc(256, (size + 255) / 256 * 256);
  return OK;
}
int cuMemFree_v2(ptr address) { CURRENT; free((void *)address); return OK; }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { CURRENT; *address = malloc(size); return OK; }
int cuMemFreeHost(void *address) { CURRENT; free(address); return OK; }
int cuMemcpyHtoDAsync_v2(ptr to, const void *from, size_t size, void *stream) { CURRENT; memcpy((void *)to, from, size); return OK; }
int cuMemcpyDtoHAsync_v2(void *to, ptr from, size_t size, void *stream) { CURRENT; memcpy(to, (void *)from, size); return OK; }
int cuStreamCreate(void **stream, unsigned flags) { CURRENT; *stream = malloc(1); return flags == 1 ? OK : INVALID; }
int cuStreamDestroy_v2(void *stream) { CURRENT; free(stream); return OK; }
int cuStreamSynchronize(void *stream) { CURRENT; return OK; }
int cuEventCreate(void **event, unsigned flags) { CURRENT; *event = calloc(1, sizeof(double)); return OK; }
int cuEventDestroy_v2(void *event) { free(event); return OK; }
int cuEventRecord(double *event, void *stream) { CURRENT; *event = ++now; return OK; }
int cuEventElapsedTime(float *ms, double *start, double *end) { CURRENT; *ms = *end - *start; return OK; }
int cuModuleLoadData(void **module, const void *image) {
  CURRENT;
  *module = malloc(1);
  return memcmp(image, "cubin with scale", 16) ? NO_BINARY : OK;
}
int cuModuleUnload(void *module) { free(module); return OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  CURRENT;
  *function = &scale;
  return strcmp(name, "scale") ? NOT_FOUND : OK;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { CURRENT; shared_limit = value; return attribute == 8 ? OK : INVALID; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **p, void **extra) {
  CURRENT;
  if (function != &scale || shared > shared_limit || by != 1 || bz != 1 || extra || *(ptr *)p[5] || *(ptr *)p[6]) return INVALID;
  float *y = *(float **)p[0], *x = *(float **)p[1], a = *(float *)p[3];
  int n = *(int *)p[2], threads = gx * gy * gz * bx;
  for (int i = 0; i < n && i < threads; i++) y[i] = a * x[i] + *(long long *)p[4];
  return OK;
}
"""


def scenario(driver):
    """What an engine does with a driver; the kernel's results against NumPy's."""
    assert (driver.device, driver.compute_capability) == ("Host", "8.7")
    x = np.arange(100, dtype=np.float32)
    with driver.current():
        assert driver.memory() == (3000, 4000)
        stream = driver.create_stream()
        kernel = driver.load_kernel(CUBIN, "scale", ARGUMENTS, 64, 2 * MAX_SHARED_BYTES)
        addresses = [driver.allocate(x.nbytes) for _ in range(2)]
        assert all(isinstance(address, int) and address % 256 == 0 for address in addresses)
        memory = [driver.allocate_pinned(x.nbytes) for _ in range(2)]
        pinned = [part.view(np.float32) for part in memory]
        pinned[0][:] = x
        start, end = driver.create_event(), driver.create_event()

        driver.record(start, stream)
        driver.to_device(addresses[1], pinned[0], stream)
        driver.launch(kernel, (1, 2, 1), stream, [*addresses, 99, 0.5, -(1 << 33), 0, 0])
        driver.to_host(pinned[1], addresses[0], stream)
        driver.record(end, stream)
        driver.synchronize(stream)
        assert driver.elapsed_ms(start, end) == 1
        np.testing.assert_array_equal(pinned[1][:99], np.float32(0.5) * x[:99] + np.float32(-(1 << 33)))

        with pytest.raises(DynaMaskError, match=r"cuMemAlloc failed: out of memory"):
            driver.allocate(TOO_MUCH)
        with pytest.raises(DynaMaskError, match="cuModuleLoadData failed"):
            driver.load_kernel(b"for another GPU and long enough", "scale", ARGUMENTS, 64, 0)
        for address in addresses:
            driver.free(address)
        for part in memory:
            driver.free_pinned(part)
        driver.destroy_stream(stream)
    with pytest.raises(DynaMaskError):
        driver.memory()  # The context is no longer current.


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """The environment in which the driver above is the machine's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for a CUDA driver of our own")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.c").write_text(LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    root = Path(__file__).parents[2]
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(root)}


def test_the_library_plays_the_scenario(libcuda):
    subprocess.run([sys.executable, __file__], env=libcuda, check=True)


def test_no_gpu_is_said_in_a_sentence(libcuda):
    done = subprocess.run([sys.executable, __file__], env={**libcuda, "NO_GPU": "1"}, capture_output=True, text=True)
    assert "InputError: TensorRT's engines run on an NVIDIA GPU" in done.stderr
    assert "(cuInit failed: some error (CUDA_ERROR_NO_DEVICE, 100)); install" in done.stderr


@pytest.fixture
def no_library(monkeypatch):
    def missing(name):
        assert name == "libcuda.so.1"
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)


def test_no_driver_is_said_in_a_sentence(no_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(InputError, match=r"NVIDIA GPU, .*libcuda\.so\.1.*; install .*, or take the target onnxruntime\.$"):
        open_driver()


def test_a_driver_that_lacks_a_function_is_refused(tmp_path):
    """Any library will do."""
    with pytest.raises(InputError, match=r"older than CUDA 11\.2: .*cuInit"):
        LibCuda(ctypes.CDLL(None))


def test_pycuda_plays_the_scenario(no_library, monkeypatch):
    module = pycuda_driver()
    monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    driver = open_driver()
    scenario(driver)
    assert module.state["freed"] == 2
    with pytest.raises(DynaMaskError, match="99"):  # Any exception, here a KeyError.
        driver.free(99)
    with driver.current(), pytest.raises(DynaMaskError, match="pycuda cannot launch on a stream that TensorRT made"):
        driver.launch(driver.load_kernel(CUBIN, "scale", ARGUMENTS, 64, 0), (1, 1, 1), 12345, [0] * 7)


def pycuda_driver():
    """A stand-in for `pycuda.driver` with the signatures of its documentation, on the CPU."""
    module = types.ModuleType("pycuda.driver")
    state = {"stack": [], "now": 0.0, "freed": 0}

    class Error(Exception):
        pass

    def needs_context(name):
        if not state["stack"]:
            raise Error(f"{name} failed: invalid device context")

    class Context:
        def push(self):
            state["stack"].append(self)

        @staticmethod
        def pop():
            state["stack"].pop()

    class Device:
        def __init__(self, number):
            assert number == 0

        def name(self):
            return "Host"

        def compute_capability(self):
            return 8, 7

        def retain_primary_context(self):
            return Context()

    class DeviceAllocation:
        def __init__(self, size):
            needs_context("cuMemAlloc")
            if size >= TOO_MUCH:
                raise Error("cuMemAlloc failed: out of memory")
            self.memory = ctypes.create_string_buffer(size + 256)

        def __int__(self):
            return -(-ctypes.addressof(self.memory) // 256) * 256

        def free(self):
            needs_context("cuMemFree")
            self.memory = None

    class PagelockedHostAllocation:
        def __init__(self, array):
            self.__array_interface__ = array.__array_interface__
            self.array = array

        def free(self):
            needs_context("cuMemFreeHost")
            state["freed"] += 1

    class Stream:
        def __init__(self, flags=0):
            needs_context("cuStreamCreate")
            assert flags == 1
            self.handle = id(self)

        def synchronize(self):
            needs_context("cuStreamSynchronize")

    class Event:
        def record(self, stream):
            state["now"] += 1
            self.time = state["now"]

        def time_since(self, other):
            return self.time - other.time

    class Function:
        shared = MAX_SHARED_BYTES

        def set_attribute(self, attribute, value):
            assert attribute == "MAX_DYNAMIC_SHARED_SIZE_BYTES"
            self.shared = value

        def prepare(self, arg_types):
            self.arg_format = "".join(arg_types)
            return self

        def prepared_async_call(self, grid, block, stream, *args, shared_size=0):
            assert isinstance(stream, Stream) and len(block) == 3 and shared_size <= self.shared
            y, x, n, a, offset, *scratch = struct.unpack(self.arg_format, struct.pack(self.arg_format, *args))
            assert scratch == [0, 0]
            source, result = (np.ctypeslib.as_array((ctypes.c_float * n).from_address(address)) for address in (x, y))
            threads = min(n, int(np.prod(grid)) * block[0])
            result[:threads] = np.float32(a) * source[:threads] + np.float32(offset)

    def module_from_buffer(buffer):
        if buffer != CUBIN:
            raise Error("cuModuleLoadData failed: no kernel image is available")
        return types.SimpleNamespace(get_function={"scale": Function()}.__getitem__)

    def mem_get_info():
        needs_context("cuMemGetInfo")
        return 3000, 4000

    def pagelocked_empty(shape, dtype):
        return np.asarray(PagelockedHostAllocation(np.empty(shape, dtype)))

    def copy(to, source, size):
        needs_context("cuMemcpyAsync")
        ctypes.memmove(to, source, size)

    module.init, module.state = lambda: None, state
    module.Error, module.Device, module.Stream, module.Event = Error, Device, Stream, Event
    module.mem_alloc, module.mem_get_info, module.pagelocked_empty = DeviceAllocation, mem_get_info, pagelocked_empty
    module.memcpy_htod_async = lambda dest, src, stream: copy(dest, src.ctypes.data, src.nbytes)
    module.memcpy_dtoh_async = lambda dest, src, stream: copy(dest.ctypes.data, src, dest.nbytes)
    module.module_from_buffer = module_from_buffer
    module.function_attribute = types.SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="MAX_DYNAMIC_SHARED_SIZE_BYTES")
    return module


if __name__ == "__main__":
    scenario(open_driver())
