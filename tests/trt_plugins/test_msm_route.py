"""MsmRoute's kernel, in Triton's interpreter, against the model's own rule and the lists its inference makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamask.msm import Budget, route
from runtime.errors import InputError
from trt_plugins import on_torch
from trt_plugins.msm_route import MsmRoute
from trt_plugins.msm_route.reference import msm_route as reference_msm_route
from trt_plugins.on_torch import run
from trt_plugins.operator import DataDependent, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton")
CANVAS = (64, 256)
COSTS = (0.25, 0.5, 1.0, 1.5)
"""With logits that are multiples of 1/4, two instances' lambdas are equal or far apart: rounding decides nothing."""
MODEL_COSTS = (0.231, 0.543, 0.904, 1.363)
FIXED = (0.25, 0.25, 0.75, 2.0)
SLOTS = 19


def _case(n: int, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner, side = torch.rand((n, 2), generator=generator) * 40, torch.rand((n, 2), generator=generator) * 90
    return {
        "logits": torch.randn((n, 4), generator=generator) * scale,
        "boxes": torch.cat([corner, corner + side], dim=1),
        "override": torch.full((n,), -1),
        "slots": torch.arange(n),
    }


def _limits(budget: float, total: float = 0.0, costs: tuple[float, ...] = COSTS) -> Budget:
    return Budget(torch.tensor(budget), torch.tensor(total), torch.tensor([costs, FIXED]))


def _inputs(case: dict[str, Tensor], limits: Budget, images: int = 1) -> list[Tensor]:
    return [*case.values(), *limits, torch.empty(images, 1, CANVAS[0] // 4, CANVAS[1] // 4)]


def _run(case: dict[str, Tensor], limits: Budget, slots: int = SLOTS, images: int = 1, batch: int = 1) -> dict[str, Tensor]:
    operator = MsmRoute(batch=batch, stride=4, detections=slots)
    return dict(zip(operator.outputs, run(operator, _inputs(case, limits, images)), strict=True))


def _routed_by_the_model(case: dict[str, Tensor], limits: Budget) -> Tensor:
    boxes = case["boxes"]
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0)
    sides = torch.sqrt(areas / float(CANVAS[0] * CANVAS[1]))
    log_probabilities = torch.log_softmax(case["logits"].float(), dim=-1)
    return route(log_probabilities, limits, sides, case["override"])


def _check_lists(outputs: dict[str, Tensor], grids: Tensor, slots: Tensor) -> None:
    """Follow the lists as the engine does, stage by stage: every instance comes out once, at its own grid, in order."""
    assert all(output.dtype == torch.int64 for output in outputs.values())
    alive = torch.arange(len(grids))
    for k, grid in enumerate((14, 28, 56, 112)):
        if k > 0:
            alive = alive[outputs[f"continue_{grid}"]]
            assert outputs[f"continue_{grid}_count"] == len(alive)
            assert torch.equal(alive, torch.nonzero(grids >= k)[:, 0])
        ended = alive[outputs[f"exit_{grid}"]]
        assert outputs[f"exit_{grid}_count"] == len(ended)
        assert torch.equal(ended, torch.nonzero(grids == k)[:, 0])
        assert torch.equal(outputs[f"slots_{grid}"], slots[ended])


def _check_reference(outputs: dict[str, Tensor], case: dict[str, Tensor], limits: Budget, images: int = 1, slots: int = SLOTS) -> None:
    reference: Callable[..., list[Tensor]] = reference_msm_route
    expected = reference(*_inputs(case, limits, images), stride=4, detections=slots)
    for name, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(outputs[name], wanted), name


quarters = st.integers(-24, 24).map(lambda count: count / 4)
instances = st.lists(
    st.tuples(st.tuples(*[quarters] * 4), st.sampled_from([-1, -1, -1, 0, 1, 2, 3, 4])),
    max_size=SLOTS,
)

totals = st.sampled_from([0.0, 0.0, 1e-3, 1.0, 4.3, 8.8, 13.3, 1e6])


@settings(max_examples=20, deadline=None)
@given(instances, st.sampled_from([0.0, -1.0, 1e-3, 0.25, 0.3, 0.5, 0.75, 0.8, 1.0, 1.25, 1.49, 1e6]), totals, st.integers(0, 99))
@example([((0.0, 0.0, 0.0, 0.0), -1)] * SLOTS, 0.5, 0.0, 0)
@example([], 0.5, 0.5, 0)
def test_grids_and_lists_are_the_models(drawn: list[tuple[tuple[float, ...], int]], budget: float, total: float, seed: int) -> None:
    case = _case(len(drawn), seed)
    case["logits"] = torch.tensor([logits for logits, _ in drawn]).reshape(-1, 4)
    case["override"] = torch.tensor([override for _, override in drawn], dtype=torch.int64)
    case["slots"] = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed))[: len(drawn)]
    limits = _limits(budget, total)
    outputs = _run(case, limits)
    grids = _routed_by_the_model(case, limits)
    assert torch.equal(outputs["grids"], torch.full((SLOTS,), -1).scatter(0, case["slots"], grids))
    _check_lists(outputs, grids, case["slots"])
    _check_reference(outputs, case, limits)


