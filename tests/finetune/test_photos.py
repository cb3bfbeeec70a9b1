"""The photos of a fine-tuning: divided, checked, scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from dynamask.finetune.photos import COPY_SIDE_PX, PhotoSets, prepare_photos
from runtime.errors import InputError

NAMES = ["leaf", "flower", "fern"]


def square(image_id: int, category: int, x: int = 100) -> dict[str, Any]:
    polygon = [x, 80, x + 200, 80, x + 200, 280, x, 280]
    return {"image_id": image_id, "category_id": category, "segmentation": [polygon]}


def labelled(root: Path, classes: list[list[int]], size: tuple[int, int] = (600, 800)) -> Path:
    """A folder of photos, each with objects of the given category ids."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, categories in enumerate(classes):
        cv2.imwrite(str(root / "images" / f"{i}.jpg"), np.full((*size, 3), 60 + i, np.uint8))
        images.append({"id": i, "file_name": f"{i}.jpg", "height": size[0], "width": size[1]})
        annotations += [square(i, category, 100 + 250 * n) for n, category in enumerate(categories)]
    tree = {"images": images, "annotations": annotations, "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]}
    (root / "instances.json").write_text(json.dumps(tree))
    return root


def prepare(photos: Path, folder: Path, val: Path | None = None, seed: int = 0) -> tuple[PhotoSets, list[str]]:
    said: list[str] = []
    return prepare_photos(photos, folder, None, None, val, seed, said.append), said


def test_a_fifth_is_held_back_and_every_class_stays_in_training(tmp_path: Path) -> None:
    """The only photo of a class is never held back, whatever the seed."""
    photos = labelled(tmp_path / "photos", [[1], [1, 2], [2], [1], [2], [1], [2], [1, 2], [3], [1]])
    divisions = set()
    for seed in range(8):
        sets, _ = prepare(photos, tmp_path / f"data{seed}", seed=seed)
        assert (sets.train_photos, sets.val_photos) == (8, 2)
        assert [entry["name"] for entry in sets.classes] == NAMES
        assert sets.val is not None
        train, val = COCO(str(sets.train[0])), COCO(str(sets.val[0]))
        assert set(train.getImgIds()).isdisjoint({image["file_name"] for image in val.dataset["images"]})
        assert 3 not in {entry["category_id"] for entry in val.dataset["annotations"]}
        divisions.add(tuple(sorted(image["file_name"] for image in val.dataset["images"])))
    assert len(divisions) > 1


def test_copies_have_the_objects_at_their_places(tmp_path: Path) -> None:
    sets, _ = prepare(labelled(tmp_path / "photos", [[1, 2], [1]]), tmp_path / "data", val=labelled(tmp_path / "val", [[1]]))
    train = COCO(str(sets.train[0]))
    scale = COPY_SIDE_PX / 800
    for image in train.dataset["images"]:
        assert (image["height"], image["width"]) == (round(600 * scale), COPY_SIDE_PX)
        assert cv2.imread(str(sets.train[1] / image["file_name"])).shape == (image["height"], image["width"], 3)
    boxes = sorted(entry["bbox"] for entry in train.dataset["annotations"])
    expected = sorted([x * scale, 80 * scale, 200 * scale, 200 * scale] for x in (100, 350, 100))
    np.testing.assert_allclose(boxes, expected, atol=1.0)
    assert sets.val is not None
    assert COCO(str(sets.val[0])).dataset["annotations"][0]["bbox"] == [100, 80, 200, 200]


def test_photos_that_an_export_has_for_validation_are_held_back(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        folder = labelled(tmp_path / "photos" / part, [[1], [2]])
        (folder / "instances.json").rename(folder / "_annotations.coco.json")
    sets, _ = prepare(tmp_path / "photos", tmp_path / "data")
    assert (sets.train_photos, sets.val_photos) == (2, 2)
    assert sets.val is not None
    assert all(image["file_name"].startswith("valid/") for image in COCO(str(sets.val[0])).dataset["images"])


def test_broken_photos_and_classes_without_objects_are_said_and_left_out(tmp_path: Path) -> None:
    photos = labelled(tmp_path / "photos", [[1]] * 12)
    (photos / "images" / "3.jpg").write_bytes(b"no image")
    cv2.imwrite(str(photos / "images" / "7.jpg"), np.zeros((30, 40, 3), np.uint8))
    (photos / "images" / "unlabelled.jpg").write_bytes(b"")
    sets, said = prepare(photos, tmp_path / "data")
    assert sets.train_photos + sets.val_photos == 10
    assert len(sets.broken) == 2
    text = "\n".join(said)
    for words in ("3.jpg", "40x30 pixels", "flower, fern: the model will not find them", "has 1 photos without labels"):
        assert words in text


def test_one_photo_is_trained_on_and_none_judged(tmp_path: Path) -> None:
    sets, said = prepare(labelled(tmp_path / "photos", [[1]]), tmp_path / "data")
    assert (sets.train_photos, sets.val) == (1, None)
    assert "No photo is held back" in said[-1]


def test_photos_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    photos = labelled(tmp_path / "photos", [[1], [1]])
    with pytest.raises(InputError, match=r"no object of the classes of .* \(leaf\)"):
        prepare(photos, tmp_path / "data", val=labelled(tmp_path / "val", [[2]]))
    for path in (photos / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 2 labelled photos can be read"):
        prepare(photos, tmp_path / "data2")
