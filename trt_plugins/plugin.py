"""Makes TensorRT plugins of operators: class-based ones (`IPluginV3`), which TensorRT 10 and 11 and TensorRT for RTX all have.

They are registered once in a process, because TensorRT has one registry in a process. The ONNX node of operator `DeformConv` is
`DynaMaskDeformConv`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from runtime.errors import DynaMaskError
from trt_plugins.operator import DataDependent, DType, Launch, Operator, TensorSpec, Times
from trt_plugins.registry import OPERATORS, PREFIX
from trt_plugins.tensorrt import TensorRT, sizes

if TYPE_CHECKING:
    import tensorrt

VERSION = "1"
NAMESPACE = ""
ADDRESS_ALIGNMENT = 16
"""`trt_plugins.aot` tells Triton that all addresses are multiples of it."""

Launcher = Callable[[Launch, Sequence[int], Sequence[int], int, int], None]
"""Enqueues a launch: called with the launch, the addresses of inputs, outputs and workspace, and the handle of the stream.

`enqueue` calls it in every frame, with the same `Launch` object for the same shapes.
"""
Method = TypeVar("Method", bound=Callable[..., Any])


class Plugins:
    """This project's plugins in one TensorRT module, and the exceptions that they raised."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.launcher: Launcher | None = None
        """The launcher of plugins that are created from now on; existing plugins keep theirs."""
        self._failures: dict[int | None, list[BaseException]] = {None: []}
        """Exceptions of the plugins' callbacks, by thread inside `raising`; under None, those of other threads, which TensorRT starts.
        TensorRT prints such exceptions and goes on, or fails later with another message."""
        self.creators: dict[str, tensorrt.IPluginCreatorV3One] = {}
        """By operator. TensorRT keeps only pointers to them."""
        # TensorRT's registry logs to the first builder or runtime of the process, even when that one is gone. This one stays.
        self._logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self._runtime = trt.Runtime(self._logger)

    def add(self, operator: type[Operator]) -> None:
        """Register an operator's plugin, unless it is registered already."""
        if operator.name not in self.creators:
            creator = _creator(self, operator)
            if not self.trt.get_plugin_registry().register_creator(creator, NAMESPACE):
                raise DynaMaskError(f"TensorRT knows another plugin called {PREFIX}{operator.name}: start a process without it.")
            self.creators[operator.name] = creator

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise the first exception of a plugin in this block, in which TensorRT parses, builds, deserialises or runs.

        Each thread sees the exceptions of its own calls, and those of the threads that TensorRT starts.
        """
        thread = threading.get_ident()
        self._failures[thread] = []
        self._failures[None].clear()
        try:
            yield
        finally:
            failures = self._failures.pop(thread) + self._failures[None]
            if failures:
                # It replaces the caller's exception, "the engine was not built", which says less.
                raise failures[0]

    def note(self, failure: BaseException) -> None:
        """Keep an exception that a callback raised."""
        thread = threading.get_ident()
        self._failures[thread if thread in self._failures else None].append(failure)


_REGISTERED: dict[str, Plugins] = {}


def register(trt: TensorRT, launcher: Launcher | None = None, operators: Iterable[type[Operator]] | None = None) -> Plugins:
    """Register the operators' plugins with TensorRT, and set the launcher of the plugins that are created from now on.

    Call it before any builder or runtime is created: TensorRT logs to the first one of the process, even when that one is gone.

    Args:
        trt: from `trt_plugins.tensorrt.load`.
        launcher: launches the kernels of plugins; None if plugins never run. TensorRT runs plugins while it builds, to time them; TensorRT
            for RTX does not.
        operators: all of `registry.OPERATORS` by default.

    Raises:
        DynaMaskError: TensorRT has other plugins of these names.
    """
    if trt.__name__ not in _REGISTERED:
        _REGISTERED[trt.__name__] = Plugins(trt)
    plugins = _REGISTERED[trt.__name__]
    plugins.launcher = launcher
    for operator in OPERATORS.values() if operators is None else operators:
        plugins.add(operator)
    return plugins


Plan = tuple[list[Launch], list[tuple[str, bool]]]
"""The launches for inputs of some shapes; and the names of inputs, outputs and workspace, with whether each has any items."""


def plan(operator: Operator, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Plan:
    """The launches of an operator for the inputs and outputs that TensorRT gives.

    Raises:
        InputError: an input does not fit the operator.
        DynaMaskError: an output has not the type or shape that the kernels write. The shape of a data-dependent output is not compared:
            TensorRT does not promise to give its largest size.
    """
    operator.check_inputs(inputs)
    written = operator.max_output_specs(inputs)
    shapes = operator.output_shapes([spec.shape for spec in inputs])
    for name, shape, expected, given in zip(operator.outputs, shapes, written, outputs, strict=True):
        varies = any(isinstance(size, DataDependent) for size in shape)
        if given.dtype != expected.dtype or not (varies or given.shape == expected.shape):
            raise DynaMaskError(
                f"{operator.node}: TensorRT gives {given.shape} {given.dtype} for the output {name}, which is {expected.shape} "
                f"{expected.dtype}; please report it."
            )
    launches = [launch for launch in operator.launches(inputs, written) if 0 not in launch.grid]
    names = [*(f"input {index}" for index in range(len(inputs))), *(f"output {name}" for name in operator.outputs), "workspace"]
    filled = [*(spec.items > 0 for spec in (*inputs, *written)), operator.workspace(inputs).bytes > 0]
    return launches, list(zip(names, filled, strict=True))


def check_addresses(operator: Operator, tensors: Iterable[tuple[str, bool]], addresses: Iterable[int]) -> None:
    """Refuse memory that the kernels cannot use: they are compiled for aligned addresses. That of an empty tensor may be null.

    Raises:
        DynaMaskError: names the node and the tensor.
    """
    for (name, filled), address in zip(tensors, addresses, strict=True):
        if filled and (address == 0 or address % ADDRESS_ALIGNMENT):
            raise DynaMaskError(
                f"{operator.node}: TensorRT gives the address {address:#x} for the {name}, which is no multiple of {ADDRESS_ALIGNMENT} "
                "above 0; please report it."
            )


def _types(trt: TensorRT) -> Mapping[tensorrt.DataType, DType]:
    return {trt.float32: "float32", trt.float16: "float16", trt.int32: "int32", trt.int64: "int64", trt.bool: "bool"}


def _recorded(method: Method) -> Method:
    """A callback whose exceptions are kept for `Plugins.raising`, before TensorRT hides them."""

    @functools.wraps(method)
    def callback(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except BaseException as error:  # KeyboardInterrupt too: it is raised here when Ctrl-C comes in a callback.
            self.plugins.note(error)
            raise

    return cast(Method, callback)


def _creator(plugins: Plugins, operator_class: type[Operator]) -> tensorrt.IPluginCreatorV3One:
    trt = plugins.trt
    plugin_class = _plugin_class(trt, operator_class)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.plugins = plugins
            self.name = PREFIX + operator_class.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.fields = _Fields(trt, operator_class, {})
            self.field_names = self.fields.collection

        @_recorded
        def create_plugin(self, name: str, fields: Iterable[tensorrt.PluginField], phase: tensorrt.TensorRTPhase) -> tensorrt.IPluginV3:
            kinds = {attribute.name: attribute.kind for attribute in operator_class.attributes}
            values = {field.name: np.asarray(field.data).tolist() for field in fields}
            scalars = {key: value[0] for key, value in values.items() if kinds[key] in ("int", "float") and len(value) == 1}
            return plugin_class(plugins, operator_class(name, **(values | scalars)))

    return Creator()


class _Fields:
    """An operator's attributes as TensorRT's fields, which point into this object: it must live as long as they do."""

    def __init__(self, trt: TensorRT, operator: type[Operator], values: Mapping[str, Any]) -> None:
        # The types are those in which the ONNX parser gives attributes.
        kinds = {"int": (np.int32, trt.PluginFieldType.INT32), "float": (np.float32, trt.PluginFieldType.FLOAT32)}
        self.fields = []
        for attribute in operator.attributes:
            dtype, kind = kinds[attribute.kind.removesuffix("s")]
            data = np.atleast_1d(np.asarray(values.get(attribute.name, ()), dtype))
            self.fields.append(trt.PluginField(cast("tensorrt.FallbackString", attribute.name), data, kind))
        self.collection = trt.PluginFieldCollection(self.fields)


def _plugin_class(trt: TensorRT, operator_class: type[Operator]) -> type[Any]:
    names = _types(trt)
    types = {name: kind for kind, name in names.items()}
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*interfaces):  # type: ignore[misc]
        """The methods that TensorRT calls, in the order of its calls.

        `clone` and `supports_format_combination` must not raise: TensorRT 1.7 for RTX would corrupt its memory.
        """

        def __init__(self, plugins: Plugins, operator: Operator) -> None:
            for interface in interfaces:
                interface.__init__(self)
            self.plugin_name = PREFIX + operator_class.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = len(operator_class.outputs)
            self.plugins = plugins
            self.operator = operator
            self.launcher = plugins.launcher
            self.fields = _Fields(trt, operator_class, operator.values)
            # Clones share these: they depend on the operator alone.
            self.input_types: list[DType] = []
            self.plans: dict[tuple[tuple[int, ...], ...], Plan] = {}

        def clone(self) -> tensorrt.IPluginV3:
            twin = Plugin(self.plugins, self.operator)
            twin.__dict__.update(self.__dict__)
            return twin

        def get_capability_interface(self, kind: tensorrt.PluginCapabilityType) -> tensorrt.IPluginCapability:
            return self

        @_recorded
        def get_output_data_types(self, input_types: Sequence[tensorrt.DataType]) -> list[tensorrt.DataType]:
            self.input_types[:] = [_name(kind) for kind in input_types]
            return [types[name] for name in self.operator.output_types(self.input_types)]

        @_recorded
        def get_output_shapes(
            self, inputs: Sequence[tensorrt.DimsExprs], shape_inputs: Sequence[tensorrt.DimsExprs], builder: tensorrt.IExprBuilder
        ) -> list[tensorrt.DimsExprs]:
            dimensions = [list(cast(Iterable["tensorrt.IDimensionExpr"], dims)) for dims in inputs]
            known = [tuple(size.get_constant_value() if size.is_constant() else None for size in dims) for dims in dimensions]
            # TensorRT asks for the types first, so that wrong inputs are refused while the graph is parsed.
            self.operator.check_inputs([TensorSpec(shape, dtype) for shape, dtype in zip(known, self.input_types, strict=True)])
            shapes = self.operator.output_shapes(dimensions)
            declared: dict[int, tensorrt.IDimensionExpr] = {}
            return [trt.DimsExprs([_dimension(size, declared, builder) for size in shape]) for shape in shapes]

        def supports_format_combination(self, position: int, tensors: Sequence[tensorrt.DynamicPluginTensorDesc], num_inputs: int) -> bool:
            # The types are the graph's, which get_output_data_types accepted: networks are strongly typed.
            return bool(tensors[position].desc.format == trt.TensorFormat.LINEAR)

        def configure_plugin(
            self, inputs: Sequence[tensorrt.DynamicPluginTensorDesc], outputs: Sequence[tensorrt.DynamicPluginTensorDesc]
        ) -> None:
            pass

        @_recorded
        def get_workspace_size(
            self, inputs: Sequence[tensorrt.DynamicPluginTensorDesc], outputs: Sequence[tensorrt.DynamicPluginTensorDesc]
        ) -> int:
            return self.operator.workspace([TensorSpec(sizes(desc.max), _name(desc.desc.type)) for desc in inputs]).bytes

        def get_fields_to_serialize(self) -> tensorrt.PluginFieldCollection:
            return self.fields.collection

        def attach_to_context(self, context: tensorrt.IPluginResourceContext) -> tensorrt.IPluginV3:
            return self.clone()

        def on_shape_change(self, inputs: Sequence[tensorrt.PluginTensorDesc], outputs: Sequence[tensorrt.PluginTensorDesc]) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        @_recorded
        def enqueue(
            self,
            input_desc: Sequence[tensorrt.PluginTensorDesc],
            output_desc: Sequence[tensorrt.PluginTensorDesc],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self.launcher is None:
                raise DynaMaskError(f"{self.operator.node} cannot run: its plugin was registered without a launcher.")
            shapes = tuple(sizes(desc.dims) for desc in input_desc)
            if shapes not in self.plans:
                specs = [TensorSpec(shape, _name(desc.type)) for shape, desc in zip(shapes, input_desc, strict=True)]
                given = [TensorSpec(sizes(desc.dims), _name(desc.type)) for desc in output_desc]
                self.plans[shapes] = plan(self.operator, specs, given)
            launches, tensors = self.plans[shapes]
            check_addresses(self.operator, tensors, [*inputs, *outputs, workspace])
            for launch in launches:
                self.launcher(launch, inputs, outputs, workspace, stream)

    def _name(kind: tensorrt.DataType) -> DType:
        if kind not in names:
            raise DynaMaskError(f"{operator_class.name} takes no tensors of type {kind}.")
        return names[kind]

    def _dimension(size: Any, declared: dict[int, tensorrt.IDimensionExpr], builder: tensorrt.IExprBuilder) -> tensorrt.IDimensionExpr:
        if isinstance(size, int):
            return builder.constant(size)
        if isinstance(size, Times):
            return builder.operation(trt.DimensionOperation.PROD, size.size, builder.constant(size.factor))
        if not isinstance(size, DataDependent):
            return size
        if size.size_output not in declared:  # Once, even if several outputs have this size.
            upper = _dimension(size.upper, declared, builder)
            likely = builder.operation(trt.DimensionOperation.CEIL_DIV, upper, builder.constant(2))
            declared[size.size_output] = builder.declare_size_tensor(size.size_output, likely, upper)
        return declared[size.size_output]

    return Plugin
