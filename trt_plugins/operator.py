"""The base class of operators, used by TensorRT's plugins, the ahead-of-time compiler, Triton's interpreter and the tests.

An `Operator` describes its attributes, the types and shapes of its inputs and outputs, and the kernels that it launches. It imports neither
TensorRT nor Triton: `trt_plugins.plugin` makes a TensorRT plugin of it, `trt_plugins.aot` compiles its kernels, and `trt_plugins.on_torch`
runs them on PyTorch tensors. docs/plugins.md shows how to add one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from runtime.errors import InputError

DType = Literal["float32", "float16", "int32", "int64", "bool"]
ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "int32": 4, "int64": 8, "bool": 1}
TRITON_TYPES: Mapping[str, str] = {"float32": "fp32", "float16": "fp16", "int32": "i32", "int64": "i64", "bool": "i1"}
ALIGNMENT = 256
"""Each part of a workspace begins at a multiple of this number of bytes."""

AttributeValue = int | float | tuple[int, ...] | tuple[float, ...]
Constant = int | float | bool | tuple[float, ...]


@dataclass(frozen=True)
class Attribute:
    """One attribute of an operator's ONNX node."""

    name: str
    kind: Literal["int", "float", "ints", "floats"]
    default: AttributeValue | None = None
    """None if the attribute must be given."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and type. A size is None if it is not known before run time."""

    shape: tuple[int | None, ...]
    dtype: DType

    @property
    def items(self) -> int:
        """The number of items; every size must be known."""
        return math.prod(self.size(axis) for axis in range(len(self.shape)))

    def size(self, axis: int) -> int:
        """A size that must be known."""
        size = self.shape[axis]
        if size is None:
            raise ValueError(f"axis {axis} of {self.shape} is not known")
        return size


def alike(*sizes: int | None) -> bool:
    """Whether all known sizes are equal."""
    return len({size for size in sizes if size is not None}) <= 1


def power_of_two(size: int) -> int:
    """`size`, at least 1, rounded up to a power of two."""
    return 1 << (size - 1).bit_length()


def canvas_of(feature: TensorSpec, stride: int) -> tuple[int, int]:
    """Height and width in pixels of the canvas that a map `[B, C, H, W]` covers with `stride` pixels per cell."""
    return feature.size(2) * stride, feature.size(3) * stride


@dataclass(frozen=True)
class Times:
    """A dimension that is `size * factor`."""

    size: Any
    """A dimension of a TensorRT builder."""
    factor: int


def times(size: Any, factor: int) -> Any:
    """`size * factor`: an int if `size` is an int, None if it is None, and `Times` for a dimension of a TensorRT builder."""
    if size is None:
        return None
    return size * factor if isinstance(size, int) else Times(size, factor)


@dataclass(frozen=True)
class DataDependent:
    """A size that the kernels write, as one item, to output number `size_output` of the operator; at most `upper`."""

    size_output: int
    upper: Any
    """An int, a dimension of a TensorRT builder, or `Times`."""


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a Triton kernel: everything that decides its machine code."""

    module: str
    """The module that defines the kernel: `trt_plugins.deform_conv.kernel`."""
    function: str
    signature: tuple[tuple[str, str], ...]
    """The arguments that are not constants, in order: `("x", "*fp16")`, `("n", "i32")`."""
    constants: tuple[tuple[str, Constant], ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    @functools.cached_property
    def key(self) -> str:
        """A unique name of this form, for files."""
        fields = [self.module, self.function, self.signature, self.constants, self.num_warps, self.num_stages]
        return f"{self.function}-{hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Buffer:
    """A pointer argument: input or output number `index`, or `offset` bytes into the workspace."""

    kind: Literal["input", "output", "workspace"]
    index: int = 0
    offset: int = 0
    dtype: DType = "float32"
    """The type that the kernel reads there; needed for the workspace, which is untyped."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `arguments` are in the order of its signature. A launch whose grid has a 0 in it is skipped."""

    kernel: KernelSpec
    grid: tuple[int, int, int]
    arguments: tuple[Buffer | int | float, ...]


