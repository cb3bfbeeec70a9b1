"""Accuracy and latency of a bundle on a COCO data set, for several grid policies side by side."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.budget import BudgetKeeper
from runtime.coco import MISSING_FILE, CocoData, CocoImage, first_other_class
from runtime.coco_metrics import evaluate_coco
from runtime.errors import InputError
from runtime.graph import GRIDS, MSM
from runtime.machine import machine
from runtime.policies import Policy, parse_policy
from runtime.statistics import RunStatistics, grid_statistics, timed_prediction

if TYPE_CHECKING:
    from runtime.predictor import Predictor

UNUSABLE_FILE = "image file damaged or of another size"
IOU_TYPES = ("segm", "bbox", "boundary")
POLICIES = ("routed", "routed@50%", *(f"uniform-{grid}" for grid in GRIDS), "size-based")
ROUTING_SCORE = 0.5
"""Detections below this score stay out of the table of cost by class: their class says little about their shape."""


def validate(
    predictor: Predictor,
    dataset: CocoData,
    policies: Sequence[str | Policy] = POLICIES,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy, cost and latency of a bundle on a COCO data set, for several grid policies.

    All policies run on each image one after the other, and the order rotates from image to image, so that none gains from its place.
    Images whose file is broken or has another size than the annotations say are skipped and listed.

    Args:
        policies: texts as `parse_policy` reads them (`routed`, `routed@50%`, `routed@0.6gmac`, `routed@20ms`, `uniform-28`, `size-based`),
            or `Policy`. A budget in GMAC is kept over all images, one in milliseconds in each.
        limit: the number of images to take, the first ones; None takes all.
        progress: called with (images done, images in all).

    Returns:
        `dataset`, `skipped`, `bundle`, `grids`, `machine`, `date`, and under `policies`, by name: `segm`, `bbox`, `boundary` (AP × 100),
        `gmacs` (mean per instance; None without instances), `share` of each grid (0 to 1), `instances`, `latency_ms` (`preprocess`,
        `detector`, `masks`, `paste`, `total`: each `p50 p95 p99 mean`), `predicted` (the times that the engine's measured costs predict, as
        `runtime.statistics.RunStatistics.summary` has them) and, where the model chooses, `routing` (cost by class and size).

    Raises:
        InputError: no policy is given, one does not exist or has a budget that cannot be kept, or two have the same name; the limit is not
            positive; the data set's classes are not the bundle's, or none of its images can be used.

    Example:
        >>> import json, dynamask
        >>> predictor = dynamask.load(bundle)
        >>> classes = [{"id": entry.id, "name": entry.name} for entry in predictor.bundle.manifest.classes]
        >>> first = classes[0]
        >>> triangle = {"id": 1, "image_id": 1, "category_id": first["id"], "bbox": [8, 4, 32, 32], "area": 512, "iscrowd": 0}
        >>> triangle["segmentation"] = [[8, 4, 40, 4, 40, 36]]  # x, y, x, y, ... in pixels
        >>> images = [{"id": 1, "file_name": photo.name, "height": image.shape[0], "width": image.shape[1]}]
        >>> truth = {"images": images, "annotations": [triangle], "categories": classes}
        >>> length = (folder / "instances.json").write_text(json.dumps(truth))
        >>> dataset = dynamask.read_coco(folder / "instances.json", images=photo.parent)
        >>> result = dynamask.validate(predictor, dataset, ["routed", "uniform-28"])
        >>> policies = result["policies"]
        >>> figures = policies["uniform-28"]
        >>> figures["share"]
        {'14': 0.0, '28': 1.0, '56': 0.0, '112': 0.0}
    """
    manifest = predictor.bundle.manifest
    grid_gmacs = manifest.grid_gmacs
    chosen = _parse_policies(policies, grid_gmacs)
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} images leaves nothing to validate on; give 1 or more.")
    check_classes([(c.id, c.name) for c in manifest.classes], dataset)
    missing = set(dataset.require_files())
    for policy in chosen:
        predictor.check_budget(policy.budget_gmacs, policy.budget_ms)
    runs = {policy.name: _Run(policy, grid_gmacs) for policy in chosen}
    used, skipped = _run_all(predictor, dataset, runs, dataset.images[:limit], progress)
    if not used:
        raise InputError(f"none of the {len(skipped)} images in {dataset.folder} can be used; the first: {skipped[0]['reason']}")
    return {
        "dataset": {
            "name": dataset.name,
            "images": len(used),
            "images_left_out": dict(Counter(MISSING_FILE if entry["image"] in missing else UNUSABLE_FILE for entry in skipped)),
            "annotations": sum(entry.image_id in used for entry in dataset.annotations),
            "annotations_left_out": dataset.left_out,
            "boxes_repaired": dataset.repaired,
        },
        "skipped": skipped,
        "bundle": _bundle(predictor),
        "grids": [{"grid": grid, "gmacs": gmacs} for grid, gmacs in sorted(grid_gmacs.items())],
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "policies": {name: _figures(run, dataset.truth, used, grid_gmacs) for name, run in runs.items()},
    }


