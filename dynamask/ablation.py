"""Ablations: a plan's rows are trained under one recipe, judged on the same images, and set side by side in a table."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynamask.config import NO_EFFECT_ON_WEIGHTS, Config, first_difference, first_error, load_config, load_run_config
from dynamask.model import DynaMask
from dynamask.train.checkpoint import load_model
from dynamask.train.datasets import validation_set
from dynamask.train.evaluate import evaluate
from dynamask.train.log import ProgressReport
from dynamask.train.trainer import train
from runtime.errors import InputError
from runtime.files import atomic_path, check_folder, sha256, write_json
from runtime.graph import GRIDS
from runtime.policies import parse_policy

IOU_TYPES = ("bbox", "segm", "boundary")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One model of a plan, or another row's model judged in other ways."""

    name: str = Field(min_length=1)
    overrides: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Fields that differ from the plan's, `{"model.fusion": "add"}`."""
    source: str | None = Field(default=None, alias="from")
    """The row whose checkpoints are judged; None trains."""
    policies: tuple[str, ...] = ()
    """How grids are chosen (`runtime.policies.parse_policy`); empty for `routed`, and for a Mask R-CNN head's own grid."""
    seeds: tuple[int, ...] = ()
    """Empty for the plan's."""

    @model_validator(mode="after")
    def _check(self) -> Row:
        if self.source is not None and (self.overrides or self.seeds):
            raise ValueError(f"row {self.name!r} is judged from {self.source!r} and trains nothing: leave set and seeds out")
        return self

    @property
    def folder(self) -> str:
        """The name of its runs' folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Plan(_Strict):
    """What `dynamask ablate` does."""

    base: str
    """The configuration of every row: a name or a YAML file, as `dynamask train --config` takes it."""
    overrides: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Fields in which every row differs from `base`."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """`train.seed` of each row's runs."""
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        folders = [row.folder for row in self.rows]
        for seeds in (self.seeds, *(row.seeds for row in self.rows)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds {list(seeds)} name one twice, which says nothing more: give each once")
        if any("train.seed" in overrides for overrides in (self.overrides, *(row.overrides for row in self.rows))):
            raise ValueError("train.seed is in set, and every run has its seed from seeds: give it there")
        for row in self.rows:
            if not row.folder or folders.count(row.folder) > 1:
                raise ValueError(f"row {row.name!r} has no folder of its own: give rows names that differ in letters or digits")
            if row.source is not None and self._named(row.source).source is not None:
                raise ValueError(f"row {row.name!r} is judged from {row.source!r}, which trains nothing: name the row that does")
        return self

    def trained(self, row: Row) -> Row:
        """The row whose checkpoints `row` is judged by."""
        return row if row.source is None else self._named(row.source)

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """Of the runs that the row is judged by."""
        return self.trained(row).seeds or self.seeds

    def config(self, row: Row, seed: int) -> Config:
        """The configuration of a run.

        Raises:
            InputError: a field does not exist or does not fit; names the row.
        """
        trained = self.trained(row)
        try:
            return load_config(self.base, {**self.overrides, **trained.overrides, "train.seed": seed})
        except InputError as error:
            raise InputError(f"row {trained.name!r}: {error}") from error

    def policies(self, row: Row) -> tuple[str, ...]:
        """The ways in which the row's grids are chosen.

        Raises:
            InputError: no such way, or not one that a Mask R-CNN head leaves open.
        """
        grid = self.config(row, self.seeds[0]).model.mask_grid
        policies = row.policies or (("routed",) if grid is None else (f"uniform-{grid}",))
        for policy in policies:
            parse_policy(policy, dict.fromkeys(GRIDS, 1.0))
            if grid is not None and policy != f"uniform-{grid}":
                raise InputError(
                    f"row {row.name!r}: policy {policy} asks a Mask R-CNN head for more than its own grid: leave policies out."
                )
        return policies

    def _named(self, name: str) -> Row:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ValueError(f"from: {name!r} is no row; the rows are {', '.join(row.name for row in self.rows)}")
        return found[0]


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file, every row of it checked before anything is trained.

    Raises:
        InputError: the file is missing or not YAML, or a row or field does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a plan as in docs/training.md.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}): give a plan as in docs/training.md.") from error
    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}; write it as in docs/training.md.") from error
    try:
        for row in plan.rows:
            for seed in plan.seeds_of(row):
                _check_weights(plan.config(row, seed))
            plan.policies(row)
    except InputError as error:
        raise InputError(f"{path}, {error}") from error
    return plan


def _check_weights(config: Config) -> None:
    if config.weights not in ("imagenet", "none") and not Path(config.weights).is_file():
        raise InputError(f"weights {config.weights} is not a file: give its path from the folder that you are in.")


