"""Times contenders on an NVIDIA GPU, in turns.

A contender's calls are captured in a CUDA graph, repeated until a replay takes `MIN_REPLAY_MS`. A run is one replay between two events,
from an idle GPU: the time contains neither Python nor launches. Contenders that read sizes back in Python cannot be captured: their runs
are calls between two events, and the time contains Python's ("calls"). The contenders take turns, in a rotating order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.timing import take_turns

MIN_REPLAY_MS = 2.0
"""The shortest replay: its start takes some microseconds, which are negligible then."""


@dataclass(frozen=True)
class Contender:
    """An implementation to time."""

    calls: Sequence[Callable[[], object]]
    """One call for each set of inputs."""
    graph: bool = True
    """Whether it can be captured in a CUDA graph, because it does not wait for the GPU."""


class Batch(NamedTuple):
    """One run of a contender."""

    launch: Callable[[], object]
    calls: int


def call_times(contenders: Mapping[str, Contender], runs: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """By contender: the milliseconds of a call in each of its runs, and the number of calls in a run. They take turns."""
    batches = {name: _batch(contender) for name, contender in contenders.items()}
    times = take_turns({name: batch.launch for name, batch in batches.items()}, runs, warm_up=0, elapsed_ms=_elapsed_ms)
    calls = {name: batch.calls for name, batch in batches.items()}
    return {name: [time / calls[name] for time in values] for name, values in times.items()}, calls


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile of two times or more."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": statistics.median(times), "p10_ms": deciles[0], "p90_ms": deciles[-1]}


def _batch(contender: Contender) -> Batch:
    """The contender's run, after it was called twice to warm up."""
    for call in (*contender.calls, *contender.calls):
        call()
    torch.cuda.synchronize()
    if not contender.graph:
        return Batch(lambda: [call() for call in contender.calls], len(contender.calls))
    once = _captured(contender.calls)
    repeats = max(1, math.ceil(MIN_REPLAY_MS / statistics.median(_elapsed_ms(once) for _ in range(5))))
    return Batch(_captured(list(contender.calls) * repeats), len(contender.calls) * repeats)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _elapsed_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
