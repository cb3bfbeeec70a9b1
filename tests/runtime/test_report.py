from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from runtime.report import curve_svg, write_report

GMACS = {14: 0.02, 28: 0.05, 56: 0.08, 112: 0.12}


def _quantiles(p50):
    return {"p50": p50, "p95": p50 * 1.2, "p99": p50 * 1.3, "mean": p50}


def _entry(name, gmacs, **more):
    sizes = {
        size: {"count": 5, "mean_gmacs": gmacs + 0.01 * i, "share": {"14": 0.5, "28": 0.5, "56": 0, "112": 0}}
        for i, size in enumerate("SM")
    }
    sizes["L"] = {"count": 0, "mean_gmacs": None, "share": dict.fromkeys(("14", "28", "56", "112"), 0.0)}
    return {
        "name": name,
        "count": 10,
        "mean_gmacs": gmacs,
        "share": {"14": 0.25, "28": 0.25, "56": 0.5, "112": 0.0},
        "by_size": sizes,
        **more,
    }


def _policy(ap, gmacs, masks, share):
    metrics = {"AP": ap, "AP50": ap + 20, "AP75": ap + 3, "AP_S": ap - 10, "AP_M": ap, "AP_L": None}
    parts = {"preprocess": 1.1, "detector": 40.0, "masks": masks, "paste": 2.3}
    return {
        "segm": metrics,
        "bbox": {**metrics, "AP": 61.25},
        "boundary": {**metrics, "AP": ap - 12},
        "gmacs": gmacs,
        "share": dict(zip(("14", "28", "56", "112"), share, strict=True)),
        "instances": 100,
        "latency_ms": {part: _quantiles(ms) for part, ms in {**parts, "total": sum(parts.values())}.items()},
    }


@pytest.fixture
def result():
    policies = {
        "uniform-14": _policy(41.3, 0.02, 4.1, (1, 0, 0, 0)),
        "uniform-28": _policy(46.0, 0.05, 8.5, (0, 1, 0, 0)),
        "uniform-56": _policy(47.5, 0.08, 14.0, (0, 0, 1, 0)),
        "uniform-112": _policy(48.1, 0.12, 25.0, (0, 0, 0, 1)),
        "size-based": _policy(45.2, 0.046, 9.2, (0.47, 0.32, 0.14, 0.07)),
        "routed@50%": _policy(47.7, 0.059, 11.5, (0.3, 0.35, 0.2, 0.15)),
        "routed": _policy(48.0, 0.09, 17.5, (0.05, 0.13, 0.26, 0.56)),
    }
    policies["routed"]["routing"] = {
        "score_at_least": 0.5,
        "area_terciles": [812.0, 3120.5],
        "classes": [_entry("gear & <cog>", 0.11, supercategory="intricate"), _entry("ellipse", 0.03, supercategory="smooth")],
        "supercategories": [_entry("intricate", 0.11), _entry("smooth", 0.03)],
    }
    return {
        "dataset": {"name": "shapes/instances.json", "images": 200, "annotations": 1500, "annotations_left_out": {"empty mask": 17}},
        "skipped": [{"image": "torn.jpg", "reason": "torn.jpg is truncated; copy it again."}],
        "bundle": {"preset": "lite0", "target": "onnxruntime", "precision": "float32", "canvas": [320, 320]},
        "grids": [{"grid": grid, "gmacs": gmacs} for grid, gmacs in GMACS.items()],
        "machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "versions": {"python": "3.12.1", "onnxruntime": "1.32"}},
        "date": "2026-01-31",
        "policies": policies,
    }


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_the_figures_and_nothing_from_elsewhere(result, tmp_path):
    pictures = [("A frame & its grids", np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))]
    write_report(result, tmp_path / "report.html", pictures)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(page)
    text = " ".join(reader.text)
    for expected in (
        "48.0",
        "0.059",
        "Some CPU",
        "routed@50%",
        "mean cost per instance (GMAC)",
        "gear & <cog>",
        "3,120 px²",
        "torn.jpg is truncated",
        "empty mask 17",
    ):
        assert expected in text, expected
    assert "script" not in reader.tags and "link" not in reader.tags
    assert len(reader.links) == 1 and reader.links[0].startswith("data:image/jpeg;base64,")
    assert not re.search(r"url\(|@import", page)


def test_a_policy_with_a_name_of_its_own_is_reported(result, tmp_path):
    result["policies"] = {"large <all>": result["policies"]["uniform-112"]}
    write_report(result, tmp_path / "report.html")
    assert "large &lt;all&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_undefined_figures_are_dashes(result, tmp_path):
    for policy in result["policies"].values():
        policy["gmacs"] = None
        for kind in ("segm", "bbox", "boundary"):
            policy[kind] = dict.fromkeys(policy[kind])
    del result["policies"]["routed"]["routing"]
    result["skipped"] = []
    write_report(result, tmp_path / "report.html")
    assert "Nothing was measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_points_lie_where_the_axes_say():
    points = [("uniform-14", "uniform", 0.02, 41.0), ("uniform-112", "uniform", 0.12, 48.0), ("routed", "routed", 0.07, 44.5)]
    root = ElementTree.fromstring(curve_svg(points, "cost (GMAC)", "mask AP"))
    ticks = {"x": {}, "y": {}}
    for text in root.iter("text"):
        if re.fullmatch(r"[\d.]+", text.text):
            axis = "x" if text.get("text-anchor") == "middle" else "y"
            ticks[axis][float(text.text)] = float(text.get(axis)) - (4 if axis == "y" else 0)
    slopes = {axis: np.polyfit(list(values.values()), list(values), 1) for axis, values in ticks.items()}
    circles = {c.find("title").text.partition(":")[0]: c for c in root.iter("circle")}
    for name, _, x, y in points:
        assert np.polyval(slopes["x"], float(circles[name].get("cx"))) == pytest.approx(x, abs=0.001)
        assert np.polyval(slopes["y"], float(circles[name].get("cy"))) == pytest.approx(y, abs=0.05)


@pytest.mark.parametrize("values", [[0.0], [5.0], [3.2, 3.2], [0.001, 900.0]])
def test_a_curve_of_any_range_is_drawn(values):
    root = ElementTree.fromstring(curve_svg([(f"p{i}", "routed", v, v) for i, v in enumerate(values)], "x", "y"))
    for circle in root.iter("circle"):
        assert 46 <= float(circle.get("cx")) <= 466 and 12 <= float(circle.get("cy")) <= 278
