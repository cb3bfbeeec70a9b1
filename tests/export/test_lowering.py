"""Lowering: each rewrite on a few nodes, then a whole graph, computed node by node and built by TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper

from dynamask.model import DynaMask
from export.graph import export_graph
from export.lowering import (
    UNSUPPORTED,
    Lowered,
    check_supported,
    drop_identities,
    lower,
    lower_deform_conv,
    lower_detections,
    lower_proposals,
    lower_pyramid_roi_align,
    lower_reshape,
    lower_resize,
    lower_roi_align,
    lower_routing,
    place_operators,
    replace_between,
)
from export.precision import to_fp16
from export.seams import RPN_DELTAS, RPN_LOGITS, GraphFacts
from runtime.bundle import Profile
from runtime.errors import InputError
from runtime.graph import CONTINUE, DETECTIONS, EXIT, GRIDS, PYRAMID, SLOTS
from tests.export.interpreter import Arrays, Interpreter
from tests.export.portable import CANVAS
from tests.export.sessions import open_session, runnable
from trt_plugins.registry import DOMAIN, OPERATORS

FACTS = GraphFacts(
    canvas=(64, 96),
    strides=(4, 8, 16, 32, 64),
    anchors=tuple((tuple(float(side) * s for s in (-1, -1, 1, 1)),) for side in (8, 16, 32, 64, 128)),  # type: ignore[arg-type]
    proposals_per_level=7,
    proposals=6,
    proposal_nms_threshold=0.7,
    canonical_size=112.0,
    detections=5,
    candidates=50,
    score_threshold=0.25,
    nms_threshold=0.5,
    costs=(0.1, 0.2, 0.3, 0.4),
)
ONE = Profile(canvas=(FACTS.canvas,) * 3)
SEVERAL = Profile(batch=(1, 2, 4), canvas=(FACTS.canvas,) * 3)


class Sketch:
    """A small graph, drawn tensor by tensor."""

    def __init__(self) -> None:
        self.graph = gs.Graph(opset=20)

    def input(self, name: str, shape: list[int | str], dtype: npt.DTypeLike = np.float32) -> gs.Variable:
        tensor = gs.Variable(name, np.dtype(dtype), shape)
        self.graph.inputs.append(tensor)
        return tensor

    def node(self, op: str, inputs: list[Any], name: str, shape: list[int | str], dtype: npt.DTypeLike = np.float32, **attrs: Any) -> Any:
        """A node called after its output; arrays among its inputs become constants."""
        tensors = [x if isinstance(x, gs.Tensor) else gs.Constant(f"{name}/{i}", np.asarray(x)) for i, x in enumerate(inputs)]
        output = gs.Variable(name, np.dtype(dtype), shape)
        self.graph.nodes.append(gs.Node(op, name, attrs, tensors, [output]))
        return output

    def cast(self, tensor: gs.Variable, dtype: npt.DTypeLike, name: str) -> Any:
        return self.node("Cast", [tensor], name, tensor.shape, dtype, to=int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))

    def finish(self, *outputs: gs.Variable) -> gs.Graph:
        self.graph.outputs = list(outputs)
        return self.graph

    def ours(self) -> list[gs.Node]:
        """What is left after cleaning up; nothing but this project's nodes is expected."""
        self.graph.cleanup().toposort()
        assert {node.domain for node in self.graph.nodes} == {DOMAIN}, [node.op for node in self.graph.nodes]
        return list(self.graph.nodes)


def names(tensors: list[gs.Tensor]) -> list[str]:
    return [tensor.name for tensor in tensors]


@pytest.mark.parametrize("follower", ["Relu", "Sigmoid", "Relu and output", "nothing"])
def test_deform_conv_takes_the_relu_that_alone_follows_it(follower: str) -> None:
    sketch = Sketch()
    x, offset = sketch.input("x", ["n", 4, 8, 8]), sketch.input("offset", ["n", 18, 8, 8])
    weight = gs.Constant("model.branch.align.weight", np.zeros((6, 4, 3, 3), np.float32))
    y = sketch.node("DeformConv", [x, weight, offset], "y", ["n", 6, 8, 8], pads=[1, 1, 1, 1], dilations=[1, 1])
    last = y if follower == "nothing" else sketch.node(follower.split()[0], [y], "last", ["n", 6, 8, 8])
    graph = sketch.finish(last, y) if follower == "Relu and output" else sketch.finish(last)
    assert lower_deform_conv(graph, FACTS, ONE) == 1
    graph.cleanup().toposort()
    (operator,) = [placed.operator for placed in place_operators(graph)]
    fixed = {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "offset_group": 1}
    assert operator.values == {**fixed, "relu": follower == "Relu"}
    node = next(node for node in graph.nodes if node.domain == DOMAIN)
    assert (node.op, node.name, names(node.inputs[:3])) == ("DynaMaskDeformConv", "branch/align", ["x", f"{weight.name}/packed", "offset"])
    np.testing.assert_array_equal(node.inputs[3].values, np.zeros(6, np.float32))
    assert [n.op for n in graph.nodes if n.domain != DOMAIN] == [] if follower in ("Relu", "nothing") else [follower.split()[0]]


