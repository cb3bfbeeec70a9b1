"""Accuracy and latency of a bundle on a COCO data set, for several grid policies side by side."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.budget import BudgetKeeper
from runtime.coco_metrics import evaluate_coco, to_rle
from runtime.errors import InputError
from runtime.graph import MSM
from runtime.images import read_image
from runtime.machine import machine
from runtime.policies import Policy, parse_policy
from runtime.statistics import RunStatistics, grid_statistics, timed_prediction

if TYPE_CHECKING:
    from runtime.predictor import Predictor

IOU_TYPES = ("segm", "bbox", "boundary")
POLICIES = ("routed", "routed@50%", "uniform-14", "uniform-28", "uniform-56", "uniform-112", "size-based")
ROUTING_SCORE = 0.5
"""Detections below this score stay out of the table of cost by class: their class says little about their shape."""


@dataclass(frozen=True)
class CocoFiles:
    """A COCO data set read for judging: what could not be judged on is left out and counted."""

    name: str
    images: Path
    truth: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)
    """Annotations left out, by reason."""


def read_coco(data: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> CocoFiles:
    """Read a folder that holds `instances.json` and `images/`, or an annotation file and its folder of images.

    Raises:
        InputError: a file or folder is missing, the file is not a COCO data set, or it holds no images.
    """
    annotations, folder = _locate(Path(data), None if images is None else Path(images))
    try:
        raw = json.loads(annotations.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{annotations} could not be read as JSON ({error}); give a COCO annotation file.") from error
    try:
        truth, left_out = _judgeable(raw)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(
            f"{annotations} is not a COCO data set ({type(error).__name__}: {error}); it needs images, annotations, categories."
        ) from error
    if not truth["images"]:
        raise InputError(f"{annotations} holds no images, so there is nothing to validate on; give a data set with at least one.")
    return CocoFiles(str(annotations), folder, truth, left_out)


def _locate(data: Path, images: Path | None) -> tuple[Path, Path]:
    annotations = data / "instances.json" if data.is_dir() else data
    if not annotations.is_file():
        raise InputError(f"{annotations} does not exist; --data is a folder with instances.json and images/, or a COCO annotation file.")
    folder = images or annotations.parent / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder of {annotations.name}'s images with --images.")
    return annotations, folder


def _file_name(image: Mapping[str, Any]) -> str:
    """LVIS names its images by their COCO address alone."""
    return str(image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:]))


def _judgeable(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    images = [
        {**image, "file_name": _file_name(image), **{key: int(image[key]) for key in ("id", "height", "width")}} for image in raw["images"]
    ]
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    categories = [{**category, "id": int(category["id"])} for category in raw["categories"]]
    known = {category["id"]: str(category["name"]) for category in categories}
    kept, left_out = [], dict.fromkeys(("unknown image", "unknown class", "empty mask"), 0)
    for annotation in raw["annotations"]:
        if annotation["image_id"] not in sizes:
            left_out["unknown image"] += 1
        elif annotation["category_id"] not in known:
            left_out["unknown class"] += 1
        elif (rle := to_rle(annotation.get("segmentation"), *sizes[annotation["image_id"]])) is None:
            left_out["empty mask"] += 1
        else:
            kept.append({**annotation, "segmentation": rle})
    truth = {"images": images, "annotations": kept, "categories": categories}
    return truth, {reason: count for reason, count in left_out.items() if count}


def validate(
    predictor: Predictor,
    dataset: CocoFiles,
    policies: Sequence[str | Policy] = POLICIES,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy, cost and latency of a bundle on a COCO data set, for several grid policies.

    All policies run on each image one after the other, and the order rotates from image to image, so that none gains from its place.
    Images whose file is broken or has another size than the annotations say are skipped and listed.

    Args:
        policies: texts as `parse_policy` reads them (`routed`, `routed@50%`, `routed@0.6gmac`, `uniform-28`, `size-based`), or `Policy`.
            A budget is kept over all images.
        limit: the number of images to take, the first ones; None takes all.
        progress: called with (images done, images in all).

    Returns:
        `dataset`, `skipped`, `bundle`, `grids`, `machine`, `date`, and under `policies`, by name: `segm`, `bbox`, `boundary` (AP × 100),
        `gmacs` (mean per instance; None without instances), `share` of each grid (0 to 1), `instances`, `latency_ms` (`preprocess`,
        `detector`, `masks`, `paste`, `total`: each `p50 p95 p99 mean`) and, where the model chooses, `routing` (cost by class and size).

    Raises:
        InputError: there is no policy or no such policy, the limit is not positive, the data set's classes are not the bundle's, or none
            of its images can be used.
    """
    manifest = predictor.bundle.manifest
    grid_gmacs = manifest.grid_gmacs
    chosen = [parse_policy(policy, grid_gmacs) for policy in dict.fromkeys(policies)]
    if not chosen:
        raise InputError("no grid policy was given, so there is nothing to validate; take for example routed,uniform-112.")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} images leaves nothing to validate on; give 1 or more.")
    check_classes([(c.id, c.name) for c in manifest.classes], dataset)
    runs = {policy.name: _Run(policy, grid_gmacs) for policy in chosen}
    judged, skipped = _run_all(predictor, dataset, runs, dataset.truth["images"][:limit], progress)
    if not judged:
        raise InputError(f"none of the {len(skipped)} images in {dataset.images} can be used; the first: {skipped[0]['reason']}")
    return {
        "dataset": {
            "name": dataset.name,
            "images": len(judged),
            "annotations": sum(a["image_id"] in judged for a in dataset.truth["annotations"]),
            "annotations_left_out": dataset.left_out,
        },
        "skipped": skipped,
        "bundle": _bundle(predictor),
        "grids": [{"grid": grid, "gmacs": gmacs} for grid, gmacs in sorted(grid_gmacs.items())],
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "policies": {name: _judge(run, dataset.truth, judged, grid_gmacs) for name, run in runs.items()},
    }


