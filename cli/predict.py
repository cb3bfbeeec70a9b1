"""`dynamask predict`: images in, boxes, masks and grids out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import BundleFolder, Grid, Json, Limit, Score, Target, Threads, check_file, print_notice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from runtime.bundle import Bundle
    from runtime.instances import Instances


def predict(
    bundle: BundleFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write annotated images here, as PNG."),
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write the instances here as annotations in COCO format, polygons: CVAT and Label Studio import them.",
            callback=check_file,
        ),
    ] = None,
    grid: Grid = "routed",
    score: Score = 0.3,
    limit: Limit = None,
    target: Target = "auto",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Find the instances in images: boxes, classes, masks and the grid of each mask.

    A folder stands for the images in it. An image that cannot be read is named, and the others still run. A budget (routed@...) is kept
    for each image by itself; an engine built with --batch keeps it for each batch. The file of --json has the masks as COCO run-length
    encodings.

    Example: dynamask predict lite0.bundle photos --output annotated --json detections.json
    """
    from runtime.bundle import Bundle
    from runtime.errors import InputError
    from runtime.files import check_apart, check_folder, write_json
    from runtime.policies import parse_policy
    from runtime.pre_annotations import coco_annotations, coco_file
    from runtime.predictor import load

    files = _image_files(images)[:limit]
    pictures = [] if output is None else [_picture(output, path, number, files) for number, path in enumerate(files)]
    check_apart([*pictures, json, coco], files, bundle)
    if output is not None:
        check_folder(output)
    opened = Bundle.open(bundle)
    policy = parse_policy(grid, opened.manifest.grid_gmacs)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with load(opened, target, policy.budget_gmacs, threads, policy.budget_ms) as predictor:
        print_notice(predictor)
        readable = _read(files, failures)
        while group := list(itertools.islice(readable, predictor.engine.profile.batch[-1])):
            found = predictor.batch([image for *_, image in group], grid_override=policy.grid_override, min_score=score)
            for (number, path, image), instances in zip(group, found, strict=True):
                records.append(_record(number, path, instances))
                if coco is not None:
                    annotations += coco_annotations(instances, number + 1, len(annotations) + 1)
                if output is not None:
                    _draw(pictures[number], image, instances)
                typer.echo(_sentence(path, instances))
        result = {"bundle": str(bundle), "target": predictor.engine.target, "images": records, "failures": failures}
    if json is not None:
        write_json(json, result | {"classes": _classes(opened)})
    if coco is not None:
        write_json(coco, coco_file(_coco_images(records), annotations, opened.manifest.classes))
    if failures:
        raise typer.Exit(InputError.exit_status)


def _image_files(paths: list[Path]) -> list[Path]:
    """The files, and the image files in the folders.

    Raises:
        InputError: a folder holds no image.
    """
    from runtime.sources import image_files

    return [file for path in paths for file in (image_files(path) if path.is_dir() else [path])]


def _read(paths: list[Path], failures: list[dict[str, str]]) -> Iterator[tuple[int, Path, npt.NDArray[np.uint8]]]:
    """Number, path and image `[H, W, 3] uint8` of the files that can be read; the others are named, and added to `failures`."""
    from runtime.errors import InputError
    from runtime.images import read_image

    for number, path in enumerate(paths):
        try:
            image = read_image(path)
        except InputError as error:
            typer.echo(str(error), err=True)
            failures.append({"image": str(path), "reason": str(error)})
            continue
        yield number, path, image


def _record(number: int, path: Path, instances: Instances) -> dict[str, Any]:
    height, width = instances.size
    return {
        "id": number,
        "file_name": str(path),
        "height": height,
        "width": width,
        "times_ms": instances.times_ms,
        **({"predicted_ms": instances.predicted_ms} if instances.predicted_ms else {}),
        "detections": instances.to_coco(number),
    }


def _coco_images(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images of a COCO file. Labelling tools know photos by their names; two of the same name have their whole paths."""
    names = [Path(record["file_name"]).name for record in records]
    images = []
    for record, name in zip(records, names, strict=True):
        shown = name if names.count(name) == 1 else record["file_name"]
        images.append({"id": record["id"] + 1, "file_name": shown, "height": record["height"], "width": record["width"]})
    return images


def _classes(bundle: Bundle) -> list[dict[str, Any]]:
    return [{"id": entry.id, "name": entry.name} for entry in bundle.manifest.classes]


def _picture(folder: Path, path: Path, number: int, images: list[Path]) -> Path:
    repeated = sum(other.stem == path.stem for other in images) > 1
    return folder / (f"{path.stem}.{number}.png" if repeated else f"{path.stem}.png")


def _draw(path: Path, image: Any, instances: Instances) -> None:
    from PIL import Image

    from runtime.annotate import annotate
    from runtime.files import atomic_path

    with atomic_path(path) as temporary:
        Image.fromarray(annotate(image, instances, score=0)).save(temporary)


def _sentence(path: Path, instances: Instances) -> str:
    from collections import Counter

    found = Counter(instances.classes[label].name for label in instances.labels)
    grids = Counter(instances.grids.tolist())
    names = ", ".join(f"{count} {name}" for name, count in found.most_common()) or "nothing"
    shares = ", ".join(f"{count} at {grid}" for grid, count in sorted(grids.items()))
    return f"{path}: {names}" + (f" (grids: {shares})" if shares else "")
