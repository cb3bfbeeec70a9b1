"""`dynamask flops`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import Json


def flops(
    model: Annotated[str, typer.Option(help="The preset: r50 (the paper's), r101, x101, r18; lite0, lite1, lite2 (for the edge).")] = "r50",
    classes: Annotated[int, typer.Option(min=1, help="Number of object classes; COCO has 80.")] = 80,
    json: Json = None,
) -> None:
    """Count a preset's multiply-accumulates from its modules, beside the paper's figures.

    Example: dynamask flops --model lite0
    """
    from dynamask.config import PRESETS
    from runtime.errors import InputError
    from runtime.files import write_json

    if model not in PRESETS:
        raise InputError(f"--model {model} is not a preset: choose {' or '.join(PRESETS)}.")

    result = _count(model, classes)
    if json is not None:
        write_json(json, result)
    _print_table(result)


def _count(preset: str, classes: int) -> dict[str, Any]:
    from dynamask.config import PRESETS, Config
    from dynamask.flops import PAPER_GMACS
    from dynamask.model import build_model, count_gmacs
    from runtime.graph import GRIDS

    config = PRESETS[preset]
    gmacs = count_gmacs(build_model(Config(model=config), [{"id": i + 1, "name": str(i + 1)} for i in range(classes)]).eval())
    return {
        "model": preset,
        "canvas": list(config.canvas),
        "cumulative_gmacs": {str(grid): cost for grid, cost in gmacs.grids.items()},
        "paper_gmacs": dict(zip(map(str, GRIDS), PAPER_GMACS, strict=True)),
        "msm": gmacs.msm,
        "detector": gmacs.detector,
        "classes": classes,
    }


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # The paper counts its own model, with 80 classes; beside another one its figures would mislead.
    paper = result["paper_gmacs"] if result["model"] == "r50" else {}
    table = Table()
    table.add_column("grid", justify="right")
    table.add_column("counted", justify="right")
    if paper:
        table.add_column("paper", justify="right")
        table.add_column("difference", justify="right")
    for grid, counted in result["cumulative_gmacs"].items():
        beside = [f"{paper[grid]:.2f}", f"{100 * (counted / paper[grid] - 1):+.1f} %"] if paper else []
        table.add_row(f"{grid} × {grid}", f"{counted:.4f}", *beside)
    console = Console(markup=False, highlight=False)
    console.print(f"{result['model']}: mask branch, GMAC per instance, cumulative")
    console.print(table)
    largest = result["cumulative_gmacs"]["112"]
    console.print(f"MSM       {result['msm']:.4f} GMAC per instance, {100 * result['msm'] / largest:.1f} % of the largest grid's cost")
    height, width = result["canvas"]
    console.print(f"detector  {result['detector']:.2f} GMAC per image of {height} × {width}")
