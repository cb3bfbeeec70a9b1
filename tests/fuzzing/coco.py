"""Hypothesis strategies for COCO annotation files, from sound ones to ones that no program writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as mask_api

Strategy = st.SearchStrategy[Any]

ODD_NUMBERS = (0, -1, 1.5, 2**31, 2**53 + 1, 2**64, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"))
ODD_TEXTS = ("", " ", "1", " 1 ", "1.0", "-0", "٣", "null", "../x.jpg", "/x.jpg", "C:\\x.jpg", "a\0b", "\ud800", "\udcff", "ä", "x" * 300)


def odd_values() -> Strategy:
    """Values of any JSON type, where another one belongs."""
    leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), st.integers(-3, 3), st.floats())
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
    )


def mostly(sound: Strategy) -> Strategy:
    """The sound value in about seven of eight draws, otherwise an odd one."""
    return st.integers(0, 7).flatmap(lambda draw: odd_values() if draw == 7 else sound)


def ids() -> Strategy:
    """Ids as numbers, floats and strings; few, so that they meet."""
    return st.integers(0, 4).flatmap(lambda number: st.sampled_from([number, number, float(number), str(number)]))


def polygons(height: int, width: int) -> Strategy:
    """A polygon as a flat list, now and then with odd coordinates."""
    near = st.one_of(st.floats(-1, max(height, width) + 1), st.integers(0, max(height, width)))
    coordinates = st.integers(0, 15).flatmap(
        lambda draw: st.one_of(near, st.sampled_from(ODD_NUMBERS), odd_values()) if draw == 15 else near
    )
    return st.lists(coordinates, max_size=16)


def runs(height: int, width: int) -> Strategy:
    """Run-length masks, plain and compressed: sound, damaged and made up."""

    def sound(seed: int) -> str:
        pixels = np.random.default_rng(seed).random((height, width)) < 0.3
        return str(mask_api.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"].decode())

    compressed = st.integers(0, 2**16).map(sound)
    damaged = st.tuples(compressed, st.integers(0, 40), st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=4)).map(
        lambda parts: parts[0][: parts[1]] + parts[2]
    )
    plain = st.integers(0, height * width).map(lambda first: [first, height * width - first])
    counts = st.one_of(
        compressed, compressed, damaged, plain, st.lists(st.integers(-2, 2**33), max_size=6), st.text(max_size=12), odd_values()
    )
    size = mostly(st.sampled_from([[height, width], [height, width], [float(height), str(width)], [width, height]]))
    return st.fixed_dictionaries({"size": size, "counts": counts})


def segmentations(height: int, width: int) -> Strategy:
    """Segmentations in every form that files have: nested and flat polygons, points, RLE, nothing."""
    polygon = polygons(height, width)
    points = st.lists(st.lists(st.floats(0, width), min_size=2, max_size=2), max_size=6)
    return mostly(st.one_of(st.lists(polygon, max_size=3), polygon, points, st.lists(points, max_size=2), runs(height, width)))


@st.composite
def coco_trees(draw: st.DrawFn) -> Any:
    """The tree of an annotation file: images of 12 x 16 pixels, their annotations and categories; any part may be odd or missing."""
    height, width = 12, 16
    image = st.fixed_dictionaries(
        {
            "id": mostly(ids()),
            "file_name": mostly(st.sampled_from(["a.png", "b.png", "c/d.png", "e\\f.png", "./g.png"])),
            "height": mostly(st.just(height)),
            "width": mostly(st.just(width)),
        },
        optional={"coco_url": odd_values(), "neg_category_ids": mostly(st.lists(ids())), "license": odd_values()},
    )
    annotation = st.fixed_dictionaries(
        {"image_id": mostly(ids()), "category_id": mostly(ids()), "segmentation": segmentations(height, width)},
        optional={
            "id": odd_values(),
            "bbox": mostly(st.lists(st.floats(-5, 20) | st.sampled_from(ODD_NUMBERS), max_size=5)),
            "area": mostly(st.floats(0, 100)),
            "iscrowd": mostly(st.sampled_from([0, 1, "0", "1", True, 0.0])),
        },
    )
    category = st.fixed_dictionaries(
        {"id": mostly(ids()), "name": mostly(st.text(min_size=1, max_size=4))},
        optional={"supercategory": odd_values(), "frequency": odd_values()},
    )

    def apart(entries: list[Any], name: str, form: str) -> list[Any]:
        """The entries, most with an id and a name of their own, so that most files get past the check for duplicates."""
        return [{**entry, "id": i, name: form.format(i)} if draw(st.integers(0, 9)) else entry for i, entry in enumerate(entries)]

    tree = {
        "images": apart(draw(st.lists(image, min_size=1, max_size=3)), "file_name", "{}.png"),
        "annotations": draw(st.lists(mostly(annotation), max_size=6)),
        "categories": apart(draw(st.lists(category, min_size=1, max_size=3)), "name", "class {}"),
    }
    damage = draw(st.integers(0, 15))
    if damage == 15:
        tree[draw(st.sampled_from(sorted(tree)))] = draw(odd_values())
    if damage == 14:
        del tree[draw(st.sampled_from(sorted(tree)))]
    return tree if damage != 13 else draw(st.one_of(odd_values(), st.just([tree])))


@st.composite
def coco_documents(draw: st.DrawFn) -> bytes:
    """The bytes of an annotation file: JSON in several encodings, sometimes cut short or with other bytes in it."""
    text = json.dumps(draw(coco_trees()))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])))
    damage = draw(st.integers(0, 15))
    at = draw(st.integers(0, len(content)))
    if damage == 15:
        return content[:at]
    if damage == 14:
        return content[:at] + draw(st.binary(max_size=8)) + content[at + 1 :]
    return draw(st.binary(max_size=64)) if damage == 13 else content
