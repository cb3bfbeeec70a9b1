"""`dynamask build-engine`: builds the engine of a bundle for a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

from cli.options import Json
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.costs import MeasuredCosts

Value = TypeVar("Value")


def build_engine(
    bundle: Annotated[Path, typer.Argument(help="The folder that dynamask export wrote; the engine is written into it.")],
    target: Annotated[str, typer.Option(help="onnxruntime (CPU), tensorrt-rtx (RTX GPUs) or tensorrt (Jetson, servers).")] = "onnxruntime",
    precision: Annotated[
        str,
        typer.Option(
            help="Weights and activations: fp32 (without TF32) or fp16. Boxes, scores and routing are fp32 in both. "
            "With onnxruntime, fp16 emulates a GPU's rounding, to measure its cost in accuracy; it is not faster."
        ),
    ] = "fp32",
    compute_capability: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="CC[,CC…]",
            help="GPUs to compile the plugins' kernels for: 8.7 is Jetson Orin, 8.9 the RTX 40 series. Repeatable. "
            "Default: this machine's GPU; without one, 8.0, 8.6, 8.7, 8.9, 9.0 and 12.0.",
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(metavar="N|MIN:OPT:MAX", help="A batch size or an optimization profile: any batch from MIN to MAX, tuned for OPT."),
    ] = "1",
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="HxW|MIN:OPT:MAX",
            help="Canvas in pixels, multiples of 32; the bundle's by default. With a range, 224x384:224x384:384x384, an image gets the "
            "smallest canvas that holds it, so that the GPU computes less padding.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(help="Measure shortly how long the engine takes on this machine, as dynamask calibrate does, if it can run here."),
    ] = True,
    json: Json = None,
) -> None:
    """Build the engine of a bundle for a target. It replaces an earlier one for that target, unless nothing has changed since.

    An engine takes one image at a time on the bundle's canvas; for TensorRT, --batch and --size change that. The number of instances in an
    image may always vary.
    Engines for tensorrt-rtx are built on any machine, with or without a GPU; engines for tensorrt are built on the GPU that runs them.

    Example: dynamask build-engine lite0.bundle --target tensorrt-rtx --precision fp16 --compute-capability 8.9 --batch 1:4:8
    """
    from rich.console import Console
    from rich.progress import Progress

    from cli.calibrate import summary
    from cli.data import parse_size
    from export import engine
    from runtime.files import check_apart, write_json

    check_apart([json], bundle=bundle)
    capabilities = [part.strip() for given in compute_capability or () for part in given.split(",") if part.strip()]
    batches = _parse_profile("--batch", batch, _count, "4 or 1:4:8")
    canvases = None if size is None else _parse_profile("--size", size, parse_size, "384x384 or 224x384:224x384:384x384")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        phases = _Phases(progress)
        result = engine.build_engine(bundle, target, precision, capabilities, batches, canvases, phases.update)
    typer.echo(_summary(result))
    costs = _calibrate(bundle, target) if calibrate else None
    if json is not None:
        write_json(json, result | {"costs": None if costs is None else costs.model_dump(mode="json")})
    if costs is not None:
        typer.echo(summary(costs))


def _calibrate(bundle: Path, target: str) -> MeasuredCosts | None:
    """Measured times of the engine, unless it has some; None, with a notice, where they cannot be measured."""
    from cli.calibrate import measure
    from runtime.bundle import Bundle
    from runtime.calibration import SHORT

    opened = Bundle.open(bundle)
    if (known := opened.engine(target, verify=False).costs) is not None:
        return known
    try:
        return measure(opened, SHORT, target)[1]
    except InputError as error:
        typer.echo(f"The engine's times were not measured: {error}", err=True)
        return None


def _parse_profile(option: str, given: str, parse: Callable[[str], Value], example: str) -> tuple[Value, Value, Value]:
    """The values MIN, OPT and MAX of an option; a single value is all three."""
    values = [parse(part) for part in given.split(":")]
    if len(values) not in (1, 3):
        raise InputError(f"{option} {given} is neither one value nor MIN:OPT:MAX; give {example}.")
    return values[0], values[len(values) // 2], values[-1]


def _count(given: str) -> int:
    if not given.isdecimal():
        raise InputError(f"--batch {given} is not a number of images; give 4 or 1:4:8.")
    return int(given)


class _Phases:
    """A progress bar for each phase in progress."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def update(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase)
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(phase))


def _summary(result: dict[str, Any]) -> str:
    state = "nothing has changed, kept" if result["reused"] else f"{result['seconds']:.1f} s"
    lines = [f"{result['engine']} ({result['bytes'] / 1e6:.1f} MB, {result['precision']}, {state})"]
    if text := _profile(**result["profile"]):
        lines.append(text)
    if nodes := result["plugin_nodes"]:
        capabilities = sorted({kernel["compute_capability"] for kernel in result["kernels"]}, key=float)
        lines.append(f"plugins: {', '.join(f'{name} ×{count}' for name, count in nodes.items())}")
        lines.append(f"{len(result['kernels'])} kernels for compute capability {', '.join(capabilities)}")
    return "\n".join(lines)


def _profile(batch: Sequence[int], canvas: Sequence[Sequence[int]]) -> str:
    """The images that a run takes, in words; empty for one image on one canvas."""
    smallest, tuned, largest = batch
    sizes = [f"{height}x{width}" for height, width in canvas]
    if largest == 1 and len(set(sizes)) == 1:
        return ""
    several = f"{largest} images" if smallest == largest else f"{smallest} to {largest} images, tuned for {tuned},"
    images = "1 image" if largest == 1 else several
    return f"a run takes {images} " + (f"of {sizes[0]}" if len(set(sizes)) == 1 else f"of {sizes[0]} to {sizes[2]}, tuned for {sizes[1]}")
