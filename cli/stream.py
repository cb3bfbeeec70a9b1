"""`dynamask stream`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json

if TYPE_CHECKING:
    from runtime.predictor import Predictor
    from runtime.sinks import Sink
    from runtime.sources import Source
    from runtime.stream import StreamReport


def stream(
    bundle: Annotated[Path, typer.Argument(help="The bundle, as dynamask export wrote it.")],
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Video files or folders of images, one after another.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.mp4", help="Annotated video; without any output given: SOURCE-dynamask.mp4 in the current folder."),
    ] = None,
    jsonl: Annotated[Path | None, typer.Option(metavar="FILE", help="One JSON line a frame: boxes, classes, grids, masks as RLE.")] = None,
    frames_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Annotated frames as JPEG.")] = None,
    target: Annotated[
        str, typer.Option(help="The engine to run: auto (the best that is built and can run here), tensorrt-rtx, tensorrt, onnxruntime.")
    ] = "auto",
    budget: Annotated[float | None, typer.Option(help="Mean GMAC per instance to keep to, over the stream.")] = None,
    grid: Annotated[
        str, typer.Option(help="routed, routed@50% (of the largest grid), uniform-14, -28, -56, -112 or size-based.")
    ] = "routed",
    score: Annotated[float, typer.Option(min=0, max=1, help="Leave out instances that score this or less.")] = 0.3,
    limit: Annotated[int | None, typer.Option(min=1, help="End after this many frames of each source.")] = None,
    json: Json = None,
) -> None:
    """Run a bundle on video: masks, labels and each instance's grid drawn in, and written as JSON lines.

    With several sources, --output, --jsonl and --frames-dir name folders, with one file (or folder) for each source in them.

    Example: dynamask stream lite0.bundle video.mp4 --output annotated.mp4 --jsonl detections.jsonl
    """
    from runtime.bundle import Bundle
    from runtime.errors import INTERRUPTED, InputError
    from runtime.files import write_json
    from runtime.predictor import load
    from runtime.validate import parse_policy

    plans = plan_outputs(sources, output, jsonl, frames_dir, json)
    opened = Bundle.open(bundle)
    policy = parse_policy(grid, opened.manifest.grid_gmacs)
    if budget is not None and grid != "routed":
        raise InputError(f"--budget {budget} is for --grid routed, and --grid {grid} leaves it nothing to choose; give one of the two.")
    with load(opened, target, policy.budget or budget) as predictor:
        results = []
        for source, outputs in zip(sources, plans, strict=True):
            results.append(_run(predictor, source, outputs, score, limit, policy.grid_override))
            if results[-1]["interrupted"]:
                break
    if json is not None:
        write_json(json, results[0] if len(sources) == 1 else {"streams": results})
    if results[-1]["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def plan_outputs(
    sources: list[Path], output: Path | None, jsonl: Path | None, frames_dir: Path | None, json: Path | None = None
) -> list[dict[str, Path]]:
    """What each source writes: `video`, `jsonl`, `frames` -> path.

    Raises:
        InputError: a source does not exist or is an output as well, or two outputs are one file.
    """
    from runtime.errors import InputError
    from runtime.files import check_apart, check_folder

    names = _unique_names(sources)
    if len(sources) == 1:
        given = {"video": output, "jsonl": jsonl, "frames": frames_dir}
        plans = [{kind: path for kind, path in given.items() if path is not None}]
    else:
        folders = {"video": (output, ".mp4"), "jsonl": (jsonl, ".jsonl"), "frames": (frames_dir, "")}
        plans = [{kind: folder / f"{name}{suffix}" for kind, (folder, suffix) in folders.items() if folder is not None} for name in names]
    for source, name, plan in zip(sources, names, plans, strict=True):
        if not plan:
            plan["video"] = Path(f"{name}-dynamask.mp4")
        if not source.exists():
            raise InputError(f"{source} does not exist; give a video file or a folder of images.")
        for kind, path in plan.items():
            check_folder(path if kind == "frames" else path.parent)
    check_apart([*(path for plan in plans for path in plan.values()), *([] if json is None else [json])], sources)
    return plans


def _unique_names(sources: list[Path]) -> list[str]:
    """The sources' names without suffix, numbered where they occur twice."""
    stems = [source.resolve().stem for source in sources]
    return [stem if stems.count(stem) == 1 else f"{stem}-{i + 1}" for i, stem in enumerate(stems)]


def _run(predictor: Predictor, path: Path, outputs: dict[str, Path], score: float, limit: int | None, grid_override: int) -> dict[str, Any]:
    from runtime.sources import open_source
    from runtime.stream import run_stream

    with open_source(path) as source:
        sinks = _open_sinks(source, outputs)
        total = min(filter(None, (limit, source.frame_count)), default=None)
        with _progress() as progress:
            task = progress.add_task(path.name, total=total)
            report = run_stream(predictor, source, sinks, score, limit, lambda done: progress.update(task, completed=done), grid_override)
    _print(path, outputs, report)
    return {"source": str(path), "outputs": {kind: str(place) for kind, place in outputs.items()}, **report.to_dict()}


def _open_sinks(source: Source, outputs: dict[str, Path]) -> list[Sink]:
    from runtime.sinks import FolderSink, JsonLinesSink, VideoSink

    sinks: list[Sink] = []
    if "video" in outputs:
        sinks.append(VideoSink(outputs["video"], source.frame_rate))
    if "jsonl" in outputs:
        sinks.append(JsonLinesSink(outputs["jsonl"]))
    if "frames" in outputs:
        sinks.append(FolderSink(outputs["frames"]))
    return sinks


def _progress() -> Any:
    """A bar on standard error with frames, frames a second and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class FramesPerSecond(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("– fps" if speed is None else f"{speed:.1f} fps")

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

    console = Console(markup=False, highlight=False, soft_wrap=True)
    ended = " (interrupted)" if report.interrupted else ""
    console.print(f"{path}: {report.frames} frames in {report.seconds:.1f} s, {report.fps:.1f} fps{ended}")
    if report.missing:
        console.print(f"the source is truncated: {report.missing} of the frames it announces are missing")
    if report.broken:
        console.print(f"{report.broken} frames could not be decoded and were left out")
    if report.gmacs is not None:
        shares = "  ".join(f"{grid}: {share:.0%}" for grid, share in report.share.items())
        console.print(f"{report.instances} instances at {report.gmacs:.3f} GMAC on average; {shares}")
    console.print(f"peak memory {report.peak_rss_mb:.0f} MB")
    table = Table("ms", "p50", "p95", "p99")
    for part, values in report.latency_ms.items():
        table.add_row(part, *(f"{values[q]:.1f}" for q in ("p50", "p95", "p99")))
    console.print(table)
    for place in outputs.values():
        console.print(str(place))
