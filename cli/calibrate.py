"""`dynamask calibrate`: measures the times that budgets in milliseconds go by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BundleFolder, Json, Target, Threads

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.calibration import Effort
    from runtime.costs import MeasuredCosts


def calibrate(
    bundle: BundleFolder,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A folder of images to run on; drawn shapes by default. TensorRT needs images with what the model finds."
        ),
    ] = None,
    target: Target = "auto",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure how long the detector and the masks of an engine take on this machine, and keep the times in the bundle.

    Budgets in milliseconds (routed@20ms) and predicted times go by them. Measure on the machine, and with the --threads, that will run the
    engine, while nothing else runs there; it takes a minute or two. dynamask build-engine measures shortly.

    Example: dynamask calibrate lite0.bundle --threads 2
    """
    from runtime.bundle import Bundle
    from runtime.calibration import FULL
    from runtime.files import check_apart, write_json

    check_apart([json], bundle=bundle)
    opened = Bundle.open(bundle)
    built, costs = measure(opened, FULL, target, threads, images)
    if json is not None:
        write_json(json, {"bundle": str(bundle), "target": built, **costs.model_dump(mode="json")})
    typer.echo(summary(costs))


def measure(
    bundle: Bundle, effort: Effort, target: str, threads: int | None = None, images: Path | None = None
) -> tuple[str, MeasuredCosts]:
    """`runtime.calibration.calibrate`, with a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    from cli.bench import frames
    from runtime import calibration

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Measuring times", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return calibration.calibrate(bundle, target, threads, frames(images, bundle.manifest), effort, update)


def summary(costs: MeasuredCosts) -> str:
    """The times, in lines of text."""
    from runtime.costs import count_of

    lines = [
        f"detector {costs.detector_ms.p50:.1f} ms (99th percentile {costs.detector_ms.p99:.1f}), masks of a frame without instances "
        f"{costs.empty_ms:.1f} ms"
    ]
    lines += [f"all at {grid:<4} {cost.fixed_ms:7.2f} ms + {cost.instance_ms:.3f} ms per instance" for grid, cost in costs.grids.items()]
    threads = f", {count_of(costs.threads, 'thread')}" if costs.threads else ""
    lines.append(f"{costs.processor}{threads}; median error of the fit {100 * costs.fit_error:.1f} %")
    return "\n".join(lines)
