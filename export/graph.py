"""The portable ONNX graph of a DynaMask: standard operators only, static detection slots, the mask branch routed inside."""

from __future__ import annotations

import collections
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from dynamask.detector import CANDIDATES_PER_DETECTION, RPN_NMS_THRESHOLD
from dynamask.mask_branch import DynamicMaskBranch
from dynamask.model import DynaMask
from dynamask.msm import Budget
from export.seams import DETECTOR_SEAMS, MASK_SEAMS, GraphFacts, write_facts
from runtime.files import atomic_path
from runtime.graph import DETECTIONS, GRIDS, INPUTS, MSM, OUTPUTS

OPSET = 20


class InferenceGraph(nn.Module):
    """The inference pass as one module: `INPUTS` -> `OUTPUTS`, `DETECTOR_SEAMS` and `MASK_SEAMS`, flat.

    The seams are among the outputs only so that their tensors get names; `export_graph` takes them out again.
    """

    def __init__(self, model: DynaMask) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image: Tensor, min_score: Tensor, budget: Tensor, total_budget: Tensor, costs: Tensor, grid_override: Tensor
    ) -> tuple[Tensor, ...]:
        branch = self.model.mask_branch
        assert isinstance(branch, DynamicMaskBranch)
        found = self.model.detect(image, min_score)
        canvas = (image.shape[-2], image.shape[-1])
        masks = branch.mask_pass(found.pyramid, found.detections, canvas, Budget(budget, total_budget, costs), grid_override)
        routing = masks.routing
        outputs = (*found.detections, routing.grids, *routing.slots, *masks.logits)
        detector_seams = (
            *found.pyramid[:4],
            *found.rpn_logits,
            *found.rpn_deltas,
            found.proposals,
            found.proposal_count,
            found.box_region,
            found.class_logits,
            found.box_deltas,
        )
        mask_seams = (
            masks.slots,
            masks.mask_boxes,
            masks.mask_overrides,
            masks.region,
            masks.msm_logits,
            *routing.continuing,
            *routing.exiting,
        )
        return (*outputs, *detector_seams, *mask_seams)


def export_graph(model: DynaMask, path: Path, canvas: tuple[int, int]) -> dict[str, int]:
    """Write the model's ONNX graph for one canvas (height, width); returns how many nodes of each operator it has.

    Names and shapes of inputs, outputs and inner boundary tensors are those of docs/architecture.md.
    """
    slots = model.config.model.detections
    image, override = torch.zeros(1, 3, *canvas), torch.full((slots,), MSM, dtype=torch.int64)
    # Tensors of their own: inputs that are one tensor would become one input.
    example = (image, torch.tensor(0.0), *(tensor.clone() for tensor in model.mask_branch.gmac_budget()), override)
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
            output_names=(*OUTPUTS, *DETECTOR_SEAMS, *MASK_SEAMS),
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _name_counts(graph, model.config.model.proposals)
    _hide_seams(graph)
    _drop_traces(graph)
    write_facts(graph, graph_facts(model, canvas))
    onnx.checker.check_model(graph, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save(graph, temporary)
    return dict(sorted(collections.Counter(node.op_type for node in graph.graph.node).items()))


def graph_facts(model: DynaMask, canvas: tuple[int, int]) -> GraphFacts:
    """The facts of the model's graph for one canvas (height, width)."""
    config = model.config.model
    return GraphFacts.model_validate(
        {
            "canvas": canvas,
            "strides": (4, 8, 16, 32, 64),
            "anchors": [cell.tolist() for cell in model.rpn.anchor_generator.cell_anchors],
            "proposals_per_level": config.proposals_per_level,
            "proposals": config.proposals,
            "proposal_nms_threshold": RPN_NMS_THRESHOLD,
            "canonical_size": config.canonical_size,
            "detections": config.detections,
            "candidates": CANDIDATES_PER_DETECTION * config.detections,
            "score_threshold": config.score_threshold,
            "nms_threshold": config.nms_threshold,
            "costs": model.mask_branch.costs.tolist(),
        }
    )


def _hide_seams(model: onnx.ModelProto) -> None:
    """Keep the seams as named and typed tensors inside the graph, no longer as outputs; the detections stay outputs too."""
    outputs = {value.name: value for value in model.graph.output}
    present = {value.name for value in model.graph.value_info}
    model.graph.value_info.extend(outputs[name] for name in (*DETECTIONS, *DETECTOR_SEAMS, *MASK_SEAMS) if name not in present)
    for name in (*DETECTOR_SEAMS, *MASK_SEAMS):
        model.graph.output.remove(outputs[name])


def _name_counts(model: onnx.ModelProto, proposals: int) -> None:
    """Name the sizes that depend on the data, which the exporter numbers in order of appearance (`u11`).

    `n` instances in all, `n_14` to `n_112` that exit at a grid, `stage_28` to `stage_112` that run through a stage. The number of regions
    from the levels of the pyramid is the number of proposals, which the exporter cannot know.
    """
    named: dict[str, str | int] = {"slots": "n", "region": "n", "box_region": proposals}
    named |= {f"slots_{grid}": f"n_{grid}" for grid in GRIDS} | {f"continue_{grid}": f"stage_{grid}" for grid in GRIDS[1:]}
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.output}
    sizes = {shapes[tensor].dim[0].dim_param: size for tensor, size in named.items()}
    for value in [*model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            size = sizes.get(dimension.dim_param) if dimension.dim_param else None
            if isinstance(size, int):
                dimension.dim_value = size
            elif size is not None:
                dimension.dim_param = size


def _drop_traces(model: onnx.ModelProto) -> None:
    """Remove stack traces and module hierarchies: they hold paths of this machine, and are a third of a small graph's bytes."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]:
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