def test_modulated_deform_conv_keeps_its_bias_and_mask() -> None:
    sketch = Sketch()
    x, offset, mask = sketch.input("x", [2, 4, 8, 8]), sketch.input("offset", [2, 36, 8, 8]), sketch.input("mask", [2, 18, 8, 8])
    weight, bias = np.zeros((4, 4, 3, 3), np.float32), np.ones(4, np.float32)
    y = sketch.node("DeformConv", [x, weight, offset, bias, mask], "y", [2, 4, 8, 8], pads=[1] * 4, offset_group=2)
    lower_deform_conv(sketch.finish(y), FACTS, ONE)
    (node,) = sketch.ours()
    assert names(node.inputs[2:]) == ["offset", "y/3", "mask"] and node.attrs["offset_group"] == 2
    assert len(list(place_operators(sketch.graph))) == 1


def test_deform_conv_in_groups_is_refused() -> None:
    sketch = Sketch()
    x, offset = sketch.input("x", [1, 4, 8, 8]), sketch.input("offset", [1, 18, 8, 8])
    y = sketch.node("DeformConv", [x, np.zeros((4, 2, 3, 3), np.float32), offset], "y", [1, 4, 8, 8], pads=[1] * 4, group=2)
    with pytest.raises(InputError, match="y has 2 groups"):
        lower_deform_conv(sketch.finish(y), FACTS, ONE)


def crop(sketch: Sketch, feature: gs.Variable, boxes: gs.Variable, name: str, size: int, stride: int) -> Any:
    """RoIAlign as the exporter writes it: a column of batch indices before the boxes, cut off again."""
    n = boxes.shape[0]
    index = sketch.node("Slice", [boxes, [0], [1], [1]], f"{name}/column", [n, 1])
    rois = sketch.node("Concat", [index, boxes], f"{name}/rois", [n, 5], axis=1)
    batch = sketch.node("Slice", [rois, [0], [1], [1]], f"{name}/batch", [n, 1])
    batch = sketch.node("Cast", [sketch.node("Squeeze", [batch, [1]], f"{name}/row", [n])], f"{name}/index", [n], np.int64, to=7)
    cut = sketch.node("Slice", [rois, [1], [5], [1]], f"{name}/boxes", [n, 4])
    attributes = {"output_height": size, "output_width": size, "sampling_ratio": 2, "spatial_scale": 1 / stride}
    attributes |= {"mode": "avg", "coordinate_transformation_mode": "output_half_pixel"}
    return sketch.node("RoiAlign", [feature, cut, batch], name, [n, feature.shape[1], size, size], **attributes)


@pytest.mark.parametrize("half", [False, True])
def test_roi_align_takes_the_boxes_themselves_and_maps_of_either_type(half: bool) -> None:
    """In fp16 the casts around it are gone, and what wants fp32 behind it gets a cast of its own."""
    sketch = Sketch()
    kind = np.float16 if half else np.float32
    feature, boxes = sketch.input("feature", [1, 16, 8, 8], kind), sketch.input("boxes", ["n", 4])
    region = crop(sketch, sketch.cast(feature, np.float32, "wide") if half else feature, boxes, "crop", 14, 8)
    narrow = sketch.cast(region, np.float16, "narrow") if half else region
    graph = sketch.finish(sketch.node("Relu", [narrow], "a", region.shape, kind), sketch.node("Relu", [region], "b", region.shape))
    assert lower_roi_align(graph, FACTS, ONE) == 1
    graph.cleanup().toposort()
    (placed,) = place_operators(graph)
    drop_identities(graph)
    graph.cleanup().toposort()
    assert placed.operator.values == {"strides": (8,), "size": 14, "samples": 2, "aligned": 0, "canonical_size": 0.0, "per_image": 0}
    assert [(spec.shape, spec.dtype) for spec in placed.inputs] == [((1, 16, 8, 8), np.dtype(kind).name), ((None, 4), "float32")]
    ops = sorted(node.op for node in graph.nodes)
    assert ops == ["Cast", "DynaMaskRoiAlign", "Relu", "Relu"] if half else ops == ["DynaMaskRoiAlign", "Relu", "Relu"]
    assert {node.name: node.inputs[0].dtype for node in graph.nodes if node.op == "Relu"} == {"a": np.dtype(kind), "b": np.float32}
    onnx.checker.check_model(gs.export_onnx(graph), full_check=False)


