"""Half precision: the network in fp16, and the decisions on its predictions (boxes, grids) in fp32.

The graph stays strongly typed: every change of type is a `Cast` node. ONNX Runtime's own converter is not used, because it rounds every
tensor between two fp32 nodes to fp16 and back, box coordinates included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper

from export.seams import RPN_DELTAS, RPN_LOGITS
from runtime.errors import InputError
from runtime.graph import DETECTIONS, SLOTS

PREDICTIONS = (*RPN_LOGITS, *RPN_DELTAS, "class_logits", "box_deltas", "msm_logits")
"""The last tensors of the network; decisions begin here."""
DECISIONS = (*DETECTIONS, "grids", *SLOTS)
"""The last tensors of the decisions. The RoIs that RoIAlign takes are decisions too."""
MONOTONE = ("Relu", "Clip")
"""Rounding before them gives the same result as rounding after them: engines fuse them with the node before."""
SUFFIXES: Mapping[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def to_fp16(model: ModelProto) -> ModelProto:
    """A copy of a DynaMask graph with weights and activations in fp16; inputs and outputs keep their types.

    The nodes between `PREDICTIONS` and `DECISIONS` (decoding, NMS, routing), RoI coordinates and RoIAlign itself stay in fp32. The graph
    may also be one of the two parts of an ONNX Runtime engine.

    Raises:
        InputError: the graph has none of the tensors `PREDICTIONS`, or a weight is outside fp16's range.
    """
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    if not any(name in PREDICTIONS for node in graph.node for name in node.output):
        raise InputError(f"The graph holds none of the tensors {', '.join(PREDICTIONS)}, so it has no fp16 form; export the bundle again.")
    _Conversion(graph, _opset(model)).run()
    onnx.checker.check_model(model)
    # Strict: a type that does not fit is an error here, not in the engine builder.
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def emulate_fp16(model: ModelProto) -> ModelProto:
    """A graph of `to_fp16` for machines that compute in fp32: every node computes in fp32, and its result is rounded to fp16.

    Without this, ONNX Runtime puts casts around nodes that it cannot run in fp16, and then removes every pair of casts, and the rounding.
    """
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    halves |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes: list[NodeProto] = []
    # Name of an fp16 tensor -> of the same values in fp32, and -> of the values before they were rounded.
    wide: dict[str, str] = {}
    exact: dict[str, str] = {}
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast":
            continue
        for name in sorted(halves.intersection(node.input) - wide.keys()):
            wide[name] = f"{name}_wide"
            nodes.insert(-1, _cast(name, wide[name], TensorProto.FLOAT))
        values = wide | exact if node.op_type in MONOTONE else wide
        node.input[:] = [values.get(name, name) for name in node.input]
        for index, name in enumerate(node.output):
            if name in halves:
                node.output[index] = exact[name] = f"{name}_exact"
                nodes.append(_cast(exact[name], name, TensorProto.FLOAT16))
    _replace(graph.node, nodes)
    return emulated


def fp32_nodes(graph: GraphProto) -> set[str]:
    """The outputs of the nodes that stay in fp32: RoIAlign, and the nodes between `PREDICTIONS` and `DECISIONS` or a RoI."""
    producers = {name: node for node in graph.node for name in node.output}
    aligns = [node for node in graph.node if node.op_type == "RoiAlign"]
    found = {name for node in aligns for name in node.output}
    waiting = [name for node in aligns for name in node.input[1:]] + list(DECISIONS)
    while waiting:
        name = waiting.pop()
        if name in producers and name not in found and name not in PREDICTIONS:
            found.update(producers[name].output)
            waiting += producers[name].input
    return found


class _Conversion:
    """One pass over the nodes, in order: each gets its inputs in the type in which it computes."""

    def __init__(self, graph: GraphProto, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.fp32 = fp32_nodes(graph)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = [*graph.input, *graph.output, *graph.value_info]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.floats = {name for name, kind in self.types.items() if kind == TensorProto.FLOAT}
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            kind = TensorProto.FLOAT if node.output[0] in self.fp32 else TensorProto.FLOAT16
            admits = self._admits_fp16(node)
            for index, name in enumerate(node.input):
                if name in self.floats:
                    node.input[index] = self._in_type(name, kind if admits(index) else TensorProto.FLOAT)
            if kind == TensorProto.FLOAT16:
                _halve_attributes(node)
            self.types |= {name: kind for name in node.output if name in self.floats}
            self.nodes.append(node)
        self._restore_outputs()
        _replace(self.graph.node, self.nodes)
        used = {name for node in self.nodes for name in node.input}
        _replace(self.graph.initializer, [tensor for name, tensor in self.constants.items() if name in used])
        for value in self.graph.value_info:
            value.type.tensor_type.elem_type = self.types[value.name]

    def _admits_fp16(self, node: NodeProto) -> Callable[[int], bool]:
        """Whether the operator takes its input number i in fp16; some inputs, such as the scales of `Resize`, are always fp32."""
        schema = defs.get_schema(node.op_type, self.opset, node.domain)
        last = len(schema.inputs) - 1
        return lambda index: "tensor(float16)" in schema.inputs[min(index, last)].types

    def _in_type(self, name: str, kind: int) -> str:
        """The name of a tensor in a type: its own, that of a converted constant, or that of a `Cast`'s output, added once."""
        if self.types[name] == kind:
            return name
        other = f"{name}_{SUFFIXES[kind]}"
        if other not in self.types:
            self.types[other] = kind
            if name in self.constants:
                self.constants[other] = _halved(self.constants[name], other)
            else:
                self.nodes.append(_cast(name, other, kind))
        return other

    def _restore_outputs(self) -> None:
        """Cast outputs that became fp16 back to fp32, under their name."""
        halves = {name: f"{name}_fp16" for name in (value.name for value in self.graph.output) if self.types[name] == TensorProto.FLOAT16}
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [halves.get(name, name) for name in names]
        for name, half in halves.items():
            self.nodes.append(_cast(half, name, TensorProto.FLOAT))
            self.types[name] = TensorProto.FLOAT


def _cast(source: str, destination: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [destination], name=f"{destination}_cast", to=kind)


def _halve_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_halved(attribute.t, attribute.t.name))
        elif (node.op_type, attribute.name, attribute.i) == ("Cast", "to", TensorProto.FLOAT):
            attribute.i = TensorProto.FLOAT16


def _halved(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half[np.isfinite(values)]).all():
        raise InputError(f"The weight {tensor.name} holds {np.abs(values).max():.4g}, beyond fp16's range of 65504; build it in fp32.")
    return numpy_helper.from_array(half, name)


def _opset(model: ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _replace(field: Any, values: Iterable[Any]) -> None:
    del field[:]
    field.extend(values)
