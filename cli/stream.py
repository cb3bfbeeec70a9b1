"""`dynamask stream`: videos in, annotated videos and detections out."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import BundleFolder, Grid, Json, Limit, Score, Target, Threads, print_notice

if TYPE_CHECKING:
    from runtime.frames import Source
    from runtime.policies import Policy
    from runtime.predictor import Predictor
    from runtime.sinks import Sink
    from runtime.stream import StreamReport
    from runtime.streams.config import OutputSettings, ServiceSettings

_TERMINATED = 143
"""The exit status after SIGTERM: 128 + 15."""


def stream(
    bundle: BundleFolder,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Videos, images or folders of images, one after the other. With rtsp://, rtmp://, http(s)://, udp://, /dev/video0, -"
            " (standard input) or a quoted pattern among them, all at once until they are stopped.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.mp4|FOLDER",
            help="Write the annotated video here. If neither this nor --jsonl nor --frames-dir is given: SOURCE-dynamask.mp4 in the"
            " current folder.",
        ),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write one line of JSON per frame here: boxes, classes, grids, masks as COCO run-length encodings."
        ),
    ] = None,
    frames_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the annotated frames here, as JPEG."),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Live sources: write the detections here too, as Parquet files of a minute each."),
    ] = None,
    mqtt: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Live sources: publish each line of JSON too, at mqtt://HOST/TOPIC."),
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Live sources: publish the annotated video, at rtsp://HOST/PATH or rtmp://HOST/PATH."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Streams, outputs and their settings, in place of sources (docs/streams.md).")
    ] = None,
    max_age_ms: Annotated[
        float | None,
        typer.Option(min=1, metavar="MS", help="Leave out frames of live sources captured longer ago than this; 1000 by default."),
    ] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="MS", help="Files: choose the grids so that each frame is done within this time, after dynamask calibrate."
        ),
    ] = None,
    grid: Grid = "routed",
    score: Score = 0.3,
    limit: Limit = None,
    target: Target = "auto",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Find the instances in videos: an annotated video, and the detections as lines of JSON.

    A budget in GMAC (routed@50%) is kept over the whole stream, one in milliseconds (routed@20ms) in each frame. With several sources,
    --output, --jsonl and --frames-dir are folders, and each source gets a file (or folder) in them. Ctrl-C and SIGTERM end the stream
    and finish the files.

    Live sources run all at once and are connected again when they fail; --output and --jsonl are folders then. A password may be
    an environment variable: 'rtsp://user:${DOOR}@host/path'.

    Example: dynamask stream lite0.bundle video.mp4 --output annotated.mp4 --jsonl detections.jsonl
    """
    from runtime.errors import InputError
    from runtime.streams.config import OutputSettings

    texts = sources or []
    if not texts and config is None:
        raise InputError("no source is given; give a video, a camera's address or --config.")
    with _terminating():
        if config is not None or any(_is_live(text) for text in texts):
            if frames_dir is not None:
                raise InputError("--frames-dir is for files; take --output or --jsonl for live sources.")
            if deadline_ms is not None:
                raise InputError("--deadline-ms is for files; take --grid routed@20ms for live sources.")
            outputs = OutputSettings(video=output, jsonl=jsonl, parquet=parquet, mqtt=mqtt, publish=publish)
            _run_service(_service_settings(texts, config, outputs, max_age_ms, grid, score), bundle, target, threads, limit, json)
        else:
            _run_files(
                [Path(text) for text in texts], bundle, output, jsonl, frames_dir, grid, score, limit, target, threads, json, deadline_ms
            )


def _is_live(source: str) -> bool:
    """Whether a source is not a file or folder: a URL, a device, standard input or a pattern."""
    import glob

    from runtime.streams.address import FILE, Address

    return Address(source).kind != FILE or (glob.has_magic(source) and not Path(source).exists())