def test_roi_align_from_several_images_is_refused() -> None:
    sketch = Sketch()
    region = crop(sketch, sketch.input("feature", [2, 16, 8, 8]), sketch.input("boxes", ["n", 4]), "crop", 14, 8)
    with pytest.raises(InputError, match=r"crop crops from \[2, 16, 8, 8\]"):
        lower_roi_align(sketch.finish(region), FACTS, ONE)


def test_the_pyramids_crops_become_one_launch() -> None:
    sketch = Sketch()
    maps = [sketch.input(name, [1, 16, 32 >> i, 32 >> i]) for i, name in enumerate(PYRAMID)]
    regions = []
    for boxes, region, size in (("proposals", "box_region", 7), ("mask_boxes", "region", 14)):
        rois = sketch.input(boxes, [6, 4] if region == "box_region" else ["n", 4])
        # The order of the levels in the graph is not that of the maps.
        crops = [crop(sketch, maps[i], rois, f"{region}{i}", size, 4 << i) for i in (2, 0, 3, 1)]
        regions.append(sketch.node("Concat", crops, region, [rois.shape[0], 16, size, size], axis=0))
    assert lower_pyramid_roi_align(sketch.finish(*regions), FACTS, ONE) == 2
    first, second = sketch.ours()
    common = {"strides": [4, 8, 16, 32], "samples": 2, "aligned": 0, "canonical_size": 112.0}
    assert (first.attrs, names(first.inputs)) == ({**common, "size": 7}, [*PYRAMID, "proposals"])
    assert (second.attrs, names(second.inputs)) == ({**common, "size": 14}, [*PYRAMID, "mask_boxes"])
    assert [len(placed.inputs) for placed in place_operators(sketch.graph)] == [5, 5]


def test_crops_of_several_images_have_the_slots_of_their_boxes() -> None:
    """Proposals by their rows, the mask branch's boxes by their slots, which follow them from stage to stage."""
    sketch = Sketch()
    maps = [sketch.input(name, [1, 16, 32 >> i, 32 >> i]) for i, name in enumerate(PYRAMID)]
    slots, boxes = sketch.input("slots", ["n"], np.int64), sketch.input("mask_boxes", ["n", 4])
    outputs = []
    for rois, region in ((sketch.input("proposals", [6, 4]), "box_region"), (boxes, "region")):
        crops = [crop(sketch, maps[i], rois, f"{region}{i}", 7, 4 << i) for i in range(4)]
        outputs.append(sketch.node("Concat", crops, region, [rois.shape[0], 16, 7, 7], axis=0))
    for k, size in enumerate((28, 56)):
        boxes = sketch.node("Gather", [boxes, sketch.input(CONTINUE[k], [f"on{k}"], np.int64)], f"boxes_{size}", [f"on{k}", 4], axis=0)
        outputs.append(crop(sketch, maps[2], boxes, f"crop{size}", size, 16))
    graph = sketch.finish(*outputs)
    assert lower_pyramid_roi_align(graph, FACTS, SEVERAL) == 2
    graph.cleanup()
    assert lower_roi_align(graph, FACTS, SEVERAL) == 2
    graph.cleanup().toposort()
    nodes = {node.name: node for node in graph.nodes if node.domain == DOMAIN}
    assert {name: node.attrs["per_image"] for name, node in nodes.items()} == {"box_region": 6, "region": 5, "crop_28": 5, "crop_56": 5}
    assert names(nodes["box_region"].inputs) == [*PYRAMID, "proposals"]
    assert names(nodes["region"].inputs) == [*PYRAMID, "mask_boxes", "slots"]
    at_28, at_56 = nodes["crop_28"].inputs[2], nodes["crop_56"].inputs[2]
    assert at_28.inputs[0].inputs[0] is slots and at_56.inputs[0].inputs[0] is at_28
    assert [tensor.inputs[0].inputs[1].name for tensor in (at_28, at_56)] == [*CONTINUE[:2]]
    assert len(list(place_operators(graph))) == 4


def test_sizes_become_factors() -> None:
    sketch = Sketch()
    x = sketch.input("x", [1, 8, 6, 10])
    none = gs.Variable.empty()
    fixed = sketch.node("Resize", [x, none, none, np.array([1, 8, 12, 20])], "y", [1, 8, 12, 20], mode="nearest")
    graph = sketch.finish(fixed)
    before = open_session(gs.export_onnx(graph, ir_version=10)).run(None, {"x": np.arange(480, dtype=np.float32).reshape(1, 8, 6, 10)})
    assert lower_resize(graph, FACTS, ONE) == 1
    after = open_session(gs.export_onnx(graph, ir_version=10)).run(None, {"x": np.arange(480, dtype=np.float32).reshape(1, 8, 6, 10)})
    np.testing.assert_array_equal(before, after)
    graph.inputs[0].shape = graph.outputs[0].shape = ["b", 8, "h", "w"]
    assert open_session(gs.export_onnx(graph, ir_version=10)).run(None, {"x": np.zeros((2, 8, 3, 4), np.float32)})[0].shape == (2, 8, 6, 8)


