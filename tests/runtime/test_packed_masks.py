"""Instances whose masks are bits: everything that uses them gives what it gives for logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from export.onnxruntime_engine import build_onnxruntime
from runtime.annotate import annotate
from runtime.bundle import Bundle
from runtime.graph import GRIDS
from runtime.instances import ClassName, Instances
from runtime.paste import Frame, PackedMask, encode_crop
from runtime.predictor import Predictor, load
from runtime.statistics import timed_prediction
from tests.runtime.fake_stream import make_instances
from tests.runtime.packing import PackingEngine, pack, packed

SIZE = (97, 131)
coordinates = st.floats(-60, 200, width=32)


@st.composite
def instances(draw):
    """Instances of noise at any grid, with boxes of any size and place, also outside the image and inside out."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 140))
    boxes = draw(st.lists(st.tuples(*[coordinates] * 4), max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    grids = random.choice(GRIDS, len(boxes))
    return Instances(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.4, len(boxes), dtype=np.float32),
        labels=np.zeros(len(boxes), np.int64),
        grids=grids,
        mask_data=[random.normal(size=(grid, grid)).astype(np.float32) for grid in grids],
        size=(height, width),
        classes=[ClassName(7, "leaf")],
    )


@settings(max_examples=60, deadline=None)
@given(instances())
def test_bits_and_logits_give_the_same_results(found):
    bits = packed(found)
    np.testing.assert_array_equal(bits.masks, found.masks)
    assert bits.to_coco(3) == found.to_coco(3)
    for mask, result in zip(bits.masks, bits.to_coco(3), strict=True):
        assert result["segmentation"]["counts"] == coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    image = np.full((*found.size, 3), 90, np.uint8)
    np.testing.assert_array_equal(annotate(image, bits), annotate(image, found))
    np.testing.assert_array_equal(bits.to_supervision().mask, found.to_supervision().mask)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(0, 70), st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(0, 20))
def test_bits_are_the_pixels_of_their_crop(rows, columns, seed, left, top):
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    bits = pack((left, top, mask))
    assert bits.words.shape == (rows, -(-columns // 32)) and bits.words.dtype == np.int32
    for row, column in np.ndindex(rows, columns):
        assert bool(bits.words[row, column // 32] >> (column % 32) & 1) == mask[row, column]
    x0, y0, crop = bits.crop()
    assert (x0, y0, crop.dtype) == (left, top, bool)
    np.testing.assert_array_equal(crop, mask)
    assert encode_crop(bits.crop(), 40, 100) == encode_crop((left, top, mask), 40, 100)


def test_bits_beyond_the_columns_are_no_pixels():
    [[pixel]] = PackedMask(0, 0, 1, np.array([[-2]], np.int32)).crop()[2]
    assert not pixel


def test_indexing_keeps_the_bits_of_each_instance():
    found = make_instances(6, SIZE)
    bits = packed(found)
    for index in ([4, 1], found.scores > 0.7, slice(1, None), 2):
        np.testing.assert_array_equal(bits[index].masks, found[index].masks)
        assert all(isinstance(mask, PackedMask) for mask in bits[index].mask_data) and len(bits[index]) == len(found[index])
    assert bits[:0].masks.shape == (0, *SIZE) and bits[:0].to_coco(1) == []


def test_a_frame_gives_boxes_in_its_image_and_clips_them():
    boxes = np.array([[10, 20, 30, 40], [-5, -5, 500, 500]], np.float32)
    found = Frame(0.5, (100, 60)).boxes(boxes)
    assert found.tolist() == [[20, 40, 60, 80], [0, 0, 60, 100]] and found.dtype == np.float32


@pytest.fixture(scope="module")
def predictors(synthetic, tmp_path_factory):
    """On the same model: an engine that gives logits, and one that gives bits for up to three images."""
    bundle = synthetic.create(tmp_path_factory.mktemp("packed") / "a.bundle")
    build_onnxruntime(bundle)
    bundle = Bundle.open(bundle.path)
    with load(bundle.path, threads=1) as plain:
        yield plain, Predictor(bundle, PackingEngine(synthetic.EngineOfSeveral(plain.engine, 3)))


def test_a_predictor_gives_each_image_its_own_masks(predictors):
    plain, packing = predictors
    images = [
        np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8) for n, size in enumerate([(128, 96), (33, 70), (5, 300), (64, 64)])
    ]
    for found, expected in zip(packing.batch(images), plain.batch(images), strict=True):
        assert len(found) == len(expected) and found.size == expected.size and all(isinstance(mask, PackedMask) for mask in found.mask_data)
        np.testing.assert_array_equal(found.masks, expected.masks)
        assert found.masks.any() and found.to_coco(1) == expected.to_coco(1)
    assert [len(found) for found in packing.batch(images, min_score=1.0)] == [0] * 4


def test_time_of_pasting_in_the_engine_counts_as_pasting(predictors):
    plain, packing = (timed_prediction(predictor, np.full((128, 96, 3), 255, np.uint8), 0.0, -1) for predictor in predictors)
    assert packing.times_ms["paste"] > 1 and set(packing.times_ms) == set(plain.times_ms)


def test_an_instance_without_bits_is_a_fault(predictors):
    _, packing = predictors
    image = np.ones((1, 3, *packing.bundle.manifest.canvas), np.float32)
    output = packing.engine.run(image, frames=[Frame(1.0, (64, 64))])
    slots = packing.bundle.manifest.detections
    assert output.first_fault(1, slots) is None
    del output.pasted[2]
    assert output.first_fault(1, slots) == "an instance has no mask"
