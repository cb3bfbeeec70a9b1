"""Hypothesis strategies for COCO annotation files, from sound ones to ones that no program writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as mask_api

from dynamask.data.coco import CocoDataset
from runtime.coco import read_coco
from runtime.errors import InputError
from tests.fuzzing import Files
from tests.fuzzing.odd import Strategy, mostly, odd_numbers, odd_values

HEIGHT, WIDTH = 12, 16
"""Of most images."""


def ids(last: int) -> Strategy:
    """Ids from 0 to `last`, as numbers, floats and strings."""
    return st.sampled_from([form(number) for number in range(last + 1) for form in (int, int, float, str)])


near = st.integers(-1, WIDTH + 1) | st.floats(-1, WIDTH + 1)
polygons = st.one_of(
    *[st.lists(near, min_size=2 * count, max_size=2 * count) for count in (3, 4, 5, 6)],
    st.lists(mostly(st.floats(-WIDTH, 2 * WIDTH), odd_numbers), max_size=12),
    st.lists(mostly(st.integers(0, WIDTH)), max_size=12),
)
"""Polygons as flat lists, some with an odd number of coordinates or with odd ones."""
points = st.lists(st.lists(mostly(st.floats(0, WIDTH), odd_numbers), min_size=2, max_size=2), max_size=6)
"""Polygons as lists of points."""


def _compressed(seed: int) -> str:
    pixels = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.3
    return str(mask_api.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"].decode())


def _cut(counts: str, end: int, ending: str) -> str:
    return counts[:end] + ending


compressed_runs = st.integers(0, 2**16).map(_compressed)
damaged_runs = st.builds(_cut, compressed_runs, st.integers(0, 40), st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=4))
plain_runs = st.integers(0, HEIGHT * WIDTH).map(lambda first: [first, HEIGHT * WIDTH - first])
mask_sizes = st.sampled_from([[HEIGHT, WIDTH], [HEIGHT, WIDTH], [float(HEIGHT), str(WIDTH)]])
run_lengths = st.fixed_dictionaries(
    {
        "size": mostly(mask_sizes, st.just([WIDTH, HEIGHT]) | odd_values),
        "counts": st.one_of(compressed_runs, plain_runs, damaged_runs, st.lists(st.integers(-2, 2**33), max_size=6), odd_values),
    }
)
"""Masks as RLE, plain and compressed: sound, damaged and made up."""
segmentations = mostly(st.one_of(st.lists(polygons, max_size=3), polygons, points, st.lists(points, max_size=2), run_lengths, run_lengths))
"""Segmentations in every form that files have."""
boxes = mostly(st.lists(mostly(st.floats(0, WIDTH), odd_numbers), min_size=3, max_size=4))


@st.composite
def coco_trees(draw: st.DrawFn) -> Any:
    """The tree of an annotation file. In most, images and categories are sound and any part of an annotation may be odd; in the others
    any part may be odd or missing."""
    structured = draw(st.integers(0, 3)) > 0
    part = (lambda sound: sound) if structured else mostly
    count, classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extras = {"coco_url": odd_values, "neg_category_ids": mostly(st.lists(ids(classes))), "license": odd_values}
    images = [
        draw(
            st.fixed_dictionaries(
                {
                    "id": part(st.just(i)),
                    "file_name": part(st.just(f"{i}.png")),
                    "height": part(st.just(HEIGHT)),
                    "width": part(st.just(WIDTH)),
                },
                optional=extras,
            )
        )
        for i in range(count)
    ]
    categories = [
        draw(
            st.fixed_dictionaries(
                {"id": part(st.just(i)), "name": part(st.just(f"class {i}"))},
                optional={"supercategory": odd_values, "frequency": odd_values},
            )
        )
        for i in range(classes)
    ]
    annotation = st.fixed_dictionaries(
        {"image_id": mostly(ids(count - 1)), "category_id": mostly(ids(classes - 1)), "segmentation": segmentations},
        optional={
            "bbox": boxes,
            "area": mostly(st.floats(0, 100)),
            "iscrowd": mostly(st.sampled_from([0, 1, "0", "1", True, 0.0])),
            **({} if structured else {"id": odd_values}),
        },
    )
    tree: dict[str, Any] = {"images": images, "annotations": draw(st.lists(mostly(annotation), max_size=6)), "categories": categories}
    damage = 0 if structured else draw(st.integers(0, 5))
    if damage == 3:
        tree[draw(st.sampled_from(sorted(tree)))] = draw(odd_values)
    if damage == 4:
        del tree[draw(st.sampled_from(sorted(tree)))]
    return draw(st.one_of(odd_values, st.just([tree]))) if damage == 5 else tree


@st.composite
def coco_documents(draw: st.DrawFn) -> bytes:
    """The bytes of an annotation file: JSON in several encodings, one in six cut short, with other bytes in it, or no JSON at all."""
    text = json.dumps(draw(coco_trees()))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])))
    damage, at = draw(st.integers(0, 17)), draw(st.integers(0, len(content)))
    if damage == 17:
        return content[:at]
    if damage == 16:
        return content[:at] + draw(st.binary(max_size=8)) + content[at + 1 :]
    return draw(st.binary(max_size=64)) if damage == 15 else content


def inputs() -> st.SearchStrategy[Files]:
    """An annotation file and images, some of which it may name."""
    _, image = cv2.imencode(".png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    images = {f"images/{i}.png": image.tobytes() for i in range(2)}
    return coco_documents().map(lambda document: Files({"instances.json": document, **images}))


def check(folder: Path) -> bool:
    """Read the file as validation does, then as training does."""
    path = folder / "instances.json"
    try:
        data = read_coco(folder)
    except InputError as error:
        assert str(path) in str(error)
        str(error).encode()
        return False
    sizes = {image.id: (image.height, image.width) for image in data.images}
    for annotation in data.annotations:
        assert annotation.size == sizes[annotation.image_id]
        x, y, w, h = annotation.box
        assert 0 <= x < x + w <= annotation.size[1] + 1e-6
        assert 0 <= y < y + h <= annotation.size[0] + 1e-6
        assert annotation.area > 0
        assert mask_api.area(annotation.segmentation) > 0
    json.dumps(data.truth, allow_nan=False).encode()
    json.dumps([data.summary(), data.counts()], allow_nan=False).encode()
    _train(path, folder / "images")
    return True


def _train(annotations: Path, images: Path) -> None:
    try:
        dataset = CocoDataset(annotations, images)
    except InputError:
        return
    for index in range(len(dataset)):
        try:
            image, target = dataset[index]
        except InputError:
            continue
        count = len(target["labels"])
        assert target["masks"].shape == (count, *image.shape[:2]) and target["boxes"].shape == (count, 4)
        assert target["masks"].any(axis=(1, 2)).all()
        assert all(1 <= label <= len(dataset.classes) for label in target["labels"])
        assert np.isfinite(target["boxes"]).all()
