"""The `dynamask` command: what it imports, what it says, its exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli.main
from runtime.errors import DynaMaskError, InputError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["demo"],
    ["doctor"],
    ["train"],
    ["finetune"],
    ["ablate"],
    ["export"],
    ["build-engine"],
    ["calibrate"],
    ["predict"],
    ["stream"],
    ["validate"],
    ["bench", "routing"],
    ["bench", "latency"],
    ["data", "shapes"],
    ["data", "prepare"],
    ["flops"],
]
HEAVY = ["torch", "torchvision", "onnxruntime", "onnx", "cv2", "numpy", "av", "pydantic", "supervision"]


def run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """`main()` of a command line whose only act is to raise."""

    def raising(**options: Any) -> None:
        raise error

    monkeypatch.delenv("DYNAMASK_TRACEBACK", raising=False)
    monkeypatch.setattr(cli.main, "app", raising)
    return cli.main.main([])


@pytest.mark.parametrize("module", ["cli.main", "dynamask", "runtime"])
def test_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_each_command_explains_json(command: list[str]) -> None:
    result = CliRunner().invoke(cli.main.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "--json" in result.output


@pytest.mark.parametrize(
    "command", [["predict"], ["stream"], ["validate"], ["calibrate"], ["demo"], ["bench", "routing"], ["bench", "latency"]], ids=" ".join
)
def test_each_command_that_runs_an_engine_takes_its_threads(command: list[str]) -> None:
    assert "--threads" in CliRunner().invoke(cli.main.app, [*command, "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("command", ["predict", "stream", "validate"])
def test_the_help_names_every_kind_of_grid_policy(command: str) -> None:
    from runtime.policies import parse_policy

    result = CliRunner().invoke(cli.main.app, [command, "--help"], env={"COLUMNS": "1000"})
    for policy in (
        "routed",
        "routed@50%",
        "routed@0.6gmac",
        "routed@20ms",
        "uniform-14",
        "uniform-28",
        "uniform-56",
        "uniform-112",
        "size-based",
    ):
        assert policy in result.output
        assert parse_policy(policy, dict.fromkeys((14, 28, 56, 112), 1.0)).name == policy


def test_commands_listed_here_are_all_there_are() -> None:
    listed = {command[0] for command in COMMANDS}
    groups = {group.name for group in cli.main.app.registered_groups}
    commands = {entry.name or (entry.callback and entry.callback.__name__) for entry in cli.main.app.registered_commands}
    assert groups | commands == listed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dynamask ")


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["flops", "--no-such-option"], ["flops", "--classes", "none"], ["export"], ["flops", "--model", "no-such-model"]],
    ids=" ".join,
)
def test_wrong_call_is_one_sentence_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(".\n")


def test_a_result_that_has_no_place_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    said = {
        tmp_path / "file" / "a.json": "cannot be made or written because of",
        tmp_path: "is a folder, and a file is to be written there",
    }
    for path, sentence in said.items():
        assert cli.main.main(["doctor", "--json", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "", "nothing was done"
        assert sentence in printed.err and printed.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("a.png is empty: take another file."), 2),
        (DynaMaskError("The disk is full."), 1),
        (OSError(28, "No space left on device", "a.mp4"), 1),
        (PermissionError(13, "Permission denied", "model.onnx"), 1),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_is_one_sentence_and_its_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(monkeypatch, error) == status
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert "Traceback" not in written


def test_a_file_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_raising(monkeypatch, PermissionError(13, "Permission denied", "model.onnx"))
    assert "model.onnx could not be read or written (Permission denied): check" in capsys.readouterr().err


def test_a_removed_current_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path("x").absolute()
    assert run_raising(monkeypatch, caught.value) == 1
    assert capsys.readouterr().err == "The current folder was removed: change to another one (cd), and run the command again.\n"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_raising(monkeypatch, ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    assert "'.[train]'" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DYNAMASK_TRACEBACK", "1")
    assert cli.main.main(["flops", "--model", "no-such-model"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys, cli.main; sys.exit(cli.main.main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_every_public_name_resolves() -> None:
    import dynamask

    assert all(getattr(dynamask, name) is not None for name in dynamask.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        dynamask.no_such_name  # noqa: B018
