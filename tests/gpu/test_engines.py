"""Engines of the carried checkpoint on a GPU, against ONNX Runtime on the CPU.

`make test-gpu` runs this. For races and stray accesses, the same under NVIDIA's tool, slowly:

    TRITON_INTERPRET=0 compute-sanitizer --tool memcheck python -m pytest -m gpu tests/gpu -k once
    TRITON_INTERPRET=0 compute-sanitizer --tool racecheck python -m pytest -m gpu tests/gpu -k once
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dynamask.data.shapes import draw_image
from export.engine import build_engine
from export.export import export_bundle
from runtime.bundle import Bundle
from runtime.carried import carried_checkpoint
from runtime.errors import InputError
from runtime.instances import ClassName
from runtime.paste import Frame
from runtime.predictor import to_instances
from runtime.preprocess import letterbox_normalise
from runtime.targets.base import Engine, EngineOutput
from runtime.targets.registry import check_target, open_engine
from trt_plugins.driver import open_driver
from trt_plugins.engine import TensorRTEngine

pytestmark = pytest.mark.gpu

COUNT = 100
BATCH = (2, 2, 3)
CANVASES = ((192, 320), (320, 320), (320, 320))
SLACK = 32 << 20
"""Bytes: the GPU has other users."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "routed": {},
    "budget": {"budget_gmacs": 0.15},
    "14": {"grid_override": 0},
    "28": {"grid_override": 1},
    "56": {"grid_override": 2},
    "112": {"grid_override": 3},
    "by size": {"grid_override": 4},
    "mixed": {"grid_override": np.arange(COUNT) % 4},
    "few": {"min_score": 0.8},
    "none": {"min_score": 1.0},
}


class Tolerance(NamedTuple):
    """How far an engine may be from ONNX Runtime in fp32, in its worst instance."""

    pixels: float
    score: float
    probability: float
    unmatched: float
    """Share of the instances: near-equal scores and boxes at a threshold fall to either side."""


TOLERANCES = {"fp32": Tolerance(0.1, 1e-3, 5e-3, 0.01), "fp16": Tolerance(2.0, 0.03, 0.3, 0.05)}


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def target(request: pytest.FixtureRequest) -> str:
    try:
        check_target(request.param)
    except InputError as missing:
        pytest.skip(str(missing))
    return str(request.param)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    drawn = [draw_image(np.random.default_rng([77_100, index]), 320, 320)[0] for index in range(4)]
    return [letterbox_normalise(image, 320, 320, (0.5,) * 3, (0.5,) * 3)[0] for image in drawn]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    export_bundle(carried_checkpoint("lite0-shapes"), path)
    build_engine(path, "onnxruntime")
    return path


@pytest.fixture(scope="module", params=list(TOLERANCES))
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(portable: Path, target: str, precision: str) -> Bundle:
    build_engine(portable, target, precision)
    return Bundle.open(portable)


@pytest.fixture
def engine(bundle: Bundle, target: str) -> Any:
    with open_engine(bundle, target) as engine:
        yield engine


