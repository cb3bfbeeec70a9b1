from __future__ import annotations

import json

import av
import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from dynamask.data.shapes import CLASSES, INTRICATE, SMOOTH, ShapesDataset, draw_frames, draw_image, write_dataset, write_video
from runtime.errors import InputError


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, list[dict]]]:
    return [draw_image(np.random.default_rng([11, i]), 320, 320) for i in range(80)]


def tight(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def best_iou(mask: np.ndarray, grid: int) -> float:
    """IoU of the mask with the best that a grid over its box can say: each cell the share of it that is covered."""
    crop = tight(mask).astype(np.float32)
    cells = cv2.resize(crop, (grid, grid), interpolation=cv2.INTER_AREA)
    again = cv2.resize(cells, crop.shape[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    whole = crop > 0
    return float((again & whole).sum() / (again | whole).sum())


def test_intricate_outlines_need_a_fine_grid_and_smooth_ones_do_not(drawn):
    scores = {(kind, grid): [] for kind in ("smooth", "intricate") for grid in (14, 112)}
    for _, objects in drawn:
        for thing in objects:
            if max(tight(thing["mask"]).shape) >= 90:
                kind = "smooth" if CLASSES[thing["label"]] in SMOOTH else "intricate"
                for grid in (14, 112):
                    scores[kind, grid].append(best_iou(thing["mask"], grid))
    means = {key: np.mean(values) for key, values in scores.items()}
    assert len(scores["intricate", 14]) > 30
    assert means["intricate", 14] < 0.8
    assert means["smooth", 14] > 0.93
    assert min(means["intricate", 112], means["smooth", 112]) > 0.98


def test_size_is_independent_of_the_class(drawn):
    sides = {name: [] for name in CLASSES}
    for _, objects in drawn:
        for thing in objects:
            sides[CLASSES[thing["label"]]].append(max(tight(thing["mask"]).shape))
    smooth, intricate = (np.log(np.concatenate([sides[name] for name in names])) for names in (SMOOTH, INTRICATE))
    error = np.sqrt(smooth.var() / smooth.size + intricate.var() / intricate.size)
    assert abs(smooth.mean() - intricate.mean()) < 3 * error
    assert min(min(values) for values in sides.values()) < 40
    assert all(max(values) > 120 for values in sides.values())


def test_images_hold_a_few_objects_whose_masks_do_not_share_pixels(drawn):
    for image, objects in drawn:
        assert image.shape == (320, 320, 3)
        assert image.dtype == np.uint8
        assert 1 <= len(objects) <= 10
        assert np.sum([thing["mask"] for thing in objects], axis=0).max() == 1
    assert 5 < np.mean([len(objects) for _, objects in drawn]) < 8


def test_an_outline_is_where_the_picture_changes(drawn):
    """Masks and pixels agree: across an outline colours differ much more than within the mask."""
    across, within = [], []
    for image, objects in drawn[:20]:
        for thing in objects:
            mask = thing["mask"].astype(np.uint8)
            inner = cv2.erode(mask, np.ones((3, 3), np.uint8), borderValue=1) > 0
            steps = np.abs(np.diff(image.astype(float), axis=1)).sum(axis=2)
            across.append(steps[mask[:, 1:] != mask[:, :-1]].mean())
            if inner[:, 1:].sum() > 50:
                within.append(steps[inner[:, 1:] & inner[:, :-1]].mean())
    assert np.mean(across) > 2 * np.mean(within)


def test_a_data_set_repeats_and_its_annotations_are_the_masks_drawn(tmp_path):
    counts = []
    first = write_dataset(tmp_path / "a", 3, seed=5, height=160, width=192, progress=lambda done, total: counts.append((done, total)))
    second = write_dataset(tmp_path / "b", 3, seed=5, height=160, width=192)
    assert first.read_bytes() == second.read_bytes()
    assert counts == [(1, 3), (2, 3), (3, 3)]
    tree = json.loads(first.read_text())
    for i in range(3):
        _, objects = draw_image(np.random.default_rng([5, i]), 160, 192)
        written = [entry for entry in tree["annotations"] if entry["image_id"] == i + 1]
        assert [entry["category_id"] - 1 for entry in written] == [thing["label"] for thing in objects]
        for entry, thing in zip(written, objects, strict=True):
            np.testing.assert_array_equal(rle.decode(entry["segmentation"]) > 0, thing["mask"])
            assert entry["area"] == thing["mask"].sum()
            x, y, w, h = map(int, entry["bbox"])
            assert thing["mask"][y : y + h, x : x + w].sum() == entry["area"]
    assert {entry["supercategory"] for entry in tree["categories"]} == {"smooth", "intricate"}


def test_shapes_drawn_on_the_fly_equal_those_written(tmp_path):
    tree = json.loads(write_dataset(tmp_path, 2, seed=9, height=128, width=128).read_text())
    dataset = ShapesDataset(2, seed=9, height=128, width=128)
    assert dataset.coco_dict == tree
    _, target = dataset[1]
    written = [entry for entry in tree["annotations"] if entry["image_id"] == 2]
    np.testing.assert_array_equal(target["labels"], [entry["category_id"] for entry in written])
    corners = np.array([entry["bbox"] for entry in written])
    np.testing.assert_array_equal(target["boxes"], np.hstack([corners[:, :2], corners[:, :2] + corners[:, 2:]]))


def test_a_second_data_set_does_not_replace_the_first(tmp_path):
    path = write_dataset(tmp_path, 1, seed=0, height=96, width=96)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write_dataset(tmp_path, 1, seed=1, height=96, width=96)
    assert path.read_bytes() == before


def test_objects_in_a_video_move_smoothly_and_keep_their_number():
    centres: dict[int, list[np.ndarray]] = {}
    for _, objects in draw_frames(40, seed=2, height=192, width=192):
        for thing in objects:
            centres.setdefault(thing["track"], []).append(np.argwhere(thing["mask"]).mean(axis=0))
    long = [np.array(path) for path in centres.values() if len(path) == 40]
    assert long
    for path in long:
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert steps.max() < 6
        assert np.linalg.norm(path[-1] - path[0]) > 1


def test_a_video_is_an_mp4_with_its_annotations_beside_it(tmp_path):
    path = write_video(tmp_path / "film.mp4", 6, seed=1, height=96, width=128)
    with av.open(str(path)) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == "h264"
    assert shapes == [(96, 128, 3)] * 6
    tree = json.loads((tmp_path / "film.json").read_text())
    assert [entry["frame_index"] for entry in tree["images"]] == list(range(6))
    assert all(entry["track_id"] > 0 for entry in tree["annotations"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: write_dataset(folder, 0, 0), "at least 1"),
        (lambda folder: write_dataset(folder, 1, 0, height=8), "too small"),
        (lambda folder: write_video(folder / "film.avi", 1, 0), "mp4"),
        (lambda folder: write_video(folder / "film.mp4", 1, 0, height=97), "even"),
        (lambda folder: ShapesDataset(0, 0), "empty"),
    ],
)
def test_wrong_calls_end_in_a_sentence_and_leave_nothing(tmp_path, call, message):
    with pytest.raises(InputError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
