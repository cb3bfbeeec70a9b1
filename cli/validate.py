"""`dynamask validate`: accuracy and latency on a COCO data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import POLICIES_HELP, BundleFolder, Json, Limit, Target, Threads, check_file, print_notice

if TYPE_CHECKING:
    from rich.table import Table

PICTURES = 6
"""Annotated images in the report."""


def validate(
    bundle: BundleFolder,
    data: Annotated[
        Path, typer.Option(metavar="FOLDER|FILE", help="A folder with instances.json and images/, or a file of COCO annotations.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of images; by default images/ beside the annotations."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY,...",
            help="The rules to compare, separated by commas; each chooses the grid (resolution) of each mask. "
            f"{POLICIES_HELP} Default: routed, routed@50%, the four uniform ones and size-based.",
        ),
    ] = None,
    limit: Limit = None,
    target: Target = "auto",
    threads: Threads = None,
    json: Json = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write an HTML report here: charts, tables, annotated images.", callback=check_file),
    ] = None,
) -> None:
    """Measure accuracy and latency of a bundle on a COCO data set, for several grid policies.

    A grid policy is a rule that chooses the resolution of each mask. All policies run on each image in turn, so that their figures can
    be compared. A budget in GMAC (routed@50%) is kept over all images, one in milliseconds (routed@20ms) in each.

    Example: dynamask validate lite0.bundle --data shapes --grid routed,routed@50%,uniform-112 --report report.html
    """
    from rich.console import Console
    from rich.progress import Progress

    from runtime import report as reports
    from runtime.coco import read_coco
    from runtime.files import check_apart, write_json
    from runtime.predictor import load
    from runtime.validate import POLICIES
    from runtime.validate import validate as run_validation

    check_apart([json, report], [data], bundle)
    dataset = read_coco(data, images)
    check_apart([json, report], dataset.files_named({path.name for path in (json, report) if path is not None}))
    for line in dataset.summary():
        typer.echo(line, err=True)
    policies = POLICIES if grid is None else [name.strip() for name in grid.split(",") if name.strip()]
    with load(bundle, target, threads=threads) as predictor:
        print_notice(predictor)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("validating", total=None)
            result = run_validation(
                predictor, dataset, policies, limit, lambda done, total: progress.update(task, completed=done, total=total)
            )
        _print(result)
        _warn_of_unusable_images(result["dataset"])
        if json is not None:
            write_json(json, result)
        if report is not None:
            reports.write_report(result, report, reports.example_pictures(predictor, dataset, PICTURES))
    if report is not None:
        typer.echo(report)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    from runtime.statistics import LATENCIES

    console = Console(markup=False, highlight=False)
    policies = result["policies"]
    accuracy = ("GMAC", "AP", "AP50", "AP75", "AP\nS", "AP\nM", "AP\nL", "box\nAP", "bound-\nary AP")
    console.print(f"{result['dataset']['images']} images of {result['dataset']['name']}", soft_wrap=True)
    console.print(
        _table(
            "mean GMAC per instance; AP of masks, boxes and boundaries, x 100",
            accuracy,
            {name: _accuracy(policy) for name, policy in policies.items()},
        )
    )
    shares = {name: ["/".join(f"{100 * share:.0f}" for share in policy["share"].values())] for name, policy in policies.items()}
    console.print(_table("share of grids, %", ("14/28/56/112",), shares))
    console.print(_table("latency per image, ms", ("", *LATENCIES), {name: _latency(policy) for name, policy in policies.items()}))
    if predicted := {name: _predicted(policy["predicted"]) for name, policy in policies.items() if policy["predicted"]}:
        columns = ("masks\nms", "predicted /\nmeasured", "frame\nms", "predicted /\nmeasured")
        console.print(_table("predicted time of mask branch and frame (detector and masks), medians", columns, predicted))
    for item in result["skipped"]:
        console.print(f"skipped {item['image']}: {item['reason']}", soft_wrap=True)
    for reason, count in result["dataset"]["annotations_left_out"].items():
        console.print(f"left out {count} annotations: {reason}")


def _warn_of_unusable_images(dataset: dict[str, Any]) -> None:
    """Say so if more than a tenth of the images could not be used; missing ones were reported at the start."""
    from runtime.coco import WARN_SHARE
    from runtime.validate import UNUSABLE_FILE

    count = dataset["images_left_out"].get(UNUSABLE_FILE, 0)
    if count > WARN_SHARE * (dataset["images"] + count):
        typer.echo(
            f"Warning: {count} of the images of {dataset['name']} could not be used; the lines that begin with skipped say why.", err=True
        )


def _table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> Table:
    from rich import box
    from rich import table as tables

    table = tables.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
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
    """A cell for each part, of three lines: p50, p95, p99."""
    from runtime.statistics import LATENCIES, QUANTILES

    parts = ["\n".join(f"{policy['latency_ms'][part][quantile]:.1f}" for quantile in QUANTILES) for part in LATENCIES]
    return ["\n".join(QUANTILES), *parts]


def _predicted(predicted: dict[str, dict[str, float]]) -> list[str]:
    return [cell for part in ("masks", "frame") for cell in (f"{predicted[part]['ms']:.1f}", f"{predicted[part]['ratio']:.2f}")]
