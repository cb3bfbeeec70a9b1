"""A validation result as one HTML file that opens offline: accuracy against latency, cost by class, annotated images."""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from runtime.errors import DynaMaskError, InputError
from runtime.files import atomic_path
from runtime.statistics import LATENCIES, QUANTILES

if TYPE_CHECKING:
    from runtime.coco import CocoData
    from runtime.predictor import Predictor

Picture = tuple[str, "NDArray[Any]"]
"""A caption and an image `[H, W, 3] uint8` RGB."""

_FAMILIES = ("uniform", "routed", "size")
_DASH = "–"


def write_report(result: Mapping[str, Any], path: str | os.PathLike[str], pictures: Sequence[Picture] = ()) -> None:
    """Write the result of `runtime.validate.validate` as one HTML file: inline CSS and SVG, pictures as JPEG, no scripts.

    Raises:
        DynaMaskError: the file could not be written, or a picture could not be encoded.
    """
    import jinja2

    template = resources.files("runtime").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template).render(**_page(result, pictures))
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def example_pictures(predictor: Predictor, dataset: CocoData, count: int) -> list[Picture]:
    """The first readable images of a data set, at most `count`, annotated with the instances that the predictor finds."""
    from runtime.annotate import annotate

    pictures: list[Picture] = []
    for record in dataset.images:
        if len(pictures) == count:
            break
        with contextlib.suppress(InputError):
            image = dataset.read_image(record)
            pictures.append((record.file_name, annotate(image, predictor(image))))
    return pictures


class _Point(NamedTuple):
    name: str
    family: str
    x: float
    y: float


def _page(result: Mapping[str, Any], pictures: Sequence[Picture]) -> dict[str, Any]:
    import markupsafe

    policies = result["policies"]
    charts = [
        (f"Time for a whole image, on {result['machine']['cpu']}.", "latency per image, total p50 (ms)", _total_ms, 980),
        ("Time of the mask branch alone, the part that the policy changes.", "latency per image, mask branch p50 (ms)", _masks_ms, 480),
        ("Cost of the mask branch, counted from its layers.", "mean cost per instance (GMAC)", operator.itemgetter("gmacs"), 480),
    ]
    dataset = result["dataset"]
    return {
        "title": f"DynaMask {result['bundle']['preset']}: accuracy and latency",
        "lead": f"{dataset['images']} images and {dataset['annotations']} masks of {dataset['name']}.",
        "facts": _facts(result),
        "charts": [
            {"caption": caption, "svg": markupsafe.Markup(curve_svg(_points(policies, cost), label, "mask AP", width))}
            for caption, label, cost, width in charts
        ],
        "rows": _rows(policies),
        "parts": LATENCIES,
        "quantiles": QUANTILES,
        "grids": [{"grid": grid["grid"], "gmacs": _number(grid["gmacs"], 3)} for grid in result["grids"]],
        "routing": _routing(policies),
        "pictures": [{"caption": caption, "data": _jpeg(image)} for caption, image in pictures],
        "skipped": result["skipped"],
        "left_out": dataset["annotations_left_out"],
    }


def _total_ms(policy: Mapping[str, Any]) -> Any:
    return policy["latency_ms"]["total"]["p50"]


def _masks_ms(policy: Mapping[str, Any]) -> Any:
    return policy["latency_ms"]["masks"]["p50"]


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine, bundle = result["machine"], result["bundle"]
    return [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("system", machine["system"]),
        ("target", bundle["target"]),
        ("precision", bundle["precision"]),
        ("canvas", f"{bundle['canvas'][0]} × {bundle['canvas'][1]}"),
        *((name, version) for name, version in machine["versions"].items()),
        ("date", result["date"]),
    ]


def _family(policy: str) -> str:
    """The policy's line in the charts; a policy of another name counts as a routed one."""
    return next((family for family in _FAMILIES if policy.startswith(family)), "routed")


