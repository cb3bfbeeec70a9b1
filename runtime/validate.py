"""Accuracy and latency of a bundle together: one pass over a COCO data set, several ways to choose the mask grids, side by side."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.bench import machine
from runtime.budget import BudgetKeeper
from runtime.coco_metrics import evaluate_coco, to_rle
from runtime.errors import InputError
from runtime.graph import MSM, SIZE_BASED
from runtime.images import read_image

if TYPE_CHECKING:
    from runtime.instances import Instances
    from runtime.predictor import Predictor

IOU_TYPES = ("segm", "bbox", "boundary")
PARTS = ("preprocess", "detector", "masks", "paste")
"""What a frame's latency is made of, in order."""
ROUTING_SCORE = 0.5
"""Detections below this score stay out of the table of who gets which grid: their class says little about the shape."""


class Policy(NamedTuple):
    """A way to choose each instance's mask grid, in the terms of the graph's inputs."""

    name: str
    budget: float
    """Mean GMAC per instance to keep to over all images (`BudgetKeeper`); 0 for none."""
    grid_override: int
    """-1 the MSM decides, 0..3 that grid, 4 the size-based rule (Eq. 8)."""


def parse_policy(name: str, grid_gmacs: Mapping[int, float]) -> Policy:
    """`routed`, `routed@0.6` (GMAC), `routed@50%` (of the largest grid's cost), `uniform-28`, `size-based`.

    Args:
        grid_gmacs: cumulative cost of each grid in GMAC, `{14: …, 28: …, 56: …, 112: …}`.

    Raises:
        InputError: no such policy, or a budget that is no positive number.
    """
    rule, _, budget = name.partition("@")
    if name == "routed":
        return Policy(name, 0.0, MSM)
    if name == "size-based":
        return Policy(name, 0.0, SIZE_BASED)
    if rule == "routed":
        return Policy(name, _budget(name, budget, max(grid_gmacs.values())), MSM)
    grids = sorted(grid_gmacs)
    if name in (uniform := [f"uniform-{grid}" for grid in grids]):
        return Policy(name, 0.0, uniform.index(name))
    raise InputError(f"{name!r} is no way to choose grids; take routed, routed@50%, routed@0.6, size-based, {', '.join(uniform)}.")


