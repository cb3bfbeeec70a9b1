"""The portable graph's seams and facts: their names hold what PyTorch computes there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dynamask.model import DynaMask
from export.seams import DETECTOR_SEAMS, FACTS, MASK_SEAMS, RPN_DELTAS, RPN_LOGITS, read_facts, write_facts
from runtime.errors import InputError
from runtime.graph import CONTINUE, EXIT, PYRAMID
from tests.export.portable import CANVAS
from tests.export.sessions import open_session, runnable


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, *CANVAS, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def wanted(model: DynaMask, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = model.detect(image)
        overrides = torch.full((20,), -1)
        masks = model.mask_branch.mask_pass(found.pyramid, found.detections, CANVAS, model.mask_branch.gmac_budget(0.025), overrides)
    lists = [(PYRAMID, found.pyramid[:4]), (RPN_LOGITS, found.rpn_logits), (RPN_DELTAS, found.rpn_deltas)]
    lists += [(CONTINUE, masks.routing.continuing), (EXIT, masks.routing.exiting)]
    seams = {name: tensor for names, tensors in lists for name, tensor in zip(names, tensors, strict=True)}
    seams |= {name: getattr(found, name) for name in DETECTOR_SEAMS if name not in seams}
    return seams | {name: getattr(masks, name) for name in MASK_SEAMS if name not in seams}


def test_a_seam_has_the_values_of_pytorch(portable: onnx.ModelProto, image: torch.Tensor, wanted: dict[str, torch.Tensor]) -> None:
    seams = [*DETECTOR_SEAMS, *MASK_SEAMS]
    types = {value.name: value for value in portable.graph.value_info}
    probed = onnx.ModelProto()
    probed.CopyFrom(runnable(portable))
    probed.graph.output.extend(types[name] for name in seams)
    session = open_session(probed)
    feeds = {"image": image.numpy(), "min_score": np.float32(0), "budget": np.float32(0.025), "total_budget": np.float32(0)}
    feeds |= {"costs": np.array([read_facts(portable).costs, [0, 0, 0, 0]], np.float32), "grid_override": np.full(20, -1)}
    found = dict(zip(seams, session.run(seams, {name: np.asarray(value) for name, value in feeds.items()}), strict=True))
    assert len(found["slots"]) > 5 and all(len(found[name]) for name in CONTINUE)
    for name, value in found.items():
        assert value.dtype == wanted[name].numpy().dtype, name
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=2e-3, rtol=1e-3, err_msg=name)


def test_seams_are_typed_and_no_outputs(portable: onnx.ModelProto) -> None:
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in portable.graph.value_info
    }
    assert shapes["box_region"] == [50, 32, 7, 7] and shapes["box_deltas"] == [50, 16] and shapes["proposal_count"] == [1]
    assert shapes["region"] == ["n", 32, 14, 14] and shapes["mask_boxes"] == ["n", 4] and shapes["msm_logits"] == ["n", 4]
    assert shapes["continue_56"] == ["stage_56"] and shapes["exit_112"] == ["n_112"]
    assert not {value.name for value in portable.graph.output} & {*DETECTOR_SEAMS, *MASK_SEAMS}


def test_the_facts_are_the_models(portable: onnx.ModelProto, model: DynaMask) -> None:
    facts, config = read_facts(portable), model.config.model
    assert (facts.canvas, facts.proposals_per_level, facts.proposals, facts.detections) == (CANVAS, 60, 50, 20)
    assert facts.candidates == 200
    assert (facts.score_threshold, facts.nms_threshold, facts.proposal_nms_threshold) == (0.3, config.nms_threshold, model.rpn.nms_thresh)
    cells = torch.stack(model.rpn.anchor_generator.cell_anchors)
    np.testing.assert_array_equal(np.array(facts.anchors), cells.numpy())
    np.testing.assert_array_equal(np.array(facts.costs, np.float32), model.mask_branch.costs.numpy())
    assert facts.canonical_size == 7 * config.anchor_sizes[0]


def test_the_graph_tells_no_path_of_this_machine(portable: onnx.ModelProto) -> None:
    content = portable.SerializeToString()
    assert {entry.key for entry in portable.metadata_props} == {FACTS}
    assert not any(str(path).encode() in content for path in (Path.cwd(), Path.home(), Path(torch.__file__).parents[1]))


def _without_facts(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def _with_another_fact(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace("costs", "prices")


@pytest.mark.parametrize(("damage", "says"), [(_without_facts, "does not say how it was made"), (_with_another_fact, "costs")])
def test_a_graph_without_its_facts_is_refused(portable: onnx.ModelProto, damage: Callable[[Any], None], says: str) -> None:
    bare = onnx.ModelProto()
    write_facts(bare, read_facts(portable))
    assert read_facts(bare) == read_facts(portable)
    damage(bare)
    with pytest.raises(InputError, match=rf"model\.onnx.*{says}.*export the bundle again"):
        read_facts(bare)
