"""The tables that `dynamask validate` prints."""

from __future__ import annotations

from typing import Any

import pytest

from cli.validate import _print
from runtime.statistics import LATENCIES
from runtime.validate import POLICIES


@pytest.fixture
def result() -> dict[str, Any]:
    """Figures of the default policies and one with a longer name, with wide figures."""
    figures = dict.fromkeys(("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"), 99.9)
    policy = {
        **dict.fromkeys(("segm", "bbox", "boundary"), figures),
        "gmacs": 1.406,
        "share": {"14": 0.25, "28": 0.25, "56": 0.25, "112": 0.25},
        "latency_ms": {part: {"p50": 1234.5, "p95": 2345.6, "p99": 3456.7} for part in LATENCIES},
    }
    dataset = {"name": "shapes/instances.json", "images": 40, "annotations_left_out": {"empty mask": 17}}
    skipped = [{"image": "torn.jpg", "reason": "torn.jpg is truncated; copy it again."}]
    return {"dataset": dataset, "skipped": skipped, "policies": dict.fromkeys((*POLICIES, "routed@0.05gmac"), policy)}


def test_the_tables_fit_a_terminal_of_80_columns(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _print(result)
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    for policy in result["policies"]:
        assert printed.count(f" {policy} ") == 3
    assert "1.406" in printed and "25/25/25/25" in printed and "3456.7" in printed
    assert "skipped torn.jpg" in printed and "left out 17 annotations: empty mask" in printed
