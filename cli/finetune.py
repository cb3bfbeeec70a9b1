"""`dynamask finetune`: from a folder of labelled photos to a bundle with an engine, in the time given."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json

if TYPE_CHECKING:
    from dynamask.finetune.photos import PhotoSets
    from dynamask.finetune.plan import Plan

SHOWN = (("mask AP", "segm", "AP"), ("AP50", "segm", "AP50"), ("box AP", "bbox", "AP"))
"""Name, IoU type and figure, as printed."""
PARITY_IMAGES = 2
"""Photos on which the exported graph is compared with PyTorch."""


def finetune(
    photos: Annotated[
        Path, typer.Argument(metavar="PHOTOS", help="The folder of the photos, with their labels: COCO, YOLO, LabelMe, CVAT or Roboflow.")
    ],
    minutes: Annotated[float, typer.Option(help="How long all of it may take, in minutes.")] = 10.0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write all files here; by default in the current folder, PHOTOS-model."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="The labels, if they are not in the folder of the photos.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", metavar="coco|yolo|labelme|cvat", help="The format of the labels; by default their content tells."),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Other labelled photos, to judge the model on; by default a fifth of PHOTOS is held back."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE|imagenet", help="A DynaMask checkpoint to start from; by default the model of everyday things."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the photos that are held back, and of the training.")] = 0,
    json: Json = None,
) -> None:
    """Make a model of your own things: from labelled photos to a bundle with an engine, in the time given.

    It starts from a model that comes with the package, measures how fast this machine is, trains as long as the time allows, and measures
    the accuracy on photos that it has not seen. Ctrl-C ends the training early; the bundle is made of what was learnt.

    Example: dynamask finetune photos --minutes 10
    """
    from runtime.errors import INTERRUPTED
    from runtime.files import write_json

    result = run_finetune(photos, minutes, output or Path(f"{photos.resolve().name}-model"), labels, kind, val, weights, seed)
    if json is not None:
        write_json(json, result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def run_finetune(
    photos: Path,
    minutes: float,
    output: Path,
    labels: Path | None = None,
    kind: str | None = None,
    val: Path | None = None,
    weights: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fine-tune a model on labelled photos, export it, build its engine, and measure its accuracy.

    Args:
        photos, labels, kind, val, seed: as for `dynamask.finetune.photos.prepare_photos`.
        minutes: for all of it.
        output: the folder for all files; it must not hold a file.
        weights: a DynaMask checkpoint or `imagenet`; None takes the model of everyday things.

    Returns:
        `bundle`, `minutes` (asked for), `seconds` (by step, and `total`), `steps`, `total_steps`, `epochs`, `images_per_second`, `classes`,
        `train_photos`, `val_photos`, `broken` (sentences), `interrupted` (by a signal), `figures` (AP by IoU type; None without photos to
        judge on), `metrics` (the run's `metrics.json`).

    Raises:
        InputError: the labels, photos or weights cannot be used, the minutes are too few, or `output` holds files.
        DynaMaskError: a step failed.
    """
    started = time.monotonic()
    _check(output, minutes)
    from runtime.carried import carried_checkpoint

    source = weights or str(carried_checkpoint("everyday"))

    from dynamask.finetune.photos import prepare_photos
    from dynamask.finetune.plan import base_config, measure_speed, plan
    from dynamask.train.trainer import train

    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    sets = prepare_photos(photos, output / "data", labels, kind, val, seed, _say)
    _say(_described(sets))
    clock.note("photos")
    config = base_config(source, sets, seed)
    speed = measure_speed(config)
    planned = plan(config, speed, sets, started, minutes)
    clock.note("measurement")
    _say(f"{planned.steps} steps of {config.train.batch} photos, {planned.epochs:.0f} epochs, {speed.step_s:.2f} s a step")
    metrics = train(planned.config, output / "run", deadline=planned.deadline)
    clock.note("training")
    stopped = metrics["interrupted"] and time.monotonic() < planned.deadline
    if metrics["interrupted"]:
        why = "Ctrl-C" if stopped else "the end of the time"
        _say(f"Training ended at step {metrics['steps']} of {planned.steps} because of {why}: the bundle is made of what was learnt.")
    figures = _finish(output, sets, clock)
    seconds["total"] = time.monotonic() - started
    result = _result(output, minutes, seconds, sets, planned, metrics, stopped, figures)
    _print(result)
    return result


