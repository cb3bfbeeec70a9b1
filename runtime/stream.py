"""Frames in, masks out: decoding, inference and encoding overlap, in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from runtime.budget import BudgetKeeper

if TYPE_CHECKING:
    from runtime.instances import Instances
    from runtime.predictor import Predictor
    from runtime.sinks import Sink
    from runtime.sources import Frame, Source

QUEUED_FRAMES = 4
"""Frames that may wait before inference, and again before the sinks."""
PARTS = ("preprocess", "detector", "masks", "paste", "total")
T = TypeVar("T")
_Pasted = tuple["Frame", "Instances"]
"""A frame and its instances, with their masks pasted and the milliseconds of each part."""


@dataclass(frozen=True)
class StreamReport:
    """What a stream did."""

    frames: int
    """Frames through the engine and all sinks."""
    dropped: int
    """Frames left out because the engine was too slow: 0, files wait for the engine."""
    broken: int
    """Frames that were read and could not be decoded, left out."""
    missing: int
    """Frames that the source announces and does not hold: it is truncated."""
    interrupted: bool
    """Ended by Ctrl-C: what was read until then is whole in the sinks."""
    seconds: float
    fps: float
    instances: int
    latency_ms: dict[str, dict[str, float]]
    """p50, p95 and p99 by part, in milliseconds: `preprocess`, `detector`, `masks`, `paste`, `total` (from decoded frame to pasted masks).
    Waiting in a queue is not counted."""
    gmacs: float | None
    """Mean cost of the mask branch in GMAC per instance; None without instances."""
    share: dict[str, float]
    """Each grid's share of the instances, 0 to 1."""
    peak_rss_mb: float
    """The process's largest resident memory so far, in MB (10^6 bytes)."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def run_stream(
    predictor: Predictor,
    source: Source,
    sinks: Sequence[Sink],
    score: float = 0.3,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    grid_override: int | None = None,
) -> StreamReport:
    """Send every frame of a source through the predictor to the sinks; sinks and source are closed afterwards.

    One thread decodes, this one runs the engine and pastes the masks, one more writes. The queues between them are short and make
    the faster part wait, so no frame of a file is dropped and the memory does not grow with the stream. Ctrl-C ends the stream as the
    end of the source would: what the engine finished is written, and the sinks are finished. The predictor's budget, if it has one, is
    kept over the stream, not by every frame for itself.

    Args:
        score: instances that score this or less are left out, and cost no mask.
        limit: end after that many frames.
        progress: called with the number of frames done, from the thread that writes.
        grid_override: 0..3 that grid (14, 28, 56, 112) for all, 4 the size-based rule (Eq. 8), None the model's choice.

    Raises:
        DynaMaskError: a sink or the predictor failed; the sinks keep what was written under its provisional name.
    """
    measured = _Measured()
    keeper = BudgetKeeper(predictor.budget, predictor.bundle.manifest.grid_gmacs) if predictor.budget else None
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(source)
        for sink in sinks:
            stack.enter_context(sink)
        interrupted = _overlap(
            lambda frame: _segment(predictor, frame, score, grid_override, keeper, measured),
            lambda done: _decode(source, limit, done),
            lambda done: _write(sinks, done, measured, progress),
        )
    seconds = time.perf_counter() - start
    return measured.report(predictor, source, interrupted, seconds)


def _overlap(
    segment: Callable[[Frame], _Pasted], decode: Callable[[_Channel[Frame]], None], write: Callable[[_Channel[_Pasted]], None]
) -> bool:
    """Run the three parts side by side to the end; whether Ctrl-C was that end."""
    decoded: _Channel[Frame] = _Channel()
    pasted: _Channel[_Pasted] = _Channel()
    errors: list[BaseException] = []
    threads = [
        _start("decode", errors, decoded, decode),
        _start("write", errors, pasted, write),
    ]
    interrupted = False
    try:
        for frame in decoded:
            if not pasted.put(segment(frame)):
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        decoded.cancel()
        # What the engine finished is still written.
        pasted.end()
        _join(threads)
    if errors:
        raise errors[0]
    return interrupted


def _segment(
    predictor: Predictor, frame: Frame, score: float, grid_override: int | None, keeper: BudgetKeeper | None, measured: _Measured
) -> _Pasted:
    start = time.perf_counter()
    instances = predictor(frame.image, keeper.budget() if keeper else None, grid_override, score)
    if keeper:
        keeper.spend(instances.grids)
    before_paste = time.perf_counter()
    # The instances keep their crops: the sinks do not paste again.
    deque(instances.crops(), maxlen=0)
    end = time.perf_counter()
    instances.times_ms = {**instances.times_ms, "paste": 1000 * (end - before_paste), "total": 1000 * (end - start)}
    measured.add(instances)
    return frame, instances


def _decode(source: Source, limit: int | None, decoded: _Channel[Frame]) -> None:
    for frame in itertools.islice(source, limit):
        if not decoded.put(frame):
            return
    decoded.end()


def _write(sinks: Sequence[Sink], pasted: _Channel[_Pasted], measured: _Measured, progress: Callable[[int], None] | None) -> None:
    for frame, instances in pasted:
        for sink in sinks:
            sink.write(frame, instances)
        measured.frames += 1
        if progress is not None:
            progress(measured.frames)


def _start(name: str, errors: list[BaseException], channel: _Channel[T], work: Callable[[_Channel[T]], None]) -> threading.Thread:
    """Start a thread whose failure ends the channel it works on, and with it the stream."""

    def run() -> None:
        try:
            work(channel)
        except BaseException as error:
            errors.append(error)
            channel.cancel()

    thread = threading.Thread(target=run, name=f"dynamask-{name}", daemon=True)
    thread.start()
    return thread


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for what is in flight, a few frames; a second Ctrl-C does not tear a sink apart in the middle of a write."""
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                thread.join()


class _Channel(Generic[T]):
    """A bounded queue between two threads that either side can end."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._cancelled = False

    def put(self, item: T) -> bool:
        """Wait for room and add the item; False when the reader has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._items) < QUEUED_FRAMES)
            if self._cancelled:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """The writer adds no more: the reader ends after what is left."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Both sides end at once; what is left is thrown away."""
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended or self._cancelled)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item


class _Measured:
    """What is counted while a stream runs."""

    def __init__(self) -> None:
        self.frames = 0
        self._times: dict[str, list[float]] = {part: [] for part in PARTS}
        self._grids: Counter[int] = Counter()

    def add(self, instances: Instances) -> None:
        for part in PARTS:
            self._times[part].append(instances.times_ms[part])
        self._grids.update(int(grid) for grid in instances.grids)

    def report(self, predictor: Predictor, source: Source, interrupted: bool, seconds: float) -> StreamReport:
        grid_gmacs = predictor.bundle.manifest.grid_gmacs
        count = sum(self._grids.values())
        return StreamReport(
            frames=self.frames,
            dropped=0,
            broken=source.broken,
            missing=source.missing,
            interrupted=interrupted,
            seconds=seconds,
            fps=self.frames / seconds,
            instances=count,
            latency_ms={part: _percentiles(times) for part, times in self._times.items() if times},
            gmacs=sum(grid_gmacs[grid] * n for grid, n in self._grids.items()) / count if count else None,
            share={str(grid): self._grids[grid] / count if count else 0.0 for grid in sorted(grid_gmacs)},
            peak_rss_mb=_peak_rss_mb(),
        )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(value) for q, value in zip((50, 95, 99), np.percentile(values, (50, 95, 99)), strict=True)}


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
