"""`dynamask flops`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli.main


def test_prints_and_writes_both_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flops.json"
    assert cli.main.main(["flops", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result["cumulative_gmacs"]) == set(result["paper_gmacs"]) == {"14", "28", "56", "112"}
    printed = capsys.readouterr().out
    assert all(f"{result[column]['112']:.2f}" in printed for column in ("cumulative_gmacs", "paper_gmacs"))
