"""LVIS v1 by its published layout, and judged by its federated rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from dynamask.data.lvis import LvisDataset, lvis_v1
from runtime.coco_metrics import evaluate_coco
from runtime.errors import InputError

SIDE = 100
A, B, C = 1, 2, 3
"""Categories: rare, common, frequent."""


def square(x: int, y: int = 0, side: int = 20) -> dict[str, Any]:
    """The fields of a square's box and mask."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + side, x : x + side] = 1
    encoded = rle.encode(np.asfortranarray(mask))
    segmentation = {"size": [SIDE, SIDE], "counts": encoded["counts"].decode()}
    return {"bbox": [x, y, side, side], "segmentation": segmentation, "area": side * side}


def tree(
    annotations: list[dict[str, Any]], negative: dict[int, list[int]] | None = None, partial: dict[int, list[int]] | None = None
) -> dict[str, Any]:
    """Images 1 and 2; of no class it is known that they lack it, except as `negative` says."""
    return {
        "images": [
            {
                "id": i,
                "coco_url": f"http://images.cocodataset.org/{folder}/{i:012d}.jpg",
                "height": SIDE,
                "width": SIDE,
                "neg_category_ids": (negative or {}).get(i, []),
                "not_exhaustive_category_ids": (partial or {}).get(i, []),
            }
            for i, folder in ((1, "train2017"), (2, "val2017"))
        ],
        "categories": [{"id": i, "name": name, "frequency": name} for i, name in ((A, "r"), (B, "c"), (C, "f"))],
        "annotations": [{"id": i + 1, **entry} for i, entry in enumerate(annotations)],
    }


def thing(image: int, category: int, x: int, score: float | None = None) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, **square(x)} | ({} if score is None else {"score": score})


def average_precisions(truth: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> tuple[float | None, ...]:
    figures = evaluate_coco(truth, detections, (kind,))[kind]
    return tuple(figures[name] for name in ("AP", "AP_r", "AP_c", "AP_f"))


@pytest.mark.parametrize("kind", ["bbox", "segm", "boundary"])
def test_a_detection_of_a_class_that_was_not_looked_for_does_not_count(kind: str) -> None:
    annotations = [thing(1, A, 0), thing(2, B, 0), thing(2, C, 40)]
    hits = [thing(1, A, 0, 0.5), thing(2, B, 0, 0.5), thing(2, C, 40, 0.5)]
    stray = thing(1, C, 60, 0.9)  # before the only hit of C: one right of two, at every recall a precision of 1/2
    assert average_precisions(tree(annotations), [*hits, stray], kind) == pytest.approx((100, 100, 100, 100))
    expected = pytest.approx(((100 + 100 + 50) / 3, 100, 100, 50))
    assert average_precisions(tree(annotations, negative={1: [C]}), [*hits, stray], kind) == expected


def test_a_surplus_of_a_class_that_is_not_exhaustively_annotated_is_no_error() -> None:
    annotations = [thing(1, A, 0), thing(2, B, 0)]
    detections = [thing(1, A, 0, 0.5), thing(1, A, 40, 0.9), thing(2, B, 0, 0.5)]
    assert average_precisions(tree(annotations), detections, "segm")[:3] == pytest.approx((75, 50, 100))
    assert average_precisions(tree(annotations, partial={1: [A]}), detections, "segm")[:2] == pytest.approx((100, 100))


def test_an_image_has_300_detections_of_all_classes_together() -> None:
    annotations = [thing(1, A, 0), thing(1, B, 40)]
    flood = [thing(1, A, 70, 0.9) for _ in range(299)]
    first, second = thing(1, A, 0, 0.95), thing(1, B, 40, 0.5)
    assert average_precisions(tree(annotations), [second, *flood[:-1], first], "bbox")[:3] == pytest.approx((100, 100, 100))
    assert average_precisions(tree(annotations), [second, *flood, first], "bbox")[:3] == pytest.approx((50, 100, 0))


def test_without_annotations_there_is_no_ap() -> None:
    assert average_precisions(tree([]), [thing(1, A, 0, 0.5)], "segm") == (None,) * 4


def write(root: Path, truth: dict[str, Any]) -> Path:
    for entry in truth["images"]:
        path = root.joinpath(*entry["coco_url"].split("/")[-2:])
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (entry["id"], 0, 0)).save(path, quality=100)
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        (root / "annotations" / f"lvis_v1_{part}.json").write_text(json.dumps(truth))
    return root


def test_images_are_found_by_coco_url_and_targets_keep_lvis_lists(tmp_path: Path) -> None:
    truth = tree([thing(1, C, 0), thing(2, B, 0)], negative={2: [A, C]}, partial={1: [C]})
    dataset = lvis_v1(write(tmp_path, truth), "val")
    image, target = dataset[1]
    assert image[0, 0, 0] == pytest.approx(2, abs=2)
    assert (target["neg_category_ids"].tolist(), target["not_exhaustive_category_ids"].tolist()) == ([A, C], [])
    assert target["neg_category_ids"].dtype == np.int64
    assert target["labels"].tolist() == [B]
    assert dataset[0][1]["not_exhaustive_category_ids"].tolist() == [C]
    # The data set's own ground truth is judged as LVIS.
    stray = thing(1, B, 0, 0.9)
    assert average_precisions(dataset.coco_dict, [stray, thing(1, C, 0, 0.5), thing(2, B, 0, 0.5)], "segm")[0] == pytest.approx(100)


@pytest.mark.parametrize("missing", ["annotations/lvis_v1_val.json", "val2017", "train2017/000000000001.jpg"])
def test_the_first_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    root = write(tmp_path, tree([thing(1, A, 0)]))
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"is missing: .*annotations/lvis_v1_train\.json.*lvisdataset\.org") as caught:
        lvis_v1(root, "train")
    assert str(caught.value).startswith(f"{root / missing} ")


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("images", "neg_category_ids", "image 1 has no list neg_category_ids"),
        ("images", "not_exhaustive_category_ids", "image 1 has no list not_exhaustive_category_ids"),
        ("images", "coco_url", "image 1 has no file_name"),
        ("categories", "frequency", "category 1 has frequency None"),
    ],
)
def test_a_file_that_is_not_lvis_is_refused(tmp_path: Path, section: str, field: str, message: str) -> None:
    truth = tree([thing(1, A, 0)])
    path = write(tmp_path, truth) / "annotations" / "lvis_v1_train.json"
    del truth[section][0][field]
    path.write_text(json.dumps(truth))
    with pytest.raises(InputError, match=message) as caught:
        LvisDataset(path, tmp_path)
    assert str(path) in str(caught.value)
