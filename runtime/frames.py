"""Frames of videos and images, and the interface of their sources."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError


@dataclass(frozen=True)
class Frame:
    """One picture of a source."""

    index: int
    """Its place in the source, from 0; frames that could not be decoded leave gaps."""
    time_s: float
    """Seconds since the source's first frame."""
    image: npt.NDArray[np.uint8]
    """`[H, W, 3] uint8` RGB, upright."""
    name: str | None = None
    """The file's name, for a folder of images."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a stream of several sources says of the frame, for JSON: `source`, `age_ms`, `predicted_ms`, …"""


class Source(Protocol):
    """Frames in order, decoded while they are iterated over. A source is iterated once, then closed.

    `frame_rate` is in frames a second, `size` is the first frame's `(height, width)`, `frame_count` the count that the source announces,
    if it does. `broken` counts the frames met so far that could not be decoded and were left out, `missing` those announced but absent at
    the end, `bridged` the places where time stamps were absent, did not rise or jumped, and time went on at the frame rate instead.
    """

    path: Path
    frame_rate: Fraction
    size: tuple[int, int]
    frame_count: int | None
    broken: int
    missing: int
    bridged: int

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Source: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class OpenedOnFirstFrame(abc.ABC):
    """A source that decodes its first frame when it is opened, so that a bad file is refused before anything else starts."""

    path: Path
    frame_rate: Fraction
    frame_count: int | None = None

    def __init__(self) -> None:
        self.broken = 0
        self.missing = 0
        self.bridged = 0
        self._decoded = self._decode()
        try:
            first = next(self._decoded, None)
        except BaseException:
            self.close()
            raise
        if first is None:
            self.close()
            raise InputError(f"{self.path}: none of its frames can be decoded; it is damaged or truncated, give another file.")
        self._first: Frame | None = first
        self.size: tuple[int, int] = (first.image.shape[0], first.image.shape[1])

    def __iter__(self) -> Iterator[Frame]:
        first, self._first = self._first, None
        if first is not None:
            yield first
        del first
        yield from self._decoded

    @abc.abstractmethod
    def _decode(self) -> Iterator[Frame]:
        """All frames that can be decoded, from the first."""

    def close(self) -> None:  # noqa: B027
        """Free what the source holds open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