def test_reshapes_that_keep_the_rows_copy_their_number() -> None:
    """A size of 0 in place of -1: a public project met an assertion of TensorRT 11.1 with -1 on data-dependent sizes."""
    sketch = Sketch()
    x = sketch.input("x", ["n", 8, 4])
    same = sketch.node("Reshape", [x, np.array([-1, 32])], "same", ["n", 32], allowzero=1)
    other = sketch.node("Reshape", [x, np.array([-1, 4])], "other", ["m", 4], allowzero=1)
    last = sketch.node("Reshape", [x, np.array([4, -1])], "last", [4, "m"])
    graph = sketch.finish(same, other, last)
    assert lower_reshape(graph, FACTS, ONE) == 1
    kept, *others = graph.nodes
    assert kept.inputs[1].values.tolist() == [0, 32] and not kept.attrs.get("allowzero", 0)
    assert [node.inputs[1].values.tolist() for node in others] == [[-1, 4], [4, -1]]


def test_a_pyramid_level_that_is_not_cropped_is_missed() -> None:
    sketch = Sketch()
    maps = [sketch.input(name, [1, 16, 32 >> i, 32 >> i]) for i, name in enumerate(PYRAMID)]
    crops = [crop(sketch, maps[i], boxes, f"{i}", 7, 4 << i) for boxes in [sketch.input("proposals", [6, 4])] for i in (0, 1, 2)]
    sketch.input("mask_boxes", ["n", 4])
    with pytest.raises(InputError, match="box_region is not cropped from each"):
        lower_pyramid_roi_align(sketch.finish(sketch.node("Concat", crops, "box_region", [6, 16, 7, 7], axis=0)), FACTS, ONE)


def between(sketch: Sketch, inputs: list[gs.Tensor], outputs: Mapping[str, tuple[list[int | str], npt.DTypeLike]]) -> list[gs.Variable]:
    """Outputs that depend on all inputs, by two steps each."""
    tensors = []
    for name, (shape, dtype) in outputs.items():
        mixed = sketch.node("NonMaxSuppression", inputs, f"{name}/mixed", ["m", 3], np.int64)
        tensors.append(sketch.node("NonZero", [mixed], name, shape, dtype))
    return tensors


@pytest.mark.parametrize("half", [False, True])
def test_proposals(half: bool) -> None:
    sketch = Sketch()
    kind = np.float16 if half else np.float32
    maps = [
        sketch.input(name, [1, channels, 64 >> 2 + i, max(96 >> 2 + i, 2)], kind)
        for group, channels in ((RPN_LOGITS, 1), (RPN_DELTAS, 4))
        for i, name in enumerate(group)
    ]
    wide = [sketch.cast(tensor, np.float32, f"{tensor.name}_fp32") for tensor in maps] if half else maps
    outputs = {"proposals": ([6, 4], np.float32), "proposal_count": ([1], np.int32)}
    assert lower_proposals(sketch.finish(*between(sketch, wide, outputs)), FACTS, ONE) == 1
    (node,) = sketch.ours()
    assert names(node.inputs[:10]) == [*RPN_LOGITS, *RPN_DELTAS] and names(node.outputs) == list(outputs)
    np.testing.assert_array_equal(node.inputs[10].values, np.array(FACTS.anchors, np.float32))
    strides = [4, 8, 16, 32, 64]
    assert node.attrs == {"strides": strides, "per_level": 7, "proposals": 6, "nms_threshold": 0.7}
    assert len(list(place_operators(sketch.graph))) == 1


def test_detections() -> None:
    sketch = Sketch()
    sketch.input("p2", [1, 16, 16, 24])
    shapes = {"class_logits": [6, 4], "box_deltas": [6, 16], "proposals": [6, 4], "proposal_count": [1], "min_score": []}
    inputs = [sketch.input(name, shape, np.int32 if name == "proposal_count" else np.float32) for name, shape in shapes.items()]
    outputs = dict(zip((*DETECTIONS, "slots"), [([5, 4], np.float32), ([5], np.float32), ([5], np.int64), (["n"], np.int64)], strict=True))
    assert lower_detections(sketch.finish(*between(sketch, inputs, outputs)), FACTS, ONE) == 1
    (node,) = sketch.ours()
    assert names(node.inputs) == [*shapes, "p2"] and names(node.outputs) == [*outputs, "detections/n"]
    assert node.attrs == {"proposals": 6, "stride": 4, "detections": 5, "candidates": 50, "score_threshold": 0.25, "nms_threshold": 0.5}
    assert len(list(place_operators(sketch.graph))) == 1


