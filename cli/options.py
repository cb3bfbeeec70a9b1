"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.predictor import Predictor

POLICIES_HELP = (
    "routed: the model chooses for each instance. routed@50%: the same, at a mean cost of at most 50 % of the largest grid's. "
    "routed@0.6gmac: the same, at a mean cost of at most 0.6 GMAC per instance. "
    "routed@20ms: the same, at a predicted time of at most 20 ms for detector and masks of each frame, by the times of dynamask calibrate. "
    "uniform-14, uniform-28, uniform-56, uniform-112: that grid for all. size-based: the size of the box decides."
)


def print_notice(predictor: Predictor) -> None:
    """Say on standard error if the engine's times were measured elsewhere (`Predictor.costs_notice`)."""
    if (notice := predictor.costs_notice()) is not None:
        typer.echo(notice, err=True)


def check_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before any work is done (`runtime.files.check_file`).

    Raises:
        InputError: it is a folder, or its folder cannot be made or written.
    """
    from runtime import files

    if path is not None:
        files.check_file(path)
    return path


BundleFolder = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        help="The model: a folder from dynamask finetune, or from dynamask export and build-engine; or everyday, the model of everyday "
        "things that comes with the package.",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        metavar="auto|onnxruntime|tensorrt-rtx|tensorrt",
        help="The engine that runs; auto takes the best one that is built and runs on this machine.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; all cores by default.")]
Grid = Annotated[str, typer.Option(metavar="POLICY", help=f"The rule that chooses the grid (resolution) of each mask. {POLICIES_HELP}")]
Score = Annotated[float, typer.Option(min=0, max=1, help="Leave out instances with this score or less.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Take only the first N images; in a stream, the first N frames of each source.")
]
Json = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result here as JSON.", callback=check_file)]
