"""What an operator is, told once for every TensorRT, for the ahead-of-time compiler, for Triton's interpreter and for the tests.

An `Operator` knows its attributes, the types and shapes it takes and gives, and which kernels it launches on them. It imports neither
TensorRT nor Triton: `trt_plugins.plugin` makes a TensorRT plugin of it, `trt_plugins.aot` compiles its kernels, `trt_plugins.on_torch`
runs them on PyTorch tensors. docs/plugins.md shows how one is added.
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
"""Bytes: what every part of a workspace begins at a multiple of."""

AttributeValue = int | float | tuple[int, ...] | tuple[float, ...]
Constant = int | float | bool | tuple[float, ...]


@dataclass(frozen=True)
class Attribute:
    """One attribute of an operator's ONNX node."""

    name: str
    kind: Literal["int", "float", "ints", "floats"]
    default: AttributeValue | None = None
    """None: it must be given."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and type; None is a size not known before run time."""

    shape: tuple[int | None, ...]
    dtype: DType

    @property
    def items(self) -> int:
        """How many items it holds; every size must be known."""
        return math.prod(self.size(axis) for axis in range(len(self.shape)))

    def size(self, axis: int) -> int:
        """A size that must be known."""
        size = self.shape[axis]
        if size is None:
            raise ValueError(f"axis {axis} of {self.shape} is not known")
        return size


def alike(*sizes: int | None) -> bool:
    """Whether those that are known are the same."""
    return len({size for size in sizes if size is not None}) <= 1


def canvas_of(feature: TensorSpec, stride: int) -> tuple[int, int]:
    """Height and width in pixels of the canvas that a map `[B, C, H, W]` covers, `stride` pixels a cell."""
    return feature.size(2) * stride, feature.size(3) * stride


@dataclass(frozen=True)
class Times:
    """A dimension that is `size * factor`."""

    size: Any
    """What a TensorRT builder calls a dimension."""
    factor: int


def times(size: Any, factor: int) -> Any:
    """`size * factor`: an int of an int, None where the size is not known, and `Times` of a builder's dimension."""
    if size is None:
        return None
    return size * factor if isinstance(size, int) else Times(size, factor)


@dataclass(frozen=True)
class DataDependent:
    """A size that the kernels write, as one item, to the operator's output `size_output`; never above `upper`."""

    size_output: int
    upper: Any
    """An int, whatever a TensorRT builder calls a dimension, or `Times`."""


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a Triton kernel. Everything that decides its machine code is here."""

    module: str
    """Where the kernel is defined: `trt_plugins.deform_conv.kernel`."""
    function: str
    signature: tuple[tuple[str, str], ...]
    """The arguments that are not constants, in order: `("x", "*fp16")`, `("n", "i32")`."""
    constants: tuple[tuple[str, Constant], ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    @functools.cached_property
    def key(self) -> str:
        """A name that no other form of any kernel has, for files."""
        fields = [self.module, self.function, self.signature, self.constants, self.num_warps, self.num_stages]
        return f"{self.function}-{hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Buffer:
    """A pointer argument: input or output number `index`, or `offset` bytes into the workspace."""

    kind: Literal["input", "output", "workspace"]
    index: int = 0
    offset: int = 0
    dtype: DType = "float32"
    """What the kernel reads there (needed for the workspace, which has no type of its own)."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `arguments` follow its signature. A grid with a 0 in it launches nothing."""

    kernel: KernelSpec
    grid: tuple[int, int, int]
    arguments: tuple[Buffer | int | float, ...]


@dataclass
class Workspace:
    """Lays out scratch memory: `take` gives each part its place, `bytes` is the whole."""

    bytes: int = 0
    parts: dict[str, Buffer] = field(default_factory=dict)

    def take(self, name: str, items: int, dtype: DType) -> Buffer:
        """A part for `items` items."""
        part = Buffer("workspace", 0, self.bytes, dtype)
        self.parts[name] = part
        self.bytes += -(-max(items, 1) * ITEM_BYTES[dtype] // ALIGNMENT) * ALIGNMENT
        return part


def _shortest(value: Any) -> float:
    """The shortest number that 32 bits, in which ONNX and TensorRT keep attributes, do not tell from this one."""
    return float(str(np.float32(value)))


class Operator(ABC):
    """One node of a lowered graph.

    Subclasses are constructed from the node's attributes; a wrong one raises at once. All tensors are dense, in row order ("linear").
    """

    name: ClassVar[str]
    """`DeformConv`; the TensorRT plugin and the ONNX node are called `DynaMaskDeformConv`, so that no parser takes it for its own."""
    attributes: ClassVar[tuple[Attribute, ...]] = ()
    outputs: ClassVar[tuple[str, ...]]
    """Their names, the sizes of data-dependent ones among them."""

    def __init__(self, node: str = "", **values: Any) -> None:
        """Take a node's name (for messages) and its attributes.

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
        """Refuse values that make no sense together.

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
        """Types of the outputs, sizes included (`int64`), for inputs of these types; they are the only combination it takes."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Shapes of the outputs from those of the inputs, whose sizes are ints or a TensorRT builder's dimensions: pass them on, or
        give ints, `times` of them, or `DataDependent`. The size of a data-dependent output is an output itself, of shape `[]`."""

    @abstractmethod
    def kernels(self, inputs: Sequence[TensorSpec]) -> list[KernelSpec]:
        """Every kernel that `launches` may use for inputs of these types and shapes (None where a size may vary)."""

    def workspace(self, inputs: Sequence[TensorSpec]) -> Workspace:
        """Scratch memory for inputs of at most these shapes."""
        return Workspace()

    @abstractmethod
    def launches(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Launch]:
        """What to launch, in order, for these inputs. Data-dependent outputs have room for their largest size, and their own sizes are
        written by the kernels. Nothing is zeroed beforehand: neither outputs nor workspace."""

    def max_output_specs(self, inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """The outputs for inputs of these shapes, data-dependent ones at their largest."""
        shapes = self.output_shapes([spec.shape for spec in inputs])
        types = self.output_types([spec.dtype for spec in inputs])
        return [
            TensorSpec(tuple(size.upper if isinstance(size, DataDependent) else size for size in shape), dtype)
            for shape, dtype in zip(shapes, types, strict=True)
        ]

    def refuse(self, what: str) -> InputError:
        """The sentence for something that does not fit; `what` names the attribute or the input."""
        return InputError(f"{self.node}: {self.name}: {what}.")
