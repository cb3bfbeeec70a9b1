"""`dynamask ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json


def ablate(
    plan: Annotated[
        Path, typer.Argument(help="YAML file with the rows to train and evaluate; configs/ablations has those of the paper's tables.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the runs, table.md and table.json.")],
    json: Json = None,
) -> None:
    """Train and evaluate variants of the model by one recipe, into one table; after Ctrl-C the same command continues.

    Example: dynamask ablate configs/ablations/table-1-shapes.yaml --output runs/table-1
    """
    from dynamask.ablation import markdown, run_plan
    from runtime.files import check_apart, write_json

    check_apart([json], [plan])
    try:
        table = run_plan(plan, output)
    except KeyboardInterrupt:
        typer.echo(f"Stopped; continue with: dynamask ablate {plan} --output {output}", err=True)
        raise
    if json is not None:
        write_json(json, table)
    typer.echo(markdown(table), nl=False)
