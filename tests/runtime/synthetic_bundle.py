"""A bundle whose graph has the contract's inputs and outputs, and boxes and masks that are known."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle import Bundle, Manifest, Profile
from runtime.graph import GRIDS
from runtime.instances import ClassName
from runtime.targets.base import EngineOutput

SIDE = 64
SLOTS = 6
BOXES = np.array([[8, 4, 40, 36], [0, 0, 64, 64], [20, 20, 30, 50], [5, 40, 25, 48], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
SCORES = np.array([0.9, 0.8, 0.6, 0.4, 0, 0], np.float32)
LABELS = np.array([1, 0, 1, 0, -1, -1], np.int64)
FREE_GRIDS = [3, 0, 2, 0, -1, -1]
"""What is chosen without budget and override."""
BUDGET_GRIDS = [0, 0, 0, 0, -1, -1]


def manifest(**changes):
    fields = {
        "preset": "synthetic",
        "classes": [ClassName(7, "leaf"), ClassName(3, "star")],
        "canvas": (SIDE, SIDE),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "detections": SLOTS,
        "score_threshold": 0.05,
        "grid_gmacs": {14: 0.1, 28: 0.2, 56: 0.3, 112: 0.4},
        "msm_gmacs": 0.01,
    }
    return Manifest(**fields | changes)


def create(folder, takes_costs=True, **changes):
    """A bundle without engines in `folder`; without `takes_costs` as earlier versions exported it."""
    source = folder.parent / f"{folder.name}.onnx"
    onnx.save(graph(takes_costs), source)
    return Bundle.create(folder, manifest(**changes), {"model.onnx": source})


def graph(takes_costs=True):
    """Features are strided copies of the image, detections are constants, the logits are P2's mean plus the label (+1 or 0).

    A `total_budget` below the cost of four instances at 112 counts as a `budget` does: the smallest grids are chosen.
    """
    tensors = [
        numpy_helper.from_array(value, name)
        for name, value in {
            "const_boxes": BOXES,
            "const_scores": SCORES,
            "const_labels": LABELS,
            "free": np.array(FREE_GRIDS, np.int64),
            "least": np.array(BUDGET_GRIDS, np.int64),
            "zero": np.array(0, np.float32),
            "zero_int": np.array(0, np.int64),
        }.items()
    ]
    nodes = [
        helper.make_node("AveragePool", ["image"], [f"p{level}"], kernel_shape=[2**level] * 2, strides=[2**level] * 2)
        for level in (2, 3, 4, 5)
    ]
    nodes += [helper.make_node("Identity", [f"const_{name}"], [name]) for name in ("boxes", "labels")]
    nodes += [
        helper.make_node("Greater", ["const_scores", "min_score"], ["sure"]),
        helper.make_node("Where", ["sure", "const_scores", "zero"], ["scores"]),
    ]
    nodes += [
        helper.make_node("Greater", ["budget", "zero"], ["limited_mean"]),
        *(_within_total() if takes_costs else [helper.make_node("Identity", ["limited_mean"], ["limited"])]),
        helper.make_node("Where", ["limited", "least", "free"], ["chosen"]),
        helper.make_node("Less", ["grid_override", "zero_int"], ["undecided"]),
        helper.make_node("Where", ["undecided", "chosen", "grid_override"], ["wanted"]),
        helper.make_node("Greater", ["scores", "zero"], ["filled"]),
        helper.make_node("Sub", ["zero_int", "one_int"], ["minus_one"]),
        helper.make_node("Where", ["filled", "wanted", "minus_one"], ["grids"]),
        helper.make_node("ReduceMean", ["p2"], ["level"], keepdims=0),
        helper.make_node("Cast", ["labels"], ["label_values"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["level", "label_values"], ["values"]),
    ]
    tensors.append(numpy_helper.from_array(np.array(1, np.int64), "one_int"))
    for k, grid in enumerate(GRIDS):
        tensors.append(numpy_helper.from_array(np.array(k, np.int64), f"index_{grid}"))
        tensors.append(numpy_helper.from_array(np.zeros((1, grid, grid), np.float32), f"blank_{grid}"))
        nodes += [
            helper.make_node("Equal", ["grids", f"index_{grid}"], [f"here_{grid}"]),
            helper.make_node("NonZero", [f"here_{grid}"], [f"where_{grid}"]),
            helper.make_node("Squeeze", [f"where_{grid}", "axis_0"], [f"slots_{grid}"]),
            helper.make_node("Gather", ["values", f"slots_{grid}"], [f"values_{grid}"]),
            helper.make_node("Unsqueeze", [f"values_{grid}", "axes_12"], [f"spread_{grid}"]),
            helper.make_node("Add", [f"spread_{grid}", f"blank_{grid}"], [f"masks_{grid}"]),
        ]
    tensors += [numpy_helper.from_array(np.array([0]), "axis_0"), numpy_helper.from_array(np.array([1, 2]), "axes_12")]
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info("image", floats, [1, 3, SIDE, SIDE]),
        helper.make_tensor_value_info("min_score", floats, []),
        helper.make_tensor_value_info("budget", floats, []),
        helper.make_tensor_value_info("grid_override", ints, [SLOTS]),
    ]
    if takes_costs:
        inputs += [helper.make_tensor_value_info("total_budget", floats, []), helper.make_tensor_value_info("costs", floats, [2, 4])]
        largest = {"largest": np.array(3, np.int64), "times": np.array([4, 1], np.float32)}
        tensors += [numpy_helper.from_array(value, name) for name, value in largest.items()]
    outputs = [
        helper.make_tensor_value_info("boxes", floats, [SLOTS, 4]),
        helper.make_tensor_value_info("scores", floats, [SLOTS]),
        *(helper.make_tensor_value_info(name, ints, [SLOTS]) for name in ("labels", "grids")),
        *(helper.make_tensor_value_info(f"slots_{grid}", ints, [f"n{grid}"]) for grid in GRIDS),
        *(helper.make_tensor_value_info(f"masks_{grid}", floats, [f"n{grid}", grid, grid]) for grid in GRIDS),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "synthetic", inputs, outputs, tensors), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.checker.check_model(model)
    return model


def _within_total():
    return [
        helper.make_node("Gather", ["costs", "largest"], ["of_largest"], axis=1),
        helper.make_node("Mul", ["of_largest", "times"], ["of_four"]),
        helper.make_node("ReduceSum", ["of_four"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "total_budget"], ["over"]),
        helper.make_node("Greater", ["total_budget", "zero"], ["limits_total"]),
        helper.make_node("And", ["over", "limits_total"], ["limited_total"]),
        helper.make_node("Or", ["limited_mean", "limited_total"], ["limited"]),
    ]


class EngineOfSeveral:
    """Takes up to `most` canvases in a run: another engine, one canvas after the other, its outputs laid end to end."""

    def __init__(self, engine, most):
        self.engine, self.target, self.manifest = engine, engine.target, engine.manifest
        self.profile = Profile(batch=(1, most, most), canvas=(engine.manifest.canvas,) * 3)
        self.counts = []
        """Of each run, how many canvases."""
        self.costs, self.threads, self.takes_costs, self.processor = engine.costs, engine.threads, engine.takes_costs, engine.processor

    def run(self, image, budget_gmacs=None, grid_override=None, min_score=0.0, frames=None, masks_ms=None):
        count = len(image)
        assert count <= self.profile.batch[-1]
        self.counts.append(count)
        overrides = np.full(count * SLOTS, -1 if grid_override is None else grid_override).reshape(count, SLOTS)
        parts = [
            self.engine.run(one[None], budget_gmacs, own, min_score, masks_ms=masks_ms) for one, own in zip(image, overrides, strict=True)
        ]
        masks = {
            grid: (
                np.concatenate([part.masks[grid][0] + SLOTS * b for b, part in enumerate(parts)]),
                np.concatenate([part.masks[grid][1] for part in parts]),
            )
            for grid in GRIDS
        }
        joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels", "grids")]
        return EngineOutput(*joined, masks, {name: sum(part.times_ms[name] for part in parts) for name in ("detector", "masks")})

    def close(self):
        self.engine.close()