@pytest.mark.parametrize("profile", [ONE, SEVERAL])
def test_routing(profile: Profile) -> None:
    sketch = Sketch()
    sketch.input("p2", [1, 16, 16, 24])
    shapes: dict[str, Any] = {"msm_logits": ["n", 4], "mask_boxes": ["n", 4], "mask_overrides": ["n"], "slots": ["n"], "budget": []}
    shapes |= {"total_budget": [], "costs": [2, 4]}
    inputs = [sketch.input(name, shape, np.int64 if len(shape) == 1 else np.float32) for name, shape in shapes.items()]
    outputs = {"grids": ([5], np.int64), **{name: ([name], np.int64) for name in (*CONTINUE, *EXIT, *SLOTS)}}
    assert lower_routing(sketch.finish(*between(sketch, inputs, outputs)), FACTS, profile) == 1
    (node,) = sketch.ours()
    sizes = [f"msm_route/continue_{grid}_count" for grid in GRIDS[1:]] + [f"msm_route/exit_{grid}_count" for grid in GRIDS]
    assert names(node.inputs) == [*shapes, "p2"] and names(node.outputs) == [*outputs, *sizes]
    assert node.attrs == {"batch": profile.batch[2], "stride": 4, "detections": 5}
    assert all(tensor.dtype == np.int64 and tensor.shape == [] for tensor in node.outputs[-7:])
    assert len(list(place_operators(sketch.graph))) == 1


def test_routing_of_a_graph_with_its_costs_inside() -> None:
    """As earlier versions exported it: the costs become constants."""
    sketch = Sketch()
    sketch.input("p2", [1, 16, 16, 24])
    shapes = {"msm_logits": ["n", 4], "mask_boxes": ["n", 4], "mask_overrides": ["n"], "slots": ["n"], "budget": []}
    inputs = [sketch.input(name, shape, np.int64 if len(shape) == 1 else np.float32) for name, shape in shapes.items()]
    outputs = {"grids": ([5], np.int64), **{name: ([name], np.int64) for name in (*CONTINUE, *EXIT, *SLOTS)}}
    lower_routing(sketch.finish(*between(sketch, inputs, outputs)), FACTS, ONE)
    (node,) = sketch.ours()
    assert names(node.inputs) == [*shapes, "total_budget", "costs", "p2"]
    np.testing.assert_array_equal(node.inputs[5].values, 0)
    np.testing.assert_array_equal(node.inputs[6].values, np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 0]], np.float32))
    assert len(list(place_operators(sketch.graph))) == 1


def test_replacing_removes_nodes_that_only_fed_the_outputs() -> None:
    sketch = Sketch()
    x = sketch.input("x", [4])
    shared = sketch.node("Abs", [x], "shared", [4])
    y = sketch.node("Neg", [sketch.node("Exp", [shared], "inner", [4])], "y", [4])
    graph = sketch.finish(sketch.node("Relu", [y], "z", [4]), shared)
    replace_between(graph, [x], [y], gs.Node("Ours", "ours", inputs=[x], domain=DOMAIN), sizes=["n"])
    graph.cleanup().toposort()
    assert [node.op for node in graph.nodes if node.op != "Abs"] == ["Ours", "Relu"] and len(graph.nodes) == 3
    assert names(y.inputs[0].outputs) == ["y", "ours/n"]


def test_a_region_that_needs_more_than_its_inputs_is_refused() -> None:
    sketch = Sketch()
    x, other = sketch.input("x", [4]), sketch.input("other", [4])
    y = sketch.node("Add", [x, sketch.node("Exp", [other], "inner", [4])], "y", [4])
    with pytest.raises(InputError, match="y depends on other, and not on x alone"):
        replace_between(sketch.finish(y), [x], [y], gs.Node("Ours", "ours", inputs=[x], domain=DOMAIN))


def test_a_missing_seam_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.onnx has no tensor rpn_logits_0.*export the bundle again"):
        lower_proposals(Sketch().finish(), FACTS, ONE)


def test_an_operator_that_does_not_fit_names_its_node() -> None:
    sketch = Sketch()
    region = crop(sketch, sketch.input("feature", [1, 16, 8, 8]), sketch.input("boxes", ["n", 4], np.float16), "crop", 14, 8)
    lower_roi_align(sketch.finish(region), FACTS, ONE)
    sketch.graph.cleanup().toposort()
    with pytest.raises(InputError, match="crop_14"):
        list(place_operators(sketch.graph))