def check_classes(classes: Sequence[tuple[int, str]], dataset: CocoFiles) -> None:
    """Refuse a data set whose classes are not the bundle's, naming the first that differs.

    Raises:
        InputError: an identifier or a name differs, or one of the two has more classes.
    """
    ours = dict(sorted(classes))
    theirs = {category["id"]: str(category["name"]) for category in sorted(dataset.truth["categories"], key=lambda c: int(c["id"]))}
    for identifier in sorted(ours.keys() | theirs.keys()):
        if ours.get(identifier) != theirs.get(identifier):
            bundle, data = (repr(classes[identifier]) if identifier in classes else "absent" for classes in (ours, theirs))
            raise InputError(
                f"{dataset.name}: class {identifier} is {data} in the data set and {bundle} in the bundle; "
                "validate on the classes that the bundle was trained on."
            )


class _Run:
    """One policy, and its results on all images."""

    def __init__(self, policy: Policy, grid_gmacs: Mapping[int, float]) -> None:
        self.policy = policy
        self.statistics = RunStatistics(grid_gmacs)
        self.detections: list[dict[str, Any]] = []
        self.areas: list[float] = []
        """Of each detection's box, square pixels."""
        self._keeper = BudgetKeeper(policy.budget_gmacs, grid_gmacs)

    def warm_up(self, predictor: Predictor, image: Any) -> None:
        """Run once without a record: the first run of an engine allocates."""
        timed_prediction(predictor, image, self.policy.budget_gmacs, self.policy.grid_override)

    def add(self, predictor: Predictor, image: Any, image_id: int) -> None:
        """Run on an image and record what was found."""
        instances = timed_prediction(predictor, image, self._keeper.budget_gmacs(), self.policy.grid_override)
        self._keeper.spend(instances.grids)
        self.statistics.add(instances)
        self.detections += instances.to_coco(image_id)
        sides = instances.boxes[:, 2:] - instances.boxes[:, :2]
        self.areas += (sides[:, 0] * sides[:, 1]).tolist()


