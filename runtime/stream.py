"""Runs a predictor on a stream of frames: decoding, inference and encoding overlap, in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from runtime.budget import BudgetKeeper
from runtime.policies import ROUTED, Policy, parse_policy
from runtime.statistics import RunStatistics, timed_prediction

if TYPE_CHECKING:
    from runtime.frames import Frame, Source
    from runtime.instances import Instances
    from runtime.predictor import Predictor
    from runtime.sinks import Sink

QUEUED_FRAMES = 4
"""The length of the queue before inference, and of the one before the sinks."""
T = TypeVar("T")
_Pasted = tuple["Frame", "Instances"]
"""A frame and its instances; their masks are pasted, and `times_ms` is complete."""


@dataclass(frozen=True)
class StreamReport:
    """Frames, speed, cost and memory of a stream.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     report = dynamask.stream(predictor, dynamask.open_source(clip), [])
        >>> report.broken, sorted(report.latency_ms["total"])
        (0, ['mean', 'p50', 'p95', 'p99'])
    """

    frames: int
    """Frames through the engine and all sinks."""
    broken: int
    """Frames that were read but could not be decoded; they are left out."""
    missing: int
    """Frames that the source announces but does not hold: it is truncated."""
    bridged: int
    """Places where the source's time stamps were absent, did not rise or jumped; time went on at the frame rate."""
    interrupted: bool
    """Whether Ctrl-C ended the stream; the sinks hold all frames that the engine finished."""
    seconds: float
    fps: float
    instances: int
    latency_ms: dict[str, dict[str, float]]
    """`p50 p95 p99 mean` in milliseconds of `preprocess`, `detector`, `masks`, `paste` and `total` (from the decoded frame to the pasted
    masks); time in a queue is not counted. Empty without frames."""
    gmacs: float | None
    """Mean cost of the mask branch in GMAC per instance; None without instances."""
    share: dict[str, float]
    """Each grid's share of the instances, 0 to 1."""
    peak_rss_mb: float
    """The largest resident memory of the process so far, in MB (10^6 bytes)."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def run_stream(
    predictor: Predictor,
    source: Source,
    sinks: Sequence[Sink],
    policy: str | Policy | None = None,
    score: float = 0.3,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> StreamReport:
    """Run a predictor on every frame of a source and write the results to the sinks; source and sinks are closed afterwards.

    One thread decodes, the calling thread runs the engine and pastes the masks, one more thread writes. The queues between them are
    short, and the faster side waits: no frame is dropped, and memory does not grow with the length of the stream. Ctrl-C ends the
    stream like the end of the source: all frames that the engine finished are written, and the sinks are finished.

    Args:
        source: from `open_source`.
        sinks: for example `VideoSink`, `JsonLinesSink`, `FolderSink`; may be empty.
        policy: `routed`, `routed@50%`, `routed@0.6gmac`, `uniform-28`, `size-based` (see `parse_policy`) or a `Policy`; None takes the
            model's choice within the predictor's own budget. A budget is kept over the whole stream.
        score: instances with this score or less are left out, and no mask is computed for them.
        limit: the number of frames after which to end.
        progress: called with the number of frames done, from the thread that writes.

    Raises:
        InputError: there is no such policy, or the predictor is closed.
        DynaMaskError: a sink or the predictor failed; the sinks keep all that was written, under its provisional name.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     source = dynamask.open_source(clip)
        ...     video = dynamask.VideoSink(folder / "annotated.mp4", source.frame_rate)
        ...     report = dynamask.stream(predictor, source, [video], "routed@50%")
        >>> report.frames > 0 and (folder / "annotated.mp4").exists()
        True
    """
    grid_gmacs = predictor.bundle.manifest.grid_gmacs
    chosen = Policy(ROUTED, predictor.budget_gmacs) if policy is None else parse_policy(policy, grid_gmacs)
    keeper = BudgetKeeper(chosen.budget_gmacs, grid_gmacs)
    measured = _Measured(grid_gmacs)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(source)
        for sink in sinks:
            stack.enter_context(sink)
        interrupted = _overlap(
            lambda frame: _segment(predictor, frame, score, chosen.grid_override, keeper, measured),
            lambda done: _decode(source, limit, done),
            lambda done: _write(sinks, done, measured, progress),
        )
    return measured.report(source, interrupted, time.perf_counter() - start)


def _overlap(
    segment: Callable[[Frame], _Pasted], decode: Callable[[_Channel[Frame]], None], write: Callable[[_Channel[_Pasted]], None]
) -> bool:
    """Run the three parts side by side to the end; returns whether Ctrl-C was the end."""
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
        # The frames that the engine finished are still written.
        pasted.end()
        _join(threads)
    if errors:
        raise errors[0]
    return interrupted


def _segment(predictor: Predictor, frame: Frame, score: float, grid_override: int, keeper: BudgetKeeper, measured: _Measured) -> _Pasted:
    instances = timed_prediction(predictor, frame.image, keeper.budget_gmacs(), grid_override, score)
    keeper.spend(instances.grids)
    measured.statistics.add(instances)
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
    """Wait until the frames in the queues are done; a second Ctrl-C does not interrupt a sink in the middle of a write."""
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                thread.join()


class _Channel(Generic[T]):
    """A bounded queue between two threads; either side can end it."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._cancelled = False

    def put(self, item: T) -> bool:
        """Wait until there is room and add the item; returns False if the channel is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._items) < QUEUED_FRAMES)
            if self._cancelled:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Add no more: the reader ends after the last item."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """End both sides at once; the remaining items are discarded."""
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
    """The figures that a stream collects while it runs."""

    def __init__(self, grid_gmacs: Mapping[int, float]) -> None:
        self.frames = 0
        self.statistics = RunStatistics(grid_gmacs)

    def report(self, source: Source, interrupted: bool, seconds: float) -> StreamReport:
        return StreamReport(
            frames=self.frames,
            broken=source.broken,
            missing=source.missing,
            bridged=source.bridged,
            interrupted=interrupted,
            seconds=seconds,
            fps=self.frames / seconds,
            peak_rss_mb=_peak_rss_mb(),
            **self.statistics.summary(),
        )


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