def _run_files(
    sources: list[Path],
    bundle: Path,
    output: Path | None,
    jsonl: Path | None,
    frames_dir: Path | None,
    grid: str,
    score: float,
    limit: int | None,
    target: str,
    threads: int | None,
    json: Path | None,
    deadline_ms: float | None,
) -> None:
    """Run files one after the other, each to its end."""
    from runtime.bundle import Bundle
    from runtime.errors import INTERRUPTED
    from runtime.files import write_json
    from runtime.policies import parse_policy
    from runtime.predictor import load

    plans = plan_outputs(sources, output, jsonl, frames_dir, json, bundle)
    opened = Bundle.open(bundle)
    policy = parse_policy(grid, opened.manifest.grid_gmacs)
    with load(opened, target, threads=threads) as predictor:
        print_notice(predictor)
        predictor.check_budget(policy.budget_gmacs, policy.budget_ms)
        results = []
        for source, outputs in zip(sources, plans, strict=True):
            results.append(_run(predictor, source, outputs, policy, score, limit, deadline_ms))
            if results[-1]["interrupted"]:
                break
    if json is not None:
        write_json(json, results[0] if len(sources) == 1 else {"streams": results})
    if results[-1]["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def _run_service(settings: ServiceSettings, bundle: Path, target: str, threads: int | None, limit: int | None, json: Path | None) -> None:
    """Run the streams until all have ended or a signal comes."""
    from runtime.files import write_json
    from runtime.predictor import load
    from runtime.streams.log import log_to_stderr
    from runtime.streams.service import Service

    log_to_stderr()
    stopped = False
    with load(bundle, target, threads=threads) as predictor:
        service = Service(predictor, settings, limit=limit)
        service.start()
        try:
            while not service.pipeline.wait(0.2):
                pass
        except KeyboardInterrupt:
            stopped = True
        failure = service.end()
    report = service.report()
    if json is not None:
        write_json(json, {"interrupted": stopped, **report})
    for name, counts in report["streams"].items():
        typer.echo(f"{name}: {counts['frames']} frames, {counts['instances']} instances; not processed: {counts['discarded'] or 'none'}")
    if failure is not None:
        raise failure
    if stopped:
        raise KeyboardInterrupt


def _service_settings(
    sources: list[str], config: Path | None, outputs: OutputSettings, max_age_ms: float | None, grid: str, score: float
) -> ServiceSettings:
    from runtime.errors import InputError
    from runtime.streams.config import ServiceSettings, StreamSettings, load_settings

    if config is not None:
        if sources:
            raise InputError(f"sources are given and {config} names some too; put all of them into the file.")
        return load_settings(config)
    streams = [StreamSettings(source=source, max_age_ms=max_age_ms) for source in sources]
    return ServiceSettings(streams=streams, outputs=outputs, grid=grid, score=score)


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; the exit status is then 143."""

    terminated = False

    def stop(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except (KeyboardInterrupt, typer.Exit):
        if terminated:
            raise typer.Exit(_TERMINATED) from None
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def plan_outputs(
    sources: list[Path],
    output: Path | None,
    jsonl: Path | None,
    frames_dir: Path | None,
    json: Path | None = None,
    bundle: Path | None = None,
) -> list[dict[str, Path]]:
    """The outputs of each source: `video`, `jsonl`, `frames` -> path.

    Raises:
        InputError: a source does not exist or is an output as well, two outputs are one file, an output lies in the bundle, or one file is
            given for several sources.
    """
    from runtime.files import check_apart, check_file, check_folder
    from runtime.sources import check_source

    given = {"video": output, "jsonl": jsonl, "frames": frames_dir}
    plans: list[dict[str, Path]] = []
    for source, name in zip(sources, _unique_names(sources), strict=True):
        check_source(source)
        plan = {kind: _place(kind, path, name, len(sources)) for kind, path in given.items() if path is not None}
        plans.append(plan or {"video": Path(f"{name}-dynamask.mp4")})
        for kind, path in plans[-1].items():
            check_folder(path) if kind == "frames" else check_file(path)
    check_apart([*(path for plan in plans for path in plan.values()), json], sources, bundle)
    return plans


def _place(kind: str, path: Path, name: str, sources: int) -> Path:
    """Where the output of one of several sources goes: `path` itself, or a file or folder of the source's name in it."""
    from runtime.errors import InputError
    from runtime.files import is_special

    if is_special(path):
        return path
    try:
        is_folder = path.is_dir()
    except OSError:  # Too long a name: `check_file` says so.
        is_folder = False
    suffix = {"video": ".mp4", "jsonl": ".jsonl", "frames": ""}[kind]
    if sources > 1:
        if suffix and path.suffix.lower() == suffix and not is_folder:
            raise InputError(f"{path} is one file, and there are {sources} sources; give a folder.")
        return path / f"{name}{suffix}"
    return path / f"{name}{suffix}" if kind == "video" and (is_folder or not path.suffix) else path


def _unique_names(sources: list[Path]) -> list[str]:
    """The sources' names without suffix, numbered where they occur twice."""
    stems = [source.resolve().stem for source in sources]
    return [stem if stems.count(stem) == 1 else f"{stem}-{i + 1}" for i, stem in enumerate(stems)]


def _run(
    predictor: Predictor, path: Path, outputs: dict[str, Path], policy: Policy, score: float, limit: int | None, deadline_ms: float | None
) -> dict[str, Any]:
    from runtime.sources import open_source
    from runtime.stream import run_stream

    with open_source(path) as source:
        sinks = _open_sinks(source, outputs)
        total = min(filter(None, (limit, source.frame_count)), default=None)
        with _progress() as progress:
            task = progress.add_task(path.name, total=total)
            report = run_stream(
                predictor, source, sinks, policy, score, limit, lambda done: progress.update(task, completed=done), deadline_ms
            )
    _print(path, outputs, report)
    return {"source": str(path), "outputs": {kind: str(place) for kind, place in outputs.items()}, **report.to_dict()}


def _open_sinks(source: Source, outputs: dict[str, Path]) -> list[Sink]:
    from runtime.sinks import FolderSink, JsonLinesSink, VideoSink

    sinks: list[Sink] = []
    try:
        if "video" in outputs:
            sinks.append(VideoSink(outputs["video"], source.frame_rate))
        if "jsonl" in outputs:
            sinks.append(JsonLinesSink(outputs["jsonl"]))
        if "frames" in outputs:
            sinks.append(FolderSink(outputs["frames"]))
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    return sinks


def _progress() -> Any:
    """A progress bar on standard error: frames, frames per second, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class FramesPerSecond(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("– frames/s" if speed is None else f"{speed:.1f} frames/s")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        FramesPerSecond(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _print(path: Path, outputs: dict[str, Path], report: StreamReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from runtime.statistics import QUANTILES

    console = Console(markup=False, highlight=False, soft_wrap=True)
    ended = " (interrupted)" if report.interrupted else ""
    console.print(f"{path}: {report.frames} frames in {report.seconds:.1f} s, {report.fps:.1f} frames/s{ended}")
    if report.missing:
        console.print(f"the source is truncated: it announces {report.missing} more frames than it holds")
    if report.broken:
        console.print(f"{report.broken} frames could not be decoded and were left out")
    if report.bridged:
        places = "1 place" if report.bridged == 1 else f"{report.bridged} places"
        console.print(f"time stamps were absent, did not rise or jumped at {places}: time went on at the frame rate")
    if report.gmacs is not None:
        shares = ", ".join(f"{share:.0%} at {grid}" for grid, share in report.share.items())
        console.print(f"{report.instances} instances, {report.gmacs:.3f} GMAC per instance; grids: {shares}")
    if report.deadline is not None:
        console.print(
            f"deadline of {report.deadline['ms']:g} ms: {report.deadline['missed']} of {report.deadline['frames']} frames were later"
        )
    console.print(f"peak memory: {report.peak_rss_mb:.0f} MB")
    table = Table("latency, ms", *QUANTILES)
    for part, values in report.latency_ms.items():
        table.add_row(part, *(f"{values[quantile]:.1f}" for quantile in QUANTILES))
    console.print(table)
    for place in outputs.values():
        console.print(str(place))
