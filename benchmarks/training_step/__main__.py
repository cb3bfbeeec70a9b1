"""The command `python -m benchmarks.training_step`."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Optional

import typer

from cli.main import run
from cli.options import Json

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def training_step(
    preset: Annotated[str, typer.Option(help="The model; r50 is compared with torchvision's Mask R-CNN R50.")] = "r50",
    size: Annotated[Optional[str], typer.Option(metavar="HxW", help="Height and width of the canvas; the preset's by default.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 2,
    rois: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="RoIs sampled per image, a quarter of them positive; the preset's by default. Fewer on a small canvas."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto takes a GPU where there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images, as data.workers.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each contender; the figures are medians.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before the timed ones.")] = 5,
    json: Json = None,
) -> None:
    """Time a training step and its wait for images; for r50, also a step of torchvision's Mask R-CNN on the same batch.

    Example: python -m benchmarks.training_step --size 800x1344 --batch 2 --workers 4
    """
    from benchmarks.training_step.measurement import bench_training
    from cli.data import parse_size
    from runtime.files import write_json

    canvas = None if size is None else parse_size(size)
    result = bench_training(preset, canvas, batch, device, steps, warmup, rois, workers)
    _print(result)
    if json is not None:
        write_json(json, result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    height, width = result["canvas"]
    made_on = f"{result['device']}, {result['precision']}; medians of {result['steps']}"
    console.print(f"{result['preset']}, {result['batch']} x {height} x {width}, {made_on}")
    rois = result["rois"]
    console.print(
        f"RoIs an image: {rois['sampled']} sampled of at most {rois['proposals']} proposals, "
        f"{rois['positive']} positive, {rois['mask']} with a mask"
    )
    table = Table("step")
    for column in ("ms", "over the peer", "peak memory, MB"):
        table.add_column(column, justify="right")
    for name, time in result["step_ms"].items():
        ratio, memory = result["ratio"].get(name), result["peak_memory_mb"][name]
        table.add_row(name, f"{time:.1f}", "" if ratio is None else f"{ratio:.2f}", "-" if memory is None else f"{memory:,.0f}")
    console.print(table)
    console.print(f"waiting for images, {result['workers']} workers: {100 * result['loader_wait']:.1f} % of a run's time")
    console.print(f"mask targets at four grids: {result['targets_ms']:.1f} ms, {100 * result['targets_share']:.1f} % of a step of phase 2")


if __name__ == "__main__":
    sys.exit(run(app, "python -m benchmarks.training_step"))