def _run_all(
    predictor: Predictor,
    dataset: CocoFiles,
    runs: Mapping[str, _Run],
    images: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> tuple[set[int], list[dict[str, str]]]:
    judged: set[int] = set()
    skipped: list[dict[str, str]] = []
    order = list(runs.values())
    for done, record in enumerate(images):
        try:
            image = _read(dataset, record)
        except InputError as error:
            skipped.append({"image": str(record["file_name"]), "reason": str(error)})
        else:
            if not judged:
                for run in order:
                    run.warm_up(predictor, image)
            for run in order:
                run.add(predictor, image, int(record["id"]))
            judged.add(int(record["id"]))
            order = order[1:] + order[:1]
        if progress is not None:
            progress(done + 1, len(images))
    return judged, skipped


def _read(dataset: CocoFiles, record: Mapping[str, Any]) -> Any:
    path = dataset.images / str(record["file_name"])
    image = read_image(path)
    if image.shape[:2] != (record["height"], record["width"]):
        height, width = image.shape[:2]
        expected = f"{record['width']}x{record['height']}"
        raise InputError(f"{path} is {width}x{height} pixels, not {expected} as its annotations say; correct one of the two.")
    return image


def _bundle(predictor: Predictor) -> dict[str, Any]:
    manifest = predictor.bundle.manifest
    return {
        "path": str(predictor.bundle.path),
        "preset": manifest.preset,
        "precision": manifest.precision,
        "canvas": list(manifest.canvas),
        "target": predictor.engine.target,
    }


def _judge(run: _Run, truth: Mapping[str, Any], judged: set[int], grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    result: dict[str, Any] = {**evaluate_coco(truth, run.detections, IOU_TYPES, judged), **run.statistics.summary()}
    if run.policy.grid_override == MSM:
        result["routing"] = _routing(run, truth["categories"], grid_gmacs)
    return result


def _routing(run: _Run, categories: Sequence[Mapping[str, Any]], grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    """Cost by class and by supercategory, each also by box area (terciles of all detections that score enough)."""
    sure = [i for i, detection in enumerate(run.detections) if detection["score"] >= ROUTING_SCORE]
    grids = np.array([run.detections[i]["grid"] for i in sure], int)
    areas = np.array([run.areas[i] for i in sure], float)
    owners = np.array([run.detections[i]["category_id"] for i in sure], int)
    terciles = [float(area) for area in np.quantile(areas, (1 / 3, 2 / 3))] if sure else []
    sizes = np.searchsorted(terciles, areas)

    def entry(member: Any) -> dict[str, Any]:
        by_size = {size: _share_and_cost(grids[member & (sizes == i)], grid_gmacs) for i, size in enumerate("SML")}
        return {**_share_and_cost(grids[member], grid_gmacs), "by_size": by_size}

    groups: dict[str, list[int]] = {}
    for category in categories:
        if "supercategory" in category:
            groups.setdefault(str(category["supercategory"]), []).append(category["id"])
    return {
        "score_at_least": ROUTING_SCORE,
        "area_terciles": terciles,
        "classes": [
            {"name": category["name"], "supercategory": category.get("supercategory"), **entry(owners == category["id"])}
            for category in categories
            if (owners == category["id"]).any()
        ],
        "supercategories": [
            {"name": name, **entry(np.isin(owners, members))} for name, members in groups.items() if np.isin(owners, members).any()
        ],
    }


def _share_and_cost(grids: Any, grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    figures = grid_statistics(Counter(grids.tolist()), grid_gmacs)
    return {"count": figures["instances"], "mean_gmacs": figures["gmacs"], "share": figures["share"]}
