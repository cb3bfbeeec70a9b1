"""The gradients of one batch, whole or shared by the processes that torchrun has started: `python gradients.py PHASE OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamask.config import LITE0, Config
from dynamask.distributed import World, averaged, joined
from dynamask.model import build_model

SIDE = 128


def batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Four images with 1, 3, 0 and 2 instances: no two processes have equally many."""
    generator = torch.Generator().manual_seed(1)
    targets = []
    for count in (1, 3, 0, 2):
        corner = torch.randint(5, 60, (count, 2), generator=generator).float()
        boxes = torch.cat([corner, corner + torch.randint(20, 60, (count, 2), generator=generator)], dim=1)
        masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
            mask[(y0 + y1) // 2 :, (x0 + x1) // 2 :] = 0
        targets.append({"boxes": boxes, "labels": torch.randint(1, 3, (count,), generator=generator), "masks": masks})
    return torch.randn(4, 3, SIDE, SIDE, generator=generator), targets


def gradients(phase: int, world: World) -> dict[str, Tensor]:
    """Of this process's share, averaged over the processes; nothing that is sampled is left to chance."""
    torch.manual_seed(0)
    sizes = {"canvas": (SIDE, SIDE), "mask_rois_per_image": 64, "frozen_stages": 4}
    model = build_model(Config(model=LITE0.model_copy(update=sizes)), [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]).train()
    model.phase = phase
    images, targets = batch()
    half = torch.full((), 0.5)
    with (
        averaged(model, world) as parallel,
        mock.patch("torch.randperm", lambda n, **kwargs: torch.arange(n)),
        mock.patch("torch.rand", lambda *shape, **kwargs: half.expand(shape[0]).clone()),
    ):
        losses = parallel(images[world.rank :: world.size], targets[world.rank :: world.size])
        torch.stack(list(losses.values())).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


if __name__ == "__main__":
    with joined() as world:
        assert world.size == 2
        for phase in (1, 2):
            found = gradients(phase, world)
            if world.is_main:
                save_file(found, Path(sys.argv[1]) / f"phase{phase}.safetensors")
