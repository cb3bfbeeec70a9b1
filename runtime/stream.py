"""Runs a predictor on a stream of frames: decoding, inference and encoding overlap, in bounded memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runtime.budget import BudgetKeeper
from runtime.graph import MSM
from runtime.policies import ROUTED, Policy, parse_policy
from runtime.statistics import RunStatistics, timed_prediction
from runtime.streams.address import Address
from runtime.streams.deadline import Deadline
from runtime.streams.output import QUEUED_FRAMES, Output
from runtime.streams.pipeline import Pipeline
from runtime.streams.reader import Reader, SourceSettings
from runtime.targets.base import check_counts_ms

if TYPE_CHECKING:
    from runtime.frames import Frame, Source
    from runtime.instances import Instances
    from runtime.predictor import Predictor
    from runtime.sinks import Sink

_SIGNALS_S = 0.2
"""Signals are handled between waits of this length."""


@dataclass(frozen=True)
class StreamReport:
    """Frames, speed, cost and memory of a stream.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     report = dynamask.run_stream(predictor, dynamask.open_source(clip), [])
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
    predicted: dict[str, dict[str, float]] | None
    """The times that the engine's measured costs predict, as `RunStatistics.summary` has them; None where none were measured."""
    peak_rss_mb: float
    """The largest resident memory of the process so far, in MB (10^6 bytes)."""

    deadline: dict[str, Any] | None = None
    """`ms`, `frames` and `missed` (the frames that took longer) under a deadline."""

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
    deadline_ms: float | None = None,
) -> StreamReport:
    """Run a predictor on every frame of a source and write the results to the sinks; source and sinks are closed afterwards.

    One thread decodes, one runs the engine and pastes the masks, and one for each sink writes. The queues between them are short, and the
    faster side waits: no frame is dropped, and memory does not grow with the length of the stream. Ctrl-C ends the stream like the end
    of the source: all frames that the engine finished are written, and the sinks are finished.

    Args:
        source: from `open_source`.
        sinks: for example `VideoSink`, `JsonLinesSink`, `FolderSink`; may be empty.
        policy: `routed`, `routed@50%`, `routed@0.6gmac`, `routed@20ms`, `uniform-28`, `size-based` (see `parse_policy`) or a `Policy`;
            None takes the model's choice within the predictor's own budget. A budget in GMAC is kept over the whole stream, one in
            milliseconds in each frame.
        score: instances with this score or less are left out, and no mask is computed for them.
        limit: the number of frames after which to end.
        progress: called with the number of frames that all sinks have, from the threads that write.

    Raises:
        InputError: there is no such policy, its budget cannot be kept, or the predictor is closed.
        DynaMaskError: a sink or the predictor failed; the sinks keep all that was written, under its provisional name.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     source = dynamask.open_source(clip)
        ...     video = dynamask.VideoSink(folder / "annotated.mp4", source.frame_rate)
        ...     report = dynamask.run_stream(predictor, source, [video], "routed@50%")
        >>> report.frames > 0 and (folder / "annotated.mp4").exists()
        True
    """
    grid_gmacs = predictor.bundle.manifest.grid_gmacs
    chosen = Policy(ROUTED, predictor.budget_gmacs, budget_ms=predictor.budget_ms) if policy is None else parse_policy(policy, grid_gmacs)
    predictor.check_budget(chosen.budget_gmacs, chosen.budget_ms)
    keeper = BudgetKeeper(chosen.budget_gmacs, grid_gmacs)
    statistics = RunStatistics(grid_gmacs)
    deadline = None if deadline_ms is None else Deadline(deadline_ms, check_counts_ms(predictor.engine))
    start = time.perf_counter()

    def segment(_: str, frame: Frame, age_s: float) -> tuple[Frame, Instances]:
        if deadline is not None:
            instances = timed_prediction(predictor, frame.image, 0.0, MSM, score, deadline.budget_ms())
            deadline.add(instances)
        else:
            instances = timed_prediction(predictor, frame.image, keeper.budget_gmacs(), chosen.grid_override, score, chosen.budget_ms)
        keeper.spend(instances.grids)
        statistics.add(instances)
        return frame, instances

    with contextlib.ExitStack() as stack:
        stack.enter_context(source)
        for sink in sinks:
            stack.enter_context(sink)
        frames, interrupted = _run(source, sinks, segment, limit, progress)
    seconds = time.perf_counter() - start
    return StreamReport(
        frames=frames,
        broken=source.broken,
        missing=source.missing,
        bridged=source.bridged,
        interrupted=interrupted,
        seconds=seconds,
        fps=frames / seconds,
        peak_rss_mb=_peak_rss_mb(),
        deadline=None if deadline is None else deadline.report(),
        **statistics.summary(),
    )


def _run(
    source: Source,
    sinks: Sequence[Sink],
    segment: Callable[[str, Frame, float], tuple[Frame, Instances]],
    limit: int | None,
    progress: Callable[[int], None] | None,
) -> tuple[int, bool]:
    """Run the pipeline with one reader to its end; returns the number of frames, and whether Ctrl-C was the end."""
    changed = threading.Condition()
    reader = Reader(Address(source.path), SourceSettings(), changed, source.path.name, source, limit)
    outputs = [
        Output(lambda sink=sink: sink, type(sink).__name__, full="wait", queued=QUEUED_FRAMES, retry=False)  # type: ignore[misc]
        for sink in sinks
    ]
    pipeline = Pipeline([reader], segment, outputs, changed, progress=progress)
    pipeline.start()
    interrupted = False
    while True:
        try:
            while not interrupted and not pipeline.wait(_SIGNALS_S):
                pass
            failure = pipeline.finish()
            break
        except KeyboardInterrupt:
            # A second Ctrl-C does not interrupt a sink in the middle of a write.
            interrupted = True
            pipeline.stop()
    if failure is not None:
        raise failure
    return pipeline.frames, interrupted or pipeline.interrupted


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
