from __future__ import annotations

import json
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from runtime.coco import read_coco
from runtime.errors import InputError
from runtime.graph import GRIDS
from runtime.instances import ClassName, Instances
from runtime.policies import Policy
from runtime.validate import validate

GMACS = {14: 0.25, 28: 0.5, 56: 0.75, 112: 1.0}
CLASSES = [ClassName(4, "disc"), ClassName(9, "star")]
GRID_OF_CLASS = (14, 112)
HEIGHT, WIDTH = 96, 128


class _Predictor:
    """Finds each image's true objects (they are told apart by the image's colour); its masks are as coarse as their grid."""

    def __init__(self, boxes):
        manifest = SimpleNamespace(preset="fake", precision="fp32", canvas=(96, 128), classes=CLASSES, grid_gmacs=GMACS)
        self.bundle = SimpleNamespace(path="fake.bundle", manifest=manifest)
        self.engine = SimpleNamespace(target="fake")
        self.boxes = boxes
        self.calls = []

    def check_budget(self, budget_gmacs, budget_ms):
        pass

    def __call__(self, image, budget_gmacs=None, grid_override=None, min_score=0.0, budget_ms=None):
        number = int(image[0, 0, 0]) // 20
        self.calls.append((number, budget_gmacs, grid_override))
        boxes, labels = self.boxes[number]
        start = time.perf_counter()
        by_msm = np.array([GRID_OF_CLASS[label] for label in labels], np.int64)
        grids = by_msm if grid_override in (None, -1, 4) else np.full(len(labels), GRIDS[grid_override], np.int64)
        found = Instances(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            scores=np.linspace(0.9, 0.6, len(labels)).astype(np.float32),
            labels=np.array(labels, np.int64),
            grids=grids,
            mask_data=[_disc(grid) for grid in grids],
            size=image.shape[:2],
            classes=CLASSES,
        )
        found.times_ms = {"preprocess": 1.0, "detector": 2.0, "masks": 1000 * (time.perf_counter() - start)}
        return found


def _disc(grid):
    centres = (np.arange(grid) + 0.5) / grid - 0.5
    return np.where(np.hypot(*np.meshgrid(centres, centres)) < 0.5, 20, -20).astype(np.float32)


@pytest.fixture
def boxes():
    random = np.random.default_rng(0)
    boxes = []
    for count in (2, 3, 0, 4):
        x, y, side = random.uniform(0, 40, count), random.uniform(0, 30, count), random.uniform(20, 60, count)
        boxes.append((np.stack([x, y, x + side, y + side], 1), random.integers(0, 2, count)))
    return boxes


@pytest.fixture
def data(tmp_path, boxes):
    """A COCO folder whose masks are true discs."""
    (tmp_path / "images").mkdir()
    truth = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": 4, "name": "disc", "supercategory": "smooth"},
            {"id": 9, "name": "star", "supercategory": "intricate"},
        ],
    }
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    for i, (objects, labels) in enumerate(boxes):
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), np.full((HEIGHT, WIDTH, 3), 20 * i + 5, np.uint8))
        truth["images"].append({"id": 100 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH})
        for (x0, y0, x1, y1), label in zip(objects, labels, strict=True):
            outline = np.stack([(x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angle), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angle)], 1)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": 100 + i,
                    "category_id": CLASSES[label].id,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) * np.pi / 4,
                    "iscrowd": 0,
                    "segmentation": [outline.ravel().tolist()],
                }
            )
    _write(tmp_path, truth)
    return tmp_path


def _write(folder, truth):
    (folder / "instances.json").write_text(json.dumps(truth))


def _read(folder):
    return json.loads((folder / "instances.json").read_text())


def test_policies_are_evaluated_side_by_side(data, boxes):
    predictor, ticks = _Predictor(boxes), []
    policies = ["routed", "routed@50%", "uniform-14", "uniform-112", "size-based"]
    result = validate(predictor, read_coco(data), policies, progress=lambda *at: ticks.append(at))
    json.dumps(result, allow_nan=False)

    judged = result["policies"]
    assert list(judged) == policies
    assert judged["uniform-112"]["segm"]["AP"] > judged["uniform-14"]["segm"]["AP"] > 20
    assert judged["uniform-14"]["bbox"]["AP"] == pytest.approx(100)
    assert judged["uniform-14"]["share"] == {"14": 1, "28": 0, "56": 0, "112": 0} and judged["uniform-14"]["gmacs"] == 0.25
    stars = np.concatenate([labels for _, labels in boxes]).mean()
    assert judged["routed"]["gmacs"] == pytest.approx(0.25 + 0.75 * stars)
    assert judged["routed"]["share"]["112"] == pytest.approx(stars)
    assert set(judged["routed"]["latency_ms"]) == {"preprocess", "detector", "masks", "paste", "total"}
    assert judged["routed"]["latency_ms"]["detector"] == {"p50": 2, "p95": 2, "p99": 2, "mean": 2}
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]

    # One warm-up of each, then for every image all of them, each image beginning with the next one.
    inputs = [(0.0, -1), (0.5, -1), (0.0, 0), (0.0, 3), (0.0, 4)]
    assert [call[1:] for call in predictor.calls[:5]] == inputs
    for image in range(4):
        calls = predictor.calls[5 + 5 * image : 10 + 5 * image]
        assert [(at, override) for at, _, override in calls] == [(image, override) for _, override in inputs[image:] + inputs[:image]]


def test_a_budget_is_kept_over_all_images(data, boxes):
    predictor = _Predictor(boxes)
    validate(predictor, read_coco(data), ["routed@50%", "uniform-112"])
    budgets = [budget for _, budget, override in predictor.calls[2:] if override == -1]
    # What the first image's grids left of the mean, or took beyond it, is the second's.
    first = np.where(boxes[0][1] == 1, 1.0, 0.25)
    assert budgets[0] == 0.5
    assert budgets[1] == pytest.approx(np.clip(0.5 + (0.5 - first).sum() / len(first), 0.25, 1.0))


