"""The portable ONNX graph of a DynaMask: standard operators only, static detection slots, the mask branch routed inside."""

from __future__ import annotations

import collections
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from dynamask.config import GRIDS
from dynamask.inference import detect, segment
from dynamask.model import DynaMask
from runtime.files import atomic_path

OPSET = 20
INPUTS = ("image", "min_score", "budget", "grid_override")
DETECTIONS = ("boxes", "scores", "labels")
PYRAMID = ("p2", "p3", "p4", "p5")
MASKS = ("grids", *(f"slots_{g}" for g in GRIDS), *(f"masks_{g}" for g in GRIDS))


class InferenceGraph(nn.Module):
    """The inference pass as one module: `INPUTS` -> `DETECTIONS`, `MASKS` and `PYRAMID`, flat.

    The pyramid is among the outputs only so that its tensors get their names; `export_graph` takes it out again.
    """

    def __init__(self, model: DynaMask) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, min_score: Tensor, budget: Tensor, grid_override: Tensor) -> tuple[Tensor, ...]:
        pyramid, detections = detect(self.model, image, min_score)
        canvas = (image.shape[-2], image.shape[-1])
        masks = segment(self.model.mask_branch, pyramid, detections, canvas, budget, grid_override)
        return (*detections, masks.grids, *masks.slots, *masks.logits, *pyramid)


def export_graph(model: DynaMask, path: Path, canvas: tuple[int, int]) -> dict[str, int]:
    """Write the model's ONNX graph for one canvas (height, width); returns how many nodes of each operator it has.

    Names and shapes of inputs, outputs and inner boundary tensors are those of docs/architecture.md.
    """
    slots = model.config.model.detections
    example = (torch.zeros(1, 3, *canvas), torch.tensor(0.0), torch.tensor(0.0), torch.full((slots,), -1, dtype=torch.int64))
    # The exporter counts steps on standard output and warns about its own and torchvision's deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            InferenceGraph(model).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=(*DETECTIONS, *MASKS, *PYRAMID),
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _hide_pyramid(graph)
    _name_counts(graph)
    _drop_traces(graph)
    onnx.checker.check_model(graph, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save(graph, temporary)
    return dict(sorted(collections.Counter(node.op_type for node in graph.graph.node).items()))


def _hide_pyramid(model: onnx.ModelProto) -> None:
    """P2..P5 stop being outputs, and stay as named and typed tensors inside."""
    hidden = [value for value in model.graph.output if value.name in PYRAMID]
    for value in hidden:
        model.graph.output.remove(value)
    present = {value.name for value in model.graph.value_info}
    boundary = [value for value in model.graph.output if value.name in DETECTIONS]
    model.graph.value_info.extend(value for value in [*hidden, *boundary] if value.name not in present)


def _name_counts(model: onnx.ModelProto) -> None:
    """The data-dependent sizes, named by the exporter in order of appearance (u11), are called n_14 to n_112."""
    names = {}
    for grid in GRIDS:
        output = next(value for value in model.graph.output if value.name == f"slots_{grid}")
        names[output.type.tensor_type.shape.dim[0].dim_param] = f"n_{grid}"
    for value in [*model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def _drop_traces(model: onnx.ModelProto) -> None:
    """Stack traces and module hierarchies hold paths of the machine that exported, and a third of a small graph's bytes."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]:
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
