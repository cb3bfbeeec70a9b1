"""What `dynamask train` makes of its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli.train import parse_assignments, train
from dynamask.config import Config
from dynamask.train import trainer
from runtime.errors import InputError

RESULT = {
    "steps": 3,
    "total_steps": 3,
    "seconds": 1.0,
    "checkpoint": "m.safetensors",
    "ap_by_epoch": [{"epoch": 1.0, "segm": {"AP": 12.34}, "bbox": {"AP": None}}],
    "uniform": None,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path, bool]]:
    seen: list[tuple[Config, Path, bool]] = []

    def record(config: Config, output: Path, resume: bool) -> dict[str, Any]:
        seen.append((config, output, resume))
        return RESULT

    monkeypatch.setattr(trainer, "train", record)
    return seen


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(train)
    return CliRunner().invoke(app, list(arguments))


def test_options_change_the_configuration(tmp_path: Path, calls: list[tuple[Config, Path, bool]]) -> None:
    result = run(
        "--config", "lite0-shapes", "--output", str(tmp_path / "run"), "--weights", "none", "--set", "train.epochs=3",
        "--set", "train.drops=[1, 2]", "--json", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert result.exit_code == 0
    assert "segm AP 12.3" in result.stdout
    (config, output, resume) = calls[0]
    assert (config.weights, config.train.epochs, config.train.drops) == ("none", 3.0, (1.0, 2.0))
    assert (output, resume) == (tmp_path / "run", False)
    assert json.loads((tmp_path / "result.json").read_text()) == RESULT


def test_resuming_takes_the_configuration_of_the_run(tmp_path: Path, calls: list[tuple[Config, Path, bool]]) -> None:
    (tmp_path / "config.yaml").write_text("train: {epochs: 7}\n")
    assert run("--output", str(tmp_path), "--resume").exit_code == 0
    assert (calls[0][0].train.epochs, calls[0][2]) == (7.0, True)


def test_a_configuration_must_be_named(tmp_path: Path) -> None:
    assert isinstance(run("--output", str(tmp_path)).exception, InputError)


@pytest.mark.parametrize("assignment", ["train.epochs", "=3", "train.epochs=[1"])
def test_an_assignment_that_is_none_is_refused(assignment: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_assignments([assignment])