def run_plan(path: Path, output: Path, quiet: bool = False) -> dict[str, Any]:
    """Train what is not yet trained, judge what is not yet judged, and write `table.md` and `table.json` anew after each run.

    The runs stand in `output/<row>/seed-<n>`; a run that was interrupted goes on where it stopped. The latest weights are judged, not the
    best: the choice would be made on the images that judge.

    Returns:
        What `table.json` holds: `plan`, `base`, `complete`, and `rows`, one a row and policy: `name`, `policy`, `seeds`, `gmacs` (by grid),
        `image_gmacs`, `share` (mean by grid), and, each with `mean`, `spread` (standard deviation over the seeds, None for one) and
        `values`, the APs times 100 (`AP AP50 AP75 boundary_AP box_AP`), `mean_gmacs` and `training_seconds`, `evaluation_seconds`.

    Raises:
        InputError: the plan does not fit, or `output` holds runs of another one or cannot be written.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    plan = read_plan(path)
    check_folder(output)
    rows: list[dict[str, Any]] = []
    table = {"plan": str(path), "base": plan.base, "complete": False, "rows": rows}
    with ProgressReport(quiet) as report:
        for row in plan.rows:
            trained, policies = plan.trained(row), plan.policies(row)
            records: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
            done = len(rows)
            for seed in plan.seeds_of(row):
                report.message(f"{row.name}, seed {seed}")
                config, folder = plan.config(row, seed), output / trained.folder / f"seed-{seed}"
                seconds = _train(config, folder, quiet)
                for policy, record in _judge(config, folder, policies).items():
                    records[policy].append({"seed": seed, "training_seconds": seconds if row.source is None else None, **record})
                rows[done:] = [_summary(row.name, policy, records[policy]) for policy in policies]
                table["complete"] = row is plan.rows[-1] and seed == plan.seeds_of(row)[-1]
                _write(output, table)
    return table


def markdown(table: dict[str, Any]) -> str:
    """`table.md`, from what `run_plan` returns."""
    heads = ["row", "grids", "AP", "AP50", "AP75", "boundary AP", "box AP", "mean GMAC", "14 / 28 / 56 / 112 %", "GMAC at each grid"]
    heads += ["GMAC an image", "training s", "evaluation s", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table["rows"]:
        cells = [row["name"], row["policy"], *(_cell(row[name], 1) for name in ("AP", "AP50", "AP75", "boundary_AP", "box_AP"))]
        cells += [_cell(row["mean_gmacs"], 4), " / ".join(f"{100 * share:.0f}" for share in row["share"].values())]
        cells += [" / ".join(f"{cost:.4f}" for cost in row["gmacs"].values()), f"{row['image_gmacs']:.4f}"]
        cells += [_cell(row["training_seconds"], 0), _cell(row["evaluation_seconds"], 0), str(len(row["seeds"]))]
        lines.append(f"| {' | '.join(cells)} |")
    unfinished = "" if table["complete"] else "\nUnfinished: the same command goes on.\n"
    return "\n".join(lines) + "\n" + unfinished


def _train(config: Config, folder: Path, quiet: bool) -> float:
    """Train the run to its end, from wherever it stopped; its seconds in all."""
    _check_begun(config, folder)
    metrics = folder / "metrics.json"
    if metrics.is_file():
        result = json.loads(metrics.read_text(encoding="utf-8"))
        if not result["interrupted"]:
            return float(result["seconds"])
    result = train(config, folder, resume=(folder / "state.safetensors").exists(), quiet=quiet)
    if result["interrupted"]:
        raise KeyboardInterrupt
    return float(result["seconds"])


def _check_begun(config: Config, folder: Path) -> None:
    """Refuse to go on with a run of other fields: what comes out would be neither's.

    Raises:
        InputError: names the first that differs.
    """
    if not (folder / "config.yaml").is_file():
        return
    changed = first_difference(load_run_config(folder), config, NO_EFFECT_ON_WEIGHTS)
    if changed is not None:
        name, before, now = changed
        raise InputError(f"{folder} holds a run with {name} {before}, not {now} as the plan says: choose another --output, or remove it.")


def _judge(config: Config, folder: Path, policies: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The figures of a run by policy; those of its present weights are kept in `evaluations.json`."""
    checkpoint, kept = folder / "model.safetensors", folder / "evaluations.json"
    judged = {"checkpoint": sha256(checkpoint), "images": config.train.evaluate_images}
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if known.get("judged") != judged:
        known = {"judged": judged, "policies": {}}
    missing = [policy for policy in policies if policy not in known["policies"]]
    if missing:
        model, dataset = load_model(checkpoint)[0], validation_set(config)
        assert isinstance(model, DynaMask)
        costs, per_image = (
            dict(zip(GRIDS, model.mask_branch.costs.tolist(), strict=True)),
            model.mask_branch.image_gmacs(config.model.canvas),
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        for policy in missing:
            started, images = time.monotonic(), config.train.evaluate_images
            figures = evaluate(model, dataset, config, images, policy=parse_policy(policy, costs), iou_types=IOU_TYPES)
            assert figures is not None  # nothing stops it
            known["policies"][policy] = {
                **{name: figures["segm"][name] for name in ("AP", "AP50", "AP75")},
                "boundary_AP": figures["boundary"]["AP"],
                "box_AP": figures["bbox"]["AP"],
                "share": figures["share"],
                "mean_gmacs": sum(costs[grid] * figures["share"][str(grid)] for grid in GRIDS),
                "gmacs": {str(grid): cost for grid, cost in costs.items() if grid in model.mask_branch.grids},
                "image_gmacs": per_image,
                "evaluation_seconds": time.monotonic() - started,
            }
            write_json(kept, known)
    return {policy: known["policies"][policy] for policy in policies}


def _summary(name: str, policy: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the records of its seeds together."""
    share = {str(grid): statistics.fmean(record["share"][str(grid)] for record in records) for grid in GRIDS}
    costs = {field: records[0][field] for field in ("gmacs", "image_gmacs")}
    summary: dict[str, Any] = {"name": name, "policy": policy, "seeds": [record["seed"] for record in records], **costs, "share": share}
    for field in ("AP", "AP50", "AP75", "boundary_AP", "box_AP", "mean_gmacs", "training_seconds", "evaluation_seconds"):
        values = [record[field] for record in records if record[field] is not None]
        summary[field] = {
            "mean": statistics.fmean(values) if values else None,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
        }
    return summary


def _cell(figure: dict[str, Any], digits: int) -> str:
    if figure["mean"] is None:
        return "–"
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"


def _write(output: Path, table: dict[str, Any]) -> None:
    write_json(output / "table.json", table)
    with atomic_path(output / "table.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