class _Clock:
    """Notes the seconds of each step."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self._last = seconds, time.monotonic()

    def note(self, name: str) -> None:
        """Note the time since the last call under a name."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def _check(output: Path, minutes: float) -> None:
    from runtime.errors import InputError
    from runtime.files import check_folder

    if not 0 < minutes < 1e5:
        raise InputError(f"--minutes {minutes:g} is no time to train for: give 10, or as long as you like.")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name another folder with --output.")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} holds files already: name another folder with --output.")
    check_folder(output)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _described(sets: PhotoSets) -> str:
    names = ", ".join(entry["name"] for entry in sets.classes)
    return f"{sets.train_photos} photos to train on, {sets.val_photos} to judge on; {len(sets.classes)} classes: {names}"


def _finish(output: Path, sets: PhotoSets, clock: _Clock) -> dict[str, Any] | None:
    """Export, build and judge; returns the figures on the photos held back."""
    from dynamask.finetune.plan import JUDGED_PHOTOS
    from export.export import export_bundle
    from export.onnxruntime_engine import build_onnxruntime
    from runtime.bundle import Bundle
    from runtime.coco import read_coco
    from runtime.predictor import load
    from runtime.validate import validate

    _say("Exporting to ONNX, building the engine …")
    bundle = output / "bundle"
    export_bundle(output / "run" / "model.safetensors", bundle, None, sorted(sets.train[1].iterdir())[:PARITY_IMAGES])
    build_onnxruntime(Bundle.open(bundle))
    clock.note("export")
    if sets.val is None:
        return None
    with load(bundle, "onnxruntime") as predictor:
        result = validate(predictor, read_coco(*sets.val), ["routed"], JUDGED_PHOTOS)
    clock.note("judgement")
    policy = result["policies"]["routed"]
    return {name: policy[name] for name in ("segm", "bbox", "boundary", "share", "gmacs")}


def _result(
    output: Path,
    minutes: float,
    seconds: dict[str, float],
    sets: PhotoSets,
    planned: Plan,
    metrics: dict[str, Any],
    stopped: bool,
    figures: dict[str, Any] | None,
) -> dict[str, Any]:
    images = metrics["steps"] * planned.config.train.batch
    return {
        "bundle": str(output / "bundle"),
        "minutes": minutes,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "steps": metrics["steps"],
        "total_steps": planned.steps,
        "epochs": round(images / sets.train_photos, 1),
        "images_per_second": round(images / max(metrics["seconds"], 1e-9), 2),
        "classes": [entry["name"] for entry in sets.classes],
        "train_photos": sets.train_photos,
        "val_photos": sets.val_photos,
        "broken": sets.broken,
        "interrupted": stopped,
        "figures": figures,
        "metrics": metrics,
    }


def _print(result: dict[str, Any]) -> None:
    figures = result["figures"]
    if figures is not None:
        cells = ((name, figures[kind][key]) for name, kind, key in SHOWN)
        shown = ", ".join(f"{name} {value:.1f}" for name, value in cells if value is not None)
        typer.echo(f"On {result['val_photos']} photos that were held back: {shown}")
    typer.echo(f"{result['bundle']} is ready, after {result['seconds']['total']:.0f} s. Try it on a video or a folder of photos:")
    typer.echo(f"  dynamask stream {result['bundle']} VIDEO --output annotated.mp4")
    typer.echo(f"  dynamask predict {result['bundle']} FOLDER --output annotated")
