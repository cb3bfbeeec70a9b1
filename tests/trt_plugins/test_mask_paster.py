"""Pasting after the network: memory of the host in place of the device's, the kernel in Triton's interpreter; results are the host's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from runtime.paste import covered_pixels, mask_crop
from tests.trt_plugins import host_memory
from trt_plugins import mask_paster
from trt_plugins.mask_paster import GridMasks, MaskPaster

FRAMES = [(37, 300), (90, 64)]


class HostDriver:
    """Allocates memory of the host, with a guard behind each block, and copies at once."""

    GUARD = 64

    def __init__(self):
        self.blocks, self.pinned = {}, []

    def allocate(self, size):
        block = np.full(size + self.GUARD, 0xA5, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address):
        self.check()
        del self.blocks[address]

    def check(self):
        assert all((block[-self.GUARD :] == 0xA5).all() for block in self.blocks.values()), "written behind a buffer"

    def allocate_pinned(self, size):
        self.pinned.append(np.full(size, 0xA5, np.uint8))
        return self.pinned[-1]

    def free_pinned(self, memory):
        self.pinned = [block for block in self.pinned if block is not memory]

    def to_device(self, address, source, stream):
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, destination, address, stream):
        ctypes.memmove(destination.ctypes.data, address, destination.nbytes)

    def synchronize(self, stream):
        self.check()


def interpret(launch, inputs, outputs, workspace, stream):
    """As `KernelLauncher`, in the interpreter."""
    grid = dict(launch.kernel.constants)["SIZE"]
    host_memory.paste(grid, launch.grid[0], *inputs, *outputs, *launch.arguments[5:])


def instances(random, count):
    """Boxes of `count` instances in one frame or the other, their pixels and their frames' sizes; some are outside or empty."""
    frames = [FRAMES[i] for i in random.integers(0, 2, count)]
    corners = np.sort(random.uniform(-20, 120, (count, 2, 2)), axis=1)
    boxes = corners.reshape(count, 4).astype(np.float32)
    boxes[::5, 2:] = boxes[::5, :2]
    pixels = np.array([covered_pixels(box, *size) for box, size in zip(boxes, frames, strict=True)], np.int64).reshape(count, 4)
    return boxes, pixels, frames


@pytest.mark.parametrize("counts", [[9, 5, 0, 3], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 12]], ids=str)
@pytest.mark.parametrize("most", [1 << 20, 200])
def test_masks_are_those_that_the_host_pastes(counts, most, monkeypatch):
    monkeypatch.setattr(mask_paster, "MAX_WORDS", most)
    random, driver = np.random.default_rng(sum(counts)), HostDriver()
    paster = MaskPaster(driver, interpret)
    for _ in range(2):
        held, masks, expected = [], [], []
        for grid, count in zip((14, 28, 56, 112), counts, strict=True):
            logits = np.repeat(np.repeat(random.choice([-8.0, 8.0], (count, 7, 7)), grid // 7, 1), grid // 7, 2).astype(np.float32)
            boxes, pixels, frames = instances(random, count)
            held.append(logits)
            masks.append(GridMasks(logits.ctypes.data, grid, "float32", boxes, pixels))
            expected.append([mask_crop(*each[:2], *each[2]) for each in zip(logits, boxes, frames, strict=True)])
        found = paster.paste(masks, stream=0)
        assert [len(of_grid) for of_grid in found] == counts
        wrong = covered = 0
        for of_grid, wanted in zip(found, expected, strict=True):
            for mask, (left, top, crop) in zip(of_grid, wanted, strict=True):
                x, y, pixels = mask.crop()
                assert pixels.shape == crop.shape and (not crop.size or (x, y) == (left, top))
                wrong, covered = wrong + int((pixels != crop).sum()), covered + int(crop.sum())
        # OpenCV rounds where it samples to a 32nd of a cell: pixels at the contour may differ.
        assert wrong <= 0.01 * covered
    paster.free()
    assert not driver.blocks and not driver.pinned