def test_routing_by_class_and_size(data, boxes):
    result = validate(_Predictor(boxes), read_coco(data), ["routed", "uniform-14"])
    assert "routing" not in result["policies"]["uniform-14"]
    routing = result["policies"]["routed"]["routing"]
    cost = {entry["name"]: entry["mean_gmacs"] for entry in routing["classes"] + routing["supercategories"]}
    assert cost == {"disc": 0.25, "star": 1.0, "smooth": 0.25, "intricate": 1.0}
    sizes = {size: sum(entry["by_size"][size]["count"] for entry in routing["classes"]) for size in "SML"}
    assert sizes == {"S": 3, "M": 3, "L": 3}
    assert all(entry["by_size"][size]["mean_gmacs"] in (cost[entry["name"]], None) for entry in routing["classes"] for size in "SML")


def test_broken_images_are_skipped_and_listed(data, boxes):
    (data / "images" / "0.png").write_bytes((data / "images" / "0.png").read_bytes()[:40])
    (data / "images" / "1.png").unlink()
    cv2.imwrite(str(data / "images" / "2.png"), np.zeros((5, 5, 3), np.uint8))
    result = validate(_Predictor(boxes), read_coco(data), ["uniform-112"])
    assert [item["image"] for item in result["skipped"]] == ["0.png", "1.png", "2.png"]
    assert "2.png has 5x5 pixels" in result["skipped"][2]["reason"]
    assert result["dataset"]["images_left_out"] == {"image file missing": 1, "image file damaged or of another size": 2}
    assert result["dataset"]["images"] == 1 and result["dataset"]["annotations"] == len(boxes[3][1])
    assert result["policies"]["uniform-112"]["bbox"]["AP"] == pytest.approx(100)
    (data / "images" / "3.png").unlink()
    with pytest.raises(InputError, match="none of the 4 images"):
        validate(_Predictor(boxes), read_coco(data), ["routed"])


def test_no_detections_at_all(data, boxes):
    nothing = [(np.zeros((0, 4)), np.zeros(0, int))] * 4
    result = validate(_Predictor(nothing), read_coco(data), ["routed"], limit=2)
    json.dumps(result, allow_nan=False)
    routed = result["policies"]["routed"]
    assert result["dataset"]["images"] == 2
    assert routed["segm"]["AP"] == 0 and routed["gmacs"] is None and routed["share"]["14"] == 0 and routed["routing"]["classes"] == []


def test_unusable_annotations_are_counted(data, boxes):
    truth = _read(data)
    base = {name: value for name, value in truth["annotations"][0].items() if name != "id"}
    outside = [[300, 300, 320, 300, 320, 320, 300, 320]]
    truth["annotations"] += [
        {**base, "image_id": 5},
        {**base, "category_id": 77},
        {**base, "segmentation": []},
        {**base, "segmentation": outside},
    ]
    _write(data, truth)
    result = validate(_Predictor(boxes), read_coco(data), ["uniform-112"])
    assert result["dataset"]["annotations_left_out"] == {
        "unknown image": 1,
        "unknown category": 1,
        "no mask": 1,
        "polygon far outside its image": 1,
    }
    assert result["policies"]["uniform-112"]["bbox"]["AP"] == pytest.approx(100)


def test_policies_of_one_name_are_refused_and_repeated_ones_run_once(data, boxes):
    twice = [Policy("cheap", budget_gmacs=0.3), Policy("cheap", budget_gmacs=0.4)]
    with pytest.raises(InputError, match="2 different policies have the name 'cheap'"):
        validate(_Predictor(boxes), read_coco(data), twice)
    result = validate(_Predictor(boxes), read_coco(data), ["uniform-14", Policy("uniform-14", grid_override=0), "routed"])
    assert list(result["policies"]) == ["uniform-14", "routed"]


def test_data_sets_that_do_not_fit_are_refused(data, boxes):
    truth = _read(data)
    for categories, message in (
        ([truth["categories"][0], {"id": 9, "name": "moon"}], "class 9 is 'moon' in the data set and 'star' in the bundle"),
        (truth["categories"][:1], "class 9 is absent in the data set and 'star' in the bundle"),
        ([*truth["categories"], {"id": 2, "name": "new"}], "class 2 is 'new' in the data set and absent in the bundle"),
    ):
        _write(data, {**truth, "annotations": [], "categories": categories})
        with pytest.raises(InputError, match=message):
            validate(_Predictor(boxes), read_coco(data), ["routed"])
    _write(data, {**truth, "images": []})
    with pytest.raises(InputError, match="list of images has no entry"):
        read_coco(data)
    _write(data, {**truth, "categories": [{"id": "one", "name": "star"}]})
    with pytest.raises(InputError, match=r"a category .* has id 'one'; that must be a whole number"):
        read_coco(data)
    _write(data, [1, 2])
    with pytest.raises(InputError, match="is not in COCO format"):
        read_coco(data)
    (data / "instances.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_coco(data)
    with pytest.raises(InputError, match=r"nowhere/.* does not exist|nowhere does not exist"):
        read_coco(data / "nowhere")
    with pytest.raises(InputError, match="is not a folder"):
        read_coco(data / "instances.json", data / "elsewhere")


def test_real_annotations_are_read(shared_data):
    mini = shared_data / "coco_mini"
    dataset = read_coco(mini / "annotations" / "instances_val.json", mini / "val")
    assert len(dataset.truth["images"]) == 80 and len(dataset.truth["annotations"]) == 815 and not dataset.left_out
