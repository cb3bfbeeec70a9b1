"""From a bundle to instances, on a graph whose boxes and masks are known."""

from __future__ import annotations

import platform
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.onnxruntime_engine import build_onnxruntime
from runtime.bundle import Bundle, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import GRIDS
from runtime.machine import processor
from runtime.predictor import Predictor, load
from runtime.preprocess import letterbox_normalise
from runtime.targets.base import EngineOutput
from tests.runtime.known_costs import costs

WHITE = np.full((128, 96, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def bundle(synthetic, tmp_path_factory):
    bundle = synthetic.create(tmp_path_factory.mktemp("predictor") / "a.bundle")
    build_onnxruntime(bundle)
    return Bundle.open(bundle.path)


@pytest.fixture(scope="module")
def predictor(bundle):
    with load(bundle.path, threads=1) as predictor:
        yield predictor


def test_boxes_come_back_in_the_images_pixels_and_inside_it(predictor, synthetic):
    found = predictor(WHITE)
    # 128 x 96 on a canvas of 64 x 64: half the size.
    expected = np.clip(synthetic.BOXES[:4] * 2, 0, [96, 128, 96, 128])
    np.testing.assert_allclose(found.boxes, expected)
    np.testing.assert_allclose(found.scores, synthetic.SCORES[:4])
    assert found.labels.tolist() == [1, 0, 1, 0] and found.size == (128, 96)
    assert found.grids.tolist() == [112, 14, 56, 14]
    assert [logits.shape[0] for logits in found.mask_data] == found.grids.tolist()
    assert set(found.times_ms) == {"preprocess", "detector", "masks"} and min(found.times_ms.values()) > 0
    assert found.to_coco(1)[0]["category_id"] == 3


def test_every_mask_goes_to_its_own_instance(predictor):
    # Three quarters of the canvas are white (1 after normalising), the rest 0; to that the graph adds the label.
    for logits, label in zip(predictor(WHITE).mask_data, [1, 0, 1, 0], strict=True):
        np.testing.assert_allclose(logits, 0.75 + label, atol=1e-6)


def test_budget_and_grid_are_chosen_per_call(predictor, bundle):
    assert predictor(WHITE, budget_gmacs=0.2).grids.tolist() == [14] * 4
    for k, grid in enumerate(GRIDS):
        assert predictor(WHITE, grid_override=k).grids.tolist() == [grid] * 4
    assert predictor(WHITE, grid_override=np.array([0, 1, -1, 3, -1, -1])).grids.tolist() == [14, 28, 56, 112]
    assert predictor(WHITE).grids.tolist() == [112, 14, 56, 14]
    with load(bundle, budget_gmacs=0.2) as tight:
        assert tight(WHITE).grids.tolist() == [14] * 4
        assert tight(WHITE, budget_gmacs=0).grids.tolist() == [112, 14, 56, 14]


def drawn(*sizes):
    return [np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8) for index, size in enumerate(sizes)]


def check_equal(found, expected):
    for name in ("boxes", "scores", "labels", "grids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for logits, others in zip(found.mask_data, expected.mask_data, strict=True):
        np.testing.assert_array_equal(logits, others)
    assert found.size == expected.size and found.times_ms.keys() == expected.times_ms.keys()


@pytest.mark.parametrize("options", [{}, {"budget_gmacs": 0.2}, {"grid_override": np.array([3, 2, 1, 0, -1, -1]), "min_score": 0.5}])
def test_a_batch_agrees_with_single_images(predictor, synthetic, options):
    images = drawn((128, 96), (30, 200), (1, 1), (64, 64), (300, 40))
    several = Predictor(predictor.bundle, synthetic.EngineOfSeveral(predictor.engine, 2))
    alone = [predictor(image, **options) for image in images]
    assert len({logits.flat[0] for found in alone for logits in found.mask_data}) > 5
    for together in (predictor.batch(images, **options), several.batch(images, **options)):
        for found, expected in zip(together, alone, strict=True):
            check_equal(found, expected)
    assert several.engine.counts == [2, 2, 1]
    check_equal(several(images[0], **options), alone[0])
    assert predictor.batch([]) == several.batch([]) == []


def test_an_images_times_are_its_share_of_its_run(predictor, synthetic):
    several = Predictor(predictor.bundle, synthetic.EngineOfSeveral(predictor.engine, 4))
    runs, run = [], several.engine.run
    several.engine.run = lambda *values: runs.append(run(*values)) or runs[-1]
    first, second = several.batch(drawn((128, 96), (30, 200)))
    for part, ms in runs[0].times_ms.items():
        assert first.times_ms[part] == second.times_ms[part] == ms / 2
    assert first.times_ms["preprocess"] > 0 and second.times_ms["preprocess"] > 0


def test_nothing_of_a_wrong_batch_runs(predictor, synthetic):
    several = Predictor(predictor.bundle, synthetic.EngineOfSeveral(predictor.engine, 2))
    with pytest.raises(InputError, match="uint8 RGB"):
        several.batch([WHITE, WHITE, WHITE[..., 0]])
    with pytest.raises(InputError, match="a grid_override of 7 does not exist"):
        several.batch([WHITE], grid_override=7)
    with pytest.raises(InputError, match=r"the shape \[12\] for 6 slots; give one value, or one for each of them"):
        several.batch([WHITE] * 2, grid_override=np.zeros(12, np.int64))
    assert several.engine.counts == []


class WholeImage:
    """Notes the canvases of its runs; finds one instance in each, on all of the canvas."""

    def __init__(self, profile):
        self.profile, self.runs, self.costs = profile, [], None

    def run(self, image, *_):
        self.runs.append(image.copy())
        count, _, height, width = image.shape
        none = (np.empty(0, np.int64), np.empty((0, 14, 14), np.float32))
        all_ = (np.arange(count), np.zeros((count, 28, 28), np.float32))
        boxes, ones = np.tile(np.array([[0, 0, width, height]], np.float32), (count, 1)), np.ones(count, np.int64)
        return EngineOutput(boxes, ones.astype(np.float32), 0 * ones, ones, {14: none, 28: all_}, {})


sides = st.integers(1, 6).map(lambda count: 32 * count)
canvases = st.tuples(sides, sides)


@st.composite
def profiles(draw):
    heights, widths = (sorted(draw(st.tuples(sides, sides, sides))) for _ in range(2))
    batch = sorted(draw(st.tuples(*[st.integers(1, 3)] * 3)))
    return Profile(batch=tuple(batch), canvas=tuple(zip(heights, widths, strict=True)))


@settings(max_examples=60, deadline=None)
@given(canvases, profiles(), st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=7))
def test_a_run_has_the_smallest_canvas_that_holds_its_images(synthetic, canvas, profile, sizes):
    (low_height, low_width), _, (high_height, high_width) = profile.canvas
    fitted = max(low_height, min(canvas[0], high_height)), max(low_width, min(canvas[1], high_width))
    images, engine = drawn(*sizes), WholeImage(profile)
    bundle = Bundle("a.bundle", synthetic.manifest(canvas=canvas, detections=1))
    found = Predictor(bundle, engine).batch(images)
    for instances, (height, width) in zip(found, sizes, strict=True):
        np.testing.assert_allclose(instances.boxes, [[0, 0, width, height]], rtol=0.02, atol=1e-3)
    remaining = iter(images)
    for run in engine.runs:
        assert 1 <= len(run) <= profile.batch[-1]
        height, width = run.shape[2:]
        assert low_height <= height <= fitted[0] and low_width <= width <= fitted[1] and height % 32 == width % 32 == 0
        whole = [letterbox_normalise(next(remaining), *fitted, (0.5,) * 3, (0.5,) * 3)[0][0] for _ in run]
        for one, expected in zip(run, whole, strict=True):
            np.testing.assert_array_equal(one, expected[:, :height, :width])
            assert not expected[:, height:].any() and not expected[:, :, width:].any()
        # On the next smaller one some image would lose something.
        assert height == low_height or any(expected[:, height - 32 :].any() for expected in whole)
        assert width == low_width or any(expected[:, :, width - 32 :].any() for expected in whole)
    assert next(remaining, None) is None


def test_onnx_runtime_takes_one_image_on_its_canvas(predictor, bundle):
    assert predictor.engine.profile == Profile(canvas=((64, 64),) * 3)
    for shape in ((2, 3, 64, 64), (1, 3, 64, 96), (3, 64, 64)):
        with pytest.raises(InputError) as refused:
            predictor.engine.run(np.zeros(shape, np.float32))
        assert str(refused.value) == (
            f"The engine for onnxruntime of {bundle.path} takes [B, 3, H, W] with B up to 1 and HxW of 64x64, multiples of 32, not "
            f"{list(shape)}; give such an input, or build another engine with dynamask build-engine {bundle.path} --target tensorrt-rtx, "
            "--batch and --size."
        )


def test_two_sessions_agree_with_the_whole_graph(predictor, bundle, synthetic):
    image = np.random.default_rng(0).normal(size=(1, 3, synthetic.SIDE, synthetic.SIDE)).astype(np.float32)
    output = predictor.engine.run(image, 0.0, -1)
    whole = ort.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in whole.get_outputs()]
    inputs = {"image": image, "budget": np.array(0, np.float32), "grid_override": np.full(synthetic.SLOTS, -1)}
    inputs |= {"min_score": np.array(0, np.float32), "total_budget": np.array(0, np.float32), "costs": np.zeros((2, 4), np.float32)}
    expected = dict(zip(names, whole.run(None, inputs), strict=True))
    for name in ("boxes", "scores", "labels", "grids"):
        np.testing.assert_array_equal(getattr(output, name), expected[name])
    for grid, (slots, masks) in output.masks.items():
        np.testing.assert_array_equal(slots, expected[f"slots_{grid}"])
        np.testing.assert_array_equal(masks, expected[f"masks_{grid}"])


