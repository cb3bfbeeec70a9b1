"""`dynamask demo`."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json, Threads

if TYPE_CHECKING:
    from runtime.predictor import Predictor

IMAGES = 40
SEED = 9_000_001
"""Far from the seeds of the shapes that the carried model was trained and validated on."""
PARITY_IMAGES = 2
SCORE = 0.5
"""Instances that score less are not drawn."""
PICTURES = 4
"""Annotated images in the report."""
PHOTO_FRAME = 45
"""The frame of the clip that is the photo."""

CLIP = "office.mp4"
"""In `dynamask/assets`, ten seconds; its README names the origin."""
MARK = ".dynamask-demo"
"""A file of this name marks a folder as the demo's own: a later demo may replace its files."""
PRODUCTS = (
    "everyday",
    "video.mp4",
    "annotated.mp4",
    "detections.jsonl",
    "photo.jpg",
    "annotated.jpg",
    "shapes",
    "bundle",
    "validation.json",
    "report.html",
)


def demo(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Write all files here; the files of an earlier demo are replaced.")] = Path(
        "demo"
    ),
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Run the whole pipeline: export, engine, video, photo, validation, report.

    Two models come with the package. The one of everyday things runs on a clip of ten seconds and on a photo. The one of drawn shapes is
    validated, because the masks of drawn shapes are exact. The demo takes up to three minutes on two cores, and prints where its results
    are.

    Example: dynamask demo --output demo
    """
    from runtime.files import write_json

    result = run_demo(output, threads)
    if json is not None:
        write_json(json, result)
    _print(result)


def run_demo(output: Path, threads: int | None = None) -> dict[str, Any]:
    """Export both carried models and build their engines; stream a clip, segment a photo, validate on drawn shapes, write a report.

    Args:
        output: the folder for all files.
        threads: CPU threads of the engine; None takes all cores.

    Returns:
        `paths`, `seconds` by step, `export` (of the model of everyday things: parity with PyTorch), `stream`, `photo` (the names of the
        classes found) and `policies` (on shapes, as `validate` returns them).

    Raises:
        InputError: `output` is not a folder, or holds files that no demo wrote; or the package lacks a checkpoint.
        DynaMaskError: a step failed.
    """
    from dynamask.data.shapes import write_dataset
    from runtime.carried import carried_checkpoint
    from runtime.coco import read_coco
    from runtime.files import write_json
    from runtime.predictor import load
    from runtime.report import example_pictures, write_report
    from runtime.validate import POLICIES, validate

    everyday, drawn = carried_checkpoint("everyday"), carried_checkpoint("lite0-shapes")
    clear(output)
    seconds: dict[str, float] = {}
    _copy_clip(output)
    with _step("Exporting the model of everyday things to ONNX, compared with PyTorch", "export", seconds):
        exported = _export(everyday, output / "everyday", [output / "photo.jpg"])
    with load(output / "everyday", "onnxruntime", threads=threads) as predictor:
        with _step("Streaming the clip: decoding, segmenting, drawing, encoding", "stream", seconds):
            streamed = _stream(predictor, output / "video.mp4", output)
        with _step("Finding the things in a photo", "photo", seconds):
            found = _photo(predictor, output)
    with _step(f"Drawing {IMAGES} images of shapes that no model has seen", "images", seconds):
        write_dataset(output / "shapes", IMAGES, SEED)
    with _step("Exporting the model of drawn shapes", "shapes export", seconds):
        _export(drawn, output / "bundle", sorted((output / "shapes" / "images").iterdir())[:PARITY_IMAGES])
    with load(output / "bundle", "onnxruntime", threads=threads) as predictor:
        with _step(f"Validating {len(POLICIES)} grid policies on the shapes", "validation", seconds):
            dataset = read_coco(output / "shapes")
            validation = validate(predictor, dataset, POLICIES)
        with _step("Writing the report", "report", seconds):
            write_json(output / "validation.json", validation)
            write_report(validation, output / "report.html", example_pictures(predictor, dataset, PICTURES))
    paths = {name: str(output / name) for name in PRODUCTS}
    return {
        "paths": paths,
        "seconds": seconds,
        "export": exported,
        "stream": streamed,
        "photo": found,
        "policies": validation["policies"],
    }


def _export(checkpoint: Path, bundle: Path, images: list[Path]) -> dict[str, Any]:
    """Export a checkpoint, and build its engine; returns the result of the export."""
    from export.export import export_bundle
    from export.onnxruntime_engine import build_onnxruntime
    from runtime.bundle import Bundle

    exported = export_bundle(checkpoint, bundle, None, images)
    build_onnxruntime(Bundle.open(bundle))
    return exported


def _copy_clip(output: Path) -> None:
    """Copy the clip that comes with the package, and write one of its frames as the photo."""
    import itertools

    import dynamask
    from dynamask.data.coco_writer import write_image
    from runtime.files import atomic_path
    from runtime.sources import open_source

    with atomic_path(output / "video.mp4") as temporary:
        shutil.copyfile(Path(dynamask.__path__[0]) / "assets" / CLIP, temporary)
    with open_source(output / "video.mp4") as source:
        write_image(output / "photo.jpg", next(itertools.islice(source, PHOTO_FRAME, None)).image)


def _photo(predictor: Predictor, output: Path) -> list[str]:
    """Write the annotated photo; returns the names of the classes found, by falling score."""
    from dynamask.data.coco_writer import write_image
    from runtime.annotate import annotate
    from runtime.images import read_image

    image = read_image(output / "photo.jpg")
    instances = predictor(image, min_score=SCORE)
    write_image(output / "annotated.jpg", annotate(image, instances, SCORE))
    return [instances.classes[label].name for label in instances.labels]


def clear(output: Path) -> None:
    """Prepare `output` for the demo: the files of an earlier demo are removed, other files stay.

    Raises:
        InputError: it is not a folder, or holds files that no demo wrote.
        DynaMaskError: it cannot be written.
    """
    from runtime.errors import InputError
    from runtime.files import unwritable

    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a folder with --output.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).exists():
        raise InputError(f"{output} holds files that no demo wrote: name another folder with --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARK).touch()
        for name in PRODUCTS:
            product = output / name
            if product.is_dir():
                shutil.rmtree(product)
            else:
                product.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(output, error) from error


@contextlib.contextmanager
def _step(title: str, name: str, seconds: dict[str, float]) -> Iterator[None]:
    typer.echo(f"{title} … ", nl=False, err=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        typer.echo("failed", err=True)
        raise
    seconds[name] = time.perf_counter() - start
    typer.echo(f"{seconds[name]:.1f} s", err=True)


def _stream(predictor: Predictor, video: Path, output: Path) -> dict[str, Any]:
    from runtime.sinks import JsonLinesSink, VideoSink
    from runtime.sources import open_source
    from runtime.stream import run_stream

    source = open_source(video)
    sinks = [VideoSink(output / "annotated.mp4", source.frame_rate), JsonLinesSink(output / "detections.jsonl")]
    return run_stream(predictor, source, sinks, score=SCORE).to_dict()


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table(title="on drawn shapes, whose masks are exact", title_justify="left")
    for column in ("policy", "mask AP", "boundary AP", "GMAC per instance", "mask branch ms", "image ms"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, policy in result["policies"].items():
        latency = policy["latency_ms"]
        figures = (policy["segm"]["AP"], policy["boundary"]["AP"], policy["gmacs"], latency["masks"]["p50"], latency["total"]["p50"])
        table.add_row(name, *(_figure(value, 4 if i == 2 else 1) for i, value in enumerate(figures)))
    console.print(table)
    stream, paths = result["stream"], result["paths"]
    console.print(f"clip: {stream['frames']} frames, {stream['fps']:.1f} frames/s")
    console.print(f"photo: {', '.join(result['photo']) or 'nothing'}")
    console.print(f"all steps: {sum(result['seconds'].values()):.0f} s")
    console.print("Look at:", style="bold")
    for name, description in (
        ("annotated.mp4", "the clip with masks, coloured by the grid of each instance"),
        ("annotated.jpg", "the photo with masks"),
        ("detections.jsonl", "the detections of the clip, one line of JSON per frame"),
        ("report.html", "accuracy and latency of each policy on drawn shapes; open it in a browser"),
        ("everyday", "the exported model of everyday things, for dynamask predict and stream"),
        ("bundle", "the exported model of drawn shapes; shapes has images for it"),
    ):
        console.print(f"  {paths[name]}  {description}", soft_wrap=True)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
