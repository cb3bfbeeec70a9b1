"""Replaces `DeformConv` for ONNX Runtimes that lack it: `GridSample` samples the position of each tap, and a 1 x 1 `Conv` sums the taps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from runtime.errors import DynaMaskError


def replace_deform_conv(model: onnx.ModelProto) -> int:
    """Rewrite, in place, every `DeformConv` whose stride, groups and offset groups are 1 and that has no mask; returns how many.

    The model's value_info must hold the static channels, height and width of the nodes' inputs (`onnx.shape_inference`); N may vary.

    Raises:
        DynaMaskError: a node is of another kind, or its shapes or weights are not known.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    # The bilinear mode is called `bilinear` up to opset 19, and `linear` from 20 on.
    mode = "linear" if opset >= 20 else "bilinear"
    known = _Known(model.graph)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "DeformConv":
            nodes += _sampled_convolution(node, known, mode, f"deform_conv_{count}")
            count += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(known.added)
    return count


class _Known:
    """The known shapes and constants of a graph, and the constants that are added to it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._values = {value.name: value for value in itertools.chain(graph.value_info, graph.input, graph.output)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._constants.update(
            (node.output[0], node.attribute[0].t) for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"
        )
        self.added: list[onnx.TensorProto] = []

    def size(self, name: str) -> tuple[int, int]:
        """Height and width of a tensor `[N, C, H, W]`."""
        shape = self._values[name].type.tensor_type.shape.dim if name in self._values else []
        if len(shape) != 4 or not all(dim.HasField("dim_value") for dim in shape[2:]):
            raise DynaMaskError(f"DeformConv cannot be rewritten: the height and width of {name} are not known; export the model again.")
        return shape[2].dim_value, shape[3].dim_value

    def constant(self, name: str) -> npt.NDArray[Any]:
        if name not in self._constants:
            raise DynaMaskError(f"DeformConv cannot be rewritten: its weight {name} is not a constant; export the model again.")
        return numpy_helper.to_array(self._constants[name])

    def add(self, name: str, value: npt.NDArray[Any]) -> str:
        self.added.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def _sampled_convolution(node: onnx.NodeProto, known: _Known, mode: str, prefix: str) -> list[onnx.NodeProto]:
    image, weight_name, offset, *rest = node.input
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if (
        any(attributes.get(name, 1) != 1 for name in ("group", "offset_group"))
        or any(step != 1 for step in attributes.get("strides", []))
        or (len(rest) > 1 and rest[1])
    ):
        raise DynaMaskError(
            f"DeformConv {node.name} has a stride, groups or a mask, so it cannot be rewritten; install a newer onnxruntime."
        )
    weight = known.constant(weight_name)
    outputs, channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    height, width = known.size(offset)
    scale, base = _positions(known.size(image), (height, width), kernel, attributes)

    def name(part: str) -> str:
        return f"{prefix}/{part}"

    def ints(part: str, values: list[int]) -> str:
        return known.add(name(part), np.array(values, np.int64))

    # A 0 in a shape of Reshape keeps the size N, which may be 0.
    return [
        helper.make_node("Reshape", [offset, ints("taps_shape", [0, taps, 2, height, width])], [name("taps")]),
        helper.make_node("Transpose", [name("taps")], [name("yx")], perm=[0, 1, 3, 4, 2]),
        helper.make_node("Gather", [name("yx"), ints("swap", [1, 0])], [name("xy")], axis=4),
        helper.make_node("Mul", [name("xy"), known.add(name("scale"), scale)], [name("scaled")]),
        helper.make_node("Add", [name("scaled"), known.add(name("base"), base)], [name("positions")]),
        helper.make_node("Reshape", [name("positions"), ints("grid_shape", [0, taps * height, width, 2])], [name("grid")]),
        helper.make_node("GridSample", [image, name("grid")], [name("samples")], mode=mode, padding_mode="zeros", align_corners=0),
        helper.make_node("Reshape", [name("samples"), ints("columns_shape", [0, channels * taps, height, width])], [name("columns")]),
        helper.make_node(
            "Conv",
            [name("columns"), known.add(name("weight"), weight.reshape(outputs, channels * taps, 1, 1)), *rest[:1]],
            [node.output[0]],
            name=node.name,
        ),
    ]


def _positions(
    image: tuple[int, int], output: tuple[int, int], kernel: list[int], attributes: dict[str, Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A factor `[2]` and a summand `[1, taps, H, W, 2]`, both xy, that turn offsets in pixels into the coordinates of `GridSample`.

    These are -1 and 1 at the edges of the image.
    """
    pads, dilations = attributes.get("pads", [0, 0, 0, 0]), attributes.get("dilations", [1, 1])
    row, column, y, x = np.meshgrid(*(np.arange(count) for count in (*kernel, *output)), indexing="ij")
    pixel = np.stack([x - pads[1] + column * dilations[1], y - pads[0] + row * dilations[0]], axis=-1).reshape(1, -1, *output, 2)
    size = np.array([image[1], image[0]])
    return (2 / size).astype(np.float32), ((2 * pixel + 1) / size - 1).astype(np.float32)
