"""The thread that reads one source: it connects, reads, and connects again after a pause, until it is stopped."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import DynaMaskError
from runtime.frames import Source
from runtime.sources import open_source
from runtime.streams.address import FILE, Address, redacted
from runtime.streams.live import LiveSource
from runtime.streams.slot import ENGINE_FAILED, Arrival, Slot

_LOG = logging.getLogger("dynamask.streams")

CONNECTING, RUNNING, STALLED, RETRYING, ENDED = "connecting", "running", "stalled", "retrying", "ended"
STATES = (CONNECTING, RUNNING, STALLED, RETRYING, ENDED)
BROKEN, MISSING, GAP = "broken", "missing", "gap"
"""Reasons why a frame was never decoded: damaged, announced by the file but absent, or absent by the time stamps of a live source."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
_JITTER = 0.2
_STEADY_S = 10.0
"""After a connection of this length, the next pause is the first one again."""


class SourceSettings(BaseModel):
    """How a source is read. Fields that are None depend on the source: live ones keep the newest frame and are retried, files wait."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    behind: Literal["newest", "wait"] | None = None
    """Which frames the engine gets when it is slower than the source: the newest one, or all, and the source waits."""
    max_age_ms: float | None = Field(default=None, gt=0)
    """Frames captured longer ago than this are not processed; None sets 1,000 ms with `newest`, and no limit with `wait`."""
    retry: bool | None = None
    """Whether to connect again after the end or a fault."""
    connect_s: float = Field(default=5.0, gt=0, le=60)
    """Seconds after which an attempt to connect is given up."""
    stall_s: float = Field(default=2.0, ge=0.2, le=600)
    """Seconds without a frame after which the connection is given up; more for cameras with few frames."""
    transport: Literal["tcp", "udp"] = "tcp"
    """Of RTSP."""
    hardware: str | None = None
    """The device that decodes (`cuda`, `vaapi`); where it does not work, the CPU decodes."""


class Reader:
    """Reads a source in a thread of its own and leaves its frames in a slot.

    Args:
        address: the source.
        settings: how it is read.
        changed: as in `Slot`.
        name: of the stream, in logs and results.
        opened: the source itself, if it is open already.
        limit: the number of frames after which the source ends.
    """

    def __init__(
        self,
        address: Address,
        settings: SourceSettings,
        changed: threading.Condition,
        name: str,
        opened: Source | None = None,
        limit: int | None = None,
    ) -> None:
        live = address.live if opened is None else False
        self.address, self.settings, self.name = address, settings, name
        self.live = live
        self.retry = live if settings.retry is None else settings.retry
        newest = live if settings.behind is None else settings.behind == "newest"
        self.max_age_s = (1.0 if newest else float("inf")) if settings.max_age_ms is None else settings.max_age_ms / 1000
        self.discarded: Counter[str] = Counter()
        self.slot = Slot(changed, newest, self.discarded)
        self.frames = self.connections = self.bridged = 0
        self.error: str | None = None
        self.frame_rate = Fraction(25) if opened is None else opened.frame_rate
        self.failure: BaseException | None = None
        """What ended the source, if it was no fault of the source's."""
        self._opened, self._limit = opened, limit
        self._state, self._retry_at = CONNECTING, 0.0
        self._began: float | None = None
        self._last = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"dynamask-read-{name}", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End; frames that wait are discarded. Returns at once."""
        self._stop.set()
        self.slot.close()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread. One that is blocked in a device's driver ends with the process."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def state(self) -> str:
        """One of `STATES`."""
        # By the last frame, also while the thread is inside FFmpeg.
        silent = time.monotonic() - self._last > max(self.settings.stall_s / 2, 3 / float(self.frame_rate))
        return STALLED if self._state == RUNNING and self.live and silent else self._state

    @property
    def ended(self) -> bool:
        """Whether no frame will come any more."""
        return self._state == ENDED and not len(self.slot)

    def describe(self) -> str:
        """The state in words: `retrying in 8 s`."""
        state = self.state
        return f"retrying in {max(0.0, self._retry_at - time.monotonic()):.0f} s" if state == RETRYING else state

    def counts(self) -> dict[str, Any]:
        """`state`, `frames` (decoded), `discarded` by reason, `connections`, `bridged` (as in `Source`), and the last `error`."""
        discarded = {reason: count for reason, count in sorted(self.discarded.items()) if count}
        return {
            "state": self.describe(),
            "frames": self.frames,
            "discarded": discarded,
            "connections": self.connections,
            "bridged": self.bridged,
            "error": self.error,
        }

    def engine_failed(self) -> None:
        """Count a frame that the engine raised on."""
        self.discarded[ENGINE_FAILED] += 1

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set():
            connected = time.monotonic()
            self._set(CONNECTING)
            try:
                self._read()
                reason = "the source ended"
            except DynaMaskError as error:
                reason = redacted(str(error))
                self.error = reason
                self.failure = error
            except BaseException as error:
                # A fault of this code must not end the other streams.
                reason = redacted(f"{type(error).__name__}: {error}")
                self.error = reason
                self.failure = error
            if not self.retry or self._stop.is_set() or (self._limit is not None and self.frames >= self._limit):
                break
            if time.monotonic() - connected > _STEADY_S:
                pause_s = FIRST_PAUSE_S
            self._pause(reason, pause_s * random.uniform(1 - _JITTER, 1 + _JITTER))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self._set(ENDED)

    def _pause(self, reason: str, seconds: float) -> None:
        self._retry_at = time.monotonic() + seconds
        self._set(RETRYING)
        _LOG.warning("%s: %s; retrying in %.1f s", self.name, reason, seconds)
        self._stop.wait(seconds)

    def _set(self, state: str) -> None:
        if state != self._state:
            _LOG.info("%s: %s", self.name, state)
        self._state = state
        self.slot.notify()

    def _read(self) -> None:
        for arrival in self._arrivals():
            self._last = time.monotonic()
            if self._state != RUNNING:
                self._set(RUNNING)
                self.error = self.failure = None
            self.frames += 1
            if not self.slot.put(arrival) or self.frames == self._limit:
                return

    def _arrivals(self) -> Iterator[Arrival]:
        if self._opened is not None or self.address.kind == FILE:
            return self._file_arrivals()
        return self._live_arrivals()

    def _file_arrivals(self) -> Iterator[Arrival]:
        with contextlib.ExitStack() as stack:
            # A source that is given stays open for its owner.
            source = self._opened or stack.enter_context(open_source(self.address.reveal()))
            self.connections += 1
            self.frame_rate = source.frame_rate
            broken, missing = self.discarded[BROKEN], self.discarded[MISSING]
            for frame in source:
                yield Arrival(_constant(frame), time.monotonic())
                self.bridged = source.bridged
                self.discarded[BROKEN] = broken + source.broken
            self.discarded[BROKEN] = broken + source.broken
            self.discarded[MISSING] = missing + source.missing

    def _live_arrivals(self) -> Iterator[Arrival]:
        settings = self.settings

        def count_broken() -> None:
            self.discarded[BROKEN] += 1

        with LiveSource(self.address, settings.connect_s, settings.stall_s, settings.transport, settings.hardware, count_broken) as source:
            self.connections += 1
            self.frame_rate = source.frame_rate
            now = time.monotonic()
            self._began = self._began or now
            bridged, gaps = self.bridged, self.discarded[GAP]
            for arrival in source.arrivals(self.frames, now - self._began):
                self.bridged, self.discarded[GAP] = bridged + source.bridged, gaps + source.gaps
                yield arrival


def _constant(frame: Any) -> Callable[[], Any]:
    return lambda: frame