@pytest.fixture(scope="module")
def several(portable: Path, target: str, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine for 2 or 3 images, on canvases from 192x320 to 320x320."""
    path = tmp_path_factory.mktemp("several") / "bundle"
    shutil.copytree(portable, path)
    build_engine(path, target, precision, batch=BATCH, canvas=CANVASES)
    with TensorRTEngine(Bundle.open(path), target) as engine:
        yield engine


@pytest.fixture(scope="module")
def peer(portable: Path) -> Any:
    with open_engine(Bundle.open(portable), "onnxruntime") as peer:
        yield peer


@pytest.mark.parametrize("name", OVERRIDES)
def test_agrees_with_onnxruntime(engine: Engine, peer: Engine, images: list[np.ndarray], precision: str, name: str) -> None:
    tolerance, found, unmatched = TOLERANCES[precision], 0, 0
    for image in images:
        ours, theirs = engine.run(image, **OVERRIDES[name]), peer.run(image, **OVERRIDES[name])
        assert np.all(np.diff(ours.scores) <= 0)
        found += int((theirs.scores > 0).sum())
        unmatched += compare(ours, theirs, tolerance)
    assert (found == 0) == (name == "none")
    assert unmatched <= tolerance.unmatched * found


def compare(ours: EngineOutput, theirs: EngineOutput, tolerance: Tolerance) -> int:
    """Check the instances that both have; returns how many of theirs ours lacks, or has on another grid."""
    our_masks, their_masks = masks_of(ours), masks_of(theirs)
    unmatched = 0
    for slot in np.nonzero(theirs.scores > 0)[0]:
        distance = np.abs(ours.boxes - theirs.boxes[slot]).max(axis=1)
        near = (ours.labels == theirs.labels[slot]) & (np.abs(ours.scores - theirs.scores[slot]) <= tolerance.score)
        match = int(np.where(near, distance, np.inf).argmin())
        if not near.any() or distance[match] > tolerance.pixels or ours.grids[match] != theirs.grids[slot]:
            unmatched += 1
            continue
        difference = np.abs(sigmoid(our_masks[match]) - sigmoid(their_masks[slot]))
        assert difference.max() <= tolerance.probability and difference.mean() <= tolerance.probability / 5
    return unmatched


def masks_of(output: EngineOutput) -> dict[int, np.ndarray]:
    """Slot -> mask logits; every filled slot must have one, on the grid that `grids` says."""
    masks = {int(slot): mask for slots, logits in output.masks.values() for slot, mask in zip(slots, logits, strict=True)}
    assert sorted(masks) == np.nonzero(output.scores > 0)[0].tolist()
    assert all(mask.shape[0] == (14, 28, 56, 112)[output.grids[slot]] for slot, mask in masks.items())
    return masks


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


CLASSES = [ClassName(index, str(index)) for index in range(COUNT)]
FRAMES = [Frame(320 / 1280, (720, 1280)), Frame(320 / 333, (333, 77)), Frame(320 / 320, (320, 320))]
"""Landscape, portrait, and as large as the canvas."""


@pytest.mark.parametrize("name", ["routed", "112", "mixed", "few", "none"])
def test_masks_pasted_on_the_gpu_are_those_of_the_host(engine: Engine, images: list[np.ndarray], name: str) -> None:
    for image, frame in zip(images, FRAMES, strict=False):
        check_pasted(engine, [image], [frame], OVERRIDES[name])


def test_a_batch_is_pasted_into_frames_of_several_sizes(several: Engine, images: list[np.ndarray]) -> None:
    for count in (3, 2, 1):
        check_pasted(several, images[:count], FRAMES[:count], {})


def check_pasted(engine: Engine, images: list[np.ndarray], frames: list[Frame], options: dict[str, Any]) -> None:
    """Check the masks that an engine pastes against those that the host pastes from its logits."""
    batch = np.concatenate(images)
    logits, bits = engine.run(batch, **options), engine.run(batch, **options, frames=frames)
    assert not bits.masks and bits.first_fault(len(images), COUNT) is None and bits.times_ms["paste"] > 0
    for host, device, frame in zip(logits.per_image(len(images)), bits.per_image(len(images)), frames, strict=True):
        wanted, found = (to_instances(output, frame, CLASSES, {}) for output in (host, device))
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
        wrong = covered = 0
        for (left, top, ours), (x, y, theirs) in zip(found.crops(), wanted.crops(), strict=True):
            assert (left, top, ours.shape) == (x, y, theirs.shape)
            wrong, covered = wrong + int((ours != theirs).sum()), covered + int(theirs.sum())
        # Some versions of OpenCV round where they sample to a 32nd of a cell: pixels at the contour may differ.
        assert wrong <= 0.01 * covered


def test_once(engine: Engine, images: list[np.ndarray]) -> None:
    """One run on mixed grids, with pasting, for the sanitizers."""
    times = engine.run(images[0], grid_override=np.arange(COUNT) % 4, frames=[Frame(320 / 720, (720, 720))]).times_ms
    assert times["detector"] > 0 and times["masks"] > 0


def test_the_same_image_gives_the_same_bits(engine: Engine, images: list[np.ndarray]) -> None:
    """Whatever ran in between: a race, or memory that is read before it is written, would show."""
    first = engine.run(images[0])
    for round_ in range(20):
        engine.run(images[1 + round_ % 3], grid_override=round_ % 5)
        again = engine.run(images[0])
        for name in ("boxes", "scores", "labels", "grids"):
            np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        for grid, (slots, logits) in first.masks.items():
            np.testing.assert_array_equal(again.masks[grid][0], slots)
            np.testing.assert_array_equal(again.masks[grid][1], logits)


def test_memory_stays_and_is_given_back(bundle: Bundle, target: str, images: list[np.ndarray]) -> None:
    driver = open_driver()

    def free() -> int:
        with driver.current():
            return driver.memory().free

    with TensorRTEngine(bundle, target) as engine:
        for override in range(5):
            engine.run(images[0], grid_override=override)
        settled = free()
        for _ in range(50):
            engine.run(images[0], grid_override=3)
        assert free() >= settled - SLACK
    rounds = []
    for _ in range(3):
        with TensorRTEngine(bundle, target) as engine:
            engine.run(images[0])
        rounds.append(free())
    assert rounds[2] >= rounds[0] - SLACK


def test_two_engines_run_side_by_side(bundle: Bundle, target: str, images: list[np.ndarray]) -> None:
    """Each launches its own kernels, though TensorRT has one registry of plugins."""
    with open_engine(bundle, target) as first, open_engine(bundle, target) as second:
        alone = first.run(images[0])
        np.testing.assert_array_equal(second.run(images[0]).boxes, alone.boxes)
        second.close()
        np.testing.assert_array_equal(first.run(images[0]).boxes, alone.boxes)


@pytest.mark.parametrize("name", ["routed", "112", "by size", "mixed", "few", "none"])
def test_a_batch_agrees_with_onnxruntime_image_by_image(
    several: Engine, peer: Engine, images: list[np.ndarray], precision: str, name: str
) -> None:
    tolerance, found, unmatched = TOLERANCES[precision], 0, 0
    for batch in ([images[0], np.zeros_like(images[0]), images[1]], images[2:], images[3:]):
        options = dict(OVERRIDES[name])
        if name == "mixed":
            options["grid_override"] = np.tile(options["grid_override"], len(batch))
        output = several.run(np.concatenate(batch), **options)
        assert len(output.scores) == COUNT * len(batch)
        for image, ours in zip(batch, output.per_image(len(batch)), strict=True):
            theirs = peer.run(image, **OVERRIDES[name])
            assert np.all(np.diff(ours.scores) <= 0)
            found += int((theirs.scores > 0).sum())
            unmatched += compare(ours, theirs, tolerance)
    assert (found == 0) == (name == "none")
    assert unmatched <= tolerance.unmatched * found


def test_a_budget_is_the_mean_over_the_images_of_a_run(several: Engine, images: list[np.ndarray]) -> None:
    gmacs = np.array(list(several.manifest.grid_gmacs.values()))
    free = several.run(np.concatenate(images[:3]))
    budget = float(gmacs[free.grids[free.grids >= 0]].mean() + gmacs[0]) / 2
    for count in (3, 2, 1):
        grids = several.run(np.concatenate(images[:count]), budget_gmacs=budget).grids
        assert gmacs[grids[grids >= 0]].mean() <= budget * (1 + 1e-5)


def test_another_canvas_agrees_with_a_bundle_of_that_canvas(several: Engine, tmp_path: Path, precision: str) -> None:
    height, width = 224, 320
    export_bundle(carried_checkpoint("lite0-shapes"), tmp_path / "bundle", (height, width))
    build_engine(tmp_path / "bundle", "onnxruntime")
    drawn = [draw_image(np.random.default_rng([77_200, index]), height, width)[0] for index in range(3)]
    canvases = [letterbox_normalise(image, height, width, (0.5,) * 3, (0.5,) * 3)[0] for image in drawn]
    tolerance = TOLERANCES[precision]
    with open_engine(Bundle.open(tmp_path / "bundle"), "onnxruntime") as peer:
        theirs = [peer.run(canvas) for canvas in canvases]
    ours = several.run(np.concatenate(canvases)).per_image(3)
    found = sum(int((output.scores > 0).sum()) for output in theirs)
    assert found > 0 and sum(compare(*pair, tolerance) for pair in zip(ours, theirs, strict=True)) <= tolerance.unmatched * found


def test_shapes_change_from_run_to_run(several: TensorRTEngine, images: list[np.ndarray]) -> None:
    """The same bits after other sizes, and no more memory."""
    driver = open_driver()
    first, sizes = several.run(np.concatenate(images[:2])), [(3, 320), (1, 192), (2, 256), (3, 192)]
    for count, height in sizes:
        several.run(np.concatenate(images[:count])[:, :, :height], grid_override=3)
    with driver.current():
        settled = driver.memory().free
    for round_ in range(20):
        count, height = sizes[round_ % 4]
        several.run(np.concatenate(images[:count])[:, :, :height], grid_override=3)
        again = several.run(np.concatenate(images[:2]))
        for name in ("boxes", "scores", "labels", "grids"):
            np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        for grid, (slots, logits) in first.masks.items():
            np.testing.assert_array_equal(again.masks[grid][0], slots)
            np.testing.assert_array_equal(again.masks[grid][1], logits)
    with driver.current():
        assert driver.memory().free >= settled - SLACK
