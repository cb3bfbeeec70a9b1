from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from dynamask.data.coco import CocoDataset
from dynamask.data.shapes import ShapesDataset, write_dataset
from runtime.errors import InputError

SQUARE = [[2, 3, 12, 3, 12, 9, 2, 9]]


def write(folder: Path, annotations: list[dict], **changes: object) -> Path:
    Image.new("RGB", (20, 16), (10, 20, 30)).save(folder / "a.png")
    tree: dict = {
        "images": [{"id": 7, "file_name": "a.png", "height": 16, "width": 20}],
        "categories": [{"id": 5, "name": "nut"}, {"id": 2, "name": "date"}],
        "annotations": annotations,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(tree | changes))
    return path


def instance(**changes: object) -> dict:
    return {"image_id": 7, "category_id": 5, "bbox": [2, 3, 10, 6], "area": 60, "iscrowd": 0, "segmentation": SQUARE} | changes


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path):
    expected = np.zeros((16, 20), np.uint8)
    expected[3:9, 2:12] = 1
    compressed = rle.encode(np.asfortranarray(expected))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], expected.ravel(order="F"), [1 - expected[-1, -1]]])))
    plain = np.diff(np.concatenate([[0], runs])).tolist()
    segmentations = [
        SQUARE,
        {"size": [16, 20], "counts": compressed["counts"].decode()},
        {"size": [16, 20], "counts": plain},
    ]
    path = write(tmp_path, [instance(segmentation=segmentation) for segmentation in segmentations])
    dataset = CocoDataset(path, tmp_path)
    image, target = dataset[0]
    assert dataset.report == {}
    assert image.shape == (16, 20, 3)
    assert target["image_id"] == 7
    assert target["masks"].dtype == np.uint8
    np.testing.assert_array_equal(target["masks"], np.stack([expected] * 3))
    np.testing.assert_array_equal(target["boxes"], np.float32([[2, 3, 12, 9]] * 3))
    np.testing.assert_array_equal(target["labels"], [2, 2, 2])
    assert dataset.classes == [{"id": 2, "name": "date"}, {"id": 5, "name": "nut"}]
    assert dataset.ids_to_category == {1: 2, 2: 5}


def test_unusable_annotations_are_left_out_and_counted(tmp_path):
    counts = rle.encode(np.asfortranarray(np.ones((16, 20), np.uint8)))["counts"].decode()
    annotations = [
        instance(),
        instance(category_id=99),
        instance(image_id=8),
        instance(segmentation=[]),
        instance(segmentation=[[1, 2, 3, 4]]),
        instance(segmentation={"size": [16, 20], "counts": "~~"}),
        instance(segmentation={"size": [16, 20], "counts": counts + "1"}),
        instance(segmentation={"size": [16, 20], "counts": [5, 5]}),
        instance(segmentation={"size": [9, 9], "counts": [81]}),
        instance(segmentation={"size": [16, 20], "counts": [320]}),
        instance(bbox=[2, 3, 0, 6]),
        instance(bbox=[2, 3, float("nan"), 6]),
        instance(bbox=[40, 3, 5, 6]),
        instance(bbox=[-3, 3, 10, 20]),
        instance(iscrowd=1),
    ]
    dataset = CocoDataset(write(tmp_path, annotations), tmp_path)
    assert dataset.report == {
        "an unknown category": 1,
        "an unknown image": 1,
        "an empty polygon": 2,
        "a malformed mask": 3,
        "a mask of another size than its image": 1,
        "an empty mask": 1,
        "a degenerate box": 1,
        "no usable box": 1,
        "a box outside its image": 1,
        "a box clipped to its image": 1,
    }
    _, target = dataset[0]
    np.testing.assert_array_equal(target["boxes"], np.float32([[2, 3, 12, 9], [0, 3, 7, 16]]))
    assert [entry["iscrowd"] for entry in dataset.coco_dict["annotations"]] == [0, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        ("[]", "not in COCO format"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "list of images has no entry"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "list of categories has no entry"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "image without a usable"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "instances.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        CocoDataset(path, tmp_path)
    assert str(path) in str(caught.value)


def test_a_data_set_without_a_usable_annotation_is_empty(tmp_path):
    with pytest.raises(InputError, match=r"empty.*1 with an unknown category"):
        CocoDataset(write(tmp_path, [instance(category_id=99)]), tmp_path)


def test_missing_truncated_and_resized_images_are_named(tmp_path):
    dataset = CocoDataset(write(tmp_path, [instance()]), tmp_path)
    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 20)).save(picture)
    with pytest.raises(InputError, match=r"a\.png is 20x16"):
        dataset[0]
    Image.effect_noise((20, 16), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:120])
    with pytest.raises(InputError, match=r"a\.png"):
        dataset[0]
    picture.unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        dataset[0]


def test_written_shapes_are_read_back_as_drawn(tmp_path):
    path = write_dataset(tmp_path, 2, seed=3, height=128, width=160)
    read, drawn = CocoDataset(path, tmp_path / "images"), ShapesDataset(2, seed=3, height=128, width=160)
    assert read.classes == drawn.classes
    assert read.report == {}
    for (image, target), (original, truth) in zip((read[i] for i in range(2)), (drawn[i] for i in range(2)), strict=True):
        assert np.abs(image.astype(int) - original).mean() < 6
        for key in ("boxes", "labels", "masks"):
            np.testing.assert_array_equal(target[key], truth[key])


def test_real_annotations_decode_as_pycocotools_decodes_them(shared_data):
    mini = shared_data / "coco_mini"
    path = mini / "annotations" / "instances_val.json"
    dataset, reference = CocoDataset(path, mini / "val"), COCO(str(path))
    assert len(dataset) == 80
    for index in range(0, 80, 16):
        _, target = dataset[index]
        things = [thing for thing in reference.imgToAnns[target["image_id"]] if not thing["iscrowd"]]
        assert [dataset.ids_to_category[label] for label in target["labels"]] == [thing["category_id"] for thing in things]
        for mask, thing in zip(target["masks"], things, strict=True):
            np.testing.assert_array_equal(mask, reference.annToMask(thing))
