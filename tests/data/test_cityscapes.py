"""Cityscapes by its published layout, from instance maps written by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle

from dynamask.data.cityscapes import CityscapesDataset
from dynamask.data.coco import Array
from runtime.errors import InputError

# A road (7), a person (24001), two cars that touch (26000, 26001), a group of cars (26), a caravan (29000) and a group of the sky (23).
MAP = np.array(
    [
        [23, 23, 23, 23, 26, 26],
        [7, 24001, 26000, 26001, 26001, 29000],
        [7, 24001, 26000, 26000, 26001, 29000],
        [7, 7, 7, 7, 7, 7],
    ],
    np.uint16,
)


def write(root: Path, part: str, name: str, pixels: Array) -> None:
    image = np.full((*pixels.shape[:2], 3), (30, 20, 10), np.uint8)
    city = name.split("_")[0]
    for folder, ending, content in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_instanceIds", pixels)):
        path = root / folder / part / city / f"{name}_{ending}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train", "ulm_000001_000019", np.full_like(MAP, 7))
    write(tmp_path, "train", "bonn_000000_000019", MAP)
    write(tmp_path, "val", "lindau_000000_000019", MAP)
    return tmp_path


def test_pixels_become_instances_of_the_eight_classes(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    assert [entry["id"] for entry in dataset.classes] == [24, 25, 26, 27, 28, 31, 32, 33]
    image, target = dataset[0]
    assert image[0, 0].tolist() == [10, 20, 30]
    assert target["image_id"] == 1
    assert [dataset.classes[label - 1]["name"] for label in target["labels"]] == ["person", "car", "car"]
    np.testing.assert_array_equal(target["masks"], np.stack([value == MAP for value in (24001, 26000, 26001)]))
    np.testing.assert_array_equal(target["boxes"], [[1, 1, 2, 3], [2, 1, 4, 3], [3, 1, 5, 3]])
    assert (target["masks"].dtype, target["boxes"].dtype, target["labels"].dtype) == (np.uint8, np.float32, np.int64)


def test_an_image_of_road_alone_is_not_trained_on(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    _, target = dataset[1]
    assert (target["boxes"].shape, target["masks"].shape, target["labels"].shape) == ((0, 4), (0, 4, 6), (0,))
    assert (len(dataset), dataset.indices_with_instances) == (2, [0])


def test_groups_are_crowds_of_the_ground_truth(root: Path) -> None:
    tree = CityscapesDataset(root, "train").coco_dict
    found = {(entry["category_id"], entry["iscrowd"], entry["area"]) for entry in tree["annotations"]}
    assert found == {(26, 1, 2), (24, 0, 2), (26, 0, 3)}
    assert [entry["id"] for entry in tree["annotations"]] == [1, 2, 3, 4]
    group = next(entry for entry in tree["annotations"] if entry["iscrowd"])
    np.testing.assert_array_equal(rle.decode(group["segmentation"]), MAP == 26)


def test_only_the_first_images_are_read_when_few_are_asked_for(root: Path) -> None:
    (root / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_instanceIds.png").write_bytes(b"broken")
    assert len(CityscapesDataset(root, "train", 1).coco_dict["images"]) == 1
    with pytest.raises(InputError, match=r"ulm_000001_000019_gtFine_instanceIds\.png is damaged"):
        _ = CityscapesDataset(root, "train").coco_dict


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint16, (4, 5), elements=st.sampled_from([0, 7, 24, 26, 29, 24000, 26003, 29001, 30000, 33999])))
def test_every_pixel_of_an_instance_lies_in_one_mask_and_no_other_pixel_in_any(pixels: Array) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "val"):
            write(Path(folder), part, "ulm_000001_000019", pixels)
        dataset = CityscapesDataset(Path(folder), "val")
        _, target = dataset[0]
        annotations = dataset.coco_dict["annotations"]
    np.testing.assert_array_equal(target["masks"].sum(axis=0), np.isin(pixels, [24000, 26003, 33999]))
    crowds = sum((rle.decode(entry["segmentation"]) for entry in annotations if entry["iscrowd"]), np.zeros_like(pixels))
    np.testing.assert_array_equal(crowds, np.isin(pixels, [24, 26]))
    for (x0, y0, x1, y1), mask in zip(target["boxes"].astype(int), target["masks"], strict=True):
        edges = mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert all(edge.any() for edge in edges)


@pytest.mark.parametrize(
    "missing",
    [
        "gtFine/val",
        "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png",
        "gtFine/train/bonn/bonn_000000_000019_gtFine_instanceIds.png",
    ],
)
def test_the_first_missing_file_is_named(root: Path, missing: str) -> None:
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"is missing: .*gtFine_trainvaltest\.zip.*cityscapes-dataset\.com") as caught:
        CityscapesDataset(root, "train")
    assert str(caught.value).startswith(f"{root / missing} ")


def test_folders_without_images_are_refused(root: Path) -> None:
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder / "val" / "lindau").rename(root / folder / "lindau")
    with pytest.raises(InputError, match=r"leftImg8bit/val/<city>/\*_leftImg8bit\.png is missing"):
        CityscapesDataset(root, "val")


def test_a_file_of_another_kind_is_refused(root: Path) -> None:
    write(root, "val", "lindau_000000_000019", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(InputError, match="has 3 channels"):
        CityscapesDataset(root, "val")[0]
    write(root, "val", "lindau_000000_000019", MAP)
    assert cv2.imwrite(str(root / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png"), np.zeros((8, 12, 3), np.uint8))
    with pytest.raises(InputError, match="is 8x12 but its instances are 4x6"):
        CityscapesDataset(root, "val")[0]
