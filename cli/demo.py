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
FRAMES = 100
SEED = 9_000_001
"""Far from the seeds of the shapes that the carried model was trained and validated on."""
PARITY_IMAGES = 2
PICTURES = 4
"""Annotated images in the report."""

MARK = ".dynamask-demo"
"""A file of this name marks a folder as the demo's own: a later demo may replace its files."""
PRODUCTS = ("shapes", "bundle", "video.mp4", "video.json", "annotated.mp4", "detections.jsonl", "validation.json", "report.html")


def demo(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Write all files here; the files of an earlier demo are replaced.")] = Path(
        "demo"
    ),
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Run the whole pipeline on generated images: export, engine, video, validation, report.

    The model comes with the package: it segments drawn shapes. The demo takes one to three minutes on two cores, and prints where its
    results are.

    Example: dynamask demo --output demo
    """
    from runtime.files import write_json

    result = run_demo(output, threads)
    if json is not None:
        write_json(json, result)
    _print(result)


def run_demo(output: Path, threads: int | None = None) -> dict[str, Any]:
    """Draw shapes that the carried model has not seen, export the model, build its engine, stream a video, validate, write a report.

    Args:
        output: the folder for all files.
        threads: CPU threads of the engine; None takes all cores.

    Returns:
        `paths`, `seconds` by step, `export` (parity with PyTorch), `stream` and `policies` (as `validate` returns them).

    Raises:
        InputError: `output` is not a folder, or holds files that no demo wrote.
        DynaMaskError: the package lacks its checkpoint, or a step failed.
    """
    from dynamask.data.shapes import write_dataset, write_video
    from export.export import export_bundle
    from export.onnxruntime_engine import build_onnxruntime
    from runtime.bundle import Bundle
    from runtime.carried import carried_checkpoint
    from runtime.coco import read_coco
    from runtime.files import write_json
    from runtime.predictor import load
    from runtime.report import example_pictures, write_report
    from runtime.validate import POLICIES, validate

    checkpoint = carried_checkpoint("lite0-shapes")
    clear(output)
    seconds: dict[str, float] = {}
    data, bundle, video = output / "shapes", output / "bundle", output / "video.mp4"
    with _step(f"Drawing {IMAGES} images of shapes the model has not seen", "images", seconds):
        write_dataset(data, IMAGES, SEED)
    with _step(f"Drawing a video of {FRAMES} frames of shapes in motion", "video", seconds):
        write_video(video, FRAMES, SEED)
    with _step("Exporting the model (lite0) to ONNX, compared with PyTorch", "export", seconds):
        exported = export_bundle(checkpoint, bundle, None, sorted((data / "images").iterdir())[:PARITY_IMAGES])
    with _step("Building the ONNX Runtime engine", "engine", seconds):
        build_onnxruntime(Bundle.open(bundle))
    with load(bundle, "onnxruntime", threads=threads) as predictor:
        with _step("Streaming the video: decoding, segmenting, drawing, encoding", "stream", seconds):
            streamed = _stream(predictor, video, output)
        with _step(f"Validating {len(POLICIES)} grid policies", "validation", seconds):
            dataset = read_coco(data)
            validation = validate(predictor, dataset, POLICIES)
        with _step("Writing the report", "report", seconds):
            write_json(output / "validation.json", validation)
            write_report(validation, output / "report.html", example_pictures(predictor, dataset, PICTURES))
    paths = {name: str(output / name) for name in PRODUCTS}
    return {"paths": paths, "seconds": seconds, "export": exported, "stream": streamed, "policies": validation["policies"]}


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
    return run_stream(predictor, source, sinks).to_dict()


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table()
    for column in ("policy", "mask AP", "boundary AP", "GMAC per instance", "mask branch ms", "image ms"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, policy in result["policies"].items():
        latency = policy["latency_ms"]
        figures = (policy["segm"]["AP"], policy["boundary"]["AP"], policy["gmacs"], latency["masks"]["p50"], latency["total"]["p50"])
        table.add_row(name, *(_figure(value, 4 if i == 2 else 1) for i, value in enumerate(figures)))
    console.print(table)
    stream, paths = result["stream"], result["paths"]
    console.print(f"video: {stream['frames']} frames, {stream['fps']:.1f} frames/s")
    console.print(f"all steps: {sum(result['seconds'].values()):.0f} s")
    console.print("Look at:", style="bold")
    for name, description in (
        ("report.html", "accuracy and latency of each policy; open it in a browser"),
        ("annotated.mp4", "the video with masks, coloured by the grid of each instance"),
        ("detections.jsonl", "the detections of the video, one line of JSON per frame"),
        ("bundle", "the exported model, for dynamask predict, stream and validate"),
    ):
        console.print(f"  {paths[name]}  {description}", soft_wrap=True)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
