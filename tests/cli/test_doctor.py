"""`dynamask doctor`, and what it says of this machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import cli.main
from runtime import doctor


def test_the_targets_that_run_here_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert cli.main.main(["doctor", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result["targets"]) == {"onnxruntime", "tensorrt-rtx", "tensorrt", "torch"}
    assert result["targets"]["onnxruntime"]["available"]
    assert result["targets"]["onnxruntime"]["version"] == onnxruntime.__version__
    assert all(target["available"] or target["note"] for target in result["targets"].values())
    assert result["machine"]["cores"] >= 1
    assert "onnxruntime" in capsys.readouterr().out


def test_gpus_as_the_driver_reports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NVIDIA H200, 143771, 580.65.06, 9.0\nOrin (nvgpu), [N/A], 540.4.0, 8.7\n"

    def answering(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(doctor.subprocess, "run", answering)
    assert doctor.find_gpus() == [
        {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "580.65.06", "compute_capability": "9.0"},
        {"name": "Orin (nvgpu)", "memory_mib": None, "driver": "540.4.0", "compute_capability": "8.7"},
    ]


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert doctor.find_gpus() == []
