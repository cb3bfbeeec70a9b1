"""Where a reader leaves frames for the engine."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.frames import Frame

WAITING_FRAMES = 4
"""Frames of a file that wait for the engine."""
REPLACED, TOO_OLD, STOPPED, ENGINE_FAILED = "replaced", "too old", "stopped", "engine failed"
"""Why a decoded frame is not processed: a newer one came, it waited too long, the stream was stopped, the engine raised."""


@dataclass(frozen=True)
class Arrival:
    """A decoded frame that waits for the engine."""

    frame: Callable[[], Frame]
    """Gives the frame; converts it to RGB now, so that frames that nobody takes cost nothing."""
    captured: float
    """When it was captured, on the monotonic clock, in seconds: estimated for live sources, else when it was decoded."""


class Slot:
    """A bounded queue from one reader to the engine.

    A slot for the newest frame holds one, which a newer one replaces. Any other slot holds a few, and the reader waits for room.

    Args:
        changed: guards the slot; notified at each change. All slots of an engine share it, so that the engine waits for all at once.
        newest: whether to keep the newest frame only.
        discarded: counts, by reason, the frames that are not processed.
    """

    def __init__(self, changed: threading.Condition, newest: bool, discarded: Counter[str]) -> None:
        self._changed = changed
        self._newest = newest
        self._discarded = discarded
        self._waiting: deque[Arrival] = deque()
        self._closed = False

    def put(self, arrival: Arrival) -> bool:
        """Leave a frame; returns False once the slot is closed, and the reader ends."""
        with self._changed:
            if self._newest:
                self._discarded[REPLACED] += len(self._waiting)
                self._waiting.clear()
            else:
                self._changed.wait_for(lambda: self._closed or len(self._waiting) < WAITING_FRAMES)
            if self._closed:
                self._discarded[STOPPED] += 1
                return False
            self._waiting.append(arrival)
            self._changed.notify_all()
            return True

    def take(self, captured_after: float) -> Arrival | None:
        """The next frame captured at or after a time, or None; older ones are discarded. The caller holds `changed`."""
        while self._waiting:
            arrival = self._waiting.popleft()
            self._changed.notify_all()
            if arrival.captured >= captured_after:
                return arrival
            self._discarded[TOO_OLD] += 1
        return None

    def notify(self) -> None:
        """Wake the engine: the reader's state has changed."""
        with self._changed:
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Take no more frames and discard those that wait."""
        with self._changed:
            self._closed = True
            self._discarded[STOPPED] += len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