@pytest.mark.parametrize(("images", "budget", "half"), [(1, 0.0, False), (2, 0.7, True), (3, 0.7, False), (3, 0.0, True)])
def test_images_of_a_run_share_the_budget_and_nothing_else(images: int, budget: float, half: bool) -> None:
    """Slots of the first and of the last image, none of one between; a run of fewer images than there may be, of 8 slots each."""
    case = _case(9, seed=images)
    case["logits"] = (case["logits"] * 4).round() / 4
    if half:
        case["logits"] = case["logits"].half()
    case["slots"] = torch.tensor([0, 1, 2, 3, 5])
    if images > 1:
        case["slots"] = torch.cat([case["slots"], 8 * (images - 1) + torch.arange(4)])
    case["override"] = torch.tensor([-1, 4, -1, 2, -1, -1, 4, -1, -1])
    case = {name: x[: len(case["slots"])] for name, x in case.items()}
    limits = _limits(budget, 4.3 if budget else 0.0)
    outputs = _run(case, limits, 8, images=images, batch=4)
    grids = _routed_by_the_model(case, limits)
    assert outputs["grids"].tolist() == torch.full((8 * images,), -1).scatter(0, case["slots"], grids).tolist()
    _check_lists(outputs, grids, case["slots"])
    _check_reference(outputs, case, limits, images, slots=8)
    if budget == 0:
        for image in range(images):
            own = case["slots"] // 8 == image
            alone = _run({name: x[own] for name, x in case.items()} | {"slots": case["slots"][own] % 8}, limits, 8)
            assert torch.equal(outputs["grids"][8 * image : 8 * (image + 1)], alone["grids"])


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_full_scene_meets_any_budget_as_the_model_does(scale: float) -> None:
    case = _case(32, seed=3, scale=scale)
    for budget in (0.24, 0.4, 0.7, 1.1):
        limits = _limits(budget, costs=MODEL_COSTS)
        outputs = _run(case, limits, 32)
        assert torch.equal(outputs["grids"], _routed_by_the_model(case, limits))
        assert np.mean([MODEL_COSTS[grid] for grid in outputs["grids"]]) <= budget * (1 + 1e-5)


def test_half_precision_logits_are_routed_in_single_precision() -> None:
    case = _case(SLOTS, seed=5)
    case["logits"] = case["logits"].half()
    assert torch.equal(_run(case, _limits(0.6))["grids"], _routed_by_the_model(case, _limits(0.6)))


def test_a_budget_below_the_smallest_grid_gives_the_smallest_grid() -> None:
    for limits in (_limits(0.01), _limits(0.0, 0.01)):
        outputs = _run(_case(7, seed=1), limits)
        assert outputs["grids"].tolist() == [0] * 7 + [-1] * (SLOTS - 7)


def test_the_size_based_rule_at_its_boundaries() -> None:
    """Sides that are exactly 1/8, 1/4, 1/2 and 1 of the canvas's `sqrt(64 * 256) = 128`, and none at all."""
    case = _case(6, seed=2)
    sides = torch.tensor([16.0, 31.9, 32.0, 64.0, 128.0, 0.0])
    case["boxes"] = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    case["override"] = torch.full((6,), 4)
    assert _run(case, _limits(0.0))["grids"][:6].tolist() == [1, 1, 2, 3, 3, 0]


