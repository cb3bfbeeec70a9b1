"""Ctrl-C and SIGTERM: a run ends after its current step, with everything saved."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """Whether SIGINT or SIGTERM has come, or the time is up; call it to ask."""

    requested: bool = False
    """A signal has come."""
    deadline: float | None = None
    """On the clock of `time.monotonic`."""

    def __call__(self) -> bool:
        return self.requested or (self.deadline is not None and time.monotonic() >= self.deadline)


@contextlib.contextmanager
def interruption(deadline: float | None = None) -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM in the block: the first one sets the flag, a second one acts as it would without this block."""
    flag = Interruption(deadline=deadline)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM in a loader's worker: they reach the whole process group, but the run still needs the worker's batches.

    The worker ends when its parent does; the loader sees to that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
