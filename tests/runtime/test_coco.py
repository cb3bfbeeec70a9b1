"""The reader of COCO files: what it takes, what it leaves out and counts, what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from runtime.coco import CocoData, read_coco
from runtime.errors import InputError

HEIGHT, WIDTH = 16, 20
SQUARE = [2, 3, 12, 3, 12, 9, 2, 9]
BOX = (2, 3, 10, 6)


def mask() -> np.ndarray:
    square = np.zeros((HEIGHT, WIDTH), np.uint8)
    square[3:9, 2:12] = 1
    return square


def compressed(pixels: np.ndarray) -> dict[str, Any]:
    encoded = mask_api.encode(np.asfortranarray(pixels))
    return {"size": list(pixels.shape), "counts": encoded["counts"].decode()}


def runs(pixels: np.ndarray) -> list[int]:
    flat = pixels.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": 5, "bbox": list(BOX), "area": 60, "iscrowd": 0, "segmentation": [SQUARE]} | changes


def tree(*annotations: Any, **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 5, "name": "nut"}, {"id": 2, "name": "date"}],
        "annotations": list(annotations),
    } | changes


def write(folder: Path, content: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def read(folder: Path, *annotations: Any, **changes: Any) -> CocoData:
    return read_coco(write(folder, tree(*annotations, **changes)), folder)


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [[2, 3], [12, 3], [12, 9], [2, 9]],
        [[[2, 3], [12, 3], [12, 9], [2, 9]]],
        [SQUARE, [1, 1, 2, 2]],
        [[str(number) for number in SQUARE]],
        [[-3, -4, 30, -4, 30, 3, 12, 3, 12, 9, 2, 9, 2, 3, -3, 3]],
        compressed(mask()),
        {"size": [HEIGHT, WIDTH], "counts": runs(mask())},
        {"size": [float(HEIGHT), str(WIDTH)], "counts": [float(run) for run in runs(mask())]},
    ],
)
def test_every_way_to_write_a_mask_is_read(tmp_path: Path, segmentation: Any) -> None:
    data = read(tmp_path, entry(segmentation=segmentation, bbox=None))
    (annotation,) = data.annotations
    pixels = annotation.mask()
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[3:], mask()[3:])
    assert data.left_out == {}


@pytest.mark.parametrize("form", [str, float, lambda number: f" {number}.0 "])
def test_ids_of_any_form_are_the_same_ids(tmp_path: Path, form: Any) -> None:
    data = read(
        tmp_path,
        entry(id=form(3), image_id=form(7), category_id=form(5)),
        images=[{"id": form(7), "file_name": "a.png", "height": form(HEIGHT), "width": form(WIDTH)}],
        categories=[{"id": form(5), "name": "nut"}],
    )
    assert [(image.id, image.height, image.width) for image in data.images] == [(7, HEIGHT, WIDTH)]
    assert [(annotation.image_id, annotation.category_id) for annotation in data.annotations] == [(7, 5)]


@pytest.mark.parametrize(
    ("flag", "crowd"),
    [(None, False), (0, False), ("0", False), (0.0, False), (False, False), ("false", False), (1, True), ("1", True), (True, True)],
)
def test_crowd_flags_of_any_form_are_read(tmp_path: Path, flag: Any, crowd: bool) -> None:
    (annotation,) = read(tmp_path, entry(iscrowd=flag)).annotations
    assert annotation.iscrowd is crowd


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_id": 8}, "unknown image"),
        ({"image_id": [7]}, "unknown image"),
        ({"image_id": None}, "unknown image"),
        ({"image_id": True}, "unknown image"),
        ({"category_id": 99}, "unknown category"),
        ({"category_id": {"id": 5}}, "unknown category"),
        ({"category_id": float("nan")}, "unknown category"),
        ({"category_id": 5.5}, "unknown category"),
        ({"iscrowd": "perhaps"}, "iscrowd is neither 0 nor 1"),
        ({"iscrowd": 2}, "iscrowd is neither 0 nor 1"),
        ({"segmentation": None}, "no mask"),
        ({"segmentation": []}, "no mask"),
        ({"segmentation": {}}, "no mask"),
        ({"segmentation": "polygon"}, "no mask"),
        ({"segmentation": [[]]}, "polygon with fewer than 3 points"),
        ({"segmentation": [[1, 2, 3, 4]]}, "polygon with fewer than 3 points"),
        ({"segmentation": [[*SQUARE, 1]]}, "malformed polygon"),
        ({"segmentation": [SQUARE, "hole"]}, "malformed polygon"),
        ({"segmentation": [["x"] * 8]}, "malformed polygon"),
        ({"segmentation": [[[[SQUARE]]]]}, "malformed polygon"),
        ({"segmentation": [[{"x": 1, "y": 2}] * 4]}, "malformed polygon"),
        ({"segmentation": [[10**400, *SQUARE[1:]]]}, "malformed polygon"),
        ({"segmentation": [[float("nan"), *SQUARE[1:]]]}, "polygon with a number that is not finite"),
        ({"segmentation": [[None, *SQUARE[1:]]]}, "polygon with a number that is not finite"),
        ({"segmentation": [SQUARE, [float("inf"), *SQUARE[1:]]]}, "polygon with a number that is not finite"),
        ({"segmentation": [[1e308, *SQUARE[1:]]]}, "polygon far outside its image"),
        ({"segmentation": [[-1e6, *SQUARE[1:]]]}, "polygon far outside its image"),
        ({"segmentation": [[0, 0, WIDTH, HEIGHT] * 40_000]}, "polygon with an outline of more than 1000000 pixels"),
        ({"segmentation": [[3, 3, 3, 3, 3, 3]]}, "empty mask"),
        ({"segmentation": [[22, 3, 28, 3, 28, 9]]}, "empty mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, "empty mask"),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": runs(mask())}}, "mask of another size than its image"),
        ({"segmentation": {"counts": runs(mask())}}, "mask of another size than its image"),
        ({"segmentation": {"size": [2**40, 2**40], "counts": "0"}}, "mask of another size than its image"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1e308, 1e308]}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [[320]]}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": None}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": ""}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "~~"}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "oooooooooo"}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed(mask())["counts"] + "1"}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed(mask())["counts"][:-1]}}, "malformed mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "äöü"}}, "malformed mask"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_counted(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    data = read(tmp_path, entry(), entry(**changes))
    assert data.left_out == {reason: 1}
    assert [annotation.box for annotation in data.annotations] == [BOX]


def test_annotations_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    assert read(tmp_path, entry(), None, 3, [entry()]).left_out == {"not a JSON object": 3}


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        [],
        BOX[:3],
        [2, 3, 0, 6],
        [2, 3, -10, 6],
        [float("nan"), 3, 10, 6],
        [1e308, 3, 1e308, 6],
        ["2", "3", "10", "6"],
        [10**400, 3, 10, 6],
        [40, 3, 5, 6],
        [0.1, 0.1875, 0.5, 0.375],
        [12, 9, 8, 7],
    ],
)
def test_a_box_that_is_missing_or_wrong_comes_from_the_mask(tmp_path: Path, bbox: Any) -> None:
    data = read(tmp_path, entry(bbox=bbox))
    assert [annotation.box for annotation in data.annotations] == [BOX]
    assert data.repaired == {"box missing or wrong, taken from the mask": 1}
    assert data.left_out == {}


@pytest.mark.parametrize(("bbox", "box"), [([2.3, 3.2, 9.1, 5.5], (2.3, 3.2, 9.1, 5.5)), ([1, 3, 11, 5], (1, 3, 11, 5))])
def test_a_box_near_the_mask_stays_as_annotated(tmp_path: Path, bbox: list[float], box: tuple[float, ...]) -> None:
    data = read(tmp_path, entry(bbox=bbox))
    assert data.annotations[0].box == box
    assert data.repaired == {}


def test_a_box_that_leaves_its_image_is_clipped(tmp_path: Path) -> None:
    whole = [[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]]
    data = read(tmp_path, entry(bbox=[-3, -2, WIDTH + 9, HEIGHT + 9], segmentation=whole))
    assert data.annotations[0].box == (0, 0, WIDTH, HEIGHT)
    assert data.repaired == {"box clipped to its image": 1}


@pytest.mark.parametrize("area", [None, 0, -4, "60", float("nan"), float("inf"), HEIGHT * WIDTH + 1])
def test_an_area_that_cannot_be_is_the_masks(tmp_path: Path, area: Any) -> None:
    assert read(tmp_path, entry(area=area)).annotations[0].area == 60
    assert read(tmp_path, entry(area=57.5)).annotations[0].area == 57.5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_of_all_unicode_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(tree(entry(), categories=[{"id": 5, "name": "Nuß"}]), ensure_ascii=False), encoding=encoding)
    assert read_coco(path, tmp_path).categories[0].name == "Nuß"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: export"),
        (b"{", "ends too early"),
        (json.dumps(tree(entry())).encode()[:-9], "ends too early"),
        (json.dumps(tree(entry())).encode()[:-30], "ends too early"),
        (json.dumps(tree(entry())).encode()[:-1] + b",}", "a comma too many"),
        (b'{"images": [{"id": 1},]}', "a comma too many"),
        (json.dumps(tree(entry())).encode() + bytes(64), "zero bytes"),
        (bytes(64), "zero bytes"),
        (b"\xff\xd8\xff\xe0", "is an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"{'images': []}", "is not JSON"),
        (b'{"images": [1 2]}', "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON|no list of images"),
        (gzip.compress(json.dumps(tree(entry())).encode(), mtime=0), "is compressed: unpack it"),
        (b"PK\x03\x04rest", "is compressed: unpack it"),
        (b"<annotation><object/></annotation>", "is XML or HTML"),
        (b"0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.1\n", "looks like a YOLO label file"),
        ('{"images": "ä"}'.encode("latin-1"), "is not JSON in UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is an image"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(9), "is compressed"),
        (b"3", "its top level is no object"),
        (b"[]", "its top level is a list"),
        (b'[{"image_id": 1, "category_id": 1, "score": 0.5}]', "a list of detections"),
        (b'[{"id": 1, "annotations": [], "data": {}}]', "an export of Label Studio"),
        (b'[{"image": "a.jpg", "annotations": []}]', "a CreateML file"),
        (b'[{"images": [], "annotations": [], "categories": []}]', "its top level is a list"),
        (b'{"shapes": [], "imagePath": "a.jpg"}', "a labelme file"),
        (b'{"_via_img_metadata": {}}', "VGG Image Annotator"),
        (b'{"images": {"1": {}}, "annotations": [], "categories": []}', "no list of images"),
        (b'{"images": [{"id": 1}], "categories": [{"id": 1}]}', "no list of annotations"),
        (b'{"images": [{"id": 1}], "annotations": null, "categories": []}', "no list of annotations"),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "list of images has no entry"),
        (b'{"images": [{"id": 1}], "annotations": [], "categories": []}', "list of categories has no entry"),
        (json.dumps(tree({"image_id": 7, "segments_info": []})).encode(), "a COCO panoptic file"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_coco(path, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("id", None, "has id None; that must be a whole number"),
        ("id", "a17", "has id 'a17'; that must be a whole number"),
        ("id", True, "has id .*; that must be a whole number"),
        ("id", 2**63, "has id .*; that must be a whole number"),
        ("id", 1.5, "has id .*; that must be a whole number"),
        ("id", [1], "has id .*; that must be a whole number"),
        ("height", None, "image 7 has height .*; that must be a whole number"),
        ("height", float("inf"), "image 7 has height .*; that must be a whole number"),
        ("height", "tall", "image 7 has height .*; that must be a whole number"),
        ("height", 0, "has height 0"),
        ("width", -20, "width -20"),
        ("height", 10**9, "has height 1000000000"),
        ("file_name", None, "image 7 has file_name .*; that must be a name"),
        ("file_name", "", "image 7 has file_name .*; that must be a name"),
        ("file_name", 17, "image 7 has file_name .*; that must be a name"),
        ("file_name", "../a.png", "leads out of the folder"),
        ("file_name", "b/../../a.png", "leads out of the folder"),
        ("file_name", "..\\a.png", "leads out of the folder"),
        ("file_name", "/etc/a.png", "leads out of the folder"),
        ("file_name", "C:\\images\\a.png", "leads out of the folder"),
        ("file_name", "\\\\server\\images\\a.png", "leads out of the folder"),
        ("file_name", ".", "cannot be the name of a file"),
        ("file_name", "a\0.png", "cannot be the name of a file"),
        ("file_name", "\ud800.png", "cannot be the name of a file"),
        ("file_name", "a" * 300, "cannot be the name of a file"),
    ],
)
def test_an_image_that_cannot_be_is_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    images = [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH} | {field: value}]
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, entry(), images=images)
    str(caught.value).encode()


@pytest.mark.parametrize("image", [None, 3, "a.png", ["a.png"], {}])
def test_an_image_that_is_no_object_is_refused(tmp_path: Path, image: Any) -> None:
    with pytest.raises(InputError, match=r"an entry of images is .*, not an object|an image .* has no id"):
        read(tmp_path, entry(), images=[image])


@pytest.mark.parametrize(
    "category",
    [
        None,
        "nut",
        {"id": 5},
        {"name": "nut"},
        {"id": "one", "name": "nut"},
        {"id": 5, "name": None},
        {"id": 5, "name": ["nut"]},
        {"id": 5, "name": " "},
        {"id": 5, "name": "\udcff"},
    ],
)
def test_a_category_that_cannot_be_is_refused(tmp_path: Path, category: Any) -> None:
    with pytest.raises(InputError, match=r"an entry of categories is|(category|categories) .* has (no )?(id|name)") as caught:
        read(tmp_path, entry(), categories=[category])
    str(caught.value).encode()


def test_categories_may_have_the_id_0_and_negative_ids(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": 12, "supercategory": ["odd"]}, {"id": -1, "name": "b"}]
    data = read(tmp_path, entry(category_id=0), entry(category_id="-1"), categories=categories)
    assert [annotation.category_id for annotation in data.annotations] == [0, -1]
    assert data.truth["categories"] == [{"id": 0, "name": "12"}, {"id": -1, "name": "b"}]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("images", {"file_name": "b.png"}, "the image id 7 to several"),
        ("images", {"id": "7", "file_name": "b.png"}, "the image id 7 to several"),
        ("images", {"id": 8}, "the image file name 'a.png' to several"),
        ("images", {"id": 8, "file_name": "./a.png"}, "the image file name 'a.png' to several"),
        ("categories", {"name": "fig"}, "the category id 5 to several"),
        ("categories", {"id": 9}, "the category name 'nut' to several"),
        ("annotations", {}, "the annotation id 1 to several"),
        ("annotations", {"id": 1.0}, "the annotation id 1 to several"),
    ],
)
def test_duplicates_are_refused(tmp_path: Path, section: str, changes: dict[str, Any], message: str) -> None:
    content = tree(entry(id=1))
    content[section].append(content[section][0] | changes)
    with pytest.raises(InputError, match=message):
        read_coco(write(tmp_path, content), tmp_path)


def test_file_names_of_other_systems_are_read(tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "some\\folder\\a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 8, "coco_url": "http://images.cocodataset.org/val2017/000000391895.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    data = read(tmp_path, entry(), images=images)
    assert [image.file_name for image in data.images] == ["some/folder/a.png", "val2017/000000391895.jpg"]
    assert data.missing_files() == ["some/folder/a.png", "val2017/000000391895.jpg"]


def test_the_truth_is_the_usable_content_in_coco_format(tmp_path: Path) -> None:
    data = read(tmp_path, entry(id=17), entry(image_id=8), entry(iscrowd="1", segmentation=compressed(mask())))
    expected = {"image_id": 7, "category_id": 5, "bbox": list(BOX), "area": 60, "segmentation": compressed(mask())}
    assert data.truth == {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [expected | {"id": 1, "iscrowd": 0}, expected | {"id": 2, "iscrowd": 1}],
        "categories": [{"id": 5, "name": "nut"}, {"id": 2, "name": "date"}],
    }


def test_a_warning_begins_the_line_if_much_is_left_out(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    assert read(tmp_path, entry()).summary() == []
    few = read(tmp_path, *[entry() for _ in range(9)], entry(image_id=8))
    assert few.summary() == [f"{few.path}: 1 of 10 annotations (10.0%) are left out: 1 unknown image."]
    many = read(tmp_path, entry(), entry(bbox=None), entry(image_id=8), entry(image_id=9), entry(segmentation=[]))
    warning, repaired = many.summary()
    assert warning.startswith(f"Warning: {many.path}: 3 of 5 annotations (60.0%) are left out: 2 unknown image, 1 no mask; ")
    assert repaired == f"{many.path}: boxes repaired: 1 box missing or wrong, taken from the mask."
    picture.unlink()
    missing, _, _ = many.summary()
    assert missing.startswith(f"Warning: {many.path}: 1 of 1 images (100.0%) are left out: 1 image file missing; ")
    assert many.counts() == {
        "images": 1,
        "images_left_out": {},
        "annotations": 2,
        "annotations_left_out": {"unknown image": 2, "no mask": 1},
        "boxes_repaired": {"box missing or wrong, taken from the mask": 1},
    }


def test_a_file_all_of_whose_annotations_are_left_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of its 3 annotations can be used \(2 unknown category, 1 no mask\)"):
        read(tmp_path, entry(category_id=9), entry(category_id=8), entry(segmentation=None))
    assert read(tmp_path).annotations == []


def test_images_that_are_not_there_leave_with_their_annotations(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 8)]
    data = read(tmp_path, entry(), entry(), entry(image_id=8), images=images)
    with pytest.raises(InputError, match=r"holds none of the 2 images of .*instances\.json"):
        data.without_missing_files()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "8.png")
    rest = data.without_missing_files()
    assert [image.id for image in rest.images] == [8]
    assert rest.images_left_out == {"image file missing": 1}
    assert rest.left_out == {"image file missing": 2}
    assert rest.summary()[0].startswith("Warning: ") and "1 of 2 images (50.0%) are left out" in rest.summary()[0]
    (tmp_path / "7.png").symlink_to(tmp_path / "8.png")
    assert data.without_missing_files() is data


def test_names_that_begin_with_the_folders_own_name_are_explained(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "a.png")
    named = tree(entry(), images=[{"id": 7, "file_name": "images/a.png", "height": HEIGHT, "width": WIDTH}])
    data = read_coco(write(tmp_path, named))
    with pytest.raises(InputError, match=rf"such as images/a\.png: that one is in {tmp_path}; give this"):
        data.require_files()
    assert read_coco(data.path, tmp_path).require_files() == []


def test_a_file_without_a_mask_to_find_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    for entries in ([], [entry(iscrowd=1)]):
        (said,) = read(tmp_path, *entries).summary()
        assert said.startswith("Warning: ") and "no annotation other than crowds" in said


def test_an_image_of_another_size_than_annotated_is_named(tmp_path: Path) -> None:
    data = read(tmp_path, entry())
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has 16x20 pixels, but .*instances\.json says 20x16"):
        data.read_image(data.images[0])
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    assert data.read_image(data.images[0]).shape == (HEIGHT, WIDTH, 3)


def test_a_folder_and_a_file_are_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances\.json does not exist"):
        read_coco(tmp_path)
    write(tmp_path, tree(entry()))
    with pytest.raises(InputError, match="images is not a folder"):
        read_coco(tmp_path)
    (tmp_path / "images").mkdir()
    assert read_coco(tmp_path).folder == tmp_path / "images"
    assert read_coco(tmp_path / "instances.json", tmp_path).folder == tmp_path
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_coco(tmp_path / "nowhere")
