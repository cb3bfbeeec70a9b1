"""Readers, one engine and outputs, side by side: what runs a stream of one file and sixteen cameras alike."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from runtime.frames import Frame
from runtime.instances import Instances
from runtime.streams.address import redacted
from runtime.streams.output import Output, Result
from runtime.streams.reader import Reader
from runtime.streams.slot import Arrival

_LOG = logging.getLogger("dynamask.streams")
_CHECK_S = 0.25
"""The engine looks this often whether frames that wait have become too old."""
ENGINE_FAILURES = 10
"""A service ends after this number of failures of the engine in a row."""


class Pipeline:
    """Readers, slots, one engine that takes the sources in turn, outputs. No queue is without a bound, and no thread waits for ever.

    Args:
        readers: the sources; may change while it runs (`add`, `remove`).
        segment: the engine: source's name, frame and its age in seconds -> the instances with their masks pasted.
        outputs: where the results go.
        service: whether a failure of the engine or an output is counted and survived; else it ends the stream.
        progress: is called with the number of frames that all outputs have.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        segment: Callable[[str, Frame, float], tuple[Frame, Instances]],
        outputs: Sequence[Output],
        changed: threading.Condition,
        service: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.readers, self.outputs = list(readers), list(outputs)
        self.frames = 0
        """Frames through the engine and all outputs."""
        self.processed = 0
        """Frames through the engine."""
        self.engine_failures = 0
        self.interrupted = False
        self.keep_open = False
        """Whether the engine waits for more after the end of all sources, because they can be started again."""
        self.last_progress = time.monotonic()
        """When the engine last finished a frame, or had none to do."""
        self._segment, self._service, self._progress = segment, service, progress
        self._changed = changed
        self._turn = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._counted = threading.Lock()
        self._engine = threading.Thread(target=self._run_engine, name="dynamask-engine", daemon=True)
        for output in self.outputs:
            output.on_failure = self._output_failed

    def start(self) -> None:
        """Begin; returns at once."""
        for output in self.outputs:
            output.start()
        for reader in self.readers:
            reader.start()
        self._engine.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of all sources; returns whether the engine has ended."""
        self._engine.join(seconds)
        return not self._engine.is_alive()

    def stop(self) -> None:
        """End the stream: no more frames are read; what the engine finished is written. Returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for reader in self.readers:
            reader.stop()

    def finish(self, drain_s: float = float("inf"), patience_s: float | None = None) -> BaseException | None:
        """After `wait` or `stop`: write what is queued and finish the outputs, before anything else is waited for.

        Args:
            drain_s: no write begins later than this.
            patience_s: outputs, engine and readers that take longer are left behind; None waits for them.

        Returns:
            What made the stream fail, or None.
        """
        end = None if patience_s is None else time.monotonic() + patience_s

        def left() -> float | None:
            return None if end is None else max(0.0, end - time.monotonic())

        if self._stopping:
            # The engine's current frame is written too, unless the engine hangs.
            self._engine.join(None if patience_s is None else patience_s / 4)
        for output in self.outputs:
            output.end(drain_s)
        late = [output.name for output in self.outputs if not output.join(left())]
        if late:
            _LOG.error("not finished in time: %s", ", ".join(late))
        for reader in self.readers:
            reader.stop()
        for reader in self.readers:
            reader.join(left())
        self._engine.join(left())
        return self._failure

    def add(self, reader: Reader) -> None:
        """Start another source while the others run."""
        with self._changed:
            self.readers.append(reader)
        reader.start()

    def remove(self, name: str) -> None:
        """Stop a source; its counts stay until it is added again."""
        for reader in self.readers:
            if reader.name == name:
                reader.stop()

    def replace(self, reader: Reader) -> None:
        """Start a source in the place of the one of the same name, which has been stopped."""
        with self._changed:
            self.readers = [reader if old.name == reader.name else old for old in self.readers]
        reader.start()

    def waiting(self) -> int:
        """Frames that wait for the engine now."""
        return sum(len(reader.slot) for reader in self.readers)

    def healthy(self, seconds: float = 10.0) -> bool:
        """Whether the engine runs and has not left frames waiting for this long; a dead camera is not unhealthy."""
        return self._engine.is_alive() and (not self.waiting() or time.monotonic() - self.last_progress < seconds)

    def counts(self) -> dict[str, Any]:
        """`sources` and `outputs` by name with their counts, `processed` and `engine_failures`."""
        return {
            "sources": {reader.name: reader.counts() for reader in self.readers},
            "outputs": {output.name: output.counts() for output in self.outputs},
            "processed": self.processed,
            "engine_failures": self.engine_failures,
        }

    def _run_engine(self) -> None:
        failures = 0
        try:
            while (taken := self._next()) is not None:
                reader, arrival = taken
                try:
                    frame, instances = self._segment(reader.name, arrival.frame(), time.monotonic() - arrival.captured)
                    failures = 0
                except Exception as error:
                    failures += 1
                    self.engine_failures += 1
                    reader.engine_failed()
                    if not self._service or failures >= ENGINE_FAILURES:
                        raise
                    _LOG.error("%s: the engine failed: %s", reader.name, redacted(f"{type(error).__name__}: {error}"))
                    continue
                finally:
                    self.last_progress = time.monotonic()
                del arrival, taken
                self.processed += 1
                if not self._deliver(reader.name, frame, instances):
                    break
                del frame, instances
        except KeyboardInterrupt:
            self.interrupted = True
        except BaseException as error:
            self._failure = self._failure or error
        for reader in self.readers:
            reader.stop()

    def _next(self) -> tuple[Reader, Arrival] | None:
        """The next frame, from the sources in turn; None at the end."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                readers = self.readers
                for step in range(len(readers)):
                    place = (self._turn + step) % len(readers)
                    arrival = readers[place].slot.take(now - readers[place].max_age_s)
                    if arrival is not None:
                        self._turn = place + 1
                        return readers[place], arrival
                self.last_progress = now
                if not self._service and (failed := next((reader.failure for reader in readers if reader.ended and reader.failure), None)):
                    raise failed
                if all(reader.ended for reader in readers) and not self.keep_open:
                    return None
                self._changed.wait(_CHECK_S)
            return None

    def _deliver(self, source: str, frame: Frame, instances: Instances) -> bool:
        takers = [output for output in self.outputs if output.takes(source)]
        done = self._count_down(len(takers))
        result = Result(source, frame, instances, done)
        kept = [output.put(result) for output in takers]
        if not takers:
            self._count()
        return all(kept) or self._service

    def _count_down(self, takers: int) -> Callable[[bool], None]:
        left, complete = takers, True

        def done(written: bool) -> None:
            nonlocal left, complete
            with self._counted:
                left -= 1
                complete = complete and written
                last = left == 0 and complete
            if last:
                self._count()

        return done

    def _count(self) -> None:
        with self._counted:
            self.frames += 1
            if self._progress is not None:
                self._progress(self.frames)

    def _output_failed(self) -> None:
        """An output that does not retry failed: the stream ends."""
        self._failure = self._failure or next((output.failure for output in self.outputs if output.failure is not None), None)
        self.stop()