def test_the_mask_branch_runs_alone(predictor, synthetic):
    engine = predictor.engine
    assert engine.feature_shapes == [(1, 3, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    features = [np.full(shape, 0.5, np.float32) for shape in engine.feature_shapes]
    grids, masks = engine.run_masks(features, synthetic.BOXES, synthetic.SCORES, synthetic.LABELS, None, 1)
    assert grids.tolist() == [1, 1, 1, 1, -1, -1]
    slots, logits = masks[28]
    assert slots.tolist() == [0, 1, 2, 3] and logits.shape == (4, 28, 28)
    np.testing.assert_allclose(logits[:, 0, 0], [1.5, 0.5, 1.5, 0.5])
    assert masks[14][1].shape == (0, 14, 14)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4000, 3), (4000, 1, 3), (64, 64, 3)])
def test_degenerate_images_work(predictor, shape):
    found = predictor(np.zeros(shape, np.uint8))
    assert len(found) == 4 and found.masks.shape == (4, *shape[:2])
    assert (found.boxes[:, 2:] <= [shape[1], shape[0]]).all()
    found.to_coco(0)


def test_a_wrong_call_is_refused(predictor, bundle):
    for image in (WHITE[..., 0], WHITE.astype(np.float32), WHITE[:0], "photo.jpg", np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(InputError, match="uint8 RGB"):
            predictor(image)
    for changes in ({"budget_gmacs": -1.0}, {"budget_gmacs": float("nan")}, {"grid_override": 5}):
        with pytest.raises(InputError):
            predictor(WHITE, **changes)
    for threads in (0, 100_000, 1.5):
        with pytest.raises(InputError, match="threads"):
            load(bundle, threads=threads)
    with pytest.raises(InputError, match="not a target"):
        load(bundle, target="abacus")


class SlowEngine:
    """Another engine, which waits before it runs and notes whether it was closed during a run."""

    def __init__(self, engine):
        self.engine, self.profile, self.costs = engine, engine.profile, engine.costs
        self.started, self.running, self.closed_during_a_run = threading.Event(), False, None

    def run(self, *values):
        self.running = True
        self.started.set()
        time.sleep(0.005)
        output = self.engine.run(*values)
        self.running = False
        return output

    def close(self):
        self.closed_during_a_run = self.running


def test_threads_that_share_a_predictor_get_their_own_results(predictor):
    shared = Predictor(predictor.bundle, SlowEngine(predictor.engine))
    images = drawn((128, 96), (30, 200), (64, 64), (300, 40))
    alone = [predictor(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(shared, images * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        check_equal(found, expected)


def test_a_closed_predictor_says_so(bundle):
    with load(bundle) as closed:
        closed(WHITE)
    closed.close()
    for call in (lambda: closed(WHITE), lambda: closed.batch([WHITE, WHITE])):
        with pytest.raises(InputError, match=r"a\.bundle is closed; open the bundle again with dynamask\.load"):
            call()


def test_a_closed_engine_says_so(bundle):
    engine = load(bundle).engine
    engine.close()
    engine.close()
    image = np.zeros((1, 3, 64, 64), np.float32)
    for call in (lambda: engine.run(image), lambda: engine.run_masks([], [], [], []), lambda: engine.feature_shapes):
        with pytest.raises(InputError, match=r"engine for onnxruntime of .*a\.bundle is closed; open the bundle again"):
            call()


def test_closing_waits_for_the_run_of_another_thread(predictor):
    engine = SlowEngine(predictor.engine)
    shared = Predictor(predictor.bundle, engine)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(shared, WHITE)
        engine.started.wait(timeout=60)
        shared.close()
        assert engine.closed_during_a_run is False
        check_equal(found.result(), predictor(WHITE))


def test_an_engine_that_does_not_fit_is_refused(synthetic, tmp_path):
    bundle = synthetic.create(tmp_path / "a.bundle")
    with pytest.raises(InputError, match="not built"):
        load(bundle)
    bundle.add_engine("onnxruntime", {"detector.onnx": b"not a model", "masks.onnx": b""}, "fp32", {"onnxruntime": "9.9"})
    with pytest.raises(InputError, match=r"built for ONNX Runtime 9\.9"):
        load(bundle)


def test_a_model_that_is_no_dynamask_graph_is_refused(synthetic, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    bundle = Bundle.create(tmp_path / "a.bundle", synthetic.manifest(), {"model.onnx": tmp_path / "bad.onnx"})
    with pytest.raises(InputError, match="could not be read as ONNX"):
        build_onnxruntime(bundle)


def output(**changes):
    """Of one image with two slots, one of them filled."""
    masks = {grid: (np.zeros(0, np.int64), np.zeros((0, grid, grid), np.float32)) for grid in GRIDS}
    masks[14] = (np.array([0]), np.zeros((1, 14, 14), np.float32))
    fields = {
        "boxes": np.zeros((2, 4), np.float32),
        "scores": np.array([0.5, 0], np.float32),
        "labels": np.array([0, -1]),
        "grids": np.array([0, -1]),
        "masks": masks,
        "times_ms": {"detector": 1.0, "masks": 1.0},
    }
    return EngineOutput(**fields | changes)


def test_outputs_that_fit_together_have_no_fault():
    assert output().first_fault(1, 2) is None
    assert output().first_fault(2, 1) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"boxes": np.zeros((2, 3), np.float32)}, "boxes has the shape [2, 3]"),
        ({"scores": np.array([1, 0])}, "scores has the shape [2], type int64"),
        ({"scores": np.array([0, 0.5], np.float32)}, "an empty slot"),
        ({"scores": np.array([0.5, 0.5], np.float32)}, "no class"),
        ({"boxes": np.full((2, 4), np.nan, np.float32)}, "not finite"),
        ({"grids": np.array([4, -1])}, "no grid"),
        ({"masks": {14: (np.array([1]), np.zeros((1, 14, 14), np.float32))}}, "no mask"),
        ({"masks": {14: (np.array([0]), np.zeros((1, 14, 15), np.float32))}}, "masks_14 has the shape [1, 14, 15]"),
    ],
    ids=["columns", "type", "order", "class", "finite", "grid", "no mask", "mask"],
)
def test_outputs_that_do_not_fit_together_are_refused(predictor, monkeypatch, changes, fault):
    assert fault in output(**changes).first_fault(1, 2)
    monkeypatch.setattr(predictor.engine, "run", lambda *_: output(**changes))
    with pytest.raises(InputError, match=r"a\.bundle: the outputs of its model do not fit together"):
        predictor(WHITE)


def test_a_graph_that_stops_while_it_runs_names_its_file(synthetic, tmp_path):
    bundle = change_detector(synthetic, tmp_path, lambda graph: graph.initializer[0].dims.insert(0, 1))
    with load(bundle, threads=1) as predictor, pytest.raises(DynaMaskError, match=r"ONNX Runtime stopped in .*masks\.onnx .*export"):
        predictor(WHITE)


def test_an_engine_with_other_outputs_is_refused_when_loaded(synthetic, tmp_path, capsys):
    bundle = change_detector(synthetic, tmp_path, lambda graph: graph.output.pop(0))
    with pytest.raises(InputError, match=r"detector\.onnx has other inputs or outputs .* \(without p2\); build it again"):
        load(bundle, threads=1)
    bundle = change_detector(synthetic, tmp_path, lambda graph: None, replace=(b"boxes", b"b\xffxes"))
    with pytest.raises(InputError, match=r"does not load|other inputs or outputs"):
        load(bundle, threads=1)
    assert capsys.readouterr().out == "", "standard output is for results"


def change_detector(synthetic, folder, change, replace=(b"", b"")):
    """The path of a bundle whose detector was changed, with the hash that it then has."""
    bundle = synthetic.create(folder / "changed.bundle")
    build_onnxruntime(bundle)
    engine = bundle.path / "engines" / "onnxruntime"
    model = onnx.load(engine / "detector.onnx")
    change(model.graph)
    files = {"detector.onnx": model.SerializeToString().replace(*replace), "masks.onnx": (engine / "masks.onnx").read_bytes()}
    bundle.add_engine("onnxruntime", files, "fp32", {})
    return bundle.path


def test_a_model_with_a_tensor_that_two_nodes_write_is_refused(synthetic, tmp_path):
    model = synthetic.graph()
    model.graph.node.append(model.graph.node[0])
    onnx.save(model, tmp_path / "twice.onnx")
    bundle = Bundle.create(tmp_path / "a.bundle", synthetic.manifest(), {"model.onnx": tmp_path / "twice.onnx"})
    with pytest.raises(InputError, match="is not a DynaMask graph"):
        build_onnxruntime(bundle)


@pytest.fixture
def measured(synthetic, tmp_path):
    """A bundle whose engine has measured costs: 21 ms for a frame without instances."""
    bundle = synthetic.create(tmp_path / "measured.bundle")
    build_onnxruntime(bundle)
    bundle.set_costs("onnxruntime", costs(host=platform.node(), processor=processor(), threads=1))
    return bundle


def test_a_budget_in_milliseconds_is_the_frames(measured):
    """Four instances at 112 take 20 + 5 + 4 * 4 = 41 ms."""
    with load(measured, threads=1) as free, load(measured, threads=1, budget_ms=40.9) as tight:
        assert free(WHITE, budget_ms=41).grids.tolist() == free(WHITE).grids.tolist() == [112, 14, 56, 14]
        assert free(WHITE, budget_ms=40.9).grids.tolist() == tight(WHITE).grids.tolist() == [14] * 4
        assert tight(WHITE, budget_ms=0).grids.tolist() == tight(WHITE, budget_gmacs=0).grids.tolist() == [112, 14, 56, 14]


def test_times_are_predicted_from_the_grids_of_the_instances(measured, predictor):
    with load(measured, threads=1) as found:
        assert found.costs_notice() is None
        assert found(WHITE).predicted_ms == {"detector": 20, "masks": 5 + 4 + 1 + 3 + 1}
        assert found(WHITE, min_score=0.85)[:1].predicted_ms == {"detector": 20, "masks": 5 + 4}
        assert found(WHITE, min_score=0.95).predicted_ms == {"detector": 20, "masks": 1}
    assert predictor(WHITE).predicted_ms == {}


def test_images_of_a_run_share_its_budget_and_prediction(measured, synthetic):
    with load(measured, threads=1) as single:
        several = Predictor(measured, synthetic.EngineOfSeveral(single.engine, 2))
        first, second = several.batch([WHITE, WHITE])
        assert first.predicted_ms == second.predicted_ms == {"detector": 20, "masks": (5 + 2 * 9) / 2}


@pytest.mark.parametrize(
    ("changes", "threads", "said"),
    [
        ({"host": "elsewhere"}, 1, "were measured on elsewhere"),
        ({"processor": "another"}, 1, r"\(another\), and this machine is"),
        ({}, 2, "were measured with 1 thread, and the engine runs with 2 threads"),
    ],
)
def test_costs_of_another_machine_are_used_and_said(measured, changes, threads, said):
    here = {"host": platform.node(), "processor": processor(), "threads": 1}
    measured.set_costs("onnxruntime", costs(**here | changes))
    with load(measured, threads=threads) as found:
        assert re.search(said, found.costs_notice())
        assert found(WHITE, budget_ms=40).grids.tolist() == [14] * 4


def test_a_budget_in_milliseconds_that_cannot_be_kept_is_refused(measured, bundle, synthetic, tmp_path):
    with load(measured, threads=1) as found:
        smallest = r"without instances takes 21\.0 ms, of which the detector 20\.0; .* 23\.0 ms with one instance and 28\.0 ms with 6"
        with pytest.raises(InputError, match=smallest):
            found(WHITE, budget_ms=20.9)
        assert found(WHITE, budget_ms=23).grids.tolist() == [14] * 4
        with pytest.raises(InputError, match=r"leave out one of 0\.1 GMAC and 40 ms"):
            found(WHITE, budget_gmacs=0.1, budget_ms=40)
        for budget in (-1, float("nan"), float("inf")):
            with pytest.raises(InputError, match="milliseconds cannot be kept; give a positive number"):
                found(WHITE, budget_ms=budget)
    with pytest.raises(InputError, match=r"were not measured.*run dynamask calibrate"):
        load(bundle, budget_ms=40)
    earlier = synthetic.create(tmp_path / "earlier.bundle", takes_costs=False)
    build_onnxruntime(earlier)
    earlier.set_costs("onnxruntime", costs())
    with load(earlier) as old:
        assert old(WHITE, budget_gmacs=0.2).grids.tolist() == [14] * 4
        with pytest.raises(InputError, match="counts in GMAC alone, as earlier versions exported it: export the bundle again"):
            old(WHITE, budget_ms=40)
