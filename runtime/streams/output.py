"""A sink in a thread of its own, behind a bounded queue: a slow or failing sink stops nobody."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import DynaMaskError
from runtime.frames import Frame
from runtime.instances import Instances
from runtime.sinks import Sink
from runtime.streams.address import redacted

_LOG = logging.getLogger("dynamask.streams")
QUEUED_FRAMES = 4
"""The length of a queue whose writer waits."""
_PAUSES_S = (1.0, 30.0)
"""The first and the longest pause before a sink that failed is opened again."""
Full = Literal["wait", "drop"]


@dataclass(eq=False)
class Result:
    """A frame of a stream and the instances in it, with masks pasted and `times_ms` complete."""

    source: str
    """The stream's name."""
    frame: Frame
    instances: Instances
    done: Callable[[bool], None] = lambda written: None
    """Is called by each output, with whether it was written."""


class Output:
    """Writes results to a sink, in a thread of its own.

    Args:
        open_sink: opens the sink, and opens it again after a failure.
        name: of the sink, in logs and counts.
        sources: the names of the streams whose results it takes; None takes all.
        full: if the queue is full, `wait` makes the engine wait, `drop` drops the oldest result in it.
        queued: the length of the queue.
        retry: whether a sink that failed is opened again after a pause of 1 to 30 s, and closed at the end; else its error is kept in
            `failure`, and its owner closes it.
    """

    def __init__(
        self,
        open_sink: Callable[[], Sink],
        name: str,
        sources: set[str] | None = None,
        full: Full = "drop",
        queued: int = 64,
        retry: bool = True,
    ) -> None:
        self.name, self.sources = name, sources
        self.written = self.dropped = self.failures = 0
        self.error: str | None = None
        self.failure: BaseException | None = None
        self._open_sink, self._full, self._queued, self._retry = open_sink, full, queued, retry
        self._items: deque[Result] = deque()
        self._changed = threading.Condition()
        self._ending = self._aborted = False
        self._drain_until = float("inf")
        self._open_again_at = 0.0
        self._pause_s = _PAUSES_S[0]
        self._sink: Sink | None = None
        self._thread = threading.Thread(target=self._run, name=f"dynamask-write-{name}", daemon=True)
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, result: Result) -> bool:
        """Queue a result; returns False if the sink has failed for good or the output has ended."""
        if self.sources is not None and result.source not in self.sources:
            return True
        with self._changed:
            if self._full == "wait":
                self._changed.wait_for(lambda: self._ending or self._aborted or len(self._items) < self._queued)
            if self._ending or self._aborted:
                return False
            if len(self._items) >= self._queued:
                self._drop(self._items.popleft())
            self._items.append(result)
            self._changed.notify_all()
            return True

    def takes(self, source: str) -> bool:
        """Whether the results of a stream go here."""
        return self.sources is None or source in self.sources

    def end(self, drain_s: float = float("inf")) -> None:
        """Finish after what is queued, but begin no write after `drain_s` seconds. Returns at once."""
        with self._changed:
            self._ending = True
            self._drain_until = min(self._drain_until, time.monotonic() + drain_s)
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> bool:
        """Wait until the sink is finished; returns whether it is."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def counts(self) -> dict[str, Any]:
        """`written`, `dropped`, `failures`, `queued` and the last `error`."""
        return {
            "written": self.written,
            "dropped": self.dropped,
            "failures": self.failures,
            "queued": len(self._items),
            "error": self.error,
        }

    def _run(self) -> None:
        while (result := self._next()) is not None:
            try:
                if self._sink is None:
                    self._sink = self._open_sink()
                self._sink.write(result.frame, result.instances)
            except BaseException as error:
                self._failed(error, result)
                if not self._retry:
                    return
                continue
            self.written += 1
            self._pause_s = _PAUSES_S[0]
            self.error = None
            result.done(True)
            del result
        sink, self._sink = self._sink, None
        if self._retry and sink is not None:
            try:
                sink.close()
            except DynaMaskError as error:
                self.failures += 1
                self.error = redacted(str(error))
                _LOG.warning("%s: %s", self.name, self.error)

    def _next(self) -> Result | None:
        with self._changed:
            while True:
                now = time.monotonic()
                if self._ending and now >= self._drain_until:
                    while self._items:
                        self._drop(self._items.popleft())
                paused = self._open_again_at - now
                if self._items and (paused <= 0 or self._ending):
                    result = self._items.popleft()
                    self._changed.notify_all()
                    return result
                if self._ending and not self._items:
                    return None
                self._changed.wait(min(max(paused, 0.01), 1.0) if self._items else 1.0)

    def _drop(self, result: Result) -> None:
        self.dropped += 1
        result.done(False)

    def _failed(self, error: BaseException, result: Result) -> None:
        self.failures += 1
        self.error = redacted(str(error) if isinstance(error, DynaMaskError) else f"{type(error).__name__}: {error}")
        with self._changed:
            self._drop(result)
            if not self._retry:
                self.failure, self._aborted = error, True
            self._open_again_at = time.monotonic() + self._pause_s
            self._changed.notify_all()
        if not self._retry:
            self.on_failure()
            return
        _LOG.warning("%s: %s; opened again in %.0f s", self.name, self.error, self._pause_s)
        self._pause_s = min(2 * self._pause_s, _PAUSES_S[1])
        sink, self._sink = self._sink, None
        if sink is not None:
            with contextlib.suppress(Exception):
                sink.abandon()
