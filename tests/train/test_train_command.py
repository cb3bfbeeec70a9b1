"""What `dynamask train` makes of its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli.train import parse_assignments, train
from dynamask.ablation import read_plan
from dynamask.config import Config, load_config, load_run_config
from dynamask.train import trainer
from runtime.errors import InputError

RESULT = {
    "steps": 3,
    "total_steps": 3,
    "seconds": 1.0,
    "checkpoint": "m.safetensors",
    "ap_by_epoch": [{"epoch": 1.0, "segm": {"AP": 12.34}, "bbox": {"AP": None}}],
    "uniform": None,
    "interrupted": False,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path, bool]]:
    seen: list[tuple[Config, Path, bool]] = []

    def record(config: Config, output: Path, resume: bool) -> dict[str, Any]:
        seen.append((config, output, resume))
        return RESULT

    monkeypatch.setattr(trainer, "train", record)
    return seen


def run(*arguments: str, catch: bool = True) -> Any:
    app = typer.Typer()
    app.command()(train)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=catch)


def test_options_change_the_configuration(tmp_path: Path, calls: list[tuple[Config, Path, bool]]) -> None:
    result = run(
        "--config", "lite0-shapes", "--output", str(tmp_path / "run"), "--weights", "none", "--set", "train.phase2_epochs=3",
        "--set", "train.rate_drop_epochs=[1, 2]", "--json", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert result.exit_code == 0
    assert "segm AP 12.3" in result.stdout
    (config, output, resume) = calls[0]
    assert (config.weights, config.train.phase2_epochs, config.train.rate_drop_epochs) == ("none", 3.0, (1.0, 2.0))
    assert (output, resume) == (tmp_path / "run", False)
    assert json.loads((tmp_path / "result.json").read_text()) == RESULT


def test_ctrl_c_ends_with_the_status_of_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "train", lambda *_: {**RESULT, "interrupted": True})
    result = run("--config", "lite0-shapes", "--output", str(tmp_path / "run"), "--json", str(tmp_path / "result.json"))
    assert result.exit_code == 130
    assert "3 of 3 steps" in result.stdout and (tmp_path / "result.json").exists()


def test_resuming_takes_the_configuration_of_the_run(tmp_path: Path, calls: list[tuple[Config, Path, bool]]) -> None:
    (tmp_path / "config.yaml").write_text("train: {phase2_epochs: 7}\n")
    assert run("--output", str(tmp_path), "--resume").exit_code == 0
    assert (calls[0][0].train.phase2_epochs, calls[0][2]) == (7.0, True)


def test_a_configuration_must_be_named(tmp_path: Path) -> None:
    assert isinstance(run("--output", str(tmp_path)).exception, InputError)


def test_fields_are_read_by_their_earlier_names(tmp_path: Path, calls: list[Any]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("train: {warm_epochs: 0.6, batch: 2}\n")
    result = run("--config", str(own), "--output", str(tmp_path / "run"), "--set", "train.epochs=0.7")
    assert result.exit_code == 0
    recipe = calls[0][0].train
    assert (recipe.phase1_epochs, recipe.phase2_epochs, recipe.batch) == (0.6, 0.7, 2)
    assert result.stderr.splitlines() == [
        f"{own}: train.warm_epochs is now named train.phase1_epochs; the earlier name is still read.",
        "--set: train.epochs is now named train.phase2_epochs; the earlier name is still read.",
    ]


def test_a_field_set_by_either_name_takes_the_place_of_the_files(tmp_path: Path, calls: list[Any]) -> None:
    for in_file, in_set in (("epochs", "phase2_epochs"), ("phase2_epochs", "epochs")):
        (tmp_path / "own.yaml").write_text(f"train: {{{in_file}: 1}}\n")
        run("--config", str(tmp_path / "own.yaml"), "--output", str(tmp_path / "run"), "--set", f"train.{in_set}=2", catch=False)
    assert [call[0].train.phase2_epochs for call in calls] == [2.0, 2.0]


def test_a_field_by_both_names_is_refused(tmp_path: Path, calls: list[Any]) -> None:
    said = "train.epochs and train.phase2_epochs are the same field"
    with pytest.raises(InputError, match=f"^--set: {said}"):
        run("--config", "lite0-shapes", "--output", str(tmp_path), "--set", "train.epochs=1", "--set", "train.phase2_epochs=2", catch=False)
    (tmp_path / "own.yaml").write_text("train: {epochs: 1, phase2_epochs: 2}\n")
    with pytest.raises(InputError, match=f"own.yaml: {said}"):
        run("--config", str(tmp_path / "own.yaml"), "--output", str(tmp_path), catch=False)
    assert not calls


def test_a_run_of_an_earlier_version_resumes_by_its_own_configuration(tmp_path: Path, calls: list[Any]) -> None:
    (tmp_path / "config.yaml").write_text("train: {budget: 0.7, epochs: 7, drops: [3]}\n")
    assert run("--output", str(tmp_path), "--resume").exit_code == 0
    recipe = calls[0][0].train
    assert (recipe.target_paper_gmacs, recipe.phase2_epochs, recipe.rate_drop_epochs) == (0.7, 7.0, (3.0,))


def test_what_a_run_reads_is_not_written_over(tmp_path: Path, calls: list[Any]) -> None:
    (tmp_path / "own.yaml").write_text(
        "data: {kind: coco, train_annotations: train.json, train_images: a, val_annotations: b, val_images: c}\n"
    )
    for read in (tmp_path / "own.yaml", Path("train.json")):
        with pytest.raises(InputError, match="is both read and written"):
            run("--config", str(tmp_path / "own.yaml"), "--output", str(tmp_path / "run"), "--json", str(read), catch=False)
    assert not calls


def test_resuming_a_run_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere holds no run"):
        run("--output", str(tmp_path / "nowhere"), "--resume", catch=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.batch", "0"),
        ("train.phase2_epochs", "-1"),
        ("train.learning_rate", ".nan"),
        ("train.rate_drop_epochs", "[-1]"),
        ("data.workers", "-1"),
        ("model.score_threshold", "2"),
        ("model.stage_channels", "[0, 8, 8, 8]"),
        ("model.no_such", "1"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_name(field: str, value: str, tmp_path: Path, calls: list[Any]) -> None:
    with pytest.raises(InputError, match=rf"^lite0-shapes: {field}.*given: .*docs/training\.md lists") as caught:
        run("--config", "lite0-shapes", "--output", str(tmp_path), "--set", f"{field}={value}", catch=False)
    assert "\n" not in str(caught.value) and not calls


def test_fields_that_contradict_each_other_are_not_quoted_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^lite0-shapes: model: canvas \(100, 100\) must be multiples of 32 from 64 to 4096; [^{]*$"):
        run("--config", "lite0-shapes", "--output", str(tmp_path), "--set", "model.canvas=[100, 100]", catch=False)


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run cannot be made or written because of .*file \(it is a file\)"):
        run("--config", "lite0-shapes", "--output", str(tmp_path / "file" / "run"), "--weights", "imagenet", catch=False)


@pytest.mark.parametrize("assignment", ["train.phase2_epochs", "=3", "train.phase2_epochs=[1"])
def test_an_assignment_that_is_none_is_refused(assignment: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_assignments([assignment])


NINEFOLD = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 1000, "nested too deeply"),
        ("train: {seed: 2026-99-99}", r"not YAML \(month must be"),
        ("train: {seed: !!timestamp x}", "not YAML"),
        ("train: {seed: !!bool x}", "not YAML"),
        ("train: &a {seed: *a}", "refers to itself"),
        (f"model: 1\n{NINEFOLD}", "refers to itself, or holds more than"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "more than 64 bits"),
        ('"\\ud800": 1', r"half a surrogate pair \(\\ud800\)"),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for load in (load_config, lambda path: read_plan(Path(path))):
        with pytest.raises(InputError, match=said) as caught:
            load(str(tmp_path / "config.yaml"))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        str(caught.value).encode()


def test_a_file_that_is_no_utf_8_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"train:\xff")
    with pytest.raises(InputError, match=r"config\.yaml is not UTF-8 \(byte 6\)"):
        load_config(str(tmp_path / "config.yaml"))


def test_a_run_whose_section_is_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: 1.5")
    with pytest.raises(InputError, match="train: Input should be a valid dictionary"):
        load_run_config(tmp_path)


def test_a_long_name_is_shortened() -> None:
    with pytest.raises(InputError, match=r"^lite0-shapes: train\.y{71}\.\.\.: Extra inputs"):
        load_config("lite0-shapes", {"train." + "y" * 5000: 1})
