"""The command `python -m benchmarks.mask_branch`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from cli.main import run
from cli.options import Json

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def mask_branch(
    presets: Annotated[list[str], typer.Argument(help="lite0 (at 384 x 384), r50 (at 800 x 1344), or both.")],
    fusions: Annotated[str, typer.Option(help="Values of model.fusion, by commas, or all; the preset's own is always timed.")] = "",
    instances: Annotated[int, typer.Option(min=1, help="Instances in the image.")] = 100,
    distribution: Annotated[str, typer.Option(metavar="A,B,C,D", help="Shares of the instances at 14, 28, 56 and 112.")] = "35,34,21,10",
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the figures are medians.")] = 15,
    json: Json = None,
) -> None:
    """Time the mask branch against Mask R-CNN's head at 28 x 28 in ONNX Runtime, with random weights on the same instances.

    Example: python -m benchmarks.mask_branch lite0 r50 --json mask_branch.json
    """
    from benchmarks.mask_branch.measurement import bench_mask_branch
    from cli.bench import parse_distribution
    from dynamask.config import PRESETS
    from dynamask.fam import FUSIONS
    from runtime.files import write_json

    chosen = list(FUSIONS) if fusions == "all" else [name for name in fusions.split(",") if name]
    result: dict[str, Any] = {"ratios": {}, "presets": {}}
    for preset in presets:
        own = [PRESETS[preset].fusion] if preset in PRESETS else []
        timed = list(dict.fromkeys([*own, *chosen]))
        measured = bench_mask_branch(preset, timed, instances, parse_distribution(distribution), threads, repeats)
        result["presets"][preset] = measured
        result["ratios"][preset] = measured["fusions"][timed[0]]["ratio"]
        _print(preset, measured)
    if json is not None:
        write_json(json, result)


def _print(preset: str, measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    height, width = measured["canvas"]
    spread = " / ".join(map(str, measured["distribution"]))
    console.print(f"{preset} at {height} x {width}: {measured['instances']} instances, {spread}; {measured['threads']} threads")
    table = Table("fusion")
    for column in ("14, ms", "28", "56", "112", "routed", "over Mask R-CNN 28", "GMAC"):
        table.add_column(column, justify="right")
    for fusion, figures in measured["fusions"].items():
        uniform = [f"{ms:.1f}" for ms in figures["uniform_ms"].values()]
        table.add_row(fusion, *uniform, f"{figures['routed_ms']:.1f}", f"{figures['ratio']:.2f}", f"{figures['mean_gmacs']:.3f}")
    table.add_row("Mask R-CNN 28", "", f"{measured['peer_ms']:.1f}", "", "", "", "1.00", "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(run(app, "python -m benchmarks.mask_branch"))
