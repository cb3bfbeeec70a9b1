"""The engine runner around TensorRT, with stand-ins for TensorRT and the driver that work on the CPU; what a machine without a GPU says."""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
import types

import numpy as np
import pytest

from runtime.bundle import Bundle, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import COST_CONTROLS, GRIDS, INPUTS, OUTPUTS
from runtime.instances import ClassName
from runtime.paste import Frame
from runtime.predictor import Predictor, to_instances
from runtime.targets.registry import TARGETS, open_engine
from tests.runtime.known_costs import costs
from tests.trt_plugins import host_memory
from trt_plugins import engine as tensorrt
from trt_plugins import target as tensorrt_target
from trt_plugins.detections.operator import KERNELS as DETECTIONS_KERNELS
from trt_plugins.driver import Memory
from trt_plugins.engine import ENGINE, Tensor, TensorRTEngine
from trt_plugins.kernels import CompiledKernel, KernelLibrary
from trt_plugins.launcher import KernelLauncher
from trt_plugins.operator import Buffer, KernelSpec, Launch
from trt_plugins.paste_masks.operator import paste_kernel
from trt_plugins.runtime_cache import RuntimeCache

CLASSES = [ClassName(1, "a"), ClassName(2, "b"), ClassName(3, "c")]
PLAN = b"an engine for this GPU"
SIDE, SLOTS = 64, 6
ONE = Profile(canvas=((SIDE, SIDE),) * 3)
PAIRS = Profile(batch=(2, 2, 2), canvas=((SIDE, SIDE),) * 3)
SEVERAL = Profile(batch=(1, 2, 3), canvas=((SIDE, SIDE),) * 3)
CANVASES = Profile(batch=(1, 2, 3), canvas=((32, 64), (64, 64), (64, 96)))
FILL = KernelSpec(DETECTIONS_KERNELS, "fill_slots", (("x", "*fp16"), ("n", "i32"), ("least", "fp32"), ("offset", "i64")), (("BLOCK", 64),))
PASTE = "paste_masks_"
ROUTE = KernelSpec("trt_plugins.msm_route.kernel", "route", (("x", "*i64"),))


def compiled(spec, compute_capability="8.6", **changes):
    fields = {"entry": spec.function, "num_warps": spec.num_warps, "shared": 512, "global_scratch": 0, "profile_scratch": 0}
    fields |= {"registers": 32, "spills": 0, "cubin": b"cubin"} | changes
    return CompiledKernel(key=spec.key, compute_capability=compute_capability, signature=spec.signature, **fields)


KERNELS = (compiled(FILL), compiled(ROUTE), *(compiled(paste_kernel(grid), entry=f"{PASTE}{grid}") for grid in GRIDS))


class FakeDriver:
    """The driver's interface on memory of the host; what is enqueued is done at once, and every event is 3 ms after the one before."""

    device, compute_capability = "Fake GPU", "8.6"

    def __init__(self, free=1 << 30):
        self.blocks, self.streams, self.launches, self.loaded = {}, set(), [], []
        self.bytes_free, self.inside, self.now = free, 0, 0.0

    @contextlib.contextmanager
    def current(self):
        self.inside += 1
        yield
        self.inside -= 1

    def memory(self):
        assert self.inside
        return Memory(self.bytes_free, 1 << 40)

    def allocate(self, size):
        if size > self.bytes_free:
            raise DynaMaskError("cuMemAlloc failed: out of memory.")
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        del self.blocks[address]

    def allocate_pinned(self, size):
        memory = np.zeros(size, np.uint8)
        self.blocks[memory.ctypes.data] = memory
        return memory

    def free_pinned(self, memory):
        del self.blocks[memory.ctypes.data]

    def to_device(self, address, source, stream):
        assert stream in self.streams
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, destination, address, stream):
        assert stream in self.streams
        ctypes.memmove(destination.ctypes.data, address, destination.nbytes)

    def create_stream(self):
        self.streams.add(77)
        return 77

    def destroy_stream(self, stream):
        self.streams.remove(stream)

    def synchronize(self, stream):
        assert stream in self.streams

    def create_event(self):
        return types.SimpleNamespace(time=None)

    def record(self, event, stream):
        self.now += 3
        event.time = self.now

    def elapsed_ms(self, start, end):
        return end.time - start.time

    def load_kernel(self, cubin, entry, arguments, threads, shared):
        self.loaded.append((cubin, entry, arguments, threads, shared))
        return entry, arguments

    def launch(self, kernel, grid, stream, arguments):
        entry, letters = kernel
        packed = struct.unpack(letters, struct.pack(letters, *arguments))
        self.launches.append((entry, grid, stream, packed))
        if entry.startswith(PASTE):
            spec = paste_kernel(int(entry.removeprefix(PASTE)))
            host_memory.interpret(spec, grid, packed[:-2], {address: len(block) for address, block in self.blocks.items()})


