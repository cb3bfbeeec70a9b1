"""`dynamask validate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cli.options import Json, check_file

if TYPE_CHECKING:
    from rich.table import Table

POLICIES = "routed,routed@50%,uniform-14,uniform-28,uniform-56,uniform-112,size-based"
PICTURES = 6
"""Annotated images in the report."""


def validate(
    bundle: Annotated[Path, typer.Argument(help="The bundle to judge.")],
    data: Annotated[Path, typer.Option(help="A folder with instances.json and images/, or a COCO annotation file.")],
    images: Annotated[Optional[Path], typer.Option(help="The folder of the annotation file's images.")] = None,  # noqa: UP045
    grid: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help="How grids are chosen: routed, routed@50% (of the largest grid's cost), routed@0.6 (GMAC), uniform-28, size-based.",
        ),
    ] = POLICIES,
    limit: Annotated[Optional[int], typer.Option(help="Take only the first so many images.")] = None,  # noqa: UP045
    target: Annotated[str, typer.Option(help="The engine to run; auto takes the best that the bundle holds.")] = "auto",
    threads: Annotated[Optional[int], typer.Option(help="CPU threads of the engine.")] = None,  # noqa: UP045
    json: Json = None,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.html", help="Write an HTML report here: curves, tables, pictures.", callback=check_file),
    ] = None,
) -> None:
    """Judge a bundle by accuracy and latency together, each way of choosing grids side by side.

    Example: dynamask validate lite0.bundle --data shapes --report report.html
    """
    from rich.console import Console
    from rich.progress import Progress

    from runtime import report as reports
    from runtime.files import check_apart, write_json
    from runtime.predictor import load
    from runtime.validate import read_coco
    from runtime.validate import validate as judge

    check_apart([path for path in (json, report) if path is not None], [data])
    dataset = read_coco(data, images)
    policies = [name.strip() for name in grid.split(",") if name.strip()]
    with load(bundle, target, threads=threads) as predictor:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("validating", total=None)
            result = judge(predictor, dataset, policies, limit, lambda done, total: progress.update(task, completed=done, total=total))
        _print(result)
        if json is not None:
            write_json(json, result)
        if report is not None:
            reports.write_report(result, report, reports.example_pictures(predictor, dataset, PICTURES))
    if report is not None:
        typer.echo(report)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    from runtime.validate import PARTS

    console = Console(markup=False, highlight=False)
    policies = result["policies"]
    accuracy = ("GMAC", "AP", "AP50", "AP75", "S", "M", "L", "box", "bound.")
    console.print(f"{result['dataset']['images']} images of {result['dataset']['name']}", soft_wrap=True)
    console.print(
        _table("accuracy: mask AP, box AP, boundary AP", accuracy, {name: _accuracy(policy) for name, policy in policies.items()})
    )
    shares = {name: ["/".join(f"{100 * share:.0f}" for share in policy["share"].values())] for name, policy in policies.items()}
    console.print(_table("share of grids, %", ("14/28/56/112",), shares))
    console.print(_table("latency, ms", ("", *PARTS, "total"), {name: _latency(policy) for name, policy in policies.items()}))
    for item in result["skipped"]:
        console.print(f"skipped {item['image']}: {item['reason']}", soft_wrap=True)
    for reason, count in result["dataset"]["annotations_left_out"].items():
        console.print(f"left out {count} annotations: {reason}")


def _table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> Table:
    from rich import box
    from rich import table as tables

    table = tables.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _accuracy(policy: dict[str, Any]) -> list[str]:
    values = [policy["segm"][name] for name in ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")]
    values += [policy["bbox"]["AP"], policy["boundary"]["AP"]]
    cost = "–" if policy["gmacs"] is None else f"{policy['gmacs']:.3f}"
    return [cost, *("–" if value is None else f"{value:.1f}" for value in values)]


def _latency(policy: dict[str, Any]) -> list[str]:
    """A cell per part, each of three lines: p50, p95, p99."""
    from runtime.validate import PARTS

    quantiles = ("p50", "p95", "p99")
    parts = ["\n".join(f"{policy['latency_ms'][part][quantile]:.1f}" for quantile in quantiles) for part in (*PARTS, "total")]
    return ["\n".join(quantiles), *parts]
