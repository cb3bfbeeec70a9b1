"""Runs TensorRT's builder in a process of its own: Ctrl-C ends it at once, and if TensorRT aborts, the caller continues.

Cancelling a build through TensorRT's `IProgressMonitor` corrupts memory in TensorRT 1.7 for RTX while it clones plugins.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runtime.errors import DynaMaskError
from runtime.files import atomic_path, user_cache
from trt_plugins.driver import Driver, open_driver
from trt_plugins.kernels import KernelLibrary
from trt_plugins.launcher import KernelLauncher
from trt_plugins.plugin import Launcher, register
from trt_plugins.tensorrt import TensorRT, load

if TYPE_CHECKING:
    import tensorrt

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the number of its finished steps, and the number of its steps. Phases are nested."""


def build_serialized(target: str, model: Path, engine: Path, library: KernelLibrary, ranges: Ranges, progress: Progress) -> None:
    """Build an engine of a lowered ONNX graph, from file to file.

    Args:
        engine: the file to write; a log is written beside it.
        library: the kernels of the graph's plugins, which `tensorrt` runs on the GPU at hand to time them.
        ranges: each input -> its minimum, optimum and maximum shape; the engine is tuned for the optimum.

    Raises:
        InputError: a node does not fit its plugin, or for `tensorrt` there is no GPU.
        DynaMaskError: TensorRT does not take the graph, or fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, target, model, engine, library, ranges), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            if isinstance(message, DynaMaskError):
                raise message
            progress(*message)
    except EOFError:
        process.join()
        log = _log(engine)
        said = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        reason = f"exit status {process.exitcode}" + "".join(f", {line}" for line in said[-1:])
        raise DynaMaskError(
            f"The builder of {target} aborted or was killed, perhaps for lack of memory ({reason}); free some memory and build again."
        ) from None
    finally:
        process.kill()
        process.join()


def _log(engine: Path) -> Path:
    return engine.with_suffix(".log")


def _work(sender: Connection, target: str, model: Path, engine: Path, library: KernelLibrary, ranges: Ranges) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in a terminal ends this process without a traceback.
    # TensorRT prints what plugins raise, with tracebacks.
    with _log(engine).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    lock = threading.Lock()  # TensorRT reports from several threads.

    def report(phase: str, done: int, total: int) -> None:
        with lock:
            sender.send((phase, done, total))

    try:
        with _driver(target, library) as (driver, launcher):
            _Builder(load(target), report).build(model, engine, ranges, launcher, driver)
        sender.send(None)
    except DynaMaskError as error:
        sender.send(error)
    except Exception as error:
        sender.send(DynaMaskError(f"The builder of {target} failed ({type(error).__name__}: {error}); please report it."))


@contextlib.contextmanager
def _driver(target: str, library: KernelLibrary) -> Iterator[tuple[Driver | None, Launcher | None]]:
    """For `tensorrt`: the GPU on which it times its layers, and the launcher of the plugins' kernels there."""
    if target == "tensorrt-rtx":
        yield None, None
        return
    driver = open_driver()
    with driver.current():
        kernels = library.for_device(driver.compute_capability)
        launcher = KernelLauncher(driver, kernels, driver.create_event(), "build it again with dynamask build-engine.")
        try:
            yield driver, launcher
        finally:
            launcher.unload()


class _Builder:
    """One build; `error` is the last error that TensorRT logged."""

    def __init__(self, trt: TensorRT, progress: Progress) -> None:
        self.trt = trt
        self.progress = progress
        self.error = "it gave no reason"

    def build(self, model: Path, engine: Path, ranges: Ranges, launcher: Launcher | None, driver: Driver | None) -> None:
        """Build from file to file. A timing cache is used if there is a driver, for its GPU."""
        trt = self.trt
        logger, monitor = self._logger(), self._monitor()
        with register(trt, launcher).raising():
            builder = trt.Builder(logger)
            # TensorRT 10 needs the flag; in later versions all networks are strongly typed.
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(model)):
                raise self._failure("does not take the graph", parser.get_error(0).desc())
            config = builder.create_builder_config()
            config.progress_monitor = monitor
            config.clear_flag(trt.BuilderFlag.TF32)
            # One stream only: TensorRTEngine relies on the order of events and kernels in it.
            config.max_aux_streams = 0
            if driver is not None:
                # Plugins are timed on this stream. pycuda cannot launch on one that TensorRT makes.
                config.profile_stream = driver.create_stream()
            # Where nothing varies too: without a profile TensorRT creates no execution context for a graph with data-dependent sizes.
            profile = builder.create_optimization_profile()
            for name, shapes in ranges.items():
                profile.set_shape(name, *(trt.Dims(list(shape)) for shape in shapes))
            if config.add_optimization_profile(profile) < 0:
                raise self._failure("does not take the profile", self.error)
            with _timing_cache(trt, config, driver):
                serialized = cast("tensorrt.IHostMemory | None", builder.build_serialized_network(network, config))
            if serialized is None:
                raise self._failure("did not build the engine", self.error)
            engine.write_bytes(serialized)

    def _failure(self, what: str, reason: str) -> DynaMaskError:
        return DynaMaskError(f"{self.trt.__name__} {self.trt.__version__} {what} ({reason.strip().rstrip('.')}); please report it.")

    def _logger(self) -> tensorrt.ILogger:
        trt, builder = self.trt, self

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: tensorrt.ILogger.Severity, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    builder.error = message.partition("\n")[0]

        return Logger()

    def _monitor(self) -> tensorrt.IProgressMonitor:
        trt, progress = self.trt, self.progress

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.steps: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                self.steps[phase] = steps
                progress(phase, 0, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                progress(phase, step + 1, self.steps[phase])
                return True

            def phase_finish(self, phase: str) -> None:
                steps = self.steps.pop(phase)
                progress(phase, steps, steps)

        return Monitor()


@contextlib.contextmanager
def _timing_cache(trt: TensorRT, config: tensorrt.IBuilderConfig, driver: Driver | None) -> Iterator[None]:
    """The layer timings that TensorRT measures on a GPU, kept for later builds. TensorRT for RTX measures none while it builds."""
    if driver is None:
        yield
        return
    folder = user_cache("tensorrt")
    file = folder / f"{trt.__version__}-{re.sub('[^0-9A-Za-z]+', '-', driver.device)}.timing"
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    with contextlib.suppress(DynaMaskError), atomic_path(file) as temporary:
        temporary.write_bytes(bytes(cache.serialize()))
