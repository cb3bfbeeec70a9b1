"""Runs a lowered graph without TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from tests.export.sessions import open_session
from trt_plugins.registry import DOMAIN

Arrays = dict[str, npt.NDArray[Any]]
RunOperator = Callable[[onnx.NodeProto, list[npt.NDArray[Any]]], list[npt.NDArray[Any]]]
"""The outputs of one of this project's nodes from its inputs."""


class Interpreter:
    """Runs a lowered graph without TensorRT: standard nodes in ONNX Runtime, a stretch at a time, the others by `run_operator`."""

    def __init__(self, model: onnx.ModelProto, run_operator: RunOperator) -> None:
        self.model, self.run_operator = model, run_operator
        graph = model.graph
        self.constants: Arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        self.stretches = [self._stretch(nodes) for nodes in self._split(list(graph.node))]

    def _split(self, nodes: list[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
        pending: list[onnx.NodeProto] = []
        for node in nodes:
            if node.domain == DOMAIN:
                yield pending
                yield [node]
                pending = []
            else:
                pending.append(node)
        yield pending

    def _stretch(self, nodes: list[onnx.NodeProto]) -> Callable[[Arrays], Arrays]:
        if not nodes:
            return lambda values: {}
        if nodes[0].domain == DOMAIN:
            return lambda values: self._run_operator(nodes[0], values)
        made = [name for node in nodes for name in node.output]
        taken = [name for name in dict.fromkeys(name for node in nodes for name in node.input) if name and name not in made]
        initializers = [onnx.numpy_helper.from_array(self.constants[name], name) for name in taken if name in self.constants]
        inputs = [self.types[name] for name in taken if name not in self.constants]
        graph = helper.make_graph(nodes, "stretch", inputs, [self.types[name] for name in made], initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        session = open_session(model)
        return lambda values: dict(zip(made, session.run(made, {value.name: values[value.name] for value in inputs}), strict=True))

    def _run_operator(self, node: onnx.NodeProto, values: Arrays) -> Arrays:
        found = dict(zip(node.output, self.run_operator(node, [values[name] for name in node.input]), strict=True))
        for name, array in found.items():
            assert array.dtype == helper.tensor_dtype_to_np_dtype(self.types[name].type.tensor_type.elem_type), name
        return found

    def run(self, feeds: Arrays) -> Arrays:
        values = {**self.constants, **feeds}
        for stretch in self.stretches:
            values |= stretch(values)
        return {value.name: values[value.name] for value in self.model.graph.output}
