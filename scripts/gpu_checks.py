"""Checks an NVIDIA GPU with what is installed beside it, and writes one JSON file and one Markdown page about it.

Parts that cannot run here are skipped with the reason. The others run one after the other, each in a process of its own. Those that the
time does not suffice for are named at the end. No part needs PyTorch that runs an engine: give a bundle with --bundle where there is none.

    python -m scripts.gpu_checks OUTPUT [--bundle lite0.bundle] [--minutes 10] [--parts doctor,engines]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import DynaMaskError
from trt_plugins.driver import open_driver

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
SMALL_CASES = "(lite0 or version or proposals or detections) and not same_bits"
"""Cases for the sanitizers, which make kernels tens of times slower."""
RUNS = 20
"""Timed runs of an engine."""
IMAGES = ("drawn", "blank")
COMPARED = ("instances", "expected_instances", "boxes_px", "scores", "probabilities", "same_grids")
COLUMNS = (*COMPARED, "first_ms", "routed_ms", "largest_ms")
"""Of the page's table of engines."""
NOTHING_COLLECTED = 5
"""pytest's exit status without a test."""


@dataclass(frozen=True)
class Machine:
    """What decides which parts run."""

    modules: frozenset[str]
    """Of `torch`, `triton`, `onnx`, `tensorrt`, `tensorrt_rtx`: those that are installed."""
    torch_gpu: bool
    """Whether PyTorch finds a GPU."""
    capability: str | None
    """The GPU's compute capability; None without a driver or a GPU."""
    sanitizer: str | None
    """The path of compute-sanitizer."""
    bundle: Path | None
    """A bundle that was given."""
    name: str = "no NVIDIA GPU"


@dataclass(frozen=True)
class Part:
    """One check: the arguments of Python, or of `tool`; and the reason to skip it on a machine, or None."""

    name: str
    arguments: tuple[str, ...]
    skip: Callable[[Machine], str | None]
    tool: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    results: str | None = None
    """The JSON file in the output folder that it writes."""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    state: str
    """`passed`, `failed`, `skipped` or `left`."""
    seconds: float = 0.0
    note: str = ""
    """Why it was skipped or left, or the last line of a failure."""
    results: Any = field(default=None, repr=False)
    """The content of the file that it wrote."""


