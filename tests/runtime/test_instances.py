"""`Instances`: indexing, masks, and the forms it is handed on in."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from runtime.instances import ClassName, Instances


def found(count=4, size=(60, 80)):
    random = np.random.default_rng(0)
    corner = random.uniform(0, 30, (count, 2))
    grids = np.resize([14, 28, 56, 112], count)
    return Instances(
        boxes=np.concatenate([corner, corner + random.uniform(5, 30, (count, 2))], 1).astype(np.float32),
        scores=np.linspace(0.9, 0.3, count, dtype=np.float32),
        labels=np.resize([1, 0], count).astype(np.int64),
        grids=grids,
        mask_data=[random.normal(size=(grid, grid)).astype(np.float32) + 1 for grid in grids],
        size=size,
        classes=[ClassName(7, "leaf"), ClassName(3, "star")],
    )


def test_indexing_keeps_everything_together():
    instances = found()
    sure = instances[instances.scores > 0.6]
    assert len(sure) == 2 and len(instances[1:]) == 3 and len(instances[2]) == 1
    picked = instances[[3, 1]]
    np.testing.assert_array_equal(picked.boxes, instances.boxes[[3, 1]])
    assert picked.grids.tolist() == [112, 28] and [len(logits) for logits in picked.mask_data] == [112, 28]
    np.testing.assert_array_equal(picked.masks, instances.masks[[3, 1]])


def test_masks_are_the_crops_in_place():
    instances = found()
    assert instances.masks.shape == (4, 60, 80) and instances.masks.dtype == bool
    for mask, (x0, y0, crop) in zip(instances.masks, instances.crops(), strict=True):
        assert crop.sum() == mask.sum() > 0
        np.testing.assert_array_equal(mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]], crop)


def test_coco_results_hold_the_class_ids_and_the_masks():
    instances = found()
    results = instances.to_coco(12)
    assert [result["category_id"] for result in results] == [3, 7, 3, 7]
    assert [result["grid"] for result in results] == [14, 28, 56, 112]
    assert {result["image_id"] for result in results} == {12}
    for result, mask, box in zip(results, instances.masks, instances.boxes, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask)
        np.testing.assert_allclose(result["bbox"], [*box[:2], *(box[2:] - box[:2])], rtol=1e-6)


def test_supervision_gets_the_same():
    instances = found()
    detections = instances.to_supervision()
    np.testing.assert_array_equal(detections.xyxy, instances.boxes)
    np.testing.assert_array_equal(detections.mask, instances.masks)
    assert detections.class_id.tolist() == [1, 0, 1, 0]
    assert detections["class_name"].tolist() == ["star", "leaf", "star", "leaf"]
    assert detections[detections["grid"] == 56].confidence.tolist() == [pytest.approx(0.5)]


def test_nothing_found_works_everywhere():
    nothing = found()[:0]
    assert len(nothing) == 0 and nothing.masks.shape == (0, 60, 80) and nothing.to_coco(1) == [] and list(nothing.crops()) == []
    assert len(nothing.to_supervision()) == 0
