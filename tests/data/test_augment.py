"""What training makes of a data set's items: pasted instances, stand-ins for broken images, portrait batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynamask.config import Config, TrainConfig, load_config
from dynamask.data.augment import TrainingItems, copy_paste, turned_images
from dynamask.data.canvas import CanvasDataset
from dynamask.data.coco import CocoDataset
from dynamask.data.shapes import ShapesDataset
from dynamask.train.schedule import Schedule, StepSampler
from runtime.errors import InputError
from runtime.files import write_json


def configured(**fields: Any) -> Config:
    return load_config("lite0-shapes", {"model.canvas": [64, 96], **{name.replace("__", "."): value for name, value in fields.items()}})


def write_coco(folder: Path, sizes: list[tuple[int, int]]) -> CocoDataset:
    """Images of the sizes (height, width), in each a square of 20 pixels."""
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width})
        square = [4, 4, 24, 4, 24, 24, 4, 24]
        annotations.append({"id": i + 1, "image_id": 100 + i, "category_id": 1, "bbox": [4, 4, 20, 20], "segmentation": [square]})
    write_json(folder / "a.json", {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]})
    return CocoDataset(folder / "a.json", folder)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(0, 4))
def test_pasted_instances_hide_the_pixels_below_them(seed: int, count: int, others: int) -> None:
    rng = np.random.default_rng(seed)

    def scene(instances: int) -> tuple[torch.Tensor, dict[str, Any]]:
        masks = np.zeros((instances, 12, 16), np.uint8)
        for mask in masks:
            y, x = rng.integers(0, 9, 2)
            mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = 1
        labels = torch.from_numpy(rng.integers(1, 9, instances))
        return torch.from_numpy(rng.random((3, 12, 16), np.float32)), {"labels": labels, "masks": torch.from_numpy(masks), "image_id": 7}

    (image, target), (other, other_target) = scene(count), scene(others)
    mixed, placed = copy_paste(image, target, other, other_target, np.random.default_rng(seed))
    chosen = [i for i, draw in enumerate(np.random.default_rng(seed).random(others)) if draw < 0.5]
    wanted, expected = [], image.clone()
    cover = np.zeros((12, 16), bool)
    for i in chosen:
        cover |= other_target["masks"][i].numpy() > 0
    expected[:, cover] = other[:, cover]
    for i in range(count):
        left = (target["masks"][i].numpy() > 0) & ~cover
        wanted.append((int(target["labels"][i]), left))
    wanted += [(int(other_target["labels"][i]), other_target["masks"][i].numpy() > 0) for i in chosen]
    wanted = [(label, mask) for label, mask in wanted if mask.any() and min(np.ptp(np.argwhere(mask), axis=0)) >= 1]
    assert torch.equal(mixed, expected)
    assert placed["image_id"] == 7
    assert placed["labels"].tolist() == [label for label, _ in wanted]
    assert placed["boxes"].shape == (len(wanted), 4)
    for mask, box, (_, truth) in zip(placed["masks"], placed["boxes"], wanted, strict=True):
        np.testing.assert_array_equal(mask, truth)
        (y0, x0), (y1, x1) = np.argwhere(truth).min(0), np.argwhere(truth).max(0) + 1
        assert box.tolist() == [x0, y0, x1, y1]


def test_items_depend_on_seed_epoch_and_index_alone_with_everything_on() -> None:
    config = configured(data__copy_paste=0.7, data__scale_jitter=[0.1, 2.0])
    one, other = (TrainingItems(ShapesDataset(6, 3, 64, 96), config) for _ in range(2))
    keys = [(index, epoch) for epoch in range(2) for index in range(6)]
    forth = {key: one[key] for key in keys}
    back = {key: other[key] for key in reversed(keys)}
    assert all(torch.equal(forth[key][0], back[key][0]) for key in keys)
    assert all(torch.equal(forth[key][1]["masks"], back[key][1]["masks"]) for key in keys)
    assert any(not torch.equal(forth[index, 0][0], forth[index, 1][0]) for index in range(6))


def test_pasting_changes_some_items_and_none_where_it_is_off() -> None:
    dataset = ShapesDataset(8, 3, 64, 96)
    plain = CanvasDataset(dataset, 64, 96, (0.5,) * 3, (0.5,) * 3, scale_jitter=(0.8, 1.0), flip=True)  # type: ignore[arg-type]
    off, on = (TrainingItems(dataset, configured(data__copy_paste=share)) for share in (0, 0.5))
    assert all(torch.equal(off[index, 0][0], plain.placed(index, 0)[0]) for index in range(8))
    pasted = [not torch.equal(on[index, 0][0], plain.placed(index, 0)[0]) for index in range(8)]
    assert 0 < sum(pasted) < 8


def test_another_image_stands_in_for_a_broken_one(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [(64, 96)] * 25)
    (tmp_path / "3.png").unlink()
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:60])
    items = TrainingItems(dataset, configured())
    assert items.tolerated == 2
    stand_ins = set()
    for epoch in range(5):
        found = {index: items[index, epoch][1] for index in (2, 3, 9)}
        assert found[2]["skipped"] == []
        assert found[3]["skipped"][0]["index"] == 3
        assert "9.png is truncated" in found[9]["skipped"][0]["reason"]
        assert not {found[3]["image_id"], found[9]["image_id"]} & {103, 109}
        assert found[3]["image_id"] == items[3, epoch][1]["image_id"]
        stand_ins.add(found[3]["image_id"])
    assert len(stand_ins) > 1


def test_an_item_gives_up_once_too_many_are_broken(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [(64, 96)] * 25)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    image, target = TrainingItems(dataset, configured())[4, 0]
    assert len({entry["index"] for entry in target["skipped"]}) == 3  # one more than the two that are tolerated
    assert (image.shape, len(target["labels"])) == ((3, 64, 96), 0)


def test_a_portrait_image_is_larger_on_the_transposed_canvas(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [(96, 64), (64, 96), (96, 60), (60, 96)])
    fields = {"data__scale_jitter": [1.0, 1.0], "train__batch": 2}
    upright, lying = (TrainingItems(dataset, configured(data__portrait_batches=on, **fields)) for on in (True, False))
    assert upright.turned == [True, False, True, False]
    image, target = upright[0, 0]
    assert (image.shape, target["scale"]) == ((3, 96, 64), 1.0)
    image, target = lying[0, 0]
    assert (image.shape, target["scale"]) == ((3, 64, 96), pytest.approx(2 / 3))
    assert upright[1, 0][0].shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("sizes", "canvas", "turned"),
    [
        ([(9, 5), (9, 5), (5, 9), (5, 9), (7, 7)], (64, 96), [True, True, False, False, False]),
        ([(9, 5), (9, 5), (5, 9), (5, 9), (7, 7)], (96, 64), [False, False, True, True, False]),
        ([(9, 5), (9, 5), (5, 9), (5, 9)], (64, 64), []),
        ([(9, 5), (5, 9), (5, 9)], (64, 96), []),  # one portrait image makes no batch of two
        ([(9, 5), (9, 5), (5, 9)], (64, 96), [True, True, True]),
    ],
)
def test_which_images_are_turned(sizes: list[tuple[int, int]], canvas: tuple[int, int], turned: list[bool]) -> None:
    assert turned_images(sizes, canvas, batch=2) == turned


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 5))
def test_a_batch_holds_images_of_one_orientation(batch: int, portrait: list[bool], first: int) -> None:
    turned = turned_images([(9, 5) if tall else (5, 9) for tall in portrait], (64, 96), batch)
    schedule = Schedule(TrainConfig(batch=batch, phase1_epochs=0, phase2_epochs=3), len(portrait))
    batches = list(StepSampler(schedule, 0, turned=turned))
    assert len(batches) == schedule.total_steps
    if turned:
        assert all(len(chosen) == batch and len({turned[index] for index, _ in chosen}) == 1 for chosen in batches)
        for start in range(0, len(batches), schedule.steps_per_epoch):
            met = Counter(index for chosen in batches[start : start + schedule.steps_per_epoch] for index, _ in chosen)
            assert sum(met.values()) - len(met) <= batch // 2  # only what fills the last batch is met twice
    else:
        assert batches == list(StepSampler(schedule, 0))
    late = min(first, len(batches))
    assert list(StepSampler(schedule, late, turned=turned)) == batches[late:]
    halves = [list(StepSampler(schedule, 0, rank, 2, turned)) for rank in range(2)]
    assert [sorted(one + other) for one, other in zip(*halves, strict=True)] == [sorted(chosen) for chosen in batches]


@pytest.mark.parametrize("field", [{"data__scale_jitter": [1.0, 0.5]}, {"data__scale_jitter": [0, 1]}, {"data__copy_paste": 1.5}])
def test_fields_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data"):
        configured(**field)
