"""`dynamask train`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Json


def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and metrics.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="lite0-shapes, lite0-ablations; r50-coco, r101-coco, x101-coco, r18-coco, lite0-coco, lite1-coco, lite2-coco; or a YAML"
            " file. With --resume, by default that of the run."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: imagenet, none, or a file: a backbone, a DynaMask checkpoint, or a Mask R-CNN of torchvision,"
            " mmdetection or Detectron2."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field: --set train.phase2_epochs=3 (repeatable)."),
    ] = None,
    json: Json = None,
) -> None:
    """Train a model; Ctrl-C saves the last step, --resume continues from it.

    Example: dynamask train --config lite0-shapes --output runs/shapes --set train.phase2_epochs=0.5
    """
    from dynamask.config import CONFIGS, load_config, load_run_config
    from dynamask.train.trainer import train as run_training
    from runtime.errors import INTERRUPTED, InputError
    from runtime.files import check_apart, write_json

    if config is None and not resume:
        raise InputError(f"--config is missing: give one of {', '.join(CONFIGS)}, or a YAML file.")
    overrides = parse_assignments(assignments or [])
    if weights is not None:
        overrides["weights"] = weights
    notify = functools.partial(typer.echo, err=True)
    loaded = load_run_config(output, overrides, notify) if config is None else load_config(config, overrides, notify)
    read = (config, loaded.weights, loaded.data.train_annotations, loaded.data.val_annotations)
    check_apart([json], [Path(path) for path in read if path is not None])
    result = run_training(loaded, output, resume)
    if not result:  # one of several processes, but not the one that reports
        return
    if json is not None:
        write_json(json, result)
    typer.echo(_summary(result))
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["train.phase2_epochs=3"]` as `{"train.phase2_epochs": 3}`; values are YAML.

    Raises:
        InputError: no `=`, no key, or as `parse_yaml` for a value.
    """
    from dynamask.config import parse_yaml
    from runtime.errors import InputError, shortened

    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise InputError(f"--set {shortened(assignment)} is not of the form KEY=VALUE: write it like --set train.phase2_epochs=3.")
        fields[key] = parse_yaml(value, f"the value of --set {shortened(key)}")
    return fields


def _summary(result: dict[str, Any]) -> str:
    lines = [f"{result['steps']} of {result['total_steps']} steps in {result['seconds']:.0f} s: {result['checkpoint']}"]
    for entry in result["ap_by_epoch"]:
        lines.append(f"epoch {entry['epoch']:.2f}: {_figures(entry)}")
    for grid, entry in (result["uniform"] or {}).items():
        lines.append(f"all at {grid}: {_figures(entry)}")
    return "\n".join(lines)


def _figures(entry: dict[str, Any]) -> str:
    return "  ".join(f"{kind} AP {entry[kind]['AP']:.1f}" for kind in ("segm", "bbox") if entry[kind]["AP"] is not None)
