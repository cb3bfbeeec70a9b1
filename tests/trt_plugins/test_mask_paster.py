"""Pasting after the network: memory of the host in place of the device's, the kernel in Triton's interpreter; results are the host's."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from runtime.errors import DynaMaskError, InputError
from runtime.graph import GRIDS
from runtime.paste import covered_pixels, mask_crop
from tests.trt_plugins import host_memory
from tests.trt_plugins.host_memory import Guarded
from trt_plugins import mask_paster
from trt_plugins.kernels import CompiledKernel
from trt_plugins.launcher import KernelLauncher
from trt_plugins.mask_paster import GridMasks, MaskPaster
from trt_plugins.paste_masks.operator import paste_kernel

FRAMES = [(37, 300), (90, 64)]


class HostDriver:
    """The part of the driver that pasting needs, on guarded memory; launches are interpreted from their packed arguments."""

    def __init__(self, room=1 << 30):
        self.device, self.pinned, self.room, self.launches = Guarded(), Guarded(), room, 0

    def allocate(self, size):
        if size > self.room:
            raise DynaMaskError("cuMemAlloc failed: out of memory.")
        return self.device.take(size)

    def free(self, address):
        self.device.give(address)

    def allocate_pinned(self, size):
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pinned.take(size)))

    def free_pinned(self, memory):
        self.pinned.give(memory.ctypes.data)

    def to_device(self, address, source, stream):
        assert stream == STREAM and source.nbytes <= self.device.sizes[address]
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, destination, address, stream):
        assert stream == STREAM and 0 < destination.nbytes <= self.device.sizes[address]
        ctypes.memmove(destination.ctypes.data, address, destination.nbytes)

    def synchronize(self, stream):
        assert stream == STREAM
        self.device.check()
        self.pinned.check()

    def load_kernel(self, cubin, entry, arguments, threads, shared):
        assert (entry, threads, shared) == ("paste_masks", 128, 512)
        return SPECS[cubin], arguments

    def launch(self, kernel, grid, stream, arguments):
        spec, letters = kernel
        *values, scratch, profile = struct.unpack(letters, struct.pack(letters, *arguments))
        assert stream == STREAM and scratch == profile == 0 and 0 < grid[0] < 2**31 and grid[1:] == (1, 1)
        host_memory.interpret(spec, grid, values, self.device.sizes)
        self.launches += 1

    def put(self, array):
        """The address of a copy on the device."""
        address = self.allocate(array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address


STREAM = 77
SPECS = {b"paste %d" % grid: paste_kernel(grid) for grid in GRIDS}


def launcher_of(driver, specs=SPECS):
    """The launcher of an engine with these kernels."""
    fields = {"compute_capability": "8.6", "shared": 512, "global_scratch": 0, "profile_scratch": 0, "registers": 32, "spills": 0}
    kernels = {
        spec.key: CompiledKernel(key=spec.key, entry=spec.function, signature=spec.signature, num_warps=4, cubin=cubin, **fields)
        for cubin, spec in specs.items()
    }
    return KernelLauncher(driver, kernels, None, "build it again.")


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
    paster = MaskPaster(driver, launcher_of(driver))
    for _ in range(2):
        held, masks, expected = [], [], []
        for grid, count in zip((14, 28, 56, 112), counts, strict=True):
            logits = np.repeat(np.repeat(random.choice([-8.0, 8.0], (count, 7, 7)), grid // 7, 1), grid // 7, 2).astype(np.float32)
            boxes, pixels, frames = instances(random, count)
            if count:
                held.append(driver.put(logits))
            masks.append(GridMasks(held[-1] if count else 0, grid, "float32", boxes, pixels))
            expected.append([mask_crop(*each[:2], *each[2]) for each in zip(logits, boxes, frames, strict=True)])
        found = paster.paste(masks, STREAM)
        assert [len(of_grid) for of_grid in found] == counts
        wrong = covered = 0
        for of_grid, wanted in zip(found, expected, strict=True):
            for mask, (left, top, crop) in zip(of_grid, wanted, strict=True):
                x, y, pixels = mask.crop()
                assert pixels.shape == crop.shape and (not crop.size or (x, y) == (left, top))
                wrong, covered = wrong + int((pixels != crop).sum()), covered + int(crop.sum())
        # OpenCV rounds where it samples to a 32nd of a cell: pixels at the contour may differ, before version 5 more of them.
        assert wrong <= 0.03 * covered
        for address in held:
            driver.free(address)
    paster.free()
    assert not driver.device.sizes and not driver.pinned.sizes


def whole(driver, count=3, grid=14):
    """Masks that cover their boxes, the whole of a frame each."""
    boxes = np.tile(np.array([[0, 0, 300, 37]], np.float32), (count, 1))
    logits = np.full((count, grid, grid), 9, np.float32)
    return GridMasks(driver.put(logits), grid, "float32", boxes, covered_pixels(boxes, 37, 300))


@pytest.mark.parametrize(("most", "launches"), [(3 * 370, 1), (2 * 370, 2), (370, 3), (1, 3)])
def test_bits_beyond_the_room_are_pasted_in_rounds(monkeypatch, most, launches):
    monkeypatch.setattr(mask_paster, "MAX_WORDS", most)
    driver = HostDriver()
    paster = MaskPaster(driver, launcher_of(driver))
    masks = whole(driver)
    [found] = paster.paste([masks], STREAM)
    assert driver.launches == launches and [mask.words.size for mask in found] == [370] * 3
    # The masks own their bits: the next run does not change them.
    before = [mask.crop()[2].copy() for mask in found]
    paster.paste([masks._replace(boxes=masks.boxes - 90)], STREAM)
    for mask, pixels in zip(found, before, strict=True):
        assert pixels[2:-2, 20:-20].all()
        np.testing.assert_array_equal(mask.crop()[2], pixels)
    # The buffers have room for a round, or for one mask.
    assert max(size for address, size in driver.device.sizes.items() if address != masks.address) <= 2 * 4 * max(most, 370)


def test_too_little_memory_is_an_error_and_the_next_run_works():
    driver = HostDriver(room=3000)
    paster = MaskPaster(driver, launcher_of(driver))
    masks = whole(driver)
    for _ in range(2):
        with pytest.raises(DynaMaskError, match="out of memory"):
            paster.paste([masks], STREAM)
    driver.room = 1 << 30
    [found] = paster.paste([masks], STREAM)
    assert all(mask.crop()[2][2:-2, 20:-20].all() for mask in found)
    paster.free()
    assert driver.device.sizes.keys() == {masks.address} and not driver.pinned.sizes


def test_an_engine_without_the_kernel_is_refused():
    driver = HostDriver()
    paster = MaskPaster(driver, launcher_of(driver, {}))
    with pytest.raises(InputError, match=r"another version of DynaMask, without the kernel paste_masks-\w+; build it again\.$"):
        paster.paste([whole(driver)], STREAM)


def test_writing_beyond_a_block_is_noticed():
    memory = Guarded()
    address = memory.take(100)
    for place, value in ((address + 100, 1), (address - 1, 1)):
        memory.check()
        ctypes.memset(place, value, 1)
        with pytest.raises(AssertionError, match="written outside of the 100 bytes"):
            memory.check()
        ctypes.memset(place, Guarded.FILL, 1)