def _parse_policies(policies: Sequence[str | Policy], grid_gmacs: Mapping[int, float]) -> list[Policy]:
    """The policies, each once.

    Raises:
        InputError: there is none, one does not exist, or two that differ have the same name.
    """
    chosen = list(dict.fromkeys(parse_policy(policy, grid_gmacs) for policy in policies))
    if not chosen:
        raise InputError("no grid policy was given, so there is nothing to validate; take for example routed,uniform-112.")
    name, count = Counter(policy.name for policy in chosen).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} different policies have the name {name!r}; give each a name of its own.")
    return chosen


def check_classes(classes: Sequence[tuple[int, str]], dataset: CocoData) -> None:
    """Refuse a data set whose classes are not the bundle's, naming the first that differs.

    Raises:
        InputError: an identifier or a name differs, or one of the two has more classes.
    """
    theirs = {category.id: category.name for category in dataset.categories}
    if (difference := first_other_class(dict(classes), theirs)) is not None:
        identifier, bundle, data = difference
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
        timed_prediction(predictor, image, self.policy.budget_gmacs, self.policy.grid_override, budget_ms=self.policy.budget_ms)

    def add(self, predictor: Predictor, image: Any, image_id: int) -> None:
        """Run on an image and record the detections, grids and latencies."""
        budget_gmacs, override = self._keeper.budget_gmacs(), self.policy.grid_override
        instances = timed_prediction(predictor, image, budget_gmacs, override, budget_ms=self.policy.budget_ms)
        self._keeper.spend(instances.grids)
        self.statistics.add(instances)
        self.detections += instances.to_coco(image_id)
        sides = instances.boxes[:, 2:] - instances.boxes[:, :2]
        self.areas += (sides[:, 0] * sides[:, 1]).tolist()


def _run_all(
    predictor: Predictor,
    dataset: CocoData,
    runs: Mapping[str, _Run],
    images: Sequence[CocoImage],
    progress: Callable[[int, int], None] | None,
) -> tuple[set[int], list[dict[str, str]]]:
    used: set[int] = set()
    skipped: list[dict[str, str]] = []
    order = list(runs.values())
    for done, record in enumerate(images):
        try:
            image = dataset.read_image(record)
        except InputError as error:
            skipped.append({"image": record.file_name, "reason": str(error)})
        else:
            if not used:
                for run in order:
                    run.warm_up(predictor, image)
            for run in order:
                run.add(predictor, image, record.id)
            used.add(record.id)
            order = order[1:] + order[:1]
        if progress is not None:
            progress(done + 1, len(images))
    return used, skipped


def _bundle(predictor: Predictor) -> dict[str, Any]:
    manifest = predictor.bundle.manifest
    return {
        "path": str(predictor.bundle.path),
        "preset": manifest.preset,
        "precision": manifest.precision,
        "canvas": list(manifest.canvas),
        "target": predictor.engine.target,
    }


def _figures(run: _Run, truth: Mapping[str, Any], used: set[int], grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    result: dict[str, Any] = {**evaluate_coco(truth, run.detections, IOU_TYPES, used), **run.statistics.summary()}
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
