"""Many streams on one engine, until they are stopped; and their results in Python."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runtime.budget import BudgetKeeper
from runtime.policies import Policy, parse_policy
from runtime.sinks import JsonLinesSink, Sink, VideoSink
from runtime.statistics import RunStatistics, timed_prediction
from runtime.streams.address import Address
from runtime.streams.config import OutputSettings, ServiceSettings, StreamSettings
from runtime.streams.output import Output, Result
from runtime.streams.pipeline import Pipeline
from runtime.streams.reader import Reader
from runtime.streams.sinks import CallbackSink, MqttSink, ParquetSink, PublishSink

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.frames import Frame
    from runtime.instances import Instances
    from runtime.predictor import Predictor

DRAIN_S, PATIENCE_S = 0.8, 1.5
"""At a stop no write begins after the first, and nothing is waited for after the second: a service ends within two seconds."""


class Service:
    """Runs the streams of a configuration on one predictor.

    Args:
        predictor: of the bundle; the caller closes it.
        settings: the streams, the outputs, the grid policy.
        outputs: more outputs than those of the settings.
        limit: the number of frames after which a stream ends.
    """

    def __init__(self, predictor: Predictor, settings: ServiceSettings, outputs: Sequence[Output] = (), limit: int | None = None) -> None:
        grid_gmacs = predictor.bundle.manifest.grid_gmacs
        self._predictor, self._score, self._limit = predictor, settings.score, limit
        self._policy: Policy = parse_policy(settings.grid, grid_gmacs)
        predictor.check_budget(self._policy.budget_gmacs, self._policy.budget_ms)
        self._streams = settings.named_streams()
        self._changed = threading.Condition()
        self._keepers = {name: BudgetKeeper(self._policy.budget_gmacs, grid_gmacs) for name in self._streams}
        self.statistics = {name: RunStatistics(grid_gmacs) for name in self._streams}
        readers = [self._reader(name) for name in self._streams]
        by_name = {reader.name: reader for reader in readers}
        made = [output for name, reader in by_name.items() for output in _outputs_of(name, reader, settings.outputs, len(readers))]
        made += _shared_outputs(settings.outputs)
        self.pipeline = Pipeline(readers, self._segment, [*made, *outputs], self._changed, service=True)
        self._began = time.monotonic()

    def _reader(self, name: str) -> Reader:
        address, settings = self._streams[name]
        return Reader(address, settings, self._changed, name, limit=self._limit)

    def _segment(self, name: str, frame: Frame, age_s: float) -> tuple[Frame, Instances]:
        keeper = self._keepers[name]
        policy = self._policy
        instances = timed_prediction(
            self._predictor, frame.image, keeper.budget_gmacs(), policy.grid_override, self._score, policy.budget_ms
        )
        keeper.spend(instances.grids)
        self.statistics[name].add(instances)
        details = {"source": name, "age_ms": round(1000 * age_s, 1)}
        return dataclasses.replace(frame, details=details), instances

    def start(self) -> None:
        """Begin; returns at once."""
        self.pipeline.start()

    def stop_stream(self, name: str) -> None:
        """End one stream; the others go on."""
        self.pipeline.remove(name)

    def start_stream(self, name: str) -> None:
        """Begin a stream again that has ended or was stopped."""
        if any(reader.name == name and reader.state == "ended" for reader in self.pipeline.readers):
            self.pipeline.replace(self._reader(name))

    def end(self) -> BaseException | None:
        """Stop all within two seconds; returns what made the service fail, or None."""
        self.pipeline.stop()
        return self.pipeline.finish(DRAIN_S, PATIENCE_S)

    def report(self) -> dict[str, Any]:
        """`seconds`, `frames` (through engine and outputs), `processed`, `engine_failures`; `outputs` and `streams` by name."""
        counts = self.pipeline.counts()
        streams = {name: {**found, **self.statistics[name].summary()} for name, found in counts["sources"].items()}
        return {
            "seconds": time.monotonic() - self._began,
            "frames": self.pipeline.frames,
            "processed": counts["processed"],
            "engine_failures": counts["engine_failures"],
            "outputs": counts["outputs"],
            "streams": streams,
        }


def _outputs_of(name: str, reader: Reader, settings: OutputSettings, streams: int) -> list[Output]:
    """The outputs of one stream. A file's stream waits for them; a live one's drops what they do not take in time."""
    made: list[tuple[str, Callable[[], Sink]]] = []
    if settings.video is not None:
        video = settings.video / f"{name}.mp4"
        made.append(("video", lambda: VideoSink(_unused(video), reader.frame_rate, live=reader.live)))
    if settings.jsonl is not None:
        lines = settings.jsonl / f"{name}.jsonl"
        made.append(("jsonl", lambda: JsonLinesSink(_unused(lines))))
    if settings.publish is not None:
        address = Address(settings.publish if streams == 1 else f"{settings.publish}-{name}")
        made.append(("publish", lambda: PublishSink(address, reader.frame_rate)))
    full = "drop" if reader.live else "wait"
    queued = 64 if reader.live else 4
    return [Output(open_sink, f"{kind} {name}", {name}, full, queued) for kind, open_sink in made]  # type: ignore[arg-type]


def _shared_outputs(settings: OutputSettings) -> list[Output]:
    made = []
    if settings.parquet is not None:
        folder = settings.parquet
        made.append(Output(lambda: ParquetSink(folder), "parquet"))
    if settings.mqtt is not None:
        address = Address(settings.mqtt)
        made.append(Output(lambda: MqttSink(address), "mqtt"))
    return made


def _unused(path: Path) -> Path:
    """The path, or `<stem>-2`, … where an earlier run or an earlier connection of this sink has written one."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


