"""`dynamask build-engine`: makes what a target runs from a bundle's graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def build_engine(
    bundle: Annotated[Path, typer.Argument(help="The folder that dynamask export wrote; the engine is put into it.")],
    target: Annotated[str, typer.Option(help="What the engine is for: onnxruntime.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of the weights and the arithmetic: fp32.")] = "fp32",
    json: Annotated[Optional[Path], typer.Option(help="Write the result here.")] = None,  # noqa: UP045
) -> None:
    """Build an engine in the bundle, in place of an earlier one for the same target."""
    from runtime.files import write_json

    result = build(bundle, target, precision)
    if json is not None:
        write_json(json, result)
    typer.echo(f"{result['engine']} ({result['bytes'] / 1e6:.1f} MB, {result['seconds']:.1f} s)")


def build(folder: Path, target: str, precision: str) -> dict[str, Any]:
    """Build and report `engine` (its folder), `bytes`, `seconds`, `plugins`, `precision` and `versions`.

    Raises:
        InputError: the bundle is missing or damaged, or the target or precision does not exist or cannot be built here.
    """
    import time

    from runtime.bundle import Bundle
    from runtime.errors import InputError
    from runtime.targets.base import check_target

    check_target(target)
    if precision != "fp32":
        raise InputError(f"{target} is not built in precision {precision}; take fp32.")
    from runtime.targets import onnxruntime

    bundle = Bundle.open(folder)
    start = time.perf_counter()
    entry = onnxruntime.build(bundle)
    return {
        "engine": str(folder / "engines" / target),
        "bytes": sum(file.bytes for file in entry.files.values()),
        "seconds": time.perf_counter() - start,
        "plugins": [],
        "target": target,
        "precision": entry.precision,
        "versions": entry.versions,
    }