def test_only_identities_are_dropped() -> None:
    sketch = Sketch()
    row, table = sketch.input("row", ["n"], np.int64), sketch.input("table", [3, 4])
    flat = sketch.node("Reshape", [row, np.array([-1])], "flat", ["n"], np.int64)
    picked = sketch.node("Gather", [sketch.cast(table, np.float32, "same"), flat], "picked", ["n", 4], axis=0)
    other = sketch.node("Reshape", [sketch.cast(picked, np.float16, "half"), np.array([-1])], "other", ["m"], np.float16)
    graph = sketch.finish(other, sketch.node("Reshape", [row, np.array([-1])], "output", ["n"], np.int64))
    assert drop_identities(graph) == 2
    graph.cleanup().toposort()
    assert sorted(node.name for node in graph.nodes) == ["half", "other", "output", "picked"]
    assert names(picked.inputs[0].inputs) == ["table", "row"]


@pytest.mark.parametrize(("op", "domain", "says"), [("NonZero", "", "NonZero"), ("Gelu", "com.microsoft", "com.microsoft::Gelu")])
def test_operators_that_tensorrt_lacks_are_refused(op: str, domain: str, says: str) -> None:
    sketch = Sketch()
    y = sketch.node(op, [sketch.input("x", [4])], "culprit", [4])
    y.inputs[0].domain = domain
    with pytest.raises(InputError, match=f"{says}, which node culprit is"):
        check_supported(sketch.finish(y))


@pytest.fixture(scope="module")
def trt() -> Any:
    """TensorRT for RTX, with this project's plugins."""
    pytest.importorskip("tensorrt_rtx")
    from trt_plugins.plugin import register
    from trt_plugins.tensorrt import load

    module = load("tensorrt-rtx")
    register(module)
    return module


def test_our_refused_operators_are_those_of_the_parser(trt: Any) -> None:
    """And the three that it takes and cannot build."""
    parser = trt.OnnxParser(trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0), trt.Logger(trt.Logger.ERROR))
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    refused = {name for name in standard if not parser.supports_operator(name)}
    assert standard & UNSUPPORTED == refused | {"NonMaxSuppression", "NonZero", "RoiAlign"}


def reference(name: str, inputs: list[torch.Tensor], values: dict[str, Any]) -> list[torch.Tensor]:
    """An operator's outputs by its PyTorch reference."""
    if name == "DeformConv":
        from trt_plugins.deform_conv.reference import deform_conv, unpacked_weight

        x, packed, offset, bias, *mask = inputs
        weight = unpacked_weight(packed, x.shape[1], len(bias), values["kernel_shape"])
        attributes = {key: values[key] for key in ("strides", "pads", "dilations", "relu")}
        return [deform_conv(x, weight, offset, bias, *mask, **attributes)]
    if name == "RoiAlign":
        from trt_plugins.roi_align.reference import roi_align

        maps, rest = inputs[: len(values["strides"])], inputs[len(values["strides"]) :]
        return [roi_align(maps, rest[0], **values, places=rest[1] if len(rest) > 1 else None)]
    if name == "Proposals":
        from trt_plugins.proposals.reference import propose

        return [*propose(inputs[:5], inputs[5:10], inputs[10], **values)]
    if name == "Detections":
        from trt_plugins.detections.reference import detect

        return [*detect(*inputs, **values)]
    from trt_plugins.msm_route.reference import msm_route

    return msm_route(*inputs, **{key: value for key, value in values.items() if key != "batch"})


