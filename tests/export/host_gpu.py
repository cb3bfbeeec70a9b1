"""A GPU and TensorRT for RTX on the host's memory, for tests of the whole chain without a GPU.

`HostDriver` takes the place of the CUDA driver: a launch unpacks its arguments from the bytes that the launcher packs, and runs its kernel
in Triton's interpreter on the addresses. `HostTensorRT` takes the place of TensorRT's builder and executor: it runs the lowered graph node
by node, standard nodes in ONNX Runtime, and calls the plugins as TensorRT does. Everything between is the project's own.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import importlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.lowering import Lowered
from runtime.graph import GRIDS, INPUTS, OUTPUTS
from tests.export.interpreter import Interpreter
from trt_plugins.driver import Memory
from trt_plugins.kernels import CompiledKernel, KernelLibrary
from trt_plugins.operator import DataDependent, KernelSpec
from trt_plugins.paste_masks.operator import paste_kernel
from trt_plugins.plugin import VERSION, register
from trt_plugins.registry import PREFIX
from trt_plugins.tensorrt import TensorRT

Array = npt.NDArray[Any]
GUARD = 1 << 16
"""Bytes before and behind each block of memory that nothing may write."""
GARBAGE = 0xA5
"""The content of memory that was not written yet."""
ALIGNMENT = 256
"""What CUDA and TensorRT promise. No block is aligned to more."""
TYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*i32": torch.int32, "*i64": torch.int64}
COMPUTE_CAPABILITY = "8.9"


class Arena:
    """Blocks of memory with guard bands, filled with garbage."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Array, int]] = {}
        self._starts: list[int] = []

    def take(self, size: int) -> int:
        """The address of a new block."""
        memory = np.full(size + 2 * GUARD + 2 * ALIGNMENT, GARBAGE, np.uint8)
        address = -(-(memory.ctypes.data + GUARD) // ALIGNMENT) * ALIGNMENT
        address += ALIGNMENT * (address % (2 * ALIGNMENT) == 0)
        self.blocks[address] = memory, size
        bisect.insort(self._starts, address)
        return address

    def give(self, address: int) -> None:
        """Free a block, whose guard bands must be whole."""
        self.check(address)
        del self.blocks[address]
        self._starts.remove(address)

    def check(self, address: int) -> None:
        """Whether nothing was written before and behind a block."""
        memory, size = self.blocks[address]
        first = address - memory.ctypes.data
        before, behind = memory[:first], memory[first + size :]
        assert (before == GARBAGE).all() and (behind == GARBAGE).all(), f"written outside a block of {size} bytes"

    def rest(self, address: int) -> int:
        """Bytes from an address to the end of its block."""
        start = self._starts[bisect.bisect_right(self._starts, address) - 1]
        _, size = self.blocks[start]
        assert start <= address <= start + size, f"{address:#x} is in no block"
        return start + size - address


class HostDriver:
    """`trt_plugins.driver.Driver` on the host; what is enqueued is done at once."""

    device, compute_capability = "Host", COMPUTE_CAPABILITY

    def __init__(self, specs: Mapping[bytes, KernelSpec]) -> None:
        self.arena = Arena()
        self.launched: list[str] = []
        self._specs = specs
        self._inside = self._now = 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def memory(self) -> Memory:
        return Memory(1 << 34, 1 << 34)

    def allocate(self, size: int) -> int:
        assert self._inside
        return self.arena.take(size)

    def free(self, address: int) -> None:
        self.arena.give(address)

    def allocate_pinned(self, size: int) -> Array:
        return np.full(size, GARBAGE, np.uint8)

    def free_pinned(self, memory: Array) -> None:
        pass

    def to_device(self, address: int, source: Array, stream: int) -> None:
        assert self.arena.rest(address) >= source.nbytes
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, destination: Array, address: int, stream: int) -> None:
        assert self.arena.rest(address) >= destination.nbytes
        ctypes.memmove(destination.ctypes.data, address, destination.nbytes)

    def create_stream(self) -> int:
        return 77

    def destroy_stream(self, stream: int) -> None:
        assert stream == 77

    def synchronize(self, stream: int) -> None:
        assert stream == 77

    def create_event(self) -> Any:
        return SimpleNamespace(time=0)

    def record(self, event: Any, stream: int) -> None:
        assert stream == 77
        self._now += 1
        event.time = self._now

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(end.time - start.time)

    def load_kernel(self, cubin: bytes, entry: str, arguments: str, threads: int, shared: int) -> Any:
        spec = self._specs[cubin]
        assert entry == spec.function and threads == 32 * spec.num_warps
        return spec, arguments

    def launch(self, kernel: Any, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        assert self._inside and stream == 77
        spec, letters = kernel
        x, y, z = grid
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, "beyond CUDA's limits"
        *values, global_scratch, profile_scratch = struct.unpack(letters, struct.pack(letters, *arguments))
        assert (global_scratch, profile_scratch) == (0, 0) and len(values) == len(spec.signature)
        given = {
            name: self._tensor(value, kind) if kind.startswith("*") else value
            for (name, kind), value in zip(spec.signature, values, strict=True)
        }
        function = getattr(importlib.import_module(spec.module), spec.function)
        function[grid](**given, **dict(spec.constants), num_warps=spec.num_warps, num_stages=spec.num_stages)
        self.launched.append(spec.function)

    def _tensor(self, address: int, kind: str) -> torch.Tensor:
        dtype = TYPES[kind]
        if address == 0:
            return torch.empty(0, dtype=dtype)
        assert address % 16 == 0
        items = self.arena.rest(address) // dtype.itemsize
        return torch.from_numpy(_view(address, items * dtype.itemsize)).view(dtype)


class HostTensorRT(ModuleType):
    """TensorRT for RTX with an executor on the host's memory, for `trt_plugins.engine`; the rest is the module's own."""

    def __init__(self, trt: TensorRT, lowered: Lowered, driver: HostDriver) -> None:
        super().__init__(trt.__name__)
        # The real module makes the plugins, and keeps a logger and a runtime of its own.
        self.creators = register(trt).creators
        self.trt, self.lowered, self.driver = trt, lowered, driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trt, name)

    def Runtime(self, logger: Any) -> Any:
        """A runtime whose only engine is that of the lowered graph."""
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: HostEngine(self))


