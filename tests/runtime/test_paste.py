"""Pasted crops against a full-image reference in PyTorch and against torchvision, their run-lengths against pycocotools."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from runtime.paste import encode_crop, mask_crop

HEIGHT, WIDTH = 120, 160


def blob(random, grid):
    """Smooth logits with a few components, some reaching the grid's border."""
    return cv2.GaussianBlur(random.normal(size=(grid, grid)).astype(np.float32), (0, 0), grid / 10) * grid


def boxes(random, count):
    """Boxes of all sizes, some of them beyond the image."""
    centre, side = random.uniform(0, [WIDTH, HEIGHT], (count, 2)), np.exp(random.uniform(0, np.log(200), (count, 2)))
    return np.concatenate([centre - side / 2, centre + side / 2], 1).astype(np.float32)


def full(crop, height=HEIGHT, width=WIDTH):
    x0, y0, mask = crop
    image = np.zeros((height, width), bool)
    image[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return image


def sampled(logits, box):
    """The probability at every pixel of the image, as Detectron2 samples it."""
    x0, y0, x1, y1 = box.astype(np.float64)
    x = (torch.arange(WIDTH, dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(HEIGHT, dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
    places = torch.stack([x.expand(HEIGHT, -1), y[:, None].expand(-1, WIDTH)], -1)[None]
    probabilities = torch.sigmoid(torch.from_numpy(logits).double())[None, None]
    return torch.nn.functional.grid_sample(probabilities, places, align_corners=False, padding_mode="zeros")[0, 0].numpy()


@pytest.mark.parametrize("grid", [14, 28, 56, 112])
def test_a_crop_is_where_the_sampled_probability_exceeds_a_half(grid):
    random = np.random.default_rng(grid)
    for box in boxes(random, 20):
        logits = blob(random, grid)
        expected = sampled(logits, box)
        mask = full(mask_crop(logits, box, HEIGHT, WIDTH))
        different = mask != (expected > 0.5)
        # Some versions of OpenCV interpolate at 1/32 of a cell.
        assert (np.abs(expected[different] - 0.5) < 0.05).all()
        assert different.mean() < 0.002


def test_crops_agree_with_torchvision():
    y, x = np.mgrid[:28, :28] - 13.5
    logits = (11 - np.hypot(y, x)).astype(np.float32)
    # Large, because torchvision rounds boxes to whole pixels and counts the last one in.
    for box in np.array([[20, 10, 580, 458], [-60, 40, 332, 488]], np.float32):
        places, probabilities = torch.from_numpy(box)[None], torch.sigmoid(torch.from_numpy(logits))[None, None]
        theirs = paste_masks_in_image(probabilities, places, (480, 640))[0, 0].numpy() > 0.5
        ours = full(mask_crop(logits, box, 480, 640), 480, 640)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98


def test_a_sure_mask_fills_its_box_and_no_more():
    x0, y0, mask = mask_crop(np.full((14, 14), 50, np.float32), np.array([3.4, 5.6, 20.5, 30.6]), HEIGHT, WIDTH)
    assert (x0, y0, mask.shape) == (3, 6, (25, 17)) and mask[1:-1, 1:-1].all()


@pytest.mark.parametrize(
    "box", [[5.1, 5.1, 5.2, 5.2], [7, 7, 7, 7], [-50, -50, -10, -10], [WIDTH, 0, WIDTH + 9, 9], [20, 20, 10, 10]], ids=str
)
def test_a_box_without_pixels_gives_an_empty_crop(box):
    crop = mask_crop(np.full((14, 14), 9, np.float32), np.array(box, np.float32), HEIGHT, WIDTH)
    assert crop[2].size == 0
    assert encode_crop(crop, HEIGHT, WIDTH)["counts"] == coco_mask.encode(np.zeros((HEIGHT, WIDTH), np.uint8, "F"))["counts"].decode()


def test_run_lengths_are_pycocotools_own():
    random = np.random.default_rng(0)
    crops = [mask_crop(blob(random, 28), box, HEIGHT, WIDTH) for box in boxes(random, 40)]
    # Full height: runs go on from column to column, and to the image's very end.
    crops += [(x0, 0, random.random((HEIGHT, WIDTH - x0)) < share) for x0 in (0, 30) for share in (0, 0.5, 0.95, 1.1)]
    crops += [(2, 0, np.ones((HEIGHT, 3), bool)), (WIDTH - 1, HEIGHT - 1, np.ones((1, 1), bool))]
    for crop in crops:
        expected = coco_mask.encode(np.asfortranarray(full(crop), dtype=np.uint8))
        assert encode_crop(crop, HEIGHT, WIDTH) == {"size": [HEIGHT, WIDTH], "counts": expected["counts"].decode()}