def interpreter(lowered: Lowered) -> Interpreter:
    """Runs a lowered graph with the operators' references."""
    operators = {placed.operator.node: placed.operator for placed in lowered.operators}

    def run_operator(node: onnx.NodeProto, arrays: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        operator = operators[node.name]
        return [tensor.numpy() for tensor in reference(operator.name, [torch.from_numpy(np.array(x)) for x in arrays], operator.values)]

    return Interpreter(lowered.model, run_operator)


GRID_COSTS = np.array([[0.005, 0.015, 0.03, 0.06], [0.1, 0.1, 0.12, 0.2]], np.float32)


def feeds(budget: float = 0.0, override: npt.ArrayLike = -1, min_score: float = 0.0, total: float = 0.0) -> Arrays:
    image = np.random.default_rng(5).standard_normal((1, 3, *CANVAS), np.float32)
    overrides = np.broadcast_to(np.asarray(override, np.int64), 20).copy()
    scalars = {name: np.array(value, "f") for name, value in (("min_score", min_score), ("budget", budget), ("total_budget", total))}
    return {"image": image, **scalars, "costs": GRID_COSTS, "grid_override": overrides}


CASES = {
    "the MSM decides": feeds(),
    "on a budget": feeds(budget=0.03),
    "within a total": feeds(total=0.5),
    "by size, some given, few": feeds(override=np.arange(20) % 6 - 1, min_score=0.9),
    "none": feeds(min_score=0.9999),
}


@pytest.fixture(scope="module")
def lowered(portable: onnx.ModelProto) -> Lowered:
    return lower(portable)


@pytest.fixture(scope="module")
def half(portable: onnx.ModelProto) -> onnx.ModelProto:
    return to_fp16(portable)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_lowered_graph_agrees_with_the_portable_one(portable: onnx.ModelProto, half: onnx.ModelProto, precision: str) -> None:
    model = portable if precision == "fp32" else half
    lowered_graph = interpreter(lower(model))
    session = open_session(runnable(portable) if precision == "fp32" else to_fp16(runnable(portable)))
    outputs = [value.name for value in session.get_outputs()]
    counts = {}
    for name, values in CASES.items():
        wanted, found = dict(zip(outputs, session.run(None, values), strict=True)), lowered_graph.run(values)
        counts[name] = [len(wanted[slots]) for slots in SLOTS]
        assert list(found) == outputs
        # Half precision: logits of the two differ in the last bits of fp16, as ONNX Runtime computes some operators in fp32.
        tolerance = {"atol": 1e-3, "rtol": 1e-3} if precision == "fp32" else {"atol": 0.1, "rtol": 0.02}
        for output in outputs:
            np.testing.assert_allclose(found[output], wanted[output], **tolerance, err_msg=f"{name}: {output}")
    assert min(counts["the MSM decides"]) > 0 and 0 < sum(counts["by size, some given, few"]) < 20 and sum(counts["none"]) == 0


def test_a_batch_agrees_with_each_image_alone(portable: onnx.ModelProto) -> None:
    session = open_session(runnable(portable))
    lowered_graph = interpreter(lower(portable, Profile(batch=(1, 2, 4), canvas=(CANVAS,) * 3)))
    outputs = [value.name for value in session.get_outputs()]
    images = np.random.default_rng(6).standard_normal((3, 1, 3, *CANVAS), np.float32)
    images[1] = 0  # Nothing is found in a blank image, between two that have something.
    overrides = np.arange(60).reshape(3, 20) % 6 - 1
    common = {name: value for name, value in feeds(min_score=0.9).items() if name not in ("image", "grid_override")}
    alone = [
        dict(zip(outputs, session.run(None, {**common, "image": image, "grid_override": row}), strict=True))
        for image, row in zip(images, overrides, strict=True)
    ]
    together = lowered_graph.run({**common, "image": images[:, 0], "grid_override": overrides.reshape(-1)})
    counts = [sum(len(found[slots]) for slots in SLOTS) for found in alone]
    assert counts[1] < min(counts[0], counts[2])
    for image, found in enumerate(alone):
        for name in (*DETECTIONS, "grids"):
            np.testing.assert_allclose(together[name][20 * image :][:20], found[name], atol=1e-3, rtol=1e-3, err_msg=f"{image}: {name}")
        for grid, slots in zip((14, 28, 56, 112), SLOTS, strict=True):
            mine = together[slots] // 20 == image
            np.testing.assert_array_equal(together[slots][mine] % 20, found[slots])
            np.testing.assert_allclose(together[f"masks_{grid}"][mine], found[f"masks_{grid}"], atol=1e-3, rtol=1e-3)


def test_another_canvas_agrees_with_a_graph_of_that_canvas(model: DynaMask, portable: onnx.ModelProto, tmp_path: Path) -> None:
    canvas = (96, 192)
    export_graph(model, tmp_path / "other.onnx", canvas)
    session = open_session(runnable(onnx.load(tmp_path / "other.onnx")))
    image = np.random.default_rng(7).standard_normal((1, 3, *canvas), np.float32)
    values = {**feeds(override=np.arange(20) % 6 - 1), "image": image}
    wanted = dict(zip([value.name for value in session.get_outputs()], session.run(None, values), strict=True))
    assert min(len(wanted[slots]) for slots in SLOTS) > 0
    for canvases in (((64, 96), (128, 160), (160, 192)), (canvas,) * 3):
        found = interpreter(lower(portable, Profile(canvas=canvases))).run(values)
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, atol=1e-3, rtol=1e-3, err_msg=name)


def test_a_profile_shows_in_inputs_and_outputs(portable: onnx.ModelProto) -> None:
    def shapes(profile: Profile) -> dict[str, list[int | str]]:
        graph = lower(portable, profile).model.graph
        return {
            value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }

    fixed, varying = (
        shapes(Profile(batch=(3, 3, 3), canvas=(CANVAS,) * 3)),
        shapes(Profile(batch=(1, 2, 4), canvas=((64, 96), CANVAS, CANVAS))),
    )
    assert (fixed["image"], fixed["grid_override"], fixed["boxes"], fixed["grids"]) == ([3, 3, *CANVAS], [60], [60, 4], [60])
    assert (varying["image"], varying["boxes"]) == (["batch", 3, "", ""], ["20 x batch", 4])
    assert varying["min_score"] == varying["budget"] == [] and varying["costs"] == [2, 4] and varying["masks_28"] == ["n_28", 28, 28]


