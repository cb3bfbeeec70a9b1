"""Average precision of boxes, masks and mask boundaries by the rules of COCO and LVIS, from plain COCO structures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.coco_masks import MaskError, checked_area, checked_box, crowd_flag, encode_mask

Metrics = dict[str, "float | None"]

_NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
_FREQUENCIES = {"AP_r": "APr", "AP_c": "APc", "AP_f": "APf"}
"""Our names of AP over rare, common and frequent classes, and the engine's."""
_LVIS_DETECTIONS = 300
"""LVIS's limit per image, over all classes; COCO's is one per image and class."""
_BOUNDARY_DILATION = 0.02
"""Width of the boundary band as a share of the image's diagonal (Cheng et al., Boundary IoU, 2021)."""


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
) -> dict[str, Metrics]:
    """Average precision by COCO's rules: IoU 0.50:0.95, at most 100 detections an image, areas split at 32² and 96² pixels.

    A data set whose images have `neg_category_ids` and whose categories have a `frequency` is LVIS, annotated federatedly, and evaluated
    by its rules (Gupta et al., LVIS, 2019, section 2): detections of classes that the image neither is annotated with nor lists as absent
    do not count, unmatched ones of its `not_exhaustive_category_ids` are no errors, and an image may have 300 detections.

    Neither argument is changed and nothing is printed. For masks, annotations whose
    mask cannot be used (`runtime.coco_masks.encode_mask`) are left out, and a box that is missing or wrong is taken from the mask. Ids
    must be whole numbers, as `runtime.coco.read_coco` gives them.

    Args:
        ground_truth: a COCO data set (`images`, `annotations`, `categories`); segmentations are polygons or RLE.
        detections: COCO results: `image_id`, `category_id`, `score`, `bbox` (xywh pixels) and `segmentation` (compressed RLE).
        iou_types: any of `bbox`, `segm` and `boundary` (the lesser of mask and boundary IoU).
        image_ids: evaluate on these images alone; all of the data set's by default.

    Returns:
        By IoU type, `AP AP50 AP75 AP_S AP_M AP_L`, of LVIS also `AP_r AP_c AP_f` (rare, common, frequent classes), times 100; None where
        the data set has no instances of a kind.
    """
    images = {image["id"]: image for image in ground_truth["images"]}
    chosen = sorted(set(images) if image_ids is None else set(image_ids) & set(images))
    # The engine keeps ids as float64, which cannot tell large ones apart.
    numbers = {image_id: number for number, image_id in enumerate(chosen, 1)}
    truth = {
        "images": [{**images[image_id], "id": number} for image_id, number in numbers.items()],
        "categories": [dict(category) for category in ground_truth["categories"]],
        "annotations": _annotations(ground_truth, images, numbers, rasterise=any(kind != "bbox" for kind in iou_types)),
    }
    found = [{**detection, "image_id": numbers[detection["image_id"]]} for detection in detections if detection["image_id"] in numbers]
    if _is_lvis(truth):
        return {kind: _average_precision(truth, _best_by_image(found), kind, lvis=True) for kind in iou_types}
    return {kind: _average_precision(truth, found, kind) for kind in iou_types}


def _is_lvis(truth: Mapping[str, Any]) -> bool:
    images, categories = truth["images"], truth["categories"]
    return all("neg_category_ids" in image for image in images) and all("frequency" in category for category in categories)


def _best_by_image(detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """LVIS's `limit_dets_per_image`: the highest scores of each image, whatever their classes."""
    by_image: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    return [best for found in by_image.values() for best in sorted(found, key=_score, reverse=True)[:_LVIS_DETECTIONS]]


def _score(detection: Mapping[str, Any]) -> float:
    return float(detection["score"])


def _annotations(
    ground_truth: Mapping[str, Any], images: Mapping[int, Mapping[str, Any]], numbers: Mapping[int, int], rasterise: bool
) -> list[dict[str, Any]]:
    """Checked copies of the annotations of the images in `numbers`, with the image ids that those give."""
    kept: list[dict[str, Any]] = []
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] not in numbers:
            continue
        # Both engines take identifier 0 for "unmatched", so annotations are numbered from 1.
        copy = {**annotation, "id": len(kept) + 1, "image_id": numbers[annotation["image_id"]]}
        try:
            copy["iscrowd"] = int(crowd_flag(annotation.get("iscrowd")))
            if rasterise:
                image = images[annotation["image_id"]]
                rle = encode_mask(annotation.get("segmentation"), image["height"], image["width"])
                box, _ = checked_box(annotation.get("bbox"), rle)
                copy |= {"segmentation": rle, "bbox": list(box), "area": checked_area(annotation.get("area"), rle)}
            else:
                copy.setdefault("area", math.prod(copy["bbox"][2:]))
        except MaskError:
            continue
        kept.append(copy)
    return kept


def _average_precision(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: str, lvis: bool = False) -> Metrics:
    from faster_coco_eval import COCO, COCOeval_faster

    if not truth["images"] or not truth["annotations"]:
        return dict.fromkeys((*_NAMES, *_FREQUENCIES) if lvis else _NAMES)
    # The engine writes into the dictionaries it is given.
    coco = COCO({**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]})
    results = coco.loadRes([_result(detection, kind) for detection in detections])
    evaluation = COCOeval_faster(
        coco,
        results,
        kind,
        print_function=_silent,
        lvis_style=lvis,
        boundary_dilation_ratio=_BOUNDARY_DILATION,
        boundary_cpu_count=1,
        rle_iou_max_workers=1,
    )
    if lvis:
        evaluation.params.maxDets = [_LVIS_DETECTIONS]
    evaluation.run()
    figures = dict(zip(_NAMES, evaluation.stats, strict=False))
    if lvis:
        by_label = evaluation.stats_as_dict
        figures |= {name: by_label[label] for name, label in _FREQUENCIES.items()}
    return {name: None if value < 0 else 100.0 * float(value) for name, value in figures.items()}


def _result(detection: Mapping[str, Any], kind: str) -> dict[str, Any]:
    # Given a box and a mask, the COCO tools would take the box's area for the mask's, and so misplace it among S, M and L.
    field = "bbox" if kind == "bbox" else "segmentation"
    return {key: detection[key] for key in ("image_id", "category_id", "score", field)}


def _silent(*_: object) -> None:
    pass