class Results:
    """The results of several streams as they come: see `stream`. Leaving the `with` block ends the streams.

    Attributes:
        service: with the counts of the streams (`service.report()`).
    """

    def __init__(self, predictor: Predictor, settings: ServiceSettings) -> None:
        self._predictor = predictor
        self._changed = threading.Condition()
        self._result: Result | None = None
        self._closed = False
        waits = not any(address.live for address, _ in settings.named_streams().values())
        output = Output(lambda: CallbackSink(self._hand_over), "results", None, "wait" if waits else "drop", 4)
        self.service = Service(predictor, settings, [output])

    def __enter__(self) -> Results:
        self.service.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.service.end()
        self._predictor.close()

    def __iter__(self) -> Iterator[Result]:
        while True:
            with self._changed:
                while self._result is None:
                    if self._closed or (self.service.pipeline.wait(0) and self._drained()):
                        return
                    self._changed.wait(0.05)
                result, self._result = self._result, None
                self._changed.notify_all()
            yield result

    def _drained(self) -> bool:
        """Whether the engine has ended and all its results were handed over."""
        counts = self.service.pipeline.outputs[-1].counts()
        return counts["queued"] == 0 and counts["written"] + counts["dropped"] >= self.service.pipeline.processed

    def _hand_over(self, frame: Frame, instances: Instances) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._result is None or self._closed)
            if not self._closed:
                self._result = Result(frame.details["source"], frame, instances)
                self._changed.notify_all()


def stream(
    bundle: str | os.PathLike[str] | Bundle,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    policy: str = "routed",
    score: float = 0.3,
    target: str = "auto",
    threads: int | None = None,
    **settings: Any,
) -> Results:
    """Run a bundle's engine on several sources at once; the results come as they are ready, of each source in order.

    Live sources that fail are opened again until the block ends. If the loop is slower than they are, results are dropped and counted;
    with files alone, the engine waits for the loop.

    Args:
        bundle: as for `load`.
        sources: files, folders, patterns, `rtsp://`, `rtmp://`, `http(s)://`, `udp://`, `/dev/video0` or `-`.
        policy: as for `run_stream`, by its name.
        score: instances with this score or less are left out.
        target: as for `load`.
        threads: as for `load`.
        settings: of the sources: `behind`, `max_age_ms`, `retry`, `connect_s`, `stall_s`, `transport`, `hardware`
            (`runtime.streams.reader.SourceSettings`).

    Raises:
        InputError: a source, a setting or the bundle is wrong.

    Example:
        >>> import dynamask
        >>> with dynamask.stream(bundle, [clip]) as results:
        ...     for result in results:
        ...         found = result.source, result.frame.index, len(result.instances)
        >>> found[:2]
        ('clip', 3)
    """
    from pydantic import ValidationError

    from runtime.errors import InputError
    from runtime.predictor import load

    texts = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    try:
        streams = [StreamSettings(source=os.fspath(text), **settings) for text in texts]
        checked = ServiceSettings(streams=streams, grid=policy, score=score)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, fault["loc"])) or "the call"
        raise InputError(f"{field} is wrong ({fault['msg'].removeprefix('Value error, ').rstrip('.')}); correct it.") from None
    predictor = load(bundle, target, threads=threads)
    try:
        return Results(predictor, checked)
    except BaseException:
        predictor.close()
        raise
