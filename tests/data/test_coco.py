from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dynamask.data.coco import CocoDataset, left_out_counts, left_out_lines
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


def test_items_have_boxes_labels_and_masks_of_their_instances(tmp_path):
    annotations = [instance(), instance(category_id=2, bbox=None), instance(category_id=99), instance(iscrowd=1)]
    dataset = CocoDataset(write(tmp_path, annotations), tmp_path)
    image, target = dataset[0]
    expected = np.zeros((16, 20), np.uint8)
    expected[3:9, 2:12] = 1
    assert image.shape == (16, 20, 3)
    assert target["image_id"] == 7
    assert target["masks"].dtype == np.uint8
    np.testing.assert_array_equal(target["masks"], np.stack([expected] * 2))
    np.testing.assert_array_equal(target["boxes"], np.float32([[2, 3, 12, 9]] * 2))
    np.testing.assert_array_equal(target["labels"], [2, 1])
    assert dataset.classes == [{"id": 2, "name": "date"}, {"id": 5, "name": "nut"}]
    assert dataset.ids_to_category == {1: 2, 2: 5}
    assert [entry["iscrowd"] for entry in dataset.coco_dict["annotations"]] == [0, 0, 1]


def test_annotations_left_out_are_printed_and_counted_by_part(tmp_path):
    dataset = CocoDataset(write(tmp_path, [instance(), instance(category_id=99)]), tmp_path)
    parts = {"train": dataset, "val": dataset, "shapes": ShapesDataset(1, seed=0)}
    (line,), counts = left_out_lines(parts), left_out_counts(parts)
    assert line.startswith("Warning: ")
    assert "1 of 2 annotations (50.0%) are left out: 1 unknown category" in line
    assert counts == dict.fromkeys(("train", "val"), dataset.data.counts())
    assert counts["train"]["annotations_left_out"] == {"unknown category": 1}


@pytest.mark.parametrize("annotations", [[], [instance(iscrowd=1)]])
def test_a_data_set_without_instances_is_refused(tmp_path, annotations):
    with pytest.raises(InputError, match="no annotation to train on"):
        CocoDataset(write(tmp_path, annotations), tmp_path)


def test_images_that_are_missing_are_left_out_or_refused(tmp_path):
    images = [{"id": i, "file_name": name, "height": 16, "width": 20} for i, name in ((6, "none.png"), (7, "a.png"))]
    path = write(tmp_path, [instance(), instance(image_id=6)], images=images)
    dataset = CocoDataset(path, tmp_path)
    assert dataset.image_ids == [7]
    assert dataset.data.images_left_out == {"image file missing": 1}
    with pytest.raises(InputError, match=r"no none\.png"):
        CocoDataset(path, tmp_path, lambda name: InputError(f"no {name}"))


def test_truncated_resized_and_deleted_images_are_named(tmp_path):
    dataset = CocoDataset(write(tmp_path, [instance()]), tmp_path)
    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 20)).save(picture)
    with pytest.raises(InputError, match=r"a\.png has 16x20 pixels"):
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
    assert read.data.left_out == read.data.repaired == {}
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