def test_every_input_has_a_range(portable: onnx.ModelProto) -> None:
    fixed = lower(portable, Profile(batch=(2, 2, 2), canvas=((64, 96),) * 3)).ranges
    scalars = dict.fromkeys(("min_score", "budget", "total_budget"), ((),) * 3)
    assert fixed == {"image": ((2, 3, 64, 96),) * 3, **scalars, "costs": ((2, 4),) * 3, "grid_override": ((40,),) * 3}
    assert lower(portable).ranges["image"] == ((1, 3, *CANVAS),) * 3
    ranges = lower(portable, Profile(batch=(1, 2, 4), canvas=((64, 96), CANVAS, CANVAS))).ranges
    assert ranges["image"] == ((1, 3, 64, 96), (2, 3, *CANVAS), (4, 3, *CANVAS)) and ranges["grid_override"] == ((20,), (40,), (80,))


def test_lowering_leaves_the_portable_graph_as_it_is(portable: onnx.ModelProto) -> None:
    before = portable.SerializeToString(deterministic=True)
    lowered = lower(portable)
    assert portable.SerializeToString(deterministic=True) == before
    for field in ("input", "output"):
        assert list(getattr(lowered.model.graph, field)) == list(getattr(portable.graph, field))
    assert list(lowered.model.metadata_props) == list(portable.metadata_props)


def test_every_kind_of_operator_is_placed(lowered: Lowered) -> None:
    placed = [placed.operator.name for placed in lowered.operators]
    assert {name: placed.count(name) for name in OPERATORS} == {
        "DeformConv": 6,
        "RoiAlign": 5,
        "Proposals": 1,
        "Detections": 1,
        "MsmRoute": 1,
    }
    nodes = [node for node in lowered.model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [f"DynaMask{name}" for name in placed]
    assert {"box_region", "region", "crop_112", "mask_branch/rfpn/stages/2/align"} <= {node.name for node in nodes}
    relus = [placed.operator.values["relu"] for placed in lowered.operators if placed.operator.name == "DeformConv"]
    assert sorted(relus) == [0, 0, 0, 1, 1, 1]
    assert [rewrite.count for rewrite in lowered.rewrites if rewrite.name != "identities"] == [1, 1, 1, 2, 3, 6, 3, 10]


def test_half_precision_goes_straight_into_the_operators(half: onnx.ModelProto) -> None:
    """The casts that are left are those of the graph's own inputs and outputs, and decisions stay in fp32."""
    lowered = lower(half)
    casts = [node for node in lowered.model.graph.node if node.op_type == "Cast"]
    assert sorted(name for node in casts for name in node.output) == ["image_fp16", "masks_112", "masks_14", "masks_28", "masks_56"]
    for placed in lowered.operators:
        kinds = [spec.dtype for spec in placed.inputs]
        features = {"DeformConv": 4, "RoiAlign": len(kinds) - 1, "Proposals": 10, "Detections": 2, "MsmRoute": 1}[placed.operator.name]
        if placed.operator.name in ("Detections", "MsmRoute"):
            assert kinds.pop() == "float16"  # P2, of which they need the size
        assert set(kinds[:features]) == {"float16"} and "float16" not in kinds[features:], placed.operator.node


VARYING = Profile(batch=(1, 2, 4), canvas=((64, 96), CANVAS, CANVAS))


@pytest.mark.parametrize(("precision", "profile"), [("fp32", None), ("fp16", None), ("fp16", VARYING)])
def test_tensorrt_for_rtx_builds_it(
    trt: Any, portable: onnx.ModelProto, half: onnx.ModelProto, precision: str, profile: Profile | None
) -> None:
    from trt_plugins.plugin import register

    lowered = lower(portable if precision == "fp32" else half, profile)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    with register(trt).raising():
        assert parser.parse(lowered.model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        config = builder.create_builder_config()
        ranges = builder.create_optimization_profile()
        for name, shapes in lowered.ranges.items():
            ranges.set_shape(name, *shapes)
        config.add_optimization_profile(ranges)
        engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 100_000
    types = {TensorProto.FLOAT: trt.float32, TensorProto.INT64: trt.int64}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    for value in lowered.model.graph.output:
        shape = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        found = outputs[value.name]
        assert (list(found.shape), found.dtype) == (shape, types[value.type.tensor_type.elem_type]), value.name
