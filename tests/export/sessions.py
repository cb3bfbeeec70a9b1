"""ONNX Runtime's sessions for the tests of export."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime

from export.deform_conv_fallback import replace_deform_conv
from runtime.targets.onnxruntime import has_deform_conv


def open_session(model: onnx.ModelProto) -> Any:
    """A session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, or a copy without `DeformConv` where the installed ONNX Runtime lacks that operator."""
    if has_deform_conv():
        return model
    copy = onnx.shape_inference.infer_shapes(model)
    replace_deform_conv(copy)
    return copy