def _points(policies: Mapping[str, Any], cost: Any) -> list[_Point]:
    return [
        _Point(name, _family(name), float(cost(policy)), policy["segm"]["AP"])
        for name, policy in policies.items()
        if policy["segm"]["AP"] is not None and cost(policy) is not None
    ]


def _rows(policies: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = [[policy["gmacs"] for policy in policies.values()]]
    columns += [[policy["segm"][name] for policy in policies.values()] for name in ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")]
    columns += [[policy[kind]["AP"] for policy in policies.values()] for kind in ("bbox", "boundary")]
    columns += [[policy["latency_ms"]["total"]["p50"] for policy in policies.values()]]
    texts = [[_number(value, 3 if i == 0 else 1) for value in column] for i, column in enumerate(columns)]
    # The best figures are the highest AP and the lowest latency; the cost has no best.
    best = [None, *(_best(column, max) for column in columns[1:-1]), _best(columns[-1], min)]
    return [
        {
            "name": name,
            "family": _family(name),
            "gmacs": texts[0][row],
            "share": _bar(policy["share"]),
            "latency": [_number(policy["latency_ms"][part][quantile], 1) for part in LATENCIES for quantile in QUANTILES],
            "cells": [
                {"text": text[row], "best": top is not None and text[row] == _number(top, 1)} for text, top in zip(texts, best, strict=True)
            ],
        }
        for row, (name, policy) in enumerate(policies.items())
    ]


def _best(column: Sequence[float | None], choose: Any) -> float | None:
    known = [value for value in column if value is not None]
    # If all are alike, none is best.
    return choose(known) if len({_number(value, 1) for value in known}) > 1 else None


def _bar(share: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"grid": grid, "percent": round(100 * part, 2)} for grid, part in share.items() if part > 0]


def _routing(policies: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of cost by class, of the first routed policy that found anything."""
    for name, policy in policies.items():
        routing = policy.get("routing")
        if routing and routing["classes"]:
            return {
                "policy": name,
                "areas": [f"{area:,.0f}" for area in routing["area_terciles"]],
                "score": routing["score_at_least"],
                "rows": list(_routing_rows(routing)),
            }
    return None


def _routing_rows(routing: Mapping[str, Any]) -> Any:
    for group in routing["supercategories"]:
        yield _routing_row(group, group["name"], grouped=True)
        for entry in routing["classes"]:
            if entry["supercategory"] == group["name"] and entry["name"] != group["name"]:
                yield _routing_row(entry, entry["name"], grouped=False)
    for entry in routing["classes"]:
        if entry["supercategory"] is None:
            yield _routing_row(entry, entry["name"], grouped=False)


def _routing_row(entry: Mapping[str, Any], name: str, grouped: bool) -> dict[str, Any]:
    costs = [entry["by_size"][size]["mean_gmacs"] for size in ("S", "M", "L")] + [entry["mean_gmacs"]]
    return {
        "name": name,
        "group": grouped,
        "count": entry["count"],
        "costs": [_number(cost, 3) for cost in costs],
        "share": _bar(entry["share"]),
    }


def _number(value: float | None, digits: int) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _jpeg(image: NDArray[Any]) -> str:
    import cv2

    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    if not encoded:
        raise DynaMaskError(f"a picture of shape {image.shape} could not be written as JPEG for the report; give it as [H, W, 3] uint8.")
    return base64.b64encode(data.tobytes()).decode("ascii")


_HEIGHT = 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 42.0


def curve_svg(points: Sequence[tuple[str, str, float, float]], x_label: str, y_label: str, width: int = 480) -> str:
    """A chart of labelled points as inline SVG, in the colours of the page.

    Args:
        points: `(name, family, x, y)`; points of one family are joined by a line, in order of x.
        x_label, y_label: axis titles, with units.
        width: of the drawing, which is 320 high, in the SVG's units.
    """
    marks = [_Point(*point) for point in points]
    if not marks:
        return '<svg viewBox="0 0 480 40"><text x="0" y="24">Nothing was measured.</text></svg>'
    x_ticks, y_ticks = _ticks([mark.x for mark in marks]), _ticks([mark.y for mark in marks])
    right = width - _RIGHT
    x = _scale(x_ticks, _LEFT, right)
    y = _scale(y_ticks, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {width} {_HEIGHT:.0f}" role="img" aria-label="{html.escape(y_label)} against {html.escape(x_label)}">']
    parts += _axes(x_ticks, y_ticks, x, y, x_label, y_label, right)
    lines = [
        sorted(((x(mark.x), y(mark.y), mark) for mark in marks if mark.family == family), key=lambda at: at[0]) for family in _FAMILIES
    ]
    for family, line in zip(_FAMILIES, lines, strict=True):
        corners = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in line)
        parts.append(f'<g class="family-{family}"><polyline class="curve" points="{corners}"/>')
        parts += [_mark(mark, left, top) for left, top, mark in line]
        parts.append("</g>")
    parts += _names([[(left, top, mark.name) for left, top, mark in line] for line in lines], right)
    return "\n".join([*parts, "</svg>"])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values, about five of them."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = max(0.0, low - 0.06 * span) if low >= 0 else low - 0.06 * span, high + 0.06 * span
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _scale(ticks: Sequence[float], start: float, end: float) -> Any:
    return lambda value: start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x: Any, y: Any, x_label: str, y_label: str, right: float) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="gridline" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<line class="gridline" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(y_label)}</text>')
    return parts


def _mark(point: _Point, x: float, y: float) -> str:
    title = f"<title>{html.escape(point.name)}: {point.x:.4g}, {point.y:.1f}</title>"
    if point.family == "size":
        diamond = f"{x - 7:.1f},{y:.1f} {x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f}"
        return f'<polygon class="mark" points="{diamond}">{title}</polygon>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


_Box = tuple[float, float, float, float]


def _names(lines: Sequence[Sequence[tuple[float, float, str]]], right: float) -> list[str]:
    """Labels beside their points; each is placed where it covers points, earlier labels and curves the least."""
    anchors = [anchor for line in lines for anchor in line]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in anchors]
    curves = [spot for line in lines for (x0, y0, _), (x1, y1, _) in itertools.pairwise(line) for spot in _along(x0, y0, x1, y1)]
    parts = []
    for x, y, name in anchors:
        boxes = _places(x, y, 6.9 * len(name), right)
        box = min(
            boxes, key=lambda box: 100 * sum(_overlap(box, other) for other in taken) + 4 * sum(_overlap(box, spot) for spot in curves)
        )
        taken.append(box)
        parts.append(f'<text class="name" x="{box[0]:.1f}" y="{box[1] + 11:.1f}">{html.escape(name)}</text>')
    return parts


def _places(x: float, y: float, width: float, right: float) -> list[_Box]:
    """Boxes for a label around a point, the preferred one first, without those outside the drawing (if all are, the first)."""
    corners = [
        (9.0, -7.0),
        (6.0, 7.0),
        (6.0, -21.0),
        (-width - 9, -7.0),
        (-width - 4, -21.0),
        (-width - 4, 7.0),
        (-width / 2, 11.0),
        (-width / 2, -25.0),
    ]
    boxes = [(x + dx, y + dy, x + dx + width, y + dy + 14) for dx, dy in corners]
    inside = [box for box in boxes if box[0] >= _LEFT and box[2] <= right + _RIGHT and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM]
    return inside or boxes[:1]


def _along(x0: float, y0: float, x1: float, y1: float) -> list[_Box]:
    """Points on a straight line, every four units, as boxes of size 0."""
    steps = int(math.hypot(x1 - x0, y1 - y0) // 4) + 1
    places = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    return [(x, y, x, y) for x, y in places]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
