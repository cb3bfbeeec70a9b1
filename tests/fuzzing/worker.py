"""The child process that makes inputs and checks them."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import importlib
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing import Files, write

INPUT, STDERR = "input", "stderr.txt"
"""Inside the folder of a process: the folder of the input that is checked, and what libraries print."""
_EXAMPLES = 100
"""Of one run of Hypothesis, which keeps all of them in memory."""
_OPEN_FILES = 20
"""More open files than in the beginning are a finding: they are left from inputs before."""


@dataclass(frozen=True)
class Message:
    """What the child says: before each input `begun`, after it `accepted`, `refused` or the name of a finding."""

    outcome: str
    folder: Path
    peak_bytes: int
    seconds: float = 0.0
    """Processor time of the check."""
    traceback: str = ""


def fuzz(kind: str, folder: Path, first_seed: int, seconds: float, examples: int | None, sender: Connection) -> None:
    """Check different inputs until the time is over or their number is reached, and send two messages about each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / STDERR).open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    end = time.monotonic() + seconds
    module = importlib.import_module(f"tests.fuzzing.{kind}")
    count, open_files = 0, 0
    seen: set[bytes] = set()

    def one(files: Files) -> None:
        nonlocal count, open_files
        if time.monotonic() > end or (examples is not None and count >= examples):
            return
        digest = hashlib.sha256(repr(sorted(files.items())).encode()).digest()[:16]
        if digest in seen:
            return
        seen.add(digest)
        count += 1
        shutil.rmtree(folder / INPUT, ignore_errors=True)
        write(files, folder / INPUT)
        sender.send(Message("begun", folder, _peak_bytes()))
        start = time.process_time()
        outcome, report = _outcome(module.check, folder / INPUT)
        used = time.process_time() - start
        if count == 100:
            open_files = _open_files()
        elif count > 100 and _open_files() > open_files + _OPEN_FILES:
            gc.collect()
            if _open_files() > open_files + _OPEN_FILES:
                outcome, open_files = "files are left open", _open_files()
        sender.send(Message(outcome, folder, _peak_bytes(), used, report))

    number = first_seed * 1_000_000
    while time.monotonic() < end and (examples is None or count < examples):
        number += 1
        # Never fewer examples: a run of one makes the simplest input alone, which was checked before.
        run = settings(
            max_examples=_EXAMPLES, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )(seed(number)(given(files=module.inputs())(one)))
        run()


def _outcome(check: Callable[[Path], bool], folder: Path) -> tuple[str, str]:
    """The outcome of an input, and the traceback of a finding. The input that was checked is restored for it."""
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        return ("accepted" if check(folder) else "refused"), ""
    except Exception as error:
        for path, data in content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return f"{type(error).__name__} in {place}", traceback.format_exc(limit=-30)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
