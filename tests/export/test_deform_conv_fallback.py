"""The substitute for DeformConv against torchvision's operator, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.ops import deform_conv2d

from export.deform_conv_fallback import replace_deform_conv
from runtime.errors import DynaMaskError


def one_node(weight, bias, height, width, opset=20, **attributes):
    shape = ["n", weight.shape[1], height, width]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    offset = helper.make_tensor_value_info("offset", TensorProto.FLOAT, ["n", 18, height, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[0], height, width])
    weights = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    node = helper.make_node("DeformConv", ["x", "weight", "offset", "bias"], ["y"], kernel_shape=[3, 3], pads=[1] * 4, **attributes)
    return helper.make_model(
        helper.make_graph([node], "g", [x, offset], [y], weights), opset_imports=[helper.make_opsetid("", opset)], ir_version=9
    )


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("opset", [19, 20])
def test_it_samples_as_torchvision_does(count, opset):
    random = np.random.default_rng(count)
    weight, bias = (random.normal(size=size).astype(np.float32) for size in ((5, 4, 3, 3), 5))
    x, offset = random.normal(size=(count, 4, 9, 14)), random.normal(size=(count, 18, 9, 14)) * 3
    model = one_node(weight, bias, 9, 14, opset)
    assert replace_deform_conv(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node}.isdisjoint({"DeformConv"})
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.astype(np.float32), "offset": offset.astype(np.float32)})
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (x, offset, weight, bias)]
    expected = deform_conv2d(*tensors, padding=1).numpy() if count else np.zeros((0, 5, 9, 14))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=2e-4)


def test_strides_groups_and_masks_are_refused():
    weight, bias = np.zeros((4, 4, 3, 3), np.float32), np.zeros(4, np.float32)
    for attributes in ({"strides": [2, 2]}, {"offset_group": 2}):
        with pytest.raises(DynaMaskError, match="cannot be rewritten"):
            replace_deform_conv(one_node(weight, bias, 8, 8, **attributes))
