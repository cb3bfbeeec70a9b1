"""Plugins in TensorRT for RTX: engines are built for real; what would run on a GPU runs through Triton's interpreter."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from runtime.errors import DynaMaskError, InputError
from tests.trt_plugins.toy import Toy
from trt_plugins import on_torch, plugin, tensorrt
from trt_plugins.operator import Launch, TensorSpec
from trt_plugins.registry import DOMAIN, OPERATORS, PREFIX

FLOAT, HALF, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    try:
        return tensorrt.load("tensorrt-rtx")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def plugins(trt: ModuleType) -> plugin.Plugins:
    return plugin.register(trt, None, [Toy])


def chain(kind: int, shape: Sequence[int | str] = (40, 8), **attributes: Any) -> onnx.ModelProto:
    """Two Toys, one after the other, and a standard operator behind them."""
    attributes = {"scale": 2.0} | attributes
    nodes = [
        helper.make_node("DynaMaskToy", ["x", "gain"], ["rows", "indices", "m"], "head/first", domain=DOMAIN, **attributes),
        helper.make_node("DynaMaskToy", ["rows", "gain"], ["fewer", "kept", "k"], "head/second", domain=DOMAIN, **attributes),
        helper.make_node("Relu", ["fewer"], ["y"], "relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("gain", FLOAT, [])]
    outputs = [helper.make_tensor_value_info("y", kind, None), helper.make_tensor_value_info("kept", TensorProto.INT64, None)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "toys", inputs, outputs), opset_imports=opsets, ir_version=10)


def parse(trt: ModuleType, model: onnx.ModelProto) -> Any:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    if not trt.OnnxParser(network, logger).parse(model.SerializeToString()):
        raise DynaMaskError("TensorRT did not parse it")
    return builder, network


@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_data_dependent_plugins_are_built_into_an_engine(trt: ModuleType, plugins: plugin.Plugins, kind: int) -> None:
    with plugins.raising():
        builder, network = parse(trt, chain(kind, scale=1234.5))
        y, kept = network.get_output(0), network.get_output(1)
        engine = builder.build_serialized_network(network, builder.create_builder_config())
    assert (y.dtype, tuple(y.shape)) == (trt.float32 if kind == FLOAT else trt.float16, (-1, 8))
    assert (kept.dtype, tuple(kept.shape)) == (trt.int64, (-1,))
    # Both nodes carry their attributes: a plugin is made again from them where the engine is loaded.
    assert bytes(engine).count(np.float32(1234.5).tobytes()) >= 2


def test_engines_are_built_with_a_size_known_at_run_time_only(trt: ModuleType, plugins: plugin.Plugins) -> None:
    with plugins.raising():
        builder, network = parse(trt, chain(FLOAT, ["n", 8]))
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (0, 8), (20, 8), (40, 8))
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None


def detector(batch: int | str, sides: Sequence[int | str]) -> onnx.ModelProto:
    """This project's operators one behind the other, on maps of five levels: 20 proposals and 6 slots an image."""
    strides = (4, 8, 16, 32, 64)
    nodes: list[onnx.NodeProto] = []
    maps: list[onnx.ValueInfoProto] = []

    def add(kind: str, domain: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        nodes.append(helper.make_node(PREFIX + kind if domain else kind, inputs, outputs, outputs[0], domain=domain, **attributes))

    for name, channels in (("logits", 3), ("deltas", 12)):
        for level, stride in enumerate(strides):
            size = [f"{side}{level}" if isinstance(side, str) else side // stride for side in sides]
            maps.append(helper.make_tensor_value_info(f"{name}{level}", FLOAT, [batch, channels, *size]))
    settings: dict[str, Any] = {"strides": strides, "per_level": 16, "proposals": 20, "nms_threshold": 0.7}
    add("Proposals", DOMAIN, [*(value.name for value in maps), "anchors"], ["proposals", "count"], **settings)
    add("MatMul", "", ["proposals", "class_weight"], ["class_logits"])
    add("MatMul", "", ["proposals", "delta_weight"], ["box_deltas"])
    heads = ["class_logits", "box_deltas", "proposals", "count", "min_score", "logits0"]
    settings = {"proposals": 20, "stride": 4, "detections": 6, "candidates": 60, "score_threshold": 0.05, "nms_threshold": 0.5}
    add("Detections", DOMAIN, heads, ["boxes", "scores", "labels", "slots", "n"], **settings)
    add("Gather", "", ["boxes", "slots"], ["mask_boxes"])
    add("Gather", "", ["grid_override", "slots"], ["override"])
    routed = [*OPERATORS["MsmRoute"].outputs]
    settings = {"batch": 3, "stride": 4, "detections": 6}
    add(
        "MsmRoute",
        DOMAIN,
        ["mask_boxes", "mask_boxes", "override", "slots", "budget", "total_budget", "costs", "logits0"],
        routed,
        **settings,
    )
    settings = {"strides": (4,), "size": 7, "samples": 1, "aligned": 1}
    add("RoiAlign", DOMAIN, ["logits0", "proposals"], ["box_region"], per_image=20, **settings)
    add("RoiAlign", DOMAIN, ["logits0", "mask_boxes", "slots"], ["region"], per_image=6, **settings)
    weights = {"anchors": np.ones((5, 3, 4)), "class_weight": np.ones((4, 3)), "delta_weight": np.ones((4, 12))}
    inputs = [*maps, *(helper.make_tensor_value_info(name, FLOAT, []) for name in ("min_score", "budget", "total_budget"))]
    inputs.append(helper.make_tensor_value_info("costs", FLOAT, [2, 4]))
    slots = "slots" if isinstance(batch, str) else 6 * batch
    inputs.append(helper.make_tensor_value_info("grid_override", TensorProto.INT64, [slots]))
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("boxes", "box_region", "region")]
    # Every output whose size depends on the data: TensorRT for RTX 1.7 refuses to build if such an output is unused.
    outputs += [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in routed if not name.endswith("_count")]
    initializers = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph(nodes, "detector", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("varies", [False, True])
def test_batches_and_canvases_go_through_all_operators(trt: ModuleType, varies: bool) -> None:
    with plugin.register(trt).raising():
        builder, network = parse(trt, detector("B", ["H", "W"]) if varies else detector(3, [64, 128]))
        config = builder.create_builder_config()
        if varies:
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                if tensor.name == "grid_override":
                    profile.set_shape(tensor.name, (6,), (12,), (18,))
                elif len(tensor.shape) == 4:
                    stride = 4 << int(tensor.name[-1])
                    sides = [(images, tensor.shape[1], 64 // stride, 64 * images // stride) for images in (1, 2, 3)]
                    profile.set_shape(tensor.name, *sides)
            config.add_optimization_profile(profile)
        shapes = {network.get_output(index).name: tuple(network.get_output(index).shape) for index in range(network.num_outputs)}
        assert builder.build_serialized_network(network, config) is not None
    rows, slots = (-1, -1) if varies else (60, 18)
    fixed = {"boxes": (slots, 4), "box_region": (rows, 3, 7, 7), "region": (-1, 3, 7, 7), "grids": (slots,)}
    assert shapes == {name: fixed.get(name, (-1,)) for name in shapes} and len(shapes) == len(fixed) + 11


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(FLOAT, scale="wide"), "head/first: Toy's attribute scale is "),
        (chain(FLOAT, limits=[64]), "not enough values"),
        (chain(FLOAT, [40, 33]), "head/first: Toy: x is [40, 33]; give at most 64 rows of 32."),
        (chain(FLOAT, [40, 8, 1]), "head/first: Toy: x is [40, 8, 1]; give at most"),
        (chain(INT32), "head/first: Toy: x is int32; give float32 or float16."),
        (chain(TensorProto.BFLOAT16), "Toy takes no tensors of type DataType.BF16"),
    ],
)
def test_an_exception_of_a_plugin_replaces_tensorrts_message(
    trt: ModuleType, plugins: plugin.Plugins, model: onnx.ModelProto, message: str
) -> None:
    with pytest.raises(Exception) as error, plugins.raising():
        parse(trt, model)
    assert message in str(error.value)


def test_an_attribute_that_is_missing_is_named(trt: ModuleType, plugins: plugin.Plugins) -> None:
    model = chain(FLOAT)
    del model.graph.node[1].attribute[:]
    with pytest.raises(InputError, match=r"head/second: Toy needs the attribute scale\."), plugins.raising():
        parse(trt, model)


def test_exceptions_that_tensorrt_ignores_are_raised(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX goes on building with a workspace of no bytes when a plugin fails to say how many."""

    def fail(self: Toy, inputs: object) -> None:
        raise InputError("too large")

    monkeypatch.setattr(Toy, "workspace", fail)
    plugins = plugin.register(trt, None, [Toy])
    with pytest.raises(InputError, match="too large"), plugins.raising():
        builder, network = parse(trt, chain(FLOAT))
        builder.build_serialized_network(network, builder.create_builder_config())


def test_every_operator_has_a_creator(trt: ModuleType) -> None:
    plugin.register(trt)
    plugin.register(trt)  # Again: nothing is registered twice.
    for name, operator in OPERATORS.items():
        creator = trt.get_plugin_registry().get_creator(PREFIX + name, plugin.VERSION, plugin.NAMESPACE)
        assert [field.name for field in creator.field_names] == [attribute.name for attribute in operator.attributes]


def created(trt: ModuleType, launcher: plugin.Launcher | None, **values: Any) -> Any:
    """A plugin as an engine has it once it is loaded: made from fields, cloned into an execution context."""
    plugins = plugin.register(trt, launcher, [Toy])
    values = {name: np.atleast_1d(np.array(value)) for name, value in Toy("toy", **values).values.items()}
    given = [SimpleNamespace(name=name, data=value) for name, value in values.items()]
    built = plugins.creators["Toy"].create_plugin("toy", given, trt.TensorRTPhase.BUILD)
    written = [SimpleNamespace(name=field.name, data=np.array(field.data)) for field in built.get_fields_to_serialize()]
    return plugins.creators["Toy"].create_plugin("toy", written, trt.TensorRTPhase.RUNTIME).attach_to_context(None)


def enqueue(trt: ModuleType, toy: Any, rows: int, tensors: Sequence[torch.Tensor]) -> None:
    """Run a plugin on the first rows of x; tensors are x, gain, the three outputs and the workspace."""
    x, gain, *outputs, workspace = tensors
    kind = getattr(trt, on_torch.spec_of(x).dtype)
    descs = [SimpleNamespace(dims=(rows, x.shape[1]), type=kind), SimpleNamespace(dims=(), type=trt.float32)]
    written = [SimpleNamespace(dims=dims, type=to) for dims, to in (((-1, x.shape[1]), kind), ((-1,), trt.int64), ((), trt.int64))]
    toy.enqueue(descs, written, [x.data_ptr(), gain.data_ptr()], [tensor.data_ptr() for tensor in outputs], workspace.data_ptr(), 7)


def test_attributes_come_back_where_an_engine_is_loaded(trt: ModuleType) -> None:
    toy = created(trt, None, scale=0.1, threshold=-2, limits=(9, 2**31 - 1))
    assert toy.operator.values == {"scale": 0.1, "threshold": -2.0, "limits": (9, 2**31 - 1)}


def test_an_enqueued_plugin_launches_its_kernels_on_its_arguments(trt: ModuleType) -> None:
    x, gain = torch.arange(18, dtype=torch.float16).reshape(6, 3), torch.tensor(1.5)
    rows, indices, m = torch.empty(6, 3, dtype=torch.float16), torch.empty(6, dtype=torch.int64), torch.tensor(9)
    buffers = [x, gain, rows, indices, m, torch.empty(512, dtype=torch.uint8)]
    tensors = {tensor.data_ptr(): tensor for tensor in buffers}
    launched: list[Launch] = []

    def launcher(launch: Launch, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        assert stream == 7
        launched.append(launch)
        on_torch.start(launch, [tensors[item] for item in inputs], [tensors[item] for item in outputs], tensors[workspace])

    toy = created(trt, launcher, scale=2, threshold=0.5)
    plugin.register(trt, None, [Toy])  # Another engine's launcher, or none: this plugin keeps its own.
    for n, kernels in [(5, ["find_rows", "scale_rows"]), (0, ["find_rows"]), (5, ["find_rows", "scale_rows"])]:
        enqueue(trt, toy, n, buffers)
        assert m.item() == max(n - 1, 0)
        torch.testing.assert_close(rows[:m], x[1 : 1 + m] * 3)
        torch.testing.assert_close(indices[:m], torch.arange(6)[1 : 1 + m])
        # No row, no second launch: its grid has a 0.
        assert [launch.kernel.function for launch in launched[-len(kernels) :]] == kernels
    assert launched[3] is launched[0], "the launches of a shape are planned once"


TOY = Toy("toy", scale=2)
X, GAIN = TensorSpec((3, 4), "float32"), TensorSpec((), "float32")
WRITTEN = [TensorSpec((-1, 4), "float32"), TensorSpec((-1,), "int64"), TensorSpec((), "int64")]


@pytest.mark.parametrize(
    ("inputs", "outputs", "sentence"),
    [
        ([TensorSpec((99, 4), "float32"), GAIN], WRITTEN, "toy: Toy: x is .*at most 64 rows"),
        ([TensorSpec((3, 4), "int32"), GAIN], WRITTEN, "toy: Toy: x is int32"),
        ([X, GAIN], [TensorSpec((-1, 4), "float16"), *WRITTEN[1:]], "toy: TensorRT gives .* float16 for the output rows, .*float32"),
        ([X, GAIN], [*WRITTEN[:2], TensorSpec((2,), "int64")], r"toy: TensorRT gives \(2,\) int64 for the output m, which is \(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_where_a_plugin_is_entered(
    inputs: list[TensorSpec], outputs: list[TensorSpec], sentence: str
) -> None:
    with pytest.raises(DynaMaskError, match=sentence):
        plugin.plan(TOY, inputs, outputs)


@pytest.mark.parametrize(("place", "name"), [(0, "input 0"), (1, "input 1"), (2, "output rows"), (4, "output m"), (5, "workspace")])
def test_null_and_unaligned_addresses_are_refused_by_name(place: int, name: str) -> None:
    _, tensors = plugin.plan(TOY, [X, GAIN], WRITTEN)
    aligned = [256 * (index + 1) for index in range(6)]
    plugin.check_addresses(TOY, tensors, aligned)
    for address in (0, 264):
        with pytest.raises(DynaMaskError, match=f"toy: TensorRT gives the address {address:#x} for the {name},"):
            plugin.check_addresses(TOY, tensors, [*aligned[:place], address, *aligned[place + 1 :]])


def test_an_empty_tensor_may_have_no_address() -> None:
    _, tensors = plugin.plan(TOY, [TensorSpec((0, 4), "float32"), GAIN], WRITTEN)
    assert [name for name, filled in tensors if not filled] == ["input 0", "output rows", "output indices"]
    plugin.check_addresses(TOY, tensors, [0, 256, 0, 0, 512, 1024])


def test_a_plugin_for_building_does_not_run(trt: ModuleType, plugins: plugin.Plugins) -> None:
    toy = created(trt, None, scale=1)
    with pytest.raises(DynaMaskError, match="toy cannot run"), plugins.raising():
        enqueue(trt, toy, 1, [torch.zeros(1, 1)] * 6)


def test_ctrl_c_in_a_callback_is_not_lost(trt: ModuleType, plugins: plugin.Plugins) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    toy = created(trt, interrupted, scale=1)
    with pytest.raises(KeyboardInterrupt), plugins.raising():
        try:
            enqueue(trt, toy, 1, [torch.zeros(1, 1)] * 6)
        except KeyboardInterrupt:
            raise DynaMaskError("what a runner says when TensorRT's own call failed") from None


def test_a_failure_stays_in_the_thread_of_its_engine(trt: ModuleType, plugins: plugin.Plugins) -> None:
    def wrong(*arguments: object) -> None:
        raise DynaMaskError("of the other thread")

    def other() -> None:
        with plugins.raising(), contextlib.suppress(DynaMaskError):
            enqueue(trt, created(trt, wrong, scale=1), 1, [torch.zeros(1, 1)] * 6)

    with concurrent.futures.ThreadPoolExecutor() as pool, plugins.raising():
        failure = pool.submit(other).exception()
    assert isinstance(failure, DynaMaskError) and str(failure) == "of the other thread"
    with pytest.raises(DynaMaskError, match="of nobody"), plugins.raising():
        thread = threading.Thread(target=plugins.note, args=[DynaMaskError("of nobody")])
        thread.start()
        thread.join()
    with plugins.raising():
        pass


def test_stubs_of_tensorrt_are_not_taken_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="pip install tensorrt"):
        tensorrt.load("tensorrt")


def test_a_broken_installation_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"does not load \(libnvinfer.so.10"):
        tensorrt.load("tensorrt")


@pytest.mark.parametrize(
    ("target", "name", "version", "sentence"),
    [
        ("tensorrt-rtx", "tensorrt_rtx", "1.6.0.1", "needs tensorrt_rtx 1.7.1 or later, and 1.6.0.1 is installed: .*pip install --upgrade"),
        ("tensorrt", "tensorrt", "8.6.2", "needs tensorrt 10.3 or later, and 8.6.2 is installed: .*JetPack 6.1"),
        ("tensorrt", "tensorrt", "unknown", "needs tensorrt 10.3 or later"),
    ],
)
def test_earlier_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str, version: str, sentence: str
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text(f"__version__ = {version!r}")
    with pytest.raises(InputError, match=sentence):
        tensorrt.load(target)
    monkeypatch.delitem(sys.modules, name)
    if target == "tensorrt":
        (tmp_path / f"{name}.py").write_text("__version__ = '10.3.0'")
        importlib.invalidate_caches()
        assert tensorrt.load(target).__version__ == "10.3.0"
        monkeypatch.delitem(sys.modules, name)


def wheel(folder: Path) -> Path:
    """TensorRT for RTX as its wheels unpack, `libtensorrt_rtx.so` missing; gives that name's path."""
    import tensorrt_rtx
    import tensorrt_rtx_bindings
    import tensorrt_rtx_libs

    libraries = folder / "tensorrt_rtx_libs"
    libraries.mkdir()
    for module in (tensorrt_rtx, tensorrt_rtx_bindings):
        (folder / module.__name__).symlink_to(Path(module.__file__).parent)
    for file in Path(tensorrt_rtx_libs.__file__).parent.iterdir():
        if ".so." in file.name:
            (libraries / file.name).symlink_to(file)
    (libraries / "__init__.py").write_text(Path(tensorrt_rtx_libs.__file__).read_text())
    return libraries / "libtensorrt_rtx.so"


def build_with(folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parents[2])!r}]
from tests.trt_plugins import test_plugin as tests
{before}
trt = tests.tensorrt.load("tensorrt-rtx")
with tests.plugin.register(trt, None, [tests.Toy]).raising():
    tests.parse(trt, tests.chain(tests.FLOAT))
print(trt.__file__)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_missing_name_of_the_library_is_linked(trt: ModuleType, tmp_path: Path) -> None:
    link = wheel(tmp_path)
    done = build_with(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert link.readlink() == Path("libtensorrt_rtx.so.1")


def test_a_folder_that_cannot_be_written_needs_no_link(trt: ModuleType, tmp_path: Path) -> None:
    link = wheel(tmp_path)
    link.symlink_to("nowhere")  # Nothing can be put there; permissions would not stop root.
    done = build_with(tmp_path)
    assert done.returncode == 0, done.stderr
    assert link.readlink() == Path("nowhere")
    late = build_with(tmp_path, before="import tensorrt_rtx")
    assert late.returncode == 1  # Refused, not aborted.
    assert f"InputError: {link} is missing" in late.stderr
    assert f"run ln -s libtensorrt_rtx.so.1 {link}" in late.stderr