class HostEngine:
    """An engine's interface, and the plugins of its nodes as a real one has them."""

    device_memory_size_v2 = 1 << 20
    num_io_tensors = len((*INPUTS, *OUTPUTS))

    def __init__(self, module: HostTensorRT) -> None:
        self.trt, self.driver, self.creators, self.ranges = module.trt, module.driver, module.creators, module.lowered.ranges
        graph = module.lowered.model.graph
        self.values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        operators = {placed.operator.node: placed.operator for placed in module.lowered.operators}
        self.plugins = {node.name: self._plugin(node) for node in graph.node if node.name in operators}
        self.interpreter = Interpreter(module.lowered.model, self.run_plugin)

    def _plugin(self, node: onnx.NodeProto) -> Any:
        """The plugin of a node, made from the fields that are written into an engine and read from it."""
        trt: Any = self.trt
        creator = self.creators[node.op_type.removeprefix(PREFIX)]
        assert trt.get_plugin_registry().get_creator(node.op_type, VERSION, "") is not None
        given = [SimpleNamespace(name=attribute.name, data=_attribute(attribute)) for attribute in node.attribute]
        built: Any = creator.create_plugin(node.name, given, trt.TensorRTPhase.BUILD)
        fields = [trt.PluginField(field.name, np.array(field.data), field.type) for field in built.get_fields_to_serialize()]
        loaded: Any = creator.create_plugin(node.name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)
        return loaded.attach_to_context(None)

    def run_plugin(self, node: onnx.NodeProto, arrays: list[Array]) -> list[Array]:
        """What TensorRT does with a plugin in a run. Data-dependent outputs have room for their largest size; empty inputs are null."""
        plugin, arena = self.plugins[node.name], self.driver.arena
        inputs = [self._filled(array) if array.size else 0 for array in arrays]
        descs = [self._desc(array.shape, array.dtype) for array in arrays]
        types = plugin.get_output_data_types([desc.type for desc in descs])
        dtypes = [np.dtype(self.trt.nptype(kind)) for kind in types]
        shapes = plugin.operator.output_shapes([array.shape for array in arrays])
        room = [tuple(size.upper if isinstance(size, DataDependent) else size for size in shape) for shape in shapes]
        told = [tuple(-1 if isinstance(size, DataDependent) else size for size in shape) for shape in shapes]
        outputs = [arena.take(math.prod(shape) * dtype.itemsize) for shape, dtype in zip(room, dtypes, strict=True)]
        dynamic = [SimpleNamespace(desc=desc, max=desc.dims, min=desc.dims, opt=desc.dims) for desc in descs]
        workspace = plugin.get_workspace_size(dynamic, [])
        scratch = arena.take(workspace) if workspace else 0
        written = [self._desc(shape, dtype) for shape, dtype in zip(told, dtypes, strict=True)]
        plugin.on_shape_change(descs, written)
        plugin.enqueue(descs, written, inputs, outputs, scratch, 77)

        def size(item: int | DataDependent) -> int:
            return item if isinstance(item, int) else int(_view(outputs[item.size_output], 8).view(np.int64)[0])

        results = []
        for address, shape, dtype in zip(outputs, shapes, dtypes, strict=True):
            actual = tuple(map(size, shape))
            results.append(_view(address, math.prod(actual) * dtype.itemsize).view(dtype).reshape(actual).copy())
        for address in [*inputs, *outputs, scratch]:
            if address:
                arena.give(address)
        return results

    def _filled(self, array: Array) -> int:
        address = self.driver.arena.take(array.nbytes)
        _view(address, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return address

    def _desc(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        trt: Any = self.trt
        return SimpleNamespace(dims=trt.Dims(list(shape)), type=getattr(trt, dtype.name), format=trt.TensorFormat.LINEAR)

    def get_tensor_name(self, index: int) -> str:
        return [*INPUTS, *OUTPUTS][index]

    def dtype(self, name: str) -> np.dtype[Any]:
        """The NumPy type of an input or output."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.values[name].elem_type))

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt, self.dtype(name).name)

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(serialize=lambda: None, deserialize=lambda content: False)
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: None)

    def create_execution_context(self, config: Any = None) -> HostContext | None:
        """None without an optimization profile for every input, as TensorRT has it for graphs with data-dependent sizes."""
        return HostContext(self) if set(self.ranges) == set(INPUTS) else None


class HostContext:
    """An execution context's interface."""

    def __init__(self, engine: HostEngine) -> None:
        self.engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine.ranges[name]
        self._shapes[name] = tuple(shape)
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> Any:
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in self.engine.values[name].shape.dim]
        return self.engine.trt.Dims(list(self._shapes.get(name, sizes)))

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def set_output_allocator(self, name: str, allocator: Any) -> None:
        self._allocators[name] = allocator

    def execute_async_v3(self, stream: int) -> bool:
        engine, arena = self.engine, self.engine.driver.arena
        feeds = {}
        for name in INPUTS:
            shape, dtype = tuple(self.get_tensor_shape(name)), engine.dtype(name)
            feeds[name] = _view(self._addresses[name], math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape).copy()
        for name, array in engine.interpreter.run(feeds).items():
            assert array.dtype == engine.dtype(name), name
            address = self._addresses.get(name, 0)
            if name in self._allocators:
                address = self._allocators[name].reallocate_output_async(name, 0, max(array.nbytes, 1), ALIGNMENT, stream)
                self._allocators[name].notify_shape(name, engine.trt.Dims(list(array.shape)))
            assert arena.rest(address) >= array.nbytes, name
            _view(address, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return True


def host_kernels(lowered: Lowered) -> tuple[KernelLibrary, dict[bytes, KernelSpec]]:
    """The kernels of a lowered graph, not compiled: the files of an engine, and for `HostDriver` the kernel of each file's content."""
    used = [spec for placed in lowered.operators for spec in placed.operator.kernels(placed.inputs)]
    specs = {spec.key: spec for spec in (*used, *map(paste_kernel, GRIDS))}
    kernels = [
        CompiledKernel(
            key=key,
            compute_capability=COMPUTE_CAPABILITY,
            entry=spec.function,
            signature=spec.signature,
            num_warps=spec.num_warps,
            shared=0,
            global_scratch=0,
            profile_scratch=0,
            registers=None,
            spills=None,
            cubin=key.encode(),
        )
        for key, spec in specs.items()
    ]
    return KernelLibrary(kernels), {key.encode(): spec for key, spec in specs.items()}


def _attribute(attribute: onnx.AttributeProto) -> Array:
    """An attribute's value as TensorRT's parser gives it to a plugin's creator."""
    real = attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS)
    return np.atleast_1d(np.asarray(onnx.helper.get_attribute_value(attribute), np.float32 if real else np.int32))


def _view(address: int, size: int) -> Array:
    """Memory as bytes."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) if size else np.empty(0, np.uint8)