class FakeContext:
    """Finds SLOTS instances in every image that is not empty; the grid of each is its override's, or its slot modulo 4.

    Scores are the image's mean over the slot plus 1, and fall short at `min_score`; mask logits are the flat slot + budget. As in TensorRT,
    sizes that vary are -1 until they are set, and those that the input's values decide are -1 until it has run.
    """

    def __init__(self, engine):
        self.engine, self.profile = engine, engine.trt.profile
        self.addresses, self.allocators, self.shapes, self.told = {}, {}, {}, []
        self.empty = 0.0
        """The mean of an empty image, where instances are to be found in it."""
        self.inputs = None
        """Those of the last run."""

    def bounds(self, name):
        images, canvases = self.profile.batch[::2], self.profile.canvas[::2]
        if name == "image":
            return [(count, 3, *canvas) for count, canvas in zip(images, canvases, strict=True)]
        return {"grid_override": [(SLOTS * count,) for count in images], "costs": [(2, 4)] * 2}.get(name, [(), ()])

    def set_input_shape(self, name, shape):
        least, most = self.bounds(name)
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self.engine.logger.log(self.engine.trt.ILogger.ERROR, "Error Code 3: out of the profile.")
            return False
        self.told.append((name, shape))
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        if name in INPUTS:
            return self.shapes.get(name, tuple(low if low == high else -1 for low, high in zip(*self.bounds(name), strict=True)))
        kind, _, grid = name.partition("_")
        images = self.get_tensor_shape("image")[0]
        slots = -1 if images == -1 else SLOTS * images
        return {"masks": (-1, int(grid or 0), int(grid or 0)), "slots": (-1,), "boxes": (slots, 4)}.get(kind, (slots,))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_output_allocator(self, name, allocator):
        self.allocators[name] = allocator

    def array(self, name, shape):
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(self.addresses[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream):
        if self.engine.trt.broken:
            self.engine.logger.log(self.engine.trt.ILogger.ERROR, "Error Code 1: launch failed.")
            return False
        given = {name: self.array(name, self.get_tensor_shape(name)).copy() for name in INPUTS if name in self.engine.names}
        image, least, budget, override = (given[name] for name in ("image", "min_score", "budget", "grid_override"))
        self.limits = [given.get(name) for name in ("budget", "total_budget", "costs")]
        assert len(override) == SLOTS * len(image)
        self.inputs = image, override
        means = image.mean((1, 2, 3))
        scores = np.where(means, means, self.empty)[:, None] / np.arange(1, SLOTS + 1)
        scores = np.where(scores > least, scores, 0).reshape(-1)
        self.engine.launcher(Launch(FILL, (1, 1, 1), (Buffer("input", 0), 1, 0.5, 2)), [4096], [], 0, stream)
        self.engine.launcher(Launch(ROUTE, (1, 1, 1), (Buffer("workspace", offset=256),)), [], [], 8192, stream)
        filled, count = scores > 0, len(scores)
        grids = np.where(filled, np.where(override >= 0, override, np.arange(count) % SLOTS % 4), -1)
        results = {"boxes": np.arange(count * 4).reshape(-1, 4), "scores": scores, "labels": np.where(filled, 1, -1), "grids": grids}
        for k, grid in enumerate(GRIDS):
            slots = np.nonzero(grids == k)[0]
            results |= {f"slots_{grid}": slots, f"masks_{grid}": np.broadcast_to((slots + budget)[:, None, None], (len(slots), grid, grid))}
        for name, result in results.items():
            if name in self.allocators:
                size = result.size * np.dtype(self.engine.get_tensor_dtype(name)).itemsize
                self.addresses[name] = self.allocators[name].reallocate_output_async(name, 0, size, 256, stream)
                assert self.addresses[name]
                told = self.engine.trt.told.get(name, result.shape)
                if told is not None:
                    self.allocators[name].notify_shape(name, told)
            self.array(name, result.shape)[:] = result
        return True


class FakeEngine:
    device_memory_size_v2 = 1000

    def __init__(self, trt, logger, names):
        self.trt, self.logger, self.names = trt, logger, names
        self.num_io_tensors, self.launcher = len(names), trt.launcher

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return "int64" if name in ("labels", "grids", "grid_override") or name.startswith("slots") else "float32"

    def create_runtime_config(self):
        return self.trt.config

    def create_execution_context(self, config=None):
        assert config is (self.trt.config if self.trt.__name__ == "tensorrt_rtx" else None)
        self.context = FakeContext(self)
        self.trt.context = self.context
        return self.context


class FakeCache:
    content = b"compiled before"

    def deserialize(self, content):
        fits = content.startswith(b"compiled")
        self.content = content if fits else self.content
        return fits

    def serialize(self):
        return memoryview(self.content)


def fake_trt(name="tensorrt_rtx", names=(*INPUTS, *OUTPUTS), profile=ONE):
    trt = types.ModuleType(name)
    trt.__version__, trt.broken, trt.told, trt.nptype, trt.profile = "9.8.7", False, {}, np.dtype, profile
    trt.refusal = "incompatible serialization version.\nSecond line."

    class ILogger:
        ERROR, INTERNAL_ERROR, INFO = range(3)

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            self.logger.log(ILogger.INFO, "Loaded engine.")
            if plan == PLAN:
                return FakeEngine(trt, self.logger, names)
            self.logger.log(ILogger.ERROR, trt.refusal)
            return self.logger.log(ILogger.ERROR, "follows from the first")

    trt.ILogger, trt.Runtime, trt.IOutputAllocator = ILogger, Runtime, type("IOutputAllocator", (), {})
    trt.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(NONE="none")
    trt.cache = FakeCache()
    trt.config = types.SimpleNamespace(create_runtime_cache=lambda: trt.cache, set_runtime_cache=lambda cache: None)
    return trt


@pytest.fixture
def bundle(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return add_engine(synthetic.create(tmp_path / "a.bundle"))


def add_engine(bundle, target="tensorrt-rtx", plan=PLAN, kernels=KERNELS, profile=None):
    files = {ENGINE: plan, **KernelLibrary(kernels).to_files()}
    bundle.add_engine(target, files, "fp32", {target: "1.2.3", "triton": "3.6.0"}, profile)
    return bundle


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins in the places of TensorRT and the driver."""

    def put(trt, driver):
        def register(module, launcher):
            module.launcher = launcher
            return types.SimpleNamespace(raising=contextlib.nullcontext)

        monkeypatch.setattr(tensorrt, "load", lambda target: trt)
        monkeypatch.setattr(tensorrt, "open_driver", lambda: driver)
        monkeypatch.setattr(tensorrt, "register", register)

    return put


@pytest.fixture
def several(bundle, install):
    """Opens the engine of a profile, on the stand-ins."""

    def open_(profile):
        install(fake_trt(profile=profile), FakeDriver())
        return TensorRTEngine(add_engine(bundle, profile=profile), "tensorrt-rtx")

    return open_


def image(*values, canvas=(SIDE, SIDE)):
    """One canvas for each value, 0.9 if none is given."""
    return np.broadcast_to(np.reshape(values or 0.9, (-1, 1, 1, 1)), (len(values) or 1, 3, *canvas)).astype(np.float32)


def expected_masks(grids, budget):
    return {
        grid: ((slots := np.nonzero(np.asarray(grids) == k)[0]), np.full((len(slots), grid, grid), budget) + slots[:, None, None])
        for k, grid in enumerate(GRIDS)
    }


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_outputs_are_gathered(bundle, install, name):
    install(fake_trt(name), FakeDriver())
    target = name.replace("_", "-")
    with TensorRTEngine(add_engine(bundle, target), target) as engine:
        outputs = [
            engine.run(image(), budget_gmacs=0.25),
            engine.run(image(), grid_override=2),
            engine.run(image(), grid_override=np.array([3, -1, 0, 0, 0, 3]), min_score=0.2),
            engine.run(image(0)),
        ]
    for output, budget, grids in zip(outputs, (0.25, 0, 0, 0), ([0, 1, 2, 3, 0, 1], [2] * 6, [3, 1, 0, 0, -1, -1], [-1] * 6), strict=True):
        np.testing.assert_array_equal(output.boxes, np.arange(24, dtype=np.float32).reshape(6, 4))
        np.testing.assert_array_equal(output.grids, grids)
        np.testing.assert_array_equal(output.labels, np.where(np.array(grids) >= 0, 1, -1))
        np.testing.assert_allclose(output.scores, np.where(np.array(grids) >= 0, 0.9 / np.arange(1, 7), 0), rtol=1e-6)
        assert (output.scores.dtype, output.grids.dtype) == (np.float32, np.int64)
        for grid, (slots, masks) in expected_masks(grids, budget).items():
            np.testing.assert_array_equal(output.masks[grid][0], slots)
            np.testing.assert_array_equal(output.masks[grid][1], masks.astype(np.float32))


def check_found(output, values, grids, budget=0):
    """Whether an output is what the stand-in finds in images of these means, on these grids, one list an image."""
    slots = SLOTS * len(values)
    np.testing.assert_array_equal(output.boxes, np.arange(4 * slots).reshape(-1, 4))
    np.testing.assert_array_equal(output.grids, np.concatenate(grids))
    np.testing.assert_allclose(output.scores.reshape(-1, SLOTS).max(1), values, rtol=1e-6)
    np.testing.assert_array_equal(output.labels, np.where(np.concatenate(grids) >= 0, 1, -1))
    for grid, (places, masks) in expected_masks(np.concatenate(grids), budget).items():
        np.testing.assert_array_equal(output.masks[grid][0], places)
        np.testing.assert_array_equal(output.masks[grid][1], masks.astype(np.float32))


FREE, NONE, LARGE = [0, 1, 2, 3, 0, 1], [-1] * SLOTS, [3] * SLOTS


def test_any_number_of_images_within_the_profile_runs(several):
    with several(SEVERAL) as engine:
        assert engine.profile == SEVERAL
        context = engine._context
        # The buffers are made for the most.
        assert context.told == [("image", (3, 3, SIDE, SIDE)), ("grid_override", (3 * SLOTS,))]
        for values in ((0.9,), (0.9, 0.6, 0.3), (0.3, 0.9)):
            check_found(engine.run(image(*values), budget_gmacs=0.25), values, [FREE] * len(values), budget=0.25)
        told = len(context.told)
        check_found(engine.run(image(0.1, 0.2), grid_override=3), (0.1, 0.2), [LARGE] * 2)
        assert len(context.told) == told == 8  # Two inputs for each size but that of the last run, which stayed.
        overrides = np.concatenate([FREE[::-1], [3, 3, -1, -1, 2, 2]])
        check_found(engine.run(image(0.1, 0.2), grid_override=overrides), (0.1, 0.2), [FREE[::-1], [3, 3, 2, 3, 2, 2]])


def test_each_image_has_its_own_instances(several):
    with several(SEVERAL) as engine:
        # 0.9 / (slot + 1) exceeds 0.25 three times, 0.3 / (slot + 1) once, 0 never.
        output = engine.run(image(0, 0.9, 0.3), min_score=0.25)
    parts = output.per_image(3)
    for b, (part, count) in enumerate(zip(parts, (0, 3, 1), strict=True)):
        grids = FREE[:count] + NONE[count:]
        np.testing.assert_array_equal(part.grids, grids)
        np.testing.assert_array_equal(part.boxes, np.arange(24).reshape(6, 4) + 24 * b)
        assert np.count_nonzero(part.scores) == count
        for grid, (slots, _) in expected_masks(grids, 0).items():
            np.testing.assert_array_equal(part.masks[grid][0], slots)
            assert part.masks[grid][1].shape == (len(slots), grid, grid)
            np.testing.assert_array_equal(part.masks[grid][1][:, 0, 0], slots + b * SLOTS)
    for name, ms in output.times_ms.items():
        assert sum(part.times_ms[name] for part in parts) == pytest.approx(ms)


def test_fewer_images_than_the_least_are_filled_up(several):
    with several(PAIRS) as engine:
        assert not engine._context.told  # Nothing varies.
        engine._context.empty = 0.5
        check_found(engine.run(image(0.9, 0.6), budget_gmacs=0.5), (0.9, 0.6), [FREE] * 2, budget=0.5)
        # Where the second image was there is nothing now; what may still be found there is left out, and no part of the budget.
        check_found(engine.run(image(0.3), budget_gmacs=0.5), (0.3,), [FREE], budget=0.5)
        images, overrides = engine._context.inputs
        assert images.shape == (2, 3, SIDE, SIDE) and not images[1].any()
        assert overrides.tolist() == [-1] * SLOTS + [0] * SLOTS
        check_found(engine.run(image(0.3), grid_override=np.array(LARGE)), (0.3,), [LARGE])


def test_the_canvas_of_each_run_is_its_images(several):
    with several(CANVASES) as engine:
        for canvas, values in (((32, 64), (0.9,)), ((64, 96), (0.9, 0.6, 0.3)), ((32, 96), (0.6, 0.3))):
            canvases = np.random.default_rng(0).random((len(values), 3, *canvas), np.float32)
            canvases *= np.reshape(values, (-1, 1, 1, 1)) / canvases.mean((1, 2, 3), keepdims=True)
            check_found(engine.run(canvases), values, [FREE] * len(values))
            np.testing.assert_array_equal(engine._context.inputs[0], canvases)


def test_memory_stays_constant_over_runs(several):
    with several(CANVASES) as engine:
        # Inputs, boxes, scores, labels, grids; then places and logits of every slot on every grid.
        inputs = 3 * (3 * 64 * 96 * 4 + SLOTS * 8) + 3 * 4 + 2 * 4 * 4
        outputs = 3 * SLOTS * (4 * 4 + 4 + 8 + 8 + sum(8 + 4 * grid**2 for grid in GRIDS))
        assert sum(tensor.buffer.nbytes for tensor in engine._tensors.values()) == inputs + outputs
        blocks = dict(engine._driver.blocks)
        for run in (image(0.9, 0.9, 0.9, canvas=(64, 96)), image(0.9, canvas=(32, 64)), image(0.9, 0.9, 0.9, canvas=(64, 96))):
            engine.run(run, grid_override=3)
            assert engine._driver.blocks == blocks


@pytest.mark.parametrize(
    ("profile", "shape", "takes"),
    [
        (ONE, (2, 3, SIDE, SIDE), "B up to 1 and HxW of 64x64,"),
        (SEVERAL, (4, 3, SIDE, SIDE), "B up to 3 and HxW of 64x64,"),
        (SEVERAL, (0, 3, SIDE, SIDE), "B up to 3"),
        (SEVERAL, (1, 3, 32, 64), "HxW of 64x64,"),
        (SEVERAL, (3, SIDE, SIDE), "B up to 3"),
        (CANVASES, (1, 3, 64, 128), "HxW of 32x64 to 64x96,"),
        (CANVASES, (1, 3, 40, 64), "multiples of 32"),
        (CANVASES, (1, 3, 32, 32), "HxW of 32x64"),
        (CANVASES, (1, 1, 64, 64), r"\[B, 3, H, W\]"),
    ],
)
def test_shapes_outside_the_profile_are_refused_with_the_way_out(several, bundle, profile, shape, takes):
    with several(profile) as engine:
        with pytest.raises(InputError) as refused:
            engine.run(np.zeros(shape, np.float32))
        assert re.search(takes, str(refused.value)) and f"not {list(shape)};" in str(refused.value)
        assert str(refused.value).endswith(f"with dynamask build-engine {bundle.path} --target tensorrt-rtx, --batch and --size.")
        least = image(*[0.9] * profile.batch[0], canvas=profile.canvas[0])
        check_found(engine.run(least), [0.9] * len(least), [FREE] * len(least))


def test_overrides_for_another_number_of_slots_are_refused(several):
    with several(SEVERAL) as engine, pytest.raises(InputError, match=r"the shape \[6\] for 12 slots; give one value, or one for each"):
        engine.run(image(0.9, 0.6), grid_override=np.zeros(SLOTS, np.int64))


def test_an_engine_of_another_profile_than_the_manifest_says_is_refused(bundle, install):
    driver = FakeDriver()
    for built, said in ((ONE, SEVERAL), (SEVERAL, CANVASES), (CANVASES, PAIRS.model_copy(update={"batch": (4, 4, 4)}))):
        install(fake_trt(profile=built), driver)
        with pytest.raises(InputError, match=r"engine\.bin does not take \[.*\] as its image, .* \(Error Code 3: .*\); build it again"):
            TensorRTEngine(add_engine(bundle, profile=said), "tensorrt-rtx")
    assert not driver.blocks and not driver.streams


@pytest.mark.parametrize("told", [None, (-1,), (SLOTS + 1,), (2, 2)])
def test_a_size_that_cannot_be_is_refused_in_every_run(several, told):
    with several(SEVERAL) as engine:
        engine.run(image(0.9, 0.6))  # What this run was told does not count in the next one.
        engine._engine.trt.told["slots_14"] = told
        with pytest.raises(DynaMaskError, match=rf"slots_14 of .*engine\.bin is \[.*\], and at most \[{SLOTS}\] is possible"):
            engine.run(image())
        engine._engine.trt.told.clear()
        check_found(engine.run(image(0.9)), (0.9,), [FREE])


@pytest.mark.parametrize("profile", [ONE, PAIRS, SEVERAL])
def test_a_predictors_batch_agrees_with_single_images(several, bundle, profile):
    images = [np.full((20 + 30 * index, 100, 3), 150 + 20 * index, np.uint8) for index in range(5)]
    with Predictor(bundle, several(profile)) as predictor:
        options = {"grid_override": np.array(FREE[::-1]), "min_score": 0.03}
        together, alone = predictor.batch(images, **options), [predictor(image, **options) for image in images]
    # The mean of the canvas, and with it what is found, is each image's.
    assert [len(found) for found in together] == [1, 5, 6, 6, 6]
    for found, expected, image in zip(together, alone, images, strict=True):
        assert found.size == image.shape[:2]
        for name in ("scores", "labels", "grids"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("profile", [ONE, PAIRS, SEVERAL], ids=str)
def test_masks_pasted_on_the_device_are_those_of_the_host(several, profile):
    """Each image has its own frame; logits are all above 0 or all below, so that a mask is the whole box or nothing."""
    most = profile.batch[-1]
    frames = [Frame(0.5 + 0.25 * index, (90 + 10 * index, 70)) for index in range(most)]
    with several(profile) as engine:
        values = [0.9, -0.4, 0.3][:most]
        on_host = engine.run(image(*values), budget_gmacs=-4.0).per_image(most)
        on_device = engine.run(image(*values), budget_gmacs=-4.0, frames=frames).per_image(most)
    for host, device, frame in zip(on_host, on_device, frames, strict=True):
        wanted, found = (to_instances(output, frame, CLASSES, {}) for output in (host, device))
        assert not device.masks and len(device.pasted) == len(found) == len(wanted)
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
        np.testing.assert_array_equal(found.masks, wanted.masks)


def test_pasting_brings_no_logits_to_the_host(several, monkeypatch):
    with several(ONE) as engine:
        copied, to_host = [], engine._driver.to_host

        def noted(destination, *rest):
            copied.append(destination.nbytes)
            to_host(destination, *rest)

        monkeypatch.setattr(engine._driver, "to_host", noted)
        output = engine.run(image(), grid_override=3, frames=[Frame(1.0, (64, 64))])
        # Boxes, scores, labels, grids and slots, and the bits of boxes that the stand-in puts at [4 k, 4 k + 1, 4 k + 2, 4 k + 3].
        assert sum(copied) == SLOTS * (4 * 4 + 4 + 8 + 8 + 8) + 4 * sum(mask.words.size for mask in output.pasted.values())
        assert sum(mask.words.size for mask in output.pasted.values()) == 2 * SLOTS
        copied.clear()
        engine.run(image(), grid_override=3)
        assert max(copied) == SLOTS * 112 * 112 * 4


def test_nothing_found_is_pasted_as_nothing(several):
    with several(SEVERAL) as engine:
        output = engine.run(image(0, 0), frames=[Frame(1.0, (64, 64))] * 2)
        assert output.pasted == {} and output.first_fault(2, SLOTS) is None


def test_pasting_on_the_device_is_a_time_of_its_own(several):
    with several(SEVERAL) as engine:
        output = engine.run(image(0.9, 0.6), frames=[Frame(1.0, (64, 64))] * 2)
    parts = output.per_image(2)
    assert set(output.times_ms) == set(parts[0].times_ms) == {"detector", "masks", "paste"}
    assert output.times_ms["paste"] == pytest.approx(sum(part.times_ms["paste"] for part in parts)) and output.times_ms["paste"] > 0


def test_times_part_where_the_detections_are_done(bundle, install):
    install(fake_trt(), FakeDriver())
    with TensorRTEngine(bundle, "tensorrt-rtx") as engine:
        times = engine.run(image()).times_ms
    # One event before, one after the kernel of the detections, none after that of the routing.
    assert 3 <= times["detector"] < 1000
    assert set(times) == {"detector", "masks"}


def test_everything_is_freed(bundle, install):
    driver = FakeDriver()
    install(fake_trt(), driver)
    engine = TensorRTEngine(bundle, "tensorrt-rtx")
    assert len(driver.blocks) == 2 * len((*INPUTS, *OUTPUTS))
    engine.close()
    engine.close()
    assert not driver.blocks and not driver.streams
    with pytest.raises(InputError, match="is closed; open the bundle again"):
        engine.run(image())


def test_a_failed_load_frees_all_and_is_one_sentence(bundle, install):
    driver = FakeDriver()
    install(fake_trt(), driver)
    with pytest.raises(InputError) as refused:
        TensorRTEngine(add_engine(bundle, plan=b"another's"), "tensorrt-rtx")
    assert str(refused.value) == (
        f"{bundle.path}/engines/tensorrt-rtx/engine.bin, built for tensorrt_rtx 1.2.3, does not load in 9.8.7 on this "
        "Fake GPU of compute capability 8.6 (incompatible serialization version); "
        f"build it again with dynamask build-engine {bundle.path} --target tensorrt-rtx."
    )
    install(fake_trt(names=("x", "y")), driver)
    with pytest.raises(InputError, match=r"takes and gives x, y, and is not a DynaMask engine; build it again"):
        TensorRTEngine(add_engine(bundle), "tensorrt-rtx")
    with pytest.raises(InputError, match=r"compiled for compute capability 9\.0, and this GPU's is 8\.6"):
        TensorRTEngine(add_engine(bundle, kernels=[compiled(FILL, "9.0")]), "tensorrt-rtx")
    assert not driver.blocks and not driver.streams


def test_too_little_memory_is_said_with_figures(bundle, install):
    driver = FakeDriver(free=300_000)
    install(fake_trt(), driver)
    with pytest.raises(InputError, match=r"needs 1 MiB of the memory of Fake GPU, and 1 MiB are free; end other programs"):
        TensorRTEngine(bundle, "tensorrt-rtx")
    assert not driver.blocks and not driver.streams


def test_a_gpu_that_tensorrt_leaves_out_is_not_sent_to_build_again(bundle, install):
    trt = fake_trt()
    trt.refusal = "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for it."
    install(trt, FakeDriver())
    with pytest.raises(
        InputError, match=r"cannot be rebuilt for it\); build the bundle for another target there, with dynamask build-engine"
    ):
        TensorRTEngine(add_engine(bundle, plan=b"another's"), "tensorrt-rtx")


def test_a_failed_run_gives_tensorrts_reason_and_may_be_followed_by_another(bundle, install):
    trt = fake_trt()
    install(trt, FakeDriver())
    with TensorRTEngine(bundle, "tensorrt-rtx") as engine:
        trt.broken = True
        with pytest.raises(DynaMaskError, match=r"could not run .*engine\.bin \(Error Code 1: launch failed\)\.$"):
            engine.run(image())
        trt.broken = False
        assert len(engine.run(image()).masks) == 4


def test_budgets_and_costs_reach_the_graph(bundle, install):
    install(trt := fake_trt(), FakeDriver())
    bundle.set_costs("tensorrt-rtx", costs())
    gmacs = [list(bundle.manifest.grid_gmacs.values()), [0] * 4]
    with TensorRTEngine(bundle, "tensorrt-rtx") as engine:
        assert (engine.threads, engine.processor, engine.takes_costs) == (0, "Fake GPU", True)
        for given, mean, total, wanted in (
            ({"budget_gmacs": 0.25}, 0.25, 0, gmacs),
            ({"masks_ms": 7.5}, 0, 7.5, costs().graph_costs()),
            ({}, 0, 0, gmacs),
        ):
            engine.run(image(), **given)
            for found, value in zip(trt.context.limits, (mean, total, np.array(wanted, np.float32)), strict=True):
                np.testing.assert_array_equal(found, value)


def test_a_graph_of_an_earlier_version_counts_in_gmac_alone(bundle, install):
    install(fake_trt(names=[name for name in (*INPUTS, *OUTPUTS) if name not in COST_CONTROLS]), FakeDriver())
    bundle.set_costs("tensorrt-rtx", costs())
    with TensorRTEngine(bundle, "tensorrt-rtx") as engine:
        check_found(engine.run(image(0.9), budget_gmacs=0.25), (0.9,), [FREE], budget=0.25)
        with pytest.raises(InputError, match="counts in GMAC alone"):
            engine.run(image(), masks_ms=7.5)


def test_the_allocator_gives_the_room_there_is():
    tensor = Tensor(0xABC00, np.zeros(10, np.float32), (-1, 2))
    allocator = tensorrt._output_allocator(fake_trt(), tensor)
    for size, address in ((0, 0xABC00), (40, 0xABC00), (512, 0xABC00), (513, 0)):  # Memory has units of 512 bytes.
        assert allocator.reallocate_output("masks_14", 0, size, 256) == address
        assert allocator.reallocate_output_async("masks_14", 0, size, 256, 77) == address
    tensor.buffer[:] = np.arange(10)
    allocator.notify_shape("masks_14", (3, 2))
    np.testing.assert_array_equal(tensor.host, [[0, 1], [2, 3], [4, 5]])


def test_launches_are_packed_and_kernels_loaded_once():
    driver = FakeDriver()
    event = driver.create_event()
    launcher = KernelLauncher(driver, KernelLibrary([compiled(FILL), compiled(ROUTE)]).for_device("8.6"), event, "build it again.")
    launch = Launch(FILL, (3, 2, 1), (Buffer("output", 1), -7, 0.25, 1 << 40))
    for _ in range(2):
        launcher(launch, [1, 2], [16, 32], 512, 77)
    assert driver.loaded == [(b"cubin", "fill_slots", "PifqPP", 128, 512)]
    assert driver.launches == [("fill_slots", (3, 2, 1), 77, (32, -7, 0.25, 1 << 40, 0, 0))] * 2
    assert event.time == 6
    launcher(Launch(ROUTE, (1, 1, 1), (Buffer("workspace", offset=256),)), [], [], 512, 77)
    launcher(Launch(ROUTE, (1, 1, 1), (Buffer("input", 0),)), [48], [], 512, 77)
    assert [arguments for *_, arguments in driver.launches[2:]] == [(768, 0, 0), (48, 0, 0)]
    assert event.time == 6


def test_a_kernel_that_cannot_be_launched_is_refused():
    launcher = KernelLauncher(FakeDriver(), {ROUTE.key: compiled(ROUTE, global_scratch=128)}, None, "build it again.")
    with pytest.raises(InputError, match=rf"another version of DynaMask, without the kernel {FILL.key}; build it again\.$"):
        launcher(Launch(FILL, (1, 1, 1), ()), [], [], 0, 77)
    with pytest.raises(DynaMaskError, match="scratch memory"):
        launcher(Launch(ROUTE, (1, 1, 1), ()), [], [], 0, 77)


def test_compiled_code_is_kept_for_the_next_run(tmp_path):
    path = tmp_path / "folder" / "engine.bin"
    first = fake_trt()
    cache = RuntimeCache(first, FakeEngine(types.SimpleNamespace(launcher=None, config=first.config), None, ()), path)
    assert first.config.dynamic_shapes_kernel_specialization_strategy == "none"
    first.cache.content = b"compiled now"
    cache.save()
    assert path.read_bytes() == b"compiled now"

    def again():
        trt = fake_trt()
        return trt, RuntimeCache(trt, FakeEngine(types.SimpleNamespace(launcher=None, config=trt.config), None, ()), path)

    second, cache = again()
    assert second.cache.content == b"compiled now"
    path.unlink()
    cache.save()
    assert not path.exists()  # Nothing new.
    path.write_bytes(b"of another driver")
    third, cache = again()
    cache.save()
    assert path.read_bytes() == third.cache.content == b"compiled before"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    trt = fake_trt()
    engine = FakeEngine(types.SimpleNamespace(launcher=None, config=trt.config), None, ())
    RuntimeCache(trt, engine, tmp_path / "file" / "engine.bin").save()
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("built", "driver", "installed", "chosen"),
    [
        (("onnxruntime", "tensorrt-rtx", "tensorrt"), True, TARGETS, "tensorrt-rtx"),
        (("onnxruntime", "tensorrt-rtx", "tensorrt"), True, ("tensorrt",), "tensorrt"),
        (("onnxruntime", "tensorrt"), True, TARGETS, "tensorrt"),
        (("onnxruntime", "tensorrt-rtx"), True, (), "onnxruntime"),
        (("onnxruntime", "tensorrt-rtx"), False, TARGETS, "onnxruntime"),
        (("tensorrt-rtx",), False, TARGETS, "onnxruntime"),
        ((), True, TARGETS, "onnxruntime"),
    ],
)
def test_auto_takes_the_best_that_is_built_and_runs_here(monkeypatch, built, driver, installed, chosen):
    from runtime.targets import onnxruntime

    def load(target):
        if target not in installed:
            raise InputError("not installed")
        return fake_trt()

    def open_driver():
        if not driver:
            raise InputError("no driver")

    monkeypatch.setattr(tensorrt_target, "load", load)
    monkeypatch.setattr(tensorrt_target, "open_driver", open_driver)
    monkeypatch.setattr(tensorrt_target, "TensorRTEngine", lambda bundle, target: target)
    monkeypatch.setattr(onnxruntime, "OnnxRuntimeEngine", lambda bundle, threads: "onnxruntime")
    assert open_engine(types.SimpleNamespace(manifest=types.SimpleNamespace(engines=dict.fromkeys(built)))) == chosen


def test_the_error_names_the_missing_library_or_device(bundle):
    bundle = Bundle.open(bundle.path)
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver here")
    except OSError:
        pass
    with pytest.raises(InputError, match=r"not installed; run pip install|no driver for one starts here .*; install .*onnxruntime\.$"):
        open_engine(bundle, "tensorrt-rtx")
    with pytest.raises(InputError, match=r"holds no engine for onnxruntime \(built: tensorrt-rtx\)"):
        open_engine(bundle)
    with pytest.raises(InputError, match=r"which is not installed|holds no engine for tensorrt "):
        open_engine(bundle, "tensorrt")