def _budget(name: str, text: str, largest: float) -> float:
    try:
        budget = float(text[:-1]) / 100 * largest if text.endswith("%") else float(text)
    except ValueError:
        budget = 0.0
    if not (budget > 0 and np.isfinite(budget)):
        raise InputError(
            f"{name!r} holds no budget: write mean GMAC per instance (routed@0.6) or percent of the largest grid (routed@50%)."
        )
    return budget


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
    policies: Sequence[str],
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every policy on every image, interleaved in rotated order, and judge each by AP, cost and latency.

    Images whose file is broken, or not of the size that the annotations say, are skipped and listed.

    Args:
        policies: see `parse_policy`.
        limit: take only so many images.
        progress: called with (images done, images in all).

    Returns:
        `dataset`, `skipped`, `bundle`, `grids`, `machine`, `date`, and under `policies`, by policy: `segm`, `bbox`, `boundary` (AP × 100),
        `gmacs` (mean per instance; None without instances), `share` of each grid (0..1), `instances`, `latency_ms` (`preprocess`,
        `detector`, `masks`, `paste`, `total`: each `p50 p95 p99 mean`) and, of routed ones, `routing` (cost by class and size).

    Raises:
        InputError: a policy, the classes or the limit do not fit, or no image can be read.
    """
    manifest = predictor.bundle.manifest
    grid_gmacs = manifest.grid_gmacs
    chosen = [parse_policy(name, grid_gmacs) for name in dict.fromkeys(policies)]
    if not chosen:
        raise InputError("no policy was given, so there is nothing to validate; take for example routed,uniform-112.")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} images leaves nothing to validate on; give 1 or more.")
    check_classes([(c.id, c.name) for c in manifest.classes], dataset)
    runs = {policy.name: _Run(policy, BudgetKeeper(policy.budget, grid_gmacs) if policy.budget else None) for policy in chosen}
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


@dataclass
class _Run:
    """What one policy gave, over all images."""

    policy: Policy
    keeper: BudgetKeeper | None
    detections: list[dict[str, Any]] = field(default_factory=list)
    grids: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)


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
            if not judged:  # The first run of an engine allocates; it is not what is measured.
                for run in order:
                    timed_prediction(predictor, image, run.policy.budget, run.policy.grid_override)
            for run in order:
                _record(run, predictor, image, int(record["id"]))
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


def timed_prediction(predictor: Predictor, image: Any, budget: float, grid_override: int) -> tuple[Instances, dict[str, float]]:
    """One image through the predictor up to pasted masks, and the milliseconds of each part and of the whole."""
    start = time.perf_counter()
    instances = predictor(image, budget=budget, grid_override=grid_override)
    before_paste = time.perf_counter()
    for _ in instances.crops():
        pass
    end = time.perf_counter()
    return instances, {**instances.times_ms, "paste": 1000 * (end - before_paste), "total": 1000 * (end - start)}


def _record(run: _Run, predictor: Predictor, image: Any, image_id: int) -> None:
    budget = run.keeper.budget() if run.keeper else 0.0
    instances, times = timed_prediction(predictor, image, budget, run.policy.grid_override)
    if run.keeper:
        run.keeper.spend(instances.grids)
    run.times.append(times)
    run.detections += instances.to_coco(image_id)
    run.grids += [int(grid) for grid in instances.grids]
    sides = instances.boxes[:, 2:] - instances.boxes[:, :2]
    run.areas += [float(area) for area in sides[:, 0] * sides[:, 1]]


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
    metrics = evaluate_coco(truth, run.detections, IOU_TYPES, judged)
    counts = grid_counts(run.grids, grid_gmacs)
    result: dict[str, Any] = {
        **metrics,
        "gmacs": mean_gmacs(counts, grid_gmacs),
        "share": shares(counts),
        "instances": len(run.grids),
        "latency_ms": {part: percentiles([times[part] for times in run.times]) for part in (*PARTS, "total")},
    }
    if run.policy.grid_override == MSM:
        result["routing"] = _routing(run, truth["categories"], grid_gmacs)
    return result


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """`p50 p95 p99 mean` of some latencies, in their unit."""
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(np.mean(values))}


def grid_counts(grids: Sequence[int], grid_gmacs: Mapping[int, float]) -> dict[int, int]:
    """How many instances got each grid."""
    return {grid: sum(given == grid for given in grids) for grid in sorted(grid_gmacs)}


def mean_gmacs(counts: Mapping[int, int], grid_gmacs: Mapping[int, float]) -> float | None:
    """Mean cost per instance in GMAC; None without instances."""
    total = sum(counts.values())
    return sum(count * grid_gmacs[grid] for grid, count in counts.items()) / total if total else None


def shares(counts: Mapping[int, int]) -> dict[str, float]:
    """Each grid's share of the instances, 0..1; all 0 without instances."""
    total = sum(counts.values())
    return {str(grid): count / total if total else 0.0 for grid, count in counts.items()}


def _routing(run: _Run, categories: Sequence[Mapping[str, Any]], grid_gmacs: Mapping[int, float]) -> dict[str, Any]:
    """Who got which grid: cost by class and by supercategory, each also by box area (terciles of all that count)."""
    sure = [i for i, detection in enumerate(run.detections) if detection["score"] >= ROUTING_SCORE]
    grids = np.array([run.grids[i] for i in sure], int)
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
    counts = grid_counts(grids.tolist(), grid_gmacs)
    return {"count": len(grids), "mean_gmacs": mean_gmacs(counts, grid_gmacs), "share": shares(counts)}
