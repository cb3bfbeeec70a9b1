"""The fp16 form of a graph: what is halved, what is not, and what it changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dynamask.model import DynaMask
from export.deform_conv_fallback import replace_deform_conv
from export.precision import DECISIONS, PREDICTIONS, emulate_fp16, to_fp16
from export.seams import read_facts
from runtime.errors import InputError
from runtime.targets.onnxruntime import has_deform_conv
from tests.export.sessions import open_session

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def small_graph(weight: float = 2.0) -> onnx.ModelProto:
    """`class_logits = 2 image`; `boxes = (class_logits + 0.1) * 3`; `masks = 2 class_logits`; RoIAlign of the image at `boxes`."""
    nodes = [
        helper.make_node("Mul", ["image", "weight"], ["class_logits"], "predict"),
        helper.make_node("Add", ["class_logits", "tenth"], ["shifted"], "shift"),
        helper.make_node("Mul", ["shifted", "three"], ["boxes"], "decode"),
        helper.make_node("Mul", ["class_logits", "weight"], ["masks"], "mask"),
        helper.make_node("Reshape", ["class_logits", "map_shape"], ["map"], "map"),
        helper.make_node("Resize", ["map", "", "scales"], ["larger"], "enlarge", mode="nearest"),
        helper.make_node("RoiAlign", ["larger", "boxes", "index"], ["crops"], "align", output_height=2, output_width=2, sampling_ratio=1),
        helper.make_node("Identity", ["crops"], ["region"], "pass"),
    ]
    constants = {
        "weight": np.array(weight, np.float32),
        "tenth": np.array(0.1, np.float32),
        "three": np.array(3, np.float32),
        "map_shape": np.array([1, 1, 2, 4]),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "index": np.zeros(2, np.int64),
    }
    outputs = {"boxes": [2, 4], "masks": [2, 4], "region": [2, 1, 2, 2]}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", FLOAT, [2, 4])],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    found = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(model)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def test_the_network_is_halved_and_decisions_are_not() -> None:
    found = types(to_fp16(small_graph()))
    halves = {name for name, kind in found.items() if kind == HALF}
    assert halves == {"image_fp16", "weight_fp16", "class_logits", "masks_fp16", "map", "larger", "crops_fp16", "region_fp16"}
    singles = {name for name, kind in found.items() if kind == FLOAT}
    decided = {"class_logits_fp32", "tenth", "three", "shifted", "boxes", "larger_fp32", "crops"}
    assert singles == decided | {"image", "scales", "masks", "region"}


def test_only_the_network_rounds() -> None:
    """Against NumPy's half precision; 1000.3 + 0.1 has no place in fp16, nor has the product."""
    image = np.array([[1000.3, 0.2, 3.3, 7.7], [500.1, 1.1, 2.2, 3.3]], np.float32)
    found = run(emulate_fp16(to_fp16(small_graph())), {"image": image})
    logits = image.astype(np.float16) * np.float16(2)
    np.testing.assert_array_equal(found["boxes"], (logits.astype(np.float32) + np.float32(0.1)) * np.float32(3))
    np.testing.assert_array_equal(found["masks"], (logits * np.float16(2)).astype(np.float32))


def test_the_graph_given_stays_as_it_is() -> None:
    model = small_graph()
    before = model.SerializeToString()
    to_fp16(model)
    assert model.SerializeToString() == before


def test_a_weight_beyond_the_range_is_named() -> None:
    with pytest.raises(InputError, match=r"weight holds 7e\+04.*fp32"):
        to_fp16(small_graph(weight=70_000))


def test_a_graph_without_seams_is_refused() -> None:
    model = small_graph()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["logits" if name == "class_logits" else name for name in names]
    with pytest.raises(InputError, match="export the bundle again"):
        to_fp16(model)


def test_the_portable_graph_is_halved(portable: onnx.ModelProto) -> None:
    half = to_fp16(portable)
    before, after = types(portable), types(half)
    layers = [node for node in half.graph.node if node.op_type in ("Conv", "DeformConv", "Gemm", "MatMul")]
    assert len(layers) > 30 and {after[name] for node in layers for name in [*node.input, *node.output] if name} == {HALF}
    interfaces = [value.name for value in [*half.graph.input, *half.graph.output]]
    assert {name: after[name] for name in interfaces} == {name: before[name] for name in interfaces}
    assert all(after[name] == HALF for name in PREDICTIONS) and all(after[name] == before[name] for name in DECISIONS)
    assert {after[node.input[1]] for node in half.graph.node if node.op_type == "RoiAlign"} == {FLOAT}
    assert read_facts(half) == read_facts(portable)


@pytest.mark.parametrize("with_deform_conv", [True, False])
def test_the_halved_graph_finds_the_same(portable: onnx.ModelProto, model: DynaMask, with_deform_conv: bool) -> None:
    """Also where DeformConv was replaced by standard operators, for ONNX Runtimes without it."""
    if with_deform_conv and not has_deform_conv():
        pytest.skip("this ONNX Runtime has no DeformConv")
    portable = onnx.shape_inference.infer_shapes(portable)
    assert with_deform_conv or replace_deform_conv(portable) == 6
    random = np.random.default_rng(5)
    feeds = {
        "image": random.standard_normal((1, 3, *model.config.model.canvas)).astype(np.float32),
        "min_score": np.zeros((), np.float32),
        "budget": np.zeros((), np.float32),
        "total_budget": np.zeros((), np.float32),
        "costs": np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32),
        "grid_override": np.full(model.config.model.detections, 3),
    }
    single, half = run(portable, feeds), run(emulate_fp16(to_fp16(portable)), feeds)
    slots = single["slots_112"]
    assert len(slots) > 10 and half["slots_112"].tolist() == slots.tolist()
    # Near-equal scores may swap slots.
    distance = np.abs(half["boxes"][None] - single["boxes"][:, None])[slots].max(axis=2)
    nearest = distance.argmin(axis=1)
    assert 0 < distance.min(axis=1).max() < 0.5 and (half["labels"][nearest] == single["labels"][slots]).all()
    np.testing.assert_allclose(half["scores"][nearest], single["scores"][slots], atol=0.01)
    np.testing.assert_allclose(half["masks_112"][nearest], single["masks_112"], atol=0.02 * np.abs(single["masks_112"]).max())