@dataclass
class Workspace:
    """The layout of scratch memory: `take` adds a part, and `bytes` is the total size."""

    bytes: int = 0
    parts: dict[str, Buffer] = field(default_factory=dict)

    def take(self, name: str, items: int, dtype: DType) -> Buffer:
        """Add a part for this number of items."""
        part = Buffer("workspace", 0, self.bytes, dtype)
        self.parts[name] = part
        self.bytes += -(-max(items, 1) * ITEM_BYTES[dtype] // ALIGNMENT) * ALIGNMENT
        return part


def _shortest(value: Any) -> float:
    """The shortest decimal that has the same float32 value; ONNX and TensorRT store attributes in float32."""
    return float(str(np.float32(value)))


class Operator(ABC):
    """One node of a lowered graph.

    The constructor takes the node's attributes, and raises if one is wrong. All tensors are dense, in row order ("linear").
    """

    name: ClassVar[str]
    """`DeformConv`. The TensorRT plugin and the ONNX node are called `DynaMaskDeformConv` (`registry.PREFIX`)."""
    attributes: ClassVar[tuple[Attribute, ...]] = ()
    outputs: ClassVar[tuple[str, ...]]
    """The outputs' names, including the sizes of data-dependent outputs."""

    def __init__(self, node: str = "", **values: Any) -> None:
        """Check and store the attributes of a node; its name is for error messages.

        Raises:
            InputError: an attribute is missing, unknown, or not of its kind.
        """
        self.node = node or self.name
        known = {attribute.name for attribute in self.attributes}
        for unknown in sorted(values.keys() - known):
            raise InputError(f"{self.node}: {self.name} has no attribute {unknown}; it has {', '.join(sorted(known)) or 'none'}.")
        self.values: dict[str, Any] = {attribute.name: self._value(attribute, values) for attribute in self.attributes}
        self.check_attributes()

    def _value(self, attribute: Attribute, values: Mapping[str, Any]) -> AttributeValue:
        value = values.get(attribute.name, attribute.default)
        if value is None:
            raise InputError(f"{self.node}: {self.name} needs the attribute {attribute.name}.")
        convert = int if attribute.kind in ("int", "ints") else _shortest
        try:
            if attribute.kind in ("ints", "floats"):
                return tuple(convert(item) for item in value)
            return convert(value)
        except (TypeError, ValueError):
            raise InputError(f"{self.node}: {self.name}'s attribute {attribute.name} is {value!r}, not {attribute.kind}.") from None

    def check_attributes(self) -> None:  # noqa: B027 (an operator may have nothing to refuse)
        """Refuse attribute values that are out of range or do not fit each other.

        Raises:
            InputError: names the node and the attribute.
        """

    @abstractmethod
    def check_inputs(self, inputs: Sequence[TensorSpec]) -> None:
        """Refuse inputs whose number, rank, sizes or types do not fit.

        Raises:
            InputError: names the node and the input.
        """

    @abstractmethod
    def output_types(self, inputs: Sequence[DType]) -> list[DType]:
        """Types of the outputs, including the sizes (`int64`), for inputs of these types."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Shapes of the outputs. The sizes of the inputs are ints or dimensions of a TensorRT builder; the sizes of the outputs are these,
        `times` of these, ints, or `DataDependent`. The size of a data-dependent output is an output itself, of shape `[]`."""

    @abstractmethod
    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Every kernel that `launches` may use for inputs of these types and shapes; a size that may vary is None."""

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Scratch memory for inputs of at most these shapes."""
        return Workspace()

    @abstractmethod
    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """The launches, in order, for these inputs. Data-dependent outputs have memory for their largest size; the kernels write the actual
        sizes. Neither outputs nor workspace are zeroed beforehand."""

    def max_output_specs(self, inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """The outputs for inputs of these shapes, data-dependent ones at their largest size."""
        shapes = self.output_shapes([spec.shape for spec in inputs])
        types = self.output_types([spec.dtype for spec in inputs])
        return [
            TensorSpec(tuple(size.upper if isinstance(size, DataDependent) else size for size in shape), dtype)
            for shape, dtype in zip(shapes, types, strict=True)
        ]

    def refuse(self, reason: str) -> InputError:
        """The error for an attribute or input that does not fit; `reason` names it and says what to give."""
        return InputError(f"{self.node}: {self.name}: {reason}.")
