"""From a bundle to instances, on a graph whose boxes and masks are known."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.instances import GRIDS
from runtime.predictor import load
from runtime.targets import onnxruntime as target

WHITE = np.full((128, 96, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def bundle(synthetic, tmp_path_factory):
    bundle = synthetic.create(tmp_path_factory.mktemp("predictor") / "a.bundle")
    target.build(bundle)
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
    assert [logits.shape[0] for logits in found.logits] == found.grids.tolist()
    assert set(found.times_ms) == {"preprocess", "detector", "masks"} and min(found.times_ms.values()) > 0
    assert found.to_coco(1)[0]["category_id"] == 3


def test_every_mask_goes_to_its_own_instance(predictor):
    # Three quarters of the canvas are white (1 after normalising), the rest 0; to that the graph adds the label.
    for logits, label in zip(predictor(WHITE).logits, [1, 0, 1, 0], strict=True):
        np.testing.assert_allclose(logits, 0.75 + label, atol=1e-6)


def test_budget_and_grid_are_chosen_per_call(predictor, bundle):
    assert predictor(WHITE, budget=0.2).grids.tolist() == [14] * 4
    for k, grid in enumerate(GRIDS):
        assert predictor(WHITE, grid_override=k).grids.tolist() == [grid] * 4
    assert predictor(WHITE, grid_override=np.array([0, 1, -1, 3, -1, -1])).grids.tolist() == [14, 28, 56, 112]
    assert predictor(WHITE).grids.tolist() == [112, 14, 56, 14]
    with load(bundle, budget=0.2) as tight:
        assert tight(WHITE).grids.tolist() == [14] * 4
        assert tight(WHITE, budget=0).grids.tolist() == [112, 14, 56, 14]


def test_two_sessions_give_what_the_whole_graph_gives(predictor, bundle, synthetic):
    image = np.random.default_rng(0).normal(size=(1, 3, synthetic.SIDE, synthetic.SIDE)).astype(np.float32)
    output = predictor.engine.run(image, 0.0, -1)
    whole = ort.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in whole.get_outputs()]
    inputs = {"image": image, "budget": np.array(0, np.float32), "grid_override": np.full(synthetic.SLOTS, -1)}
    inputs["min_score"] = np.array(0, np.float32)
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
    for changes in ({"budget": -1.0}, {"budget": float("nan")}, {"grid_override": 5}):
        with pytest.raises(InputError):
            predictor(WHITE, **changes)
    with pytest.raises(InputError, match="threads"):
        load(bundle, threads=0)
    with pytest.raises(InputError, match="not a target"):
        load(bundle, target="abacus")


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
        target.build(bundle)