def parts(output: Path, bundle: Path | None) -> list[Part]:
    """All parts, the most important first."""
    engine = ("-m", "scripts.gpu_checks", "--engine")
    given = str(bundle or output / "bundle")
    torch_tests = [*PYTEST, "tests/gpu/test_kernels.py"]
    sanitizers = [
        Part(
            tool,
            (*torch_tests, "-x", "-k", SMALL_CASES),
            _without_sanitizer,
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86"),
            # PyTorch's memory pool would hide accesses beyond the end of a tensor.
            (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for tool in ("memcheck", "racecheck")
    ]
    engines = [
        Part(
            f"{target} {precision}",
            (*engine, given, target, precision, str(output / f"{target}-{precision}.json")),
            lambda machine, target=target: _without_engine(machine, target),  # type: ignore[misc]
            results=f"{target}-{precision}.json",
        )
        for target in ("tensorrt-rtx", "tensorrt")
        for precision in ("fp16", "fp32")
    ]
    return [
        Part("doctor", ("-m", "cli.main", "doctor", "--json", str(output / "doctor.json")), lambda machine: None, results="doctor.json"),
        Part("bundle", ("-m", "scripts.gpu_checks", "--export", str(output / "bundle")), _without_export),
        *engines,
        Part("kernels", (*torch_tests, "tests/trt_plugins"), _without_torch),
        Part(
            "speed of kernels",
            ("-m", "benchmarks.kernels", "--json", str(output / "kernels.json")),
            _without_torch,
            results="kernels.json",
        ),
        Part(
            "training step",
            ("-m", "benchmarks.training_step", "--device", "cuda", "--json", str(output / "training.json")),
            _without_torch,
            results="training.json",
        ),
        Part("engines against ONNX Runtime", (*PYTEST, "tests/gpu/test_engines.py"), _without_torch_and_tensorrt),
        *sanitizers,
    ]


def _without_gpu(machine: Machine) -> str | None:
    return "there is no NVIDIA GPU with a driver" if machine.capability is None else None


def _without_export(machine: Machine) -> str | None:
    if machine.bundle is not None:
        return f"{machine.bundle} is given"
    if not {"torch", "onnx"} <= machine.modules:
        return "exporting needs PyTorch and onnx; give a bundle with --bundle"
    return _without_gpu(machine)


def _without_engine(machine: Machine, target: str) -> str | None:
    module = target.replace("-", "_")
    missing = [name for name in (module, "triton", "onnx") if name not in machine.modules]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if machine.capability is not None and machine.bundle is None and _without_export(machine) is not None:
        return "there is no bundle; give one with --bundle"
    return _without_gpu(machine)


def _without_torch(machine: Machine) -> str | None:
    if "torch" not in machine.modules:
        return "PyTorch is not installed"
    return None if machine.torch_gpu else _without_gpu(machine) or "PyTorch finds no GPU"


def _without_torch_and_tensorrt(machine: Machine) -> str | None:
    if not machine.modules & {"tensorrt", "tensorrt_rtx"}:
        return "neither TensorRT nor TensorRT for RTX is installed"
    return _without_torch(machine)


def _without_sanitizer(machine: Machine) -> str | None:
    if machine.sanitizer is None:
        return "compute-sanitizer is not installed, which comes with the CUDA toolkit"
    return _without_torch(machine)


def this_machine(bundle: Path | None) -> Machine:
    """The machine at hand."""
    names = ("torch", "triton", "onnx", "tensorrt", "tensorrt_rtx")
    installed = frozenset(name for name in names if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None)
    torch_gpu = False
    if "torch" in installed:
        import torch

        torch_gpu = torch.cuda.is_available()
    sanitizer = shutil.which("compute-sanitizer")
    try:
        driver = open_driver()
    except DynaMaskError:
        return Machine(installed, torch_gpu, None, sanitizer, bundle)
    return Machine(installed, torch_gpu, driver.compute_capability, sanitizer, bundle, driver.device)


def run_parts(chosen: Sequence[Part], machine: Machine, output: Path, seconds: float) -> Iterator[Outcome]:
    """Run the parts within a time, and give each part's outcome once it is known."""
    end = time.monotonic() + seconds
    for part in chosen:
        reason = part.skip(machine)
        remaining = end - time.monotonic()
        if reason is not None:
            yield Outcome(part.name, "skipped", note=reason)
        elif remaining < 1:
            yield Outcome(part.name, "left", note="the time was over before it began")
        else:
            yield _run(part, output, remaining)


def _run(part: Part, output: Path, seconds: float) -> Outcome:
    start = time.monotonic()
    log = output / f"{part.name.replace(' ', '-')}.log"
    results = output / part.results if part.results else None
    if results is not None:
        results.unlink(missing_ok=True)
    command = [*part.tool, sys.executable, *part.arguments]
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, env={**os.environ, **dict(part.environment)}, check=False
            )
            state = "passed" if done.returncode == 0 else "failed"
            if done.returncode == NOTHING_COLLECTED and "pytest" in part.arguments:
                state = "skipped"
        except subprocess.TimeoutExpired:
            state = "left"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    note = "" if state == "passed" else " ".join(lines[-1:])
    if state == "left":
        note = f"the time was over; {log.name} ends at: {note}"
    found = json.loads(results.read_text()) if results is not None and results.is_file() else None
    return Outcome(part.name, state, time.monotonic() - start, note, found)


def check_engine(bundle: Path, target: str, precision: str, runs: int = RUNS, build: bool = True) -> dict[str, Any]:
    """Build and run a bundle's engine on a drawn and on a blank image, and compare it with ONNX Runtime on the CPU in fp32.

    Returns:
        By image: `instances`, and of those that both found `boxes_px`, `scores` and `probabilities` (the largest differences) and
        `same_grids` (share); for the drawn one `routed_ms` and `largest_ms`, medians of the runs after the first, and `first_ms`.
    """
    from export.engine import build_engine
    from runtime.bundle import Bundle
    from runtime.targets.registry import open_engine

    if build:
        build_engine(bundle, target, precision)
    build_engine(bundle, "onnxruntime")
    opened = Bundle.open(bundle)
    found: dict[str, Any] = {}
    with open_engine(opened, target) as engine, open_engine(opened, "onnxruntime") as peer:
        for name in IMAGES:
            canvas = _canvas(opened, name)
            start = time.perf_counter()
            output = engine.run(canvas)
            found[name] = {"first_ms": 1000 * (time.perf_counter() - start), **_compare(output, peer.run(canvas))}
        drawn = _canvas(opened, "drawn")
        for key, override in (("routed_ms", None), ("largest_ms", 3)):
            found["drawn"][key] = float(np.median([_timed(engine, drawn, override) for _ in range(runs)]))
    return found


def _canvas(bundle: Any, name: str) -> npt.NDArray[np.float32]:
    from dynamask.data.shapes import draw_image
    from runtime.preprocess import letterbox_normalise

    height, width = bundle.manifest.canvas
    image = np.zeros((height, width, 3), np.uint8)
    if name == "drawn":
        image, _ = draw_image(np.random.default_rng([77100, 0]), height, width)
    return letterbox_normalise(image, height, width, bundle.manifest.mean, bundle.manifest.std)[0]


def _timed(engine: Any, canvas: npt.NDArray[np.float32], override: int | None) -> float:
    start = time.perf_counter()
    engine.run(canvas, grid_override=override)
    return 1000 * (time.perf_counter() - start)


def _compare(found: Any, expected: Any) -> dict[str, Any]:
    """Differences of the instances that two engines found in the same slot with the same label."""
    same = (found.scores > 0) & (expected.scores > 0) & (found.labels == expected.labels)
    counts = {"instances": int((found.scores > 0).sum()), "expected_instances": int((expected.scores > 0).sum()), "same": int(same.sum())}
    if not same.any():
        return counts
    probabilities = [0.0]
    for grid, (slots, logits) in found.masks.items():
        peer_slots, peer_logits = expected.masks[grid]
        shared = np.intersect1d(np.intersect1d(slots, peer_slots), np.nonzero(same)[0])
        ours, theirs = (1 / (1 + np.exp(-x[np.searchsorted(s, shared)])) for s, x in ((slots, logits), (peer_slots, peer_logits)))
        probabilities.append(float(np.abs(ours - theirs).max(initial=0)))
    return counts | {
        "boxes_px": float(np.abs(found.boxes - expected.boxes)[same].max()),
        "scores": float(np.abs(found.scores - expected.scores)[same].max()),
        "probabilities": max(probabilities),
        "same_grids": float((found.grids == expected.grids)[same].mean()),
    }


def page(machine: Machine, outcomes: Sequence[Outcome], when: str) -> str:
    """The Markdown page."""
    results = {outcome.name: outcome.results for outcome in outcomes if outcome.results is not None}
    lines = [f"# {machine.name}", "", f"`scripts/gpu_checks.sh`, {when}. Compute capability {machine.capability or 'unknown'}.", ""]
    lines += ["| part | outcome | seconds | note |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {_cell(o.note)} |" for o in outcomes]
    engines = [(o.name, image, o.results[image]) for o in outcomes if o.name.startswith("tensorrt") and o.results for image in IMAGES]
    if engines:
        columns = (
            "instances",
            "expected_instances",
            "boxes_px",
            "scores",
            "probabilities",
            "same_grids",
            "first_ms",
            "routed_ms",
            "largest_ms",
        )
        lines += [
            "",
            "## Engines beside ONNX Runtime in fp32",
            "",
            f"| engine | image | {' | '.join(columns)} |",
            "|---" * (2 + len(columns)) + "|",
        ]
        lines += [f"| {engine} | {image} | {' | '.join(_number(found.get(key)) for key in columns)} |" for engine, image, found in engines]
    speed = results.get("speed of kernels")
    if speed:
        lines += ["", "## Kernels", "", "Medians in milliseconds.", "", "| case | type | contender | ms |", "|---|---|---|---|"]
        lines += [
            f"| {case['name']} | {case['dtype']} | {contender} | {times['median_ms']:.3f} |"
            for case in speed["cases"]
            for contender, times in case["times"].items()
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def main(arguments: Sequence[str]) -> int:
    """The number of parts that failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_checks.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for gpu.json, gpu.md and the parts' logs")
    parser.add_argument("--bundle", type=Path, help="a bundle with model.onnx; without it, lite0 is exported, which needs PyTorch")
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts")
    parser.add_argument("--parts", default="", help="names of parts, separated by commas; all by default")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    machine = this_machine(options.bundle)
    every = parts(output, options.bundle and options.bundle.resolve())
    names = [name for name in options.parts.split(",") if name]
    unknown = set(names) - {part.name for part in every}
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in every)}")
    outcomes = []
    for outcome in run_parts([part for part in every if not names or part.name in names], machine, output, 60 * options.minutes):
        outcomes.append(outcome)
        print(f"{outcome.state:8} {outcome.name} ({outcome.seconds:.0f} s) {outcome.note}", flush=True)
        # Written after each part: a library may take the machine down.
        when = time.strftime("%Y-%m-%d")
        content = {
            "date": when,
            "gpu": machine.name,
            "compute_capability": machine.capability,
            "parts": [asdict(each) for each in outcomes],
        }
        (output / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
        (output / "gpu.md").write_text(page(machine, outcomes, when))
    left = [outcome.name for outcome in outcomes if outcome.state == "left"]
    if left:
        print(f'Left for want of time: {", ".join(left)}; run them with --parts "{",".join(left)}".')
    print(f"The results are {output / 'gpu.json'} and {output / 'gpu.md'}: put them into docs/results/gpu/.")
    return sum(outcome.state == "failed" for outcome in outcomes)


def _engine(bundle: str, target: str, precision: str, report: str) -> int:
    Path(report).write_text(json.dumps(check_engine(Path(bundle), target, precision)))
    return 0


def _export(folder: str) -> int:
    from export.export import export_bundle
    from runtime.carried import carried_checkpoint

    export_bundle(carried_checkpoint("lite0-shapes"), folder)
    return 0


if __name__ == "__main__":
    # The parts that run in processes of their own.
    inner: dict[str, Callable[..., int]] = {"--engine": _engine, "--export": _export}
    first, *rest = sys.argv[1:] or ["--help"]
    sys.exit(inner[first](*rest) if first in inner else main(sys.argv[1:]))
