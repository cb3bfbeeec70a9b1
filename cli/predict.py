"""`dynamask predict`: images in, boxes, masks and grids out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cli.options import check_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from runtime.instances import Instances
    from runtime.predictor import Predictor


class Grid(str, Enum):
    """Who chooses the mask grid."""

    routed = "routed"
    tiny = "14"
    small = "28"
    medium = "56"
    large = "112"
    size_based = "size-based"


_OVERRIDES = {Grid.routed: -1, Grid.tiny: 0, Grid.small: 1, Grid.medium: 2, Grid.large: 3, Grid.size_based: 4}


def predict(
    bundle: Annotated[Path, typer.Argument(help="The folder that dynamask export wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    target: Annotated[str, typer.Option(help="The engine to run; auto takes the best that the bundle holds.")] = "auto",
    budget: Annotated[Optional[float], typer.Option(help="Mean GMAC per instance to keep to.")] = None,  # noqa: UP045
    grid: Annotated[Grid, typer.Option(help="The model chooses each instance's mask grid, or this one for all, or by size.")] = Grid.routed,
    score: Annotated[float, typer.Option(min=0, max=1, help="Leave out instances that score this or less.")] = 0.3,
    threads: Annotated[Optional[int], typer.Option(help="CPU threads of the engine.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option(help="Folder for annotated pictures.")] = None,  # noqa: UP045
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write the detections here, masks as COCO run-lengths.", callback=check_file),
    ] = None,
) -> None:
    """Find the instances in images; an image that cannot be read is named, and the others still run.

    Example: dynamask predict lite0.bundle *.jpg --output pictures --json detections.json
    """
    from runtime.errors import InputError
    from runtime.files import check_apart, check_folder, write_json
    from runtime.predictor import load

    pictures = [] if output is None else [_picture(output, path, number, images) for number, path in enumerate(images)]
    check_apart([*pictures, *([] if json is None else [json])], images)
    if output is not None:
        check_folder(output)
    if budget is not None and grid is not Grid.routed:
        chosen = f"--grid {grid.value}"
        raise InputError(f"--budget {budget} is for --grid routed, and {chosen} leaves it nothing to choose; give one of the two.")
    records: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with load(bundle, target, budget, threads) as predictor:
        readable = _read(images, failures)
        while group := list(itertools.islice(readable, predictor.engine.profile.batch[-1])):
            found = predictor.batch([image for *_, image in group], grid_override=_OVERRIDES[grid], min_score=score)
            for (number, path, image), instances in zip(group, found, strict=True):
                records.append(_record(number, path, instances))
                if output is not None:
                    _draw(pictures[number], image, instances)
                typer.echo(_sentence(path, instances))
        result = {"bundle": str(bundle), "target": predictor.engine.target, "images": records, "failures": failures}
    if json is not None:
        write_json(json, result | {"classes": _classes(predictor)})
    if failures:
        raise typer.Exit(InputError.exit_status)


def _read(paths: list[Path], failures: list[dict[str, str]]) -> Iterator[tuple[int, Path, npt.NDArray[np.uint8]]]:
    """Number, path and image `[H, W, 3]` of those that can be read; the others are named, and added to `failures`."""
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
        "detections": instances.to_coco(number),
    }


def _classes(predictor: Predictor) -> list[dict[str, Any]]:
    return [{"id": entry.id, "name": entry.name} for entry in predictor.bundle.manifest.classes]


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
