"""Ablations: the rows of a plan are trained by one recipe, evaluated on the same images, and compared in a table."""

from __future__ import annotations

import functools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynamask.config import (
    NO_EFFECT_ON_WEIGHTS,
    Config,
    current_overrides,
    first_difference,
    first_error,
    load_config,
    load_run_config,
    read_yaml,
)
from dynamask.data.coco import LabelledDataset
from dynamask.model import DynaMask
from dynamask.train.checkpoint import load_model
from dynamask.train.datasets import validation_set
from dynamask.train.evaluate import evaluate
from dynamask.train.log import ProgressReport
from dynamask.train.trainer import train
from runtime.errors import InputError, shortened
from runtime.files import atomic_path, check_folder, input_path, sha256, write_json
from runtime.graph import GRIDS
from runtime.policies import parse_policy

IOU_TYPES = ("bbox", "segm", "boundary")
Overrides = Annotated[dict[str, Any], AfterValidator(functools.partial(current_overrides, where="set"))]
"""Fields by their path, under the names of this version."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """A model to train and evaluate, or other policies for the models of another row."""

    name: str = Field(min_length=1, max_length=100)
    overrides: Overrides = Field(default_factory=dict, alias="set")
    """Fields that differ from the plan's: `{"model.fusion": "add"}`."""
    source: str | None = Field(default=None, alias="from")
    """Name of the row whose checkpoints are evaluated; None trains models of its own."""
    policies: tuple[str, ...] = ()
    """How grids are chosen (`runtime.policies.parse_policy`); by default `routed`, or the grid of a Mask R-CNN head."""
    seeds: tuple[int, ...] = ()
    """`train.seed` of each run; by default the plan's."""

    @model_validator(mode="after")
    def _check(self) -> Row:
        if self.source is not None and (self.overrides or self.seeds):
            raise ValueError(f"row {self.name!r} evaluates the models of {self.source!r} and trains none: leave set and seeds out")
        return self

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Plan(_Strict):
    """The rows that `dynamask ablate` trains and evaluates."""

    base: str
    """The configuration of every row: a name or a YAML file, as `dynamask train --config` takes it."""
    overrides: Overrides = Field(default_factory=dict, alias="set")
    """Fields in which every row differs from `base`."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """`train.seed` of the runs of each row."""
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        folders = [row.folder for row in self.rows]
        for seeds in (self.seeds, *(row.seeds for row in self.rows)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds {list(seeds)} contain one twice: give each once")
        if any("train.seed" in overrides for overrides in (self.overrides, *(row.overrides for row in self.rows))):
            raise ValueError("train.seed is in set, but seeds says the seed of each run: give it there")
        for row in self.rows:
            if not row.folder or folders.count(row.folder) > 1:
                raise ValueError(
                    f"the name of row {row.name!r} gives no folder of its own: give rows names that differ in letters or digits"
                )
            if row.source is not None and self._named(row.source).source is not None:
                raise ValueError(
                    f"row {row.name!r} evaluates the models of {row.source!r}, which trains none: name the row that trains them"
                )
        return self

    def trained(self, row: Row) -> Row:
        """The row whose checkpoints are evaluated for `row`."""
        return row if row.source is None else self._named(row.source)

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """Seeds of the runs that are evaluated for the row."""
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
        """The policies of the row.

        Raises:
            InputError: there is no such policy, it has a budget in milliseconds, or the row has a Mask R-CNN head with another grid.
        """
        grid = self.config(row, self.seeds[0]).model.mask_grid
        policies = row.policies or (("routed",) if grid is None else (f"uniform-{grid}",))
        for policy in policies:
            if parse_policy(policy, dict.fromkeys(GRIDS, 1.0)).budget_ms:
                raise InputError(
                    f"row {row.name!r}: policy {policy} is in milliseconds, which PyTorch's models do not count in: write a percentage of "
                    "the largest grid's cost (routed@50%)."
                )
            if grid is not None and policy != f"uniform-{grid}":
                raise InputError(
                    f"row {row.name!r}: policy {shortened(policy)} does not fit a Mask R-CNN head, which has one grid, {grid}: "
                    "leave policies out."
                )
        return policies

    def _named(self, name: str) -> Row:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ValueError(f"from: there is no row {name!r}; the rows are {', '.join(row.name for row in self.rows)}")
        return found[0]


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML file and check all its rows.

    Raises:
        InputError: the file is missing or is not YAML, or a row or field does not fit.
    """
    if not input_path(path).is_file():
        raise InputError(f"{path} is not a file: give a plan as in docs/training.md.")
    try:
        plan = Plan.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}; write it as in docs/training.md.") from error
    except InputError as error:
        raise InputError(f"{path}, {error}") from error
    try:
        for row in plan.rows:
            for seed in plan.seeds_of(row):
                _check_weights(plan.config(row, seed))
            plan.policies(row)
    except InputError as error:
        raise InputError(f"{path}, {error}") from error
    return plan


def _check_weights(config: Config) -> None:
    if config.weights not in ("imagenet", "none") and not input_path(config.weights).is_file():
        raise InputError(f"weights {config.weights} is not a file: give its path relative to the current folder.")


