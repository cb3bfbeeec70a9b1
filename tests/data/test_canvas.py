from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from dynamask.data.canvas import CanvasDataset, collate, to_canvas, with_colors
from dynamask.data.shapes import ShapesDataset
from runtime.preprocess import letterbox_normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def scene() -> tuple[np.ndarray, dict]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    masks = np.zeros((2, 40, 60), np.uint8)
    masks[0, 10:30, 6:36] = 1
    masks[1, 5, 5] = 1
    boxes = np.float32([[6, 10, 36, 30], [5, 5, 6, 6]])
    return image, {"image_id": 4, "boxes": boxes, "labels": np.array([3, 1]), "masks": masks}


def test_an_image_that_fits_is_only_normalised_and_padded_with_zeros():
    image, target = scene()
    canvas, placed = to_canvas(image, target, 64, 60, MEAN, STD)
    assert canvas.shape == (3, 64, 60)
    assert canvas.dtype == torch.float32
    expected = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(canvas[:, :40].numpy(), expected, atol=1e-5)
    assert not canvas[:, 40:].any()
    # The instance of one pixel is left out.
    assert placed["labels"].tolist() == [3]
    assert placed["boxes"].tolist() == [[6, 10, 36, 30]]
    np.testing.assert_array_equal(placed["masks"][0, :40], target["masks"][0])
    assert placed["image_id"] == 4
    assert placed["scale"] == 1.0


@pytest.mark.parametrize("factor", [2, 0.5])
def test_boxes_and_masks_follow_the_scale(factor):
    image, target = scene()
    _, placed = to_canvas(image, target, int(40 * factor), 200, MEAN, STD)
    assert placed["scale"] == factor
    np.testing.assert_array_equal(placed["boxes"][0], np.array([6, 10, 36, 30]) * factor)
    assert placed["masks"][0].sum() == target["masks"][0].sum() * factor**2


def test_the_canvas_is_the_runtimes_letterbox():
    image = np.random.default_rng(1).integers(0, 256, (123, 211, 3), dtype=np.uint8)
    target = {"image_id": 0, "boxes": np.zeros((0, 4)), "labels": np.zeros(0), "masks": np.zeros((0, 123, 211), np.uint8)}
    for height, width in ((96, 96), (320, 416)):
        canvas, placed = to_canvas(image, target, height, width, MEAN, STD)
        expected, scale = letterbox_normalise(image, height, width, MEAN, STD)
        assert placed["scale"] == scale
        np.testing.assert_array_equal(canvas.numpy(), expected[0])


def test_a_flip_mirrors_image_masks_and_boxes_together():
    image, target = scene()
    plain, kept = to_canvas(image, target, 40, 60, MEAN, STD)
    for seed in range(20):
        canvas, placed = to_canvas(image, target, 40, 60, MEAN, STD, np.random.default_rng(seed), flip=True)
        if not torch.equal(canvas, plain):
            break
    assert torch.equal(canvas, plain.flip(2))
    assert torch.equal(placed["masks"], kept["masks"].flip(2))
    assert placed["boxes"].tolist() == [[24, 10, 54, 30]]


def test_jitter_beyond_the_canvas_crops_and_boxes_stay_inside():
    image, target = scene()
    for seed in range(5):
        canvas, placed = to_canvas(image, target, 32, 64, MEAN, STD, np.random.default_rng(seed), scale_jitter=(1.5, 2.5))
        assert canvas.shape == (3, 32, 64)
        for box, mask in zip(placed["boxes"], placed["masks"], strict=True):
            x0, y0, x1, y1 = box.int().tolist()
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 32
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0


def test_training_items_depend_on_seed_epoch_and_index_alone():
    def item(epoch: int, before: int) -> torch.Tensor:
        dataset = CanvasDataset(ShapesDataset(3, 1, 96, 96), 96, 96, MEAN, STD, seed=5, scale_jitter=(0.6, 1.0), flip=True)
        for index in range(before):
            dataset.placed(index, epoch)
        return dataset.placed(2, epoch)[0]

    assert torch.equal(item(epoch=1, before=0), item(epoch=1, before=2))
    assert not torch.equal(item(epoch=1, before=0), item(epoch=2, before=0))


def test_images_without_instances_are_not_trained_on():
    image, target = scene()
    empty = {
        "image_id": 5,
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "masks": np.zeros((0, 40, 60), np.uint8),
    }

    class TwoImages:
        indices_with_instances = [1]  # noqa: RUF012

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[np.ndarray, dict]:
            return image, (empty, target)[index]

    dataset = CanvasDataset(TwoImages(), 64, 64, MEAN, STD)
    assert len(dataset) == 1
    assert dataset.placed(0, epoch=0)[1]["image_id"] == target["image_id"]
    images, targets = collate([to_canvas(image, objects, 64, 64, MEAN, STD) for objects in (target, empty)])
    assert images.shape == (2, 3, 64, 64)
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[1]["masks"].shape == (0, 64, 64)
    assert targets[1]["labels"].dtype == torch.int64


def test_large_scale_jitter_shrinks_and_crops():
    image, target = scene()
    scales = []
    for seed in range(40):
        canvas, placed = to_canvas(image, target, 40, 60, MEAN, STD, np.random.default_rng(seed), scale_jitter=(0.1, 2.0))
        scales.append(placed["scale"])
        rows, columns = (round(edge * placed["scale"]) for edge in (40, 60))
        assert not canvas[:, rows:].any()
        assert not canvas[:, :, columns:].any()
        for box, mask in zip(placed["boxes"], placed["masks"], strict=True):
            ys, xs = np.nonzero(mask.numpy())
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert min(scales) < 0.3
    assert 1.7 < max(scales) <= 2


def test_a_turned_item_lies_on_the_transposed_canvas():
    dataset = CanvasDataset(ShapesDataset(2, 1, 96, 64), 64, 96, MEAN, STD, seed=5, flip=True)
    image, target = dataset.placed(1, epoch=3, turned=True)
    assert image.shape == (3, 96, 64)
    assert target["masks"].shape[1:] == (96, 64)
    assert target["scale"] == 1.0
    assert dataset.placed(1, epoch=3)[1]["scale"] == pytest.approx(2 / 3)
    blank, nothing = dataset.blank(turned=True)
    assert blank.shape == (3, 96, 64)
    assert nothing["masks"].shape == (0, 96, 64)
    assert nothing["boxes"].shape == (0, 4)


def test_colours_are_those_of_torchvision() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for factors in ((0.7, 1.3, 0.6), (1.3, 0.7, 1.4), (1.0, 1.0, 1.0)):
        expected = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        expected = functional.adjust_brightness(expected, factors[0])
        expected = functional.adjust_contrast(expected, factors[1])
        expected = functional.adjust_saturation(expected, factors[2])
        found = with_colors(image, *factors).astype(float)
        np.testing.assert_allclose(found, 255 * expected.permute(1, 2, 0).numpy(), atol=0.51)


def test_colours_change_and_places_stay() -> None:
    """The same seed with and without jitter: the same boxes, other pixels; each epoch has its own colours."""
    data = ShapesDataset(2, 0, 96, 96)
    plain, jittered = (CanvasDataset(data, 64, 64, (0.5,) * 3, (0.5,) * 3, 0, (0.5, 1.5), True, jitter) for jitter in (0.0, 0.4))
    for epoch in range(3):
        (one, target), (other, other_target) = plain.placed(0, epoch), jittered.placed(0, epoch)
        assert torch.equal(target["boxes"], other_target["boxes"])
        assert not torch.equal(one, other)
