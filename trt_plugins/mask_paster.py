"""Pastes the masks of a run on the device, after the network: only packed bits come to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.paste import PackedMask
from trt_plugins.driver import Bytes, Driver
from trt_plugins.operator import ALIGNMENT, DType, Launch, TensorSpec
from trt_plugins.paste_masks import PasteMasks
from trt_plugins.paste_masks.windows import FIELDS, count_words, make_windows, unpack_windows

MAX_WORDS = 16 << 20
"""Bits of a round, in words: 64 MiB. More come in several rounds."""

Launcher = Callable[[Launch, Sequence[int], Sequence[int], int, int], None]


class GridMasks(NamedTuple):
    """The mask logits of one grid on the device, and the images' pixels that they are pasted into."""

    address: int
    """Of the logits, `[n, G, G]`, dense."""
    grid: int
    """G."""
    dtype: DType
    boxes: npt.NDArray[np.float32]
    """`[n, 4]`, xyxy in the pixels of each instance's image."""
    pixels: npt.NDArray[np.int64]
    """`[n, 4]`, `runtime.paste.covered_pixels` of the boxes."""


class MaskPaster:
    """Runs PasteMasks on a stream. It keeps its buffers, which grow with the largest run so far."""

    def __init__(self, driver: Driver, launcher: Launcher) -> None:
        self._launcher = launcher
        self._inputs, self._bits = _Buffer(driver), _Buffer(driver)
        self._driver = driver

    def free(self) -> None:
        """Free the buffers."""
        self._inputs.free()
        self._bits.free()

    def paste(self, masks: Sequence[GridMasks], stream: int) -> list[list[PackedMask]]:
        """The masks of each grid, in the order of its logits. Waits for the stream.

        Raises:
            InputError: the engine was built without a kernel that is needed.
            DynaMaskError: CUDA failed, or the device's memory is too small.
        """
        words = [count_words(of_grid.pixels) for of_grid in masks]
        rounds = _rounds(np.concatenate(words)) if words else np.empty(0, np.int64)
        of_grids = np.split(rounds, np.cumsum([len(each) for each in words])[:-1]) if words else []
        pasted: list[dict[int, PackedMask]] = [{} for _ in masks]
        for number in range(int(rounds.max(initial=-1)) + 1):
            chosen = [np.flatnonzero(of_grid == number) for of_grid in of_grids]
            for found, indices, packed in zip(pasted, chosen, self._round(masks, words, chosen, stream), strict=True):
                found |= dict(zip(indices.tolist(), packed, strict=True))
        return [[found[index] for index in range(len(found))] for found in pasted]

    def _round(
        self,
        masks: Sequence[GridMasks],
        words: Sequence[npt.NDArray[np.int64]],
        chosen: Sequence[npt.NDArray[np.int64]],
        stream: int,
    ) -> list[list[PackedMask]]:
        """Paste the `chosen` instances of each grid."""
        inputs, windows, total = [], [], 0
        for of_grid, each, indices in zip(masks, words, chosen, strict=True):
            own, owners = make_windows(of_grid.pixels[indices], total)
            total += int(each[indices].sum())
            # Logits stay where they are: instances of other rounds have a row too, and no program.
            every = np.zeros((len(of_grid.boxes), FIELDS), np.int32)
            every[indices] = own
            windows.append(own)
            inputs.append((of_grid.boxes, every, indices.astype(np.int32)[owners]))
        addresses = self._upload([array for arrays in inputs for array in arrays], stream)
        if total:
            bits, host = self._bits.room(4 * total)
            for of_grid, arrays, index in zip(masks, inputs, range(0, len(addresses), 3), strict=True):
                self._launch(of_grid, arrays, addresses[index : index + 3], bits, total, stream)
            self._driver.to_host(host, bits, stream)
        self._driver.synchronize(stream)
        # The buffer is used again.
        copied = host.view(np.int32).copy() if total else np.empty(0, np.int32)
        return [unpack_windows(copied, own) for own in windows]

    def _launch(
        self, masks: GridMasks, arrays: Sequence[npt.NDArray[Any]], addresses: Sequence[int], bits: int, words: int, stream: int
    ) -> None:
        boxes, windows, owners = arrays
        logits = TensorSpec((len(boxes), masks.grid, masks.grid), masks.dtype)
        specs = [logits, TensorSpec(boxes.shape, "float32"), TensorSpec(windows.shape, "int32"), TensorSpec(owners.shape, "int32")]
        operator = PasteMasks(words=words)
        operator.check_inputs(specs)
        for launch in operator.launches(specs, [TensorSpec((words,), "int32")]):
            if 0 not in launch.grid:
                self._launcher(launch, [masks.address, *addresses], [bits], 0, stream)

    def _upload(self, arrays: Sequence[npt.NDArray[Any]], stream: int) -> list[int]:
        """Copy arrays to the device, in one copy; their addresses."""
        sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
        if not sum(sizes):
            return [0] * len(arrays)
        address, host = self._inputs.room(sum(sizes))
        offsets = (np.cumsum(sizes) - sizes).tolist()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._driver.to_device(address, host, stream)
        return [address + offset for offset in offsets]


def _rounds(words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The round `[n]` of each instance: as many as have at most `MAX_WORDS` together, and at least one."""
    rounds, number, filled = np.zeros(len(words), np.int64), 0, 0
    for index, size in enumerate(words.tolist()):
        if filled and filled + size > MAX_WORDS:
            number, filled = number + 1, 0
        filled += size
        rounds[index] = number
    return rounds


class _Buffer:
    """Memory on the device and pinned memory of the same size, which grow."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._size = driver, 0
        self._address = 0
        self._host: Bytes = np.empty(0, np.uint8)

    def room(self, size: int) -> tuple[int, Bytes]:
        """The address of at least `size` bytes on the device, and `[size]` bytes of pinned memory. Their content is not kept."""
        if size > self._size:
            self.free()
            grown = 1 << (size - 1).bit_length()
            self._address = self._driver.allocate(grown)
            self._host = self._driver.allocate_pinned(grown)
            self._size = grown
        return self._address, self._host[:size]

    def free(self) -> None:
        """Free both."""
        if self._address:
            self._driver.free(self._address)
        if len(self._host):
            self._driver.free_pinned(self._host)
        self._size, self._address, self._host = 0, 0, np.empty(0, np.uint8)