def run_plan(path: Path, output: Path, quiet: bool = False) -> dict[str, Any]:
    """Train and evaluate the rows of a plan, and write `table.md` and `table.json` after each run.

    The runs are in `output/<row>/seed-<n>`. Runs and evaluations that are done already are not repeated, and an interrupted run continues.
    The latest weights are evaluated, not the best, because those are chosen on the same images.

    Returns:
        The contents of `table.json`: `plan`, `base`, `complete`, and `rows`, one for each row and policy: `name`, `policy`, `seeds`,
        `gmacs` (by grid), `image_gmacs`, `share` (mean by grid), and, each with `mean`, `spread` (standard deviation over the seeds, None
        for one) and `values`, the APs times 100 (`AP AP50 AP75 boundary_AP box_AP`), `mean_gmacs`, `training_seconds`,
        `evaluation_seconds`.

    Raises:
        InputError: the plan does not fit, or `output` has runs of another plan or cannot be written.
        KeyboardInterrupt: Ctrl-C; the same call continues.
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
                for policy, record in _evaluate(config, folder, policies).items():
                    records[policy].append({"seed": seed, "training_seconds": seconds if row.source is None else None, **record})
                rows[done:] = [_summary(row.name, policy, records[policy]) for policy in policies]
                table["complete"] = row is plan.rows[-1] and seed == plan.seeds_of(row)[-1]
                _write(output, table)
    return table


def markdown(table: dict[str, Any]) -> str:
    """The text of `table.md`, from the result of `run_plan`."""
    heads = ["row", "grids", "AP", "AP50", "AP75", "boundary AP", "box AP", "mean GMAC", "14 / 28 / 56 / 112 %", "GMAC at each grid"]
    heads += ["GMAC per image", "training s", "evaluation s", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table["rows"]:
        cells = [row["name"], row["policy"], *(_cell(row[name], 1) for name in ("AP", "AP50", "AP75", "boundary_AP", "box_AP"))]
        cells += [_cell(row["mean_gmacs"], 4), " / ".join(f"{100 * share:.0f}" for share in row["share"].values())]
        cells += [" / ".join(f"{cost:.4f}" for cost in row["gmacs"].values()), f"{row['image_gmacs']:.4f}"]
        cells += [_cell(row["training_seconds"], 0), _cell(row["evaluation_seconds"], 0), str(len(row["seeds"]))]
        lines.append(f"| {' | '.join(cells)} |")
    unfinished = "" if table["complete"] else "\nUnfinished: the same command continues.\n"
    return "\n".join(lines) + "\n" + unfinished


def _train(config: Config, folder: Path, quiet: bool) -> float:
    """Train the run to its end, if it has not ended; returns its seconds in all."""
    _check_fields(config, folder)
    metrics = folder / "metrics.json"
    if metrics.is_file():
        result = json.loads(metrics.read_text(encoding="utf-8"))
        if not result["interrupted"]:
            return float(result["seconds"])
    result = train(config, folder, resume=(folder / "state.safetensors").exists(), quiet=quiet)
    if result["interrupted"]:
        raise KeyboardInterrupt
    return float(result["seconds"])


def _check_fields(config: Config, folder: Path) -> None:
    """Check that a run in the folder has the same fields as the plan.

    Raises:
        InputError: names the first field that differs.
    """
    if not (folder / "config.yaml").is_file():
        return
    changed = first_difference(load_run_config(folder), config, NO_EFFECT_ON_WEIGHTS)
    if changed is not None:
        name, before, now = changed
        raise InputError(
            f"{folder} holds a run with {name} {before}, not {now} as the plan says: choose another --output, or delete that folder."
        )


def _evaluate(config: Config, folder: Path, policies: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The figures of a run by policy. They are kept in `evaluations.json`, and used again for the same weights and images."""
    checkpoint, kept = folder / "model.safetensors", folder / "evaluations.json"
    subject = {"checkpoint": sha256(checkpoint), "images": config.train.evaluate_images}
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if known.get("judged") != subject:  # the key of files of earlier versions
        known = {"judged": subject, "policies": {}}
    missing = [policy for policy in policies if policy not in known["policies"]]
    if missing:
        model, dataset = load_model(checkpoint)[0], validation_set(config)
        assert isinstance(model, DynaMask)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        for policy in missing:
            known["policies"][policy] = _figures(model, dataset, config, policy)
            write_json(kept, known)
    return {policy: known["policies"][policy] for policy in policies}


def _figures(model: DynaMask, dataset: LabelledDataset, config: Config, policy: str) -> dict[str, Any]:
    """The figures of a model with one policy."""
    started, branch = time.monotonic(), model.mask_branch
    costs = dict(zip(GRIDS, branch.costs.tolist(), strict=True))
    figures = evaluate(model, dataset, config, config.train.evaluate_images, policy=parse_policy(policy, costs), iou_types=IOU_TYPES)
    assert figures is not None  # it is None only if stopped
    seconds = time.monotonic() - started
    return {
        **{name: figures["segm"][name] for name in ("AP", "AP50", "AP75")},
        "boundary_AP": figures["boundary"]["AP"],
        "box_AP": figures["bbox"]["AP"],
        "share": figures["share"],
        "mean_gmacs": sum(costs[grid] * figures["share"][str(grid)] for grid in GRIDS),
        "gmacs": {str(grid): cost for grid, cost in costs.items() if grid in branch.grids},
        "image_gmacs": branch.image_gmacs(config.model.canvas),
        "evaluation_seconds": seconds,
    }


def _summary(name: str, policy: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: means and spreads over the records of its seeds."""
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