def test_without_instances_every_slot_and_size_is_written() -> None:
    outputs = _run(_case(0, seed=0), _limits(0.5, 0.5), slots=100, images=2, batch=2)
    assert outputs.pop("grids").tolist() == [-1] * 200
    sizes = [outputs.pop(name) for name in list(outputs) if name.endswith("_count")]
    assert len(sizes) == 7
    assert not torch.stack(sizes).any()
    assert all(output.shape == (0,) for output in outputs.values())


def test_lists_of_one_stage_share_a_size_and_none_exceeds_the_slots() -> None:
    operator = MsmRoute(stride=4, detections=50)
    shapes = dict(
        zip(operator.outputs, operator.output_shapes([["n", 4], ["n", 4], ["n"], ["n"], [], [], [2, 4], [2, 256, "H", "W"]]), strict=True)
    )
    assert shapes["grids"] == [100]
    for stage, grid in enumerate((14, 28, 56, 112)):
        count = operator.outputs.index(f"exit_{grid}_count")
        assert shapes[f"exit_{grid}"] == shapes[f"slots_{grid}"] == [DataDependent(count, 100)]
        assert stage == 0 or shapes[f"continue_{grid}"] == [DataDependent(operator.outputs.index(f"continue_{grid}_count"), 100)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"detections": 0}, "detections is 0"),
        ({"batch": 300}, "batch is 300 and detections is 10, 3000 slots in a run; give at most 204 images"),
    ],
)
def test_wrong_attributes_are_refused(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"stride": 4, "detections": 10}
    with pytest.raises(InputError, match=f"route: MsmRoute: {message}"):
        MsmRoute("route", **(values | change))


@pytest.mark.parametrize(
    ("index", "spec", "message"),
    [
        (0, TensorSpec((None, 3), "float32"), "logits"),
        (1, TensorSpec((None, 4), "float16"), "boxes"),
        (2, TensorSpec((None,), "int32"), "override"),
        (3, TensorSpec((None, 1), "int64"), "slots"),
        (4, TensorSpec((1,), "float32"), "budget"),
        (3, TensorSpec((21,), "int64"), "21"),
        (5, TensorSpec((2,), "float32"), "total_budget"),
        (6, TensorSpec((4,), "float32"), "costs is .* give \\[2, 4\\] float32"),
        (7, TensorSpec((3, 8, 4, 4), "float32"), "map is of 3 images; give at most batch, 2"),
        (7, TensorSpec((1, 8, 4), "float32"), "map is .* give \\[B, any, H, W\\] float32 or float16"),
    ],
)
def test_wrong_inputs_are_refused(index: int, spec: TensorSpec, message: str) -> None:
    inputs = [
        TensorSpec((None, 4), "float16"),
        TensorSpec((None, 4), "float32"),
        TensorSpec((None,), "int64"),
        TensorSpec((None,), "int64"),
        TensorSpec((), "float32"),
        TensorSpec((), "float32"),
        TensorSpec((2, 4), "float32"),
        TensorSpec((None, 8, None, None), "float16"),
    ]
    operator = MsmRoute(batch=2, stride=4, detections=10)
    operator.check_inputs(inputs)
    inputs[index] = spec
    with pytest.raises(InputError, match=message):
        operator.check_inputs(inputs)


def test_slots_that_do_not_exist_are_not_written() -> None:
    """Memory of any content is what plugins are timed on while an engine is built."""
    case = _case(4, 0) | {"slots": torch.tensor([5, -300, 1000, 2])}
    operator, images = MsmRoute(stride=4, detections=8), torch.empty(1, 1, 4, 4)
    inputs = [*case.values(), *_limits(0.0), images]
    specs = [on_torch.spec_of(tensor) for tensor in inputs]
    [launch, *_] = operator.launches(specs, operator.max_output_specs(specs))
    memory = torch.full((4096,), 77)
    written = [memory[2048:2056], *(torch.zeros(8, dtype=torch.int64) for _ in operator.outputs[1:])]
    on_torch.start(launch, inputs, written, torch.zeros(operator.workspace(specs).bytes, dtype=torch.uint8))
    assert (memory[:2048] == 77).all() and (memory[2056:] == 77).all()
    assert [slot for slot in range(8) if written[0][slot] >= 0] == [2, 5]
