"""The portable graph's seams and facts, which a target needs to cut the graph or to replace parts of it.

Seams are tensors inside the graph that have fixed names. Facts are numbers that its nodes do not show. This module imports no PyTorch,
because a graph can be lowered where PyTorch is not installed.
"""

from __future__ import annotations

import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.bundle import MODEL
from runtime.errors import InputError
from runtime.graph import CONTINUE, EXIT, PYRAMID

LEVELS = range(5)
RPN_LOGITS = tuple(f"rpn_logits_{level}" for level in LEVELS)
RPN_DELTAS = tuple(f"rpn_deltas_{level}" for level in LEVELS)
DETECTOR_SEAMS = (*PYRAMID, *RPN_LOGITS, *RPN_DELTAS, "proposals", "proposal_count", "box_region", "class_logits", "box_deltas")
MASK_SEAMS = ("slots", "mask_boxes", "mask_overrides", "region", "msm_logits", *CONTINUE, *EXIT)
FACTS = "dynamask"
"""The key of the facts in the model's metadata."""


class GraphFacts(BaseModel):
    """Numbers that replacing a part of the graph needs and its nodes do not show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    canvas: tuple[int, int]
    """Height and width, pixels."""
    strides: tuple[int, int, int, int, int]
    """Of P2..P6: a map is the canvas over its stride, rounded up."""
    anchors: tuple[tuple[tuple[float, float, float, float], ...], ...]
    """Per level, the anchors of the cell at the origin, xyxy in pixels."""
    proposals_per_level: int
    """Anchors kept of each level before NMS."""
    proposals: int
    """P."""
    proposal_nms_threshold: float
    canonical_size: float
    """Side in pixels of a box that takes its RoI feature from P4."""
    detections: int
    """K."""
    candidates: int
    """Scores of an image that go through the box head's NMS."""
    score_threshold: float
    nms_threshold: float
    costs: tuple[float, float, float, float]
    """GMAC of an instance that exits at each grid."""


def write_facts(model: onnx.ModelProto, facts: GraphFacts) -> None:
    """Put `facts` into the model's metadata."""
    onnx.helper.set_model_props(model, {**_metadata(model), FACTS: facts.model_dump_json()})


def read_facts(model: onnx.ModelProto) -> GraphFacts:
    """The facts in the model's metadata.

    Raises:
        InputError: there are none, or they are of another version.
    """
    text = _metadata(model).get(FACTS)
    if text is None:
        raise InputError(f"{MODEL} does not say how it was made (no {FACTS} in its metadata): export the bundle again.")
    try:
        return GraphFacts.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "all of it"
        raise InputError(f"{MODEL} was made by another version ({field}: {first['msg']}): export the bundle again.") from error


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
