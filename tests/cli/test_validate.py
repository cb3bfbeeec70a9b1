"""`dynamask validate`: the tables that it prints, and what it says about the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from cli.validate import _print
from runtime.bundle import Bundle
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
        "predicted": {key: {"ms": 1234.5, "ratio": 0.987} for key in ("masks", "frame")},
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
        assert printed.count(f" {policy} ") == 4
    assert "1.406" in printed and "25/25/25/25" in printed and "3456.7" in printed and "0.99" in printed
    assert "skipped torn.jpg" in printed and "left out 17 annotations: empty mask" in printed


def test_many_annotations_left_out_are_printed_and_in_the_result(
    example_files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [{"id": entry.id, "name": entry.name} for entry in Bundle.open(example_files["bundle"]).manifest.classes]
    fields = {"image_id": 1, "category_id": classes[0]["id"], "segmentation": [[8, 4, 40, 4, 40, 36]]}
    annotations = [fields, fields | {"category_id": 999}, fields | {"segmentation": [[8, 4, float("nan"), 4, 40, 36]]}]
    height, width = example_files["image"].shape[:2]
    images = [{"id": 1, "file_name": "photo.jpg", "height": height, "width": width}]
    data, result = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps({"images": images, "annotations": annotations, "categories": classes}))
    folder = str(example_files["photo"].parent)
    call = [
        "validate",
        str(example_files["bundle"]),
        "--data",
        str(data),
        "--images",
        folder,
        "--grid",
        "uniform-28",
        "--json",
        str(result),
    ]
    assert main(call) == 0
    assert capsys.readouterr().err.startswith(f"Warning: {data}: 2 of 3 annotations (66.7%) are left out: ")
    dataset = json.loads(result.read_text())["dataset"]
    assert dataset["annotations"] == 1
    assert dataset["annotations_left_out"] == {"unknown category": 1, "polygon with a number that is not finite": 1}
    assert dataset["boxes_repaired"] == {"box missing or wrong, taken from the mask": 1}
    data.write_text(json.dumps({"images": images, "annotations": annotations[1:], "categories": classes}))
    assert main(call) == 2
    assert "none of its 2 annotations can be used" in capsys.readouterr().err


def test_half_of_the_images_unusable_is_said_and_no_image_is_written_over(
    example_files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [{"id": entry.id, "name": entry.name} for entry in Bundle.open(example_files["bundle"]).manifest.classes]
    height, width = example_files["image"].shape[:2]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in (1, 2)]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(example_files["photo"].read_bytes())
    (tmp_path / "images" / "2.jpg").write_text("no image")
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"images": images, "annotations": [], "categories": classes}))
    call = ["validate", str(example_files["bundle"]), "--data", str(data), "--grid", "uniform-28", "--json"]
    assert main([*call, str(tmp_path / "result.json")]) == 0
    assert f"Warning: 1 of the images of {data} could not be used" in capsys.readouterr().err
    assert main([*call, str(tmp_path / "images" / "1.jpg")]) == 2
    assert "is both read and written" in capsys.readouterr().err
