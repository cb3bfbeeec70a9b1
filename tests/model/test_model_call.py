"""`model(images)` in evaluation mode gives results as torchvision's detectors do; tests/test_end_to_end.py compares it with its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F

import dynamask
from dynamask.data.shapes import draw_image
from dynamask.model import DynaMask
from dynamask.train.checkpoint import load_model
from runtime.errors import InputError
from runtime.paste import probability_crop

CHECKPOINT = Path(dynamask.__file__).parent / "assets" / "lite0-shapes.safetensors"


@pytest.fixture(scope="module")
def model() -> DynaMask:
    loaded = load_model(CHECKPOINT)[0]
    assert isinstance(loaded, DynaMask)
    return loaded


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Scenes of two sizes, neither of them the canvas's shape."""
    return [draw_image(np.random.default_rng([3, i]), *size)[0] for i, size in enumerate([(240, 416), (400, 300)])]


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def test_results_have_torchvisions_form(model: DynaMask, images: list[np.ndarray]) -> None:
    (found,) = model([tensor(images[0])])
    count, (height, width) = len(found["boxes"]), images[0].shape[:2]
    forms = {name: (tuple(value.shape), value.dtype) for name, value in found.items()}
    assert forms == {
        "boxes": ((count, 4), torch.float32),
        "labels": ((count,), torch.int64),
        "scores": ((count,), torch.float32),
        "grids": ((count,), torch.int64),
        "masks": ((count, 1, height, width), torch.float32),
    }
    assert found["labels"].min() >= 1 and (found["scores"].diff() <= 0).all()
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_mask_probabilities_are_bilinear_samples_at_pixel_centres() -> None:
    """Against PyTorch's sampling; OpenCV rounds the position in the grid to 1/32 of a cell."""
    logits, (x0, y0, x1, y1) = torch.randn(28, 28, generator=torch.Generator().manual_seed(0)), (10.3, 5.8, 66.1, 60.2)
    left, top, crop = probability_crop(logits.numpy(), np.array([x0, y0, x1, y1], np.float32), 80, 90)
    x = (torch.arange(10, 66) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(6, 60) + 0.5 - y0) / (y1 - y0) * 2 - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    peer = F.grid_sample(logits.sigmoid()[None, None], places[None], align_corners=False)[0, 0].numpy()
    assert (left, top, crop.shape) == (10, 6, peer.shape)
    np.testing.assert_allclose(crop, peer, atol=0.04)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 8, 8), r"\[1, 8, 8\]"),
        (torch.full((3, 8, 8), 255.0), "255 to 255"),
        (torch.full((3, 8, 8), float("nan")), "from 0 to 1"),
        (np.zeros((3, 8, 8), np.float32), "ndarray"),
    ],
)
def test_values_other_than_images_are_refused(model: DynaMask, image: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        model([image])


def test_in_training_mode_a_list_of_images_is_refused(model: DynaMask) -> None:
    try:
        with pytest.raises(InputError, match=r"model\.eval\(\)"):
            model.train()([torch.zeros(3, 64, 64)])
    finally:
        model.eval()


def test_the_names_of_the_parameters_are_those_of_the_carried_checkpoint(model: DynaMask) -> None:
    with safetensors.safe_open(CHECKPOINT, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
