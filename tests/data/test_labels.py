"""Labels of every format that is read, against pycocotools, supervision and masks drawn here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

import cli.main
from dynamask.data.labels import read_labels
from runtime.errors import InputError

HEIGHT, WIDTH = 48, 64
STAR = [10.0, 4.0, 40.0, 8.0, 52.0, 40.0, 20.0, 30.0]
LEAF = [2.0, 30.0, 18.0, 34.0, 6.0, 46.0]
RECTANGLE = [30.0, 12.0, 50.0, 12.0, 50.0, 26.0, 30.0, 26.0]


def photo(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    return path.name


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def coco_tree(names: list[str], polygons: list[list[float]], first: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": 9, "file_name": names[0], "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": first, "name": "star"}, {"id": first + 1, "name": "leaf"}],
        "annotations": [{"id": i + 1, "image_id": 9, "category_id": first + i, "segmentation": [p]} for i, p in enumerate(polygons)],
    }


def coco(root: Path) -> None:
    write(root / "instances.json", coco_tree([photo(root / "images" / "a.jpg")], [STAR, LEAF]))


def cvat_coco(root: Path) -> None:
    photo(root / "images" / "default" / "a.jpg")
    write(root / "annotations" / "instances_default.json", coco_tree(["a.jpg"], [STAR, LEAF]))


def yolo(root: Path) -> None:
    photo(root / "train" / "images" / "a.jpg")
    write(root / "data.yaml", "train: train/images\nnc: 2\nnames: ['star', 'leaf']\n")
    scaled = [(np.reshape(polygon, (-1, 2)) / (WIDTH, HEIGHT)).ravel() for polygon in (STAR, LEAF)]
    lines = [" ".join([str(number), *(f"{value:.8f}" for value in values)]) for number, values in enumerate(scaled)]
    write(root / "train" / "labels" / "a.txt", "\n".join(lines) + "\n")


def labelme(root: Path) -> None:
    photo(root / "a.jpg")
    shapes = [{"label": n, "points": np.reshape(p, (-1, 2)).tolist(), "shape_type": "polygon"} for n, p in (("star", STAR), ("leaf", LEAF))]
    write(root / "a.json", {"version": "5.5", "shapes": shapes, "imagePath": "a.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH})


def cvat(root: Path) -> None:
    photo(root / "images" / "a.jpg")
    text = "".join(
        f'<polygon label="{name}" points="{";".join(f"{x},{y}" for x, y in np.reshape(p, (-1, 2)))}" z_order="0"/>'
        for name, p in (("star", STAR), ("leaf", LEAF))
    )
    image = f'<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{text}</image>'
    write(root / "annotations.xml", f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{image}</annotations>')


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "COCO": ("coco", coco),
    "CVAT's COCO": ("coco", cvat_coco),
    "YOLO": ("yolo", yolo),
    "LabelMe": ("labelme", labelme),
    "CVAT": ("cvat", cvat),
}


def expected(polygon: list[float]) -> np.ndarray[Any, Any]:
    return np.asarray(mask_api.decode(mask_api.merge(mask_api.frPyObjects([polygon], HEIGHT, WIDTH))))


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_becomes_the_same_coco_file(name: str, tmp_path: Path) -> None:
    """The masks are those that pycocotools draws of the polygons, and pycocotools reads the file."""
    kind, make = WRITERS[name]
    make(tmp_path / "photos")
    assert cli.main.main(["data", "convert", str(tmp_path / "photos"), str(tmp_path / "all.json")]) == 0
    assert read_labels(tmp_path / "photos").format == kind
    data = COCO(str(tmp_path / "all.json"))
    [image] = data.loadImgs(data.getImgIds())
    assert (tmp_path / "photos" / image["file_name"]).is_file()
    assert (image["height"], image["width"]) == (HEIGHT, WIDTH)
    names = {category["id"]: category["name"] for category in data.loadCats(data.getCatIds())}
    found = {names[entry["category_id"]]: data.annToMask(entry) for entry in data.loadAnns(data.getAnnIds())}
    assert sorted(found) == ["leaf", "star"]
    np.testing.assert_array_equal(found["star"], expected(STAR))
    np.testing.assert_array_equal(found["leaf"], expected(LEAF))


def test_yolo_labels_are_those_that_supervision_reads(tmp_path: Path) -> None:
    yolo(tmp_path)
    folder = tmp_path / "train"
    peer = supervision.DetectionDataset.from_yolo(str(folder / "images"), str(folder / "labels"), str(tmp_path / "data.yaml"))
    [(_, _, detections)] = list(peer)
    ours = read_labels(tmp_path)
    assert peer.classes == ours.classes
    for mask, class_id, entry in zip(detections.mask, detections.class_id, ours.annotations, strict=True):
        assert entry["category_id"] == class_id + 1
        polygons = mask_api.frPyObjects(entry["segmentation"], HEIGHT, WIDTH)
        ours_mask = mask_api.decode(mask_api.merge(polygons))
        # supervision rounds points to whole pixels, and OpenCV, which it draws with, includes the pixels on the outline.
        assert (ours_mask <= mask).all() and (mask <= cv2.dilate(ours_mask, np.ones((5, 5), np.uint8))).all()


def test_roboflow_parts_are_joined_by_the_names_of_classes(tmp_path: Path) -> None:
    placeholder = {"id": 0, "name": "plants", "supercategory": "none"}
    for part, first in (("train", 1), ("valid", 5)):
        tree = coco_tree([photo(tmp_path / part / f"{part}.jpg")], [STAR, LEAF], first)
        tree["categories"] = [placeholder, *({**category, "supercategory": "plants"} for category in tree["categories"])]
        write(tmp_path / part / "_annotations.coco.json", tree)
    labels = read_labels(tmp_path)
    assert labels.classes == ["star", "leaf"]
    assert [entry["category_id"] for entry in labels.annotations] == [1, 2, 1, 2]
    assert [image["file_name"] for image in labels.images] == ["train/train.jpg", "valid/valid.jpg"]
    assert labels.validation == {"valid/valid.jpg"}


def test_labelme_groups_rectangles_and_circles(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    shapes = [
        {"label": "star", "points": np.reshape(LEAF, (-1, 2)).tolist(), "shape_type": "polygon", "group_id": 1},
        {"label": "star", "points": [[30, 12], [50, 26]], "shape_type": "rectangle", "group_id": 1},
        {"label": "disc", "points": [[32, 24], [32, 34]], "shape_type": "circle"},
        {"label": "disc", "points": [[1, 1], [9, 9]], "shape_type": "line"},
    ]
    write(tmp_path / "a.json", {"shapes": shapes, "imagePath": "..\\elsewhere\\a.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH})
    labels = read_labels(tmp_path)
    assert labels.left_out == {"line": 1}
    group, disc = labels.annotations
    assert group["segmentation"] == [LEAF, RECTANGLE]
    area = mask_api.area(mask_api.merge(mask_api.frPyObjects(disc["segmentation"], HEIGHT, WIDTH)))
    assert area == pytest.approx(np.pi * 100, rel=0.03)


def test_a_mask_of_cvat_stands_at_its_place(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:9, 7:12] = [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    rle = "1, 2, 1, 6, 2, 1, 3, 1, 1, 1, 1"  # runs by rows, from (7, 5)
    shape = f'<mask label="star" rle="{rle}" left="7" top="5" width="5" height="4"/>'
    image = f'<image name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{shape}<box label="b"/></image>'
    write(tmp_path / "annotations.xml", f"<annotations>{image}</annotations>")
    labels = read_labels(tmp_path)
    np.testing.assert_array_equal(mask_api.decode(labels.annotations[0]["segmentation"]), mask)
    assert labels.left_out == {"box": 1}


def test_labels_left_out_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo(tmp_path)
    write(tmp_path / "train" / "labels" / "a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "train" / "labels" / "b.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    write(tmp_path / "train" / "images" / "c.jpg", "no photo")
    write(tmp_path / "train" / "labels" / "c.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    assert cli.main.main(["data", "convert", str(tmp_path), str(tmp_path / "all.json"), "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["unlabelled_classes"] == ["leaf"]
    assert result["annotations_left_out"] == {"box without an outline": 1}
    assert len(result["missing_photos"]) == len(result["broken_photos"]) == 1
    said = capsys.readouterr().err
    for words in ("c.jpg", "b.txt", "1 box without an outline", "No object is labelled as leaf"):
        assert words in said


def yolo_with(line: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        yolo(root)
        write(root / "train" / "labels" / "a.txt", line)

    return make


def cvat_with(image: str, before: str = "") -> Callable[[Path], None]:
    return lambda root: write(root / "annotations.xml", f"{before}<annotations>{image}</annotations>")


def labelme_with(**fields: Any) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        labelme(root)
        write(root / "a.json", {**json.loads((root / "a.json").read_text()), **fields})

    return make


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: photo(root / "a.jpg"), "holds no labels: export the labels as COCO"),
        (
            lambda root: write(root / "instances.json", coco_tree(["gone.jpg"], [STAR])),
            r"none of the 1 labelled photos, such as gone\.jpg",
        ),
        (yolo_with("2 0 0 1 0 1 1"), "an object of class 2, and data.yaml names 2 classes"),
        (yolo_with("0 0 0 1 0 1"), "a line of 6 numbers"),
        (yolo_with("0 0 0 1 0 1 x"), "where numbers are expected"),
        (yolo_with("0 0.5 0.5 0.1 0.1"), r"has no outline of an object \(there are 1 box without an outline\)"),
        (cvat_with('<image name="../../a.jpg" width="9" height="9"/>'), "leads out of the folder of photos"),
        (cvat_with('<image name="/etc/passwd" width="9" height="9"/>'), "leads out of the folder of photos"),
        (cvat_with("<track/>"), "is an export of a video"),
        (cvat_with("", '<!DOCTYPE a [<!ENTITY b "c">]>'), "declares entities"),
        (cvat_with("<image>"), "is damaged"),
        (labelme_with(imageHeight=None), "lacks imageHeight and imageWidth"),
        (labelme_with(shapes=[{"points": []}]), "a shape without a label"),
        (labelme_with(shapes=[{"label": "a", "points": [["x"]]}]), "points are not pairs of numbers"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(make: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=sentence):
        read_labels(tmp_path)


def test_a_coco_file_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "instances.json", coco_tree(["../a.jpg"], [STAR]))
    with pytest.raises(InputError, match="leads out of the folder"):
        read_labels(tmp_path)


def test_a_format_that_the_labels_do_not_have_is_refused(tmp_path: Path) -> None:
    labelme(tmp_path)
    with pytest.raises(InputError, match="no labels in the format yolo; they look like labelme"):
        read_labels(tmp_path, kind="yolo")
    with pytest.raises(InputError, match="pascal is not a format of labels"):
        read_labels(tmp_path, kind="pascal")


def test_neither_labels_nor_photos_are_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelme(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        assert cli.main.main(["data", "convert", str(tmp_path), str(path)]) == 2
        assert "is both read and written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "export.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="unpack it"):
        read_labels(tmp_path, tmp_path / "export.zip")
