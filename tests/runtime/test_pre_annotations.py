"""Pre-annotations for labelling tools, against pycocotools and the rules of the tools' importers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

import cli.main
from runtime.pre_annotations import mask_polygons


def drawn(polygons: list[list[float]], height: int, width: int) -> np.ndarray[Any, Any]:
    return np.asarray(mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, height, width))))


def test_a_rectangle_keeps_every_pixel() -> None:
    mask = np.zeros((12, 16), bool)
    mask[3:9, 4:13] = True
    [polygon] = mask_polygons(mask)
    assert sorted(np.reshape(polygon, (-1, 2)).tolist()) == [[4, 3], [4, 9], [13, 3], [13, 9]]
    np.testing.assert_array_equal(drawn([polygon], 12, 16), mask)


@pytest.mark.parametrize("seed", range(6))
def test_polygons_draw_the_mask_again(seed: int) -> None:
    """Blobs of several parts, at an offset: nearly the same pixels as pycocotools draws them."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(90, 120)).astype(np.float32), (0, 0), 9)
    blob = (noise > noise.std()).astype(np.uint8)
    contours, _ = cv2.findContours(blob, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(blob), contours, -1, 1, cv2.FILLED)
    polygons = mask_polygons(blob.astype(bool), 7, 5)
    assert len(polygons) == len(contours)
    areas = [cv2.contourArea(np.reshape(polygon, (-1, 1, 2)).astype(np.float32)) for polygon in polygons]
    assert areas == sorted(areas, reverse=True)
    found, expected = drawn(polygons, 100, 130)[5:95, 7:127], filled.astype(bool)
    assert (found & expected).sum() / (found | expected).sum() > 0.95
    assert sum(map(len, polygons)) < sum(map(len, contours))  # half of the points, which have two numbers each


def test_a_mask_without_pixels_has_no_polygon() -> None:
    assert mask_polygons(np.zeros((5, 5), bool)) == []


def test_predict_writes_a_file_that_labelling_tools_import(example_files: dict[str, Any], tmp_path: Path) -> None:
    """CVAT takes polygons of annotations with iscrowd 0, and finds photos by their names. Label Studio's converter takes the first polygon
    of each, reads every category's id and name, and joins file names to the address of the photos."""
    path = tmp_path / "found.json"
    photo = example_files["photo"]
    assert cli.main.main(["predict", str(example_files["bundle"]), str(photo), "--coco", str(path), "--score", "0"]) == 0
    tree = json.loads(path.read_text())
    [image] = tree["images"]
    height, width = example_files["image"].shape[:2]
    assert (image["file_name"], image["height"], image["width"]) == (photo.name, height, width)
    assert tree["annotations"]
    categories = {entry["id"]: entry["name"] for entry in tree["categories"]}
    for entry in tree["annotations"]:
        assert entry["iscrowd"] == 0 and entry["category_id"] in categories and entry["image_id"] == image["id"]
        assert isinstance(entry["segmentation"], list)
        for polygon in entry["segmentation"]:
            points = np.reshape(polygon, (-1, 2))
            assert len(points) >= 3 and (points >= 0).all() and (points <= (width, height)).all()
    data = COCO(str(path))
    results = tmp_path / "results.json"
    assert cli.main.main(["predict", str(example_files["bundle"]), str(photo), "--json", str(results), "--score", "0"]) == 0
    [record] = json.loads(results.read_text())["images"]
    detections = [entry for entry in record["detections"] if mask_api.area(entry["segmentation"])]
    assert len(detections) == len(tree["annotations"])
    for entry, detection in zip(tree["annotations"], detections, strict=True):
        mask = mask_api.decode(detection["segmentation"]).astype(bool)
        ours = data.annToMask(entry).astype(bool)
        assert entry["area"] == mask.sum()
        assert entry["bbox"] == mask_api.toBbox(detection["segmentation"]).tolist()
        assert (ours & mask).sum() / (ours | mask).sum() > 0.8
