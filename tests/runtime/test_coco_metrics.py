from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from runtime.coco_masks import encode_mask
from runtime.coco_metrics import evaluate_coco

NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


def _encode(mask):
    rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _ellipse(height, width, x, y, w, h):
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) / (w / 2)) ** 2 + ((rows - y) / (h / 2)) ** 2 <= 1


def _dataset(seed=0, images=12, height=160, width=200):
    """Ellipses of all sizes as polygons, compressed and plain RLE, some of them crowds, and detections that are off by a little."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 10 + i, "height": height, "width": width, "file_name": f"{i}.png"} for i in range(images)],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 9, "name": "never there"}],
        "annotations": [],
    }
    detections = []
    for image in truth["images"]:
        for _ in range(random.integers(1, 7)):
            w, h = random.uniform(8, 150, 2)
            x, y = random.uniform(20, width - 20), random.uniform(20, height - 20)
            mask = _ellipse(height, width, x, y, w, h)
            crowd = int(random.random() < 0.1)
            category = int(random.choice([3, 7]))
            annotation = {"id": len(truth["annotations"]), "image_id": image["id"], "category_id": category, "iscrowd": crowd}
            kind = random.integers(3)
            if crowd or kind == 0:
                counts, flat = [], mask.T.ravel()
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
                counts = np.diff(np.concatenate([[0], edges])).tolist()
                annotation["segmentation"] = {"size": [height, width], "counts": counts}
            elif kind == 1:
                annotation["segmentation"] = _encode(mask)
            else:
                angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                outline = np.stack([x + w / 2 * np.cos(angle), y + h / 2 * np.sin(angle)], 1)
                annotation["segmentation"] = [outline.ravel().tolist()]
                mask = mask_api.decode(mask_api.frPyObjects(annotation["segmentation"], height, width))[..., 0]
            annotation["bbox"] = mask_api.toBbox(mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
            annotation["area"] = float(mask.sum())
            truth["annotations"].append(annotation)
            for _ in range(random.integers(0, 3)):
                moved = _ellipse(height, width, x + random.normal(0, 3), y + random.normal(0, 3), w * random.uniform(0.8, 1.2), h)
                if moved.any():
                    rle = _encode(moved)
                    detections.append(
                        {
                            "image_id": image["id"],
                            "category_id": category if random.random() < 0.9 else 10 - category,
                            "score": float(random.random()),
                            "bbox": mask_api.toBbox(rle).tolist(),
                            "segmentation": rle,
                        }
                    )
    return truth, detections


def _pycocotools(truth, detections, kind, image_ids=None):
    """The reference: pycocotools, whose size of a mask detection is the mask's only if no box is given."""
    truth = copy.deepcopy(truth)
    for i, annotation in enumerate(truth["annotations"]):
        annotation["id"] = i + 1
    field = "bbox" if kind == "bbox" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        results = coco.loadRes([{k: d[k] for k in ("image_id", "category_id", "score", field)} for d in copy.deepcopy(detections)])
        evaluation = COCOeval(coco, results, kind)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, 100 * evaluation.stats[:6], strict=True))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("image_ids", [None, [10, 13, 17]])
def test_agrees_with_pycocotools(kind, image_ids, capfd):
    truth, detections = _dataset()
    before = copy.deepcopy((truth, detections))
    ours = evaluate_coco(truth, detections, (kind,), image_ids)[kind]
    assert capfd.readouterr() == ("", "")
    assert (truth, detections) == before
    reference = _pycocotools(truth, [d for d in detections if image_ids is None or d["image_id"] in image_ids], kind, image_ids)
    assert 1 < reference["AP"] < 99
    for name in NAMES:
        assert (ours[name] if ours[name] is not None else -100) == pytest.approx(reference[name], abs=1e-6), name


def test_image_ids_beyond_the_precision_of_floats_are_told_apart():
    truth, detections = _dataset(3)
    usual = evaluate_coco(truth, detections, ("segm",))
    for entry in [*truth["annotations"], *detections]:
        entry["image_id"] += 2**62
    for image in truth["images"]:
        image["id"] += 2**62
    assert evaluate_coco(truth, detections, ("segm",)) == usual


def test_boundary_ap_is_below_mask_ap_for_coarse_masks():
    truth, detections = _dataset(seed=1)
    exact = [
        {**a, "score": 0.9, "segmentation": encode_mask(a["segmentation"], 160, 200)} for a in truth["annotations"] if not a["iscrowd"]
    ]
    assert evaluate_coco(truth, exact, ("boundary",))["boundary"]["AP"] == pytest.approx(100)
    metrics = evaluate_coco(truth, detections, ("segm", "boundary"))
    assert 0 < metrics["boundary"]["AP"] < metrics["segm"]["AP"]


def test_ap_without_detections_and_without_annotations():
    truth, detections = _dataset()
    assert evaluate_coco(truth, [], ("bbox", "segm", "boundary"))["boundary"]["AP"] == 0
    empty = evaluate_coco({**truth, "annotations": []}, detections)
    assert empty["segm"] == dict.fromkeys(NAMES)
    small_only = {**truth, "annotations": [a for a in truth["annotations"] if a["area"] < 1024]}
    assert evaluate_coco(small_only, detections)["segm"]["AP_L"] is None


def test_empty_polygons_and_missing_fields_are_handled():
    truth, detections = _dataset()
    expected = evaluate_coco(truth, detections, ("segm",))
    for annotation in truth["annotations"]:
        if isinstance(annotation["segmentation"], dict):
            del annotation["area"], annotation["bbox"]
    truth["annotations"].append({"id": 900, "image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5], "segmentation": [[]]})
    assert evaluate_coco(truth, detections, ("segm",)) == expected
