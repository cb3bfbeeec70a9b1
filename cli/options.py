"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

POLICIES_HELP = (
    "routed: the model chooses for each instance. routed@50%: the same, at a mean cost of at most 50 % of the largest grid's. "
    "routed@0.6gmac: the same, at a mean cost of at most 0.6 GMAC per instance. "
    "uniform-14, uniform-28, uniform-56, uniform-112: that grid for all. size-based: the size of the box decides."
)


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
