"""Fuzzes one kind of file in a child process, and watches its time and memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzzing import worker

MAX_BYTES = 2 * 1024**3
"""Of memory, that a process may hold at any time, the interpreter and all libraries included."""
MAX_SECONDS = 10.0
"""Of processor time, for one input."""
_HANG_SECONDS = 60.0
"""Of wall time, for one input: one that waits takes no processor time."""
_SAVED = 3
"""Inputs saved of each finding."""
_BETWEEN_SECONDS = 180.0
"""Of wall time, for the start (imports, sound files) and for the making of an input."""


class Campaign:
    """The inputs of one kind, and what came of them.

    Attributes:
        outcomes: `accepted` and `refused` -> number of inputs.
        findings: name of a finding -> number of inputs.
        seed: of the first process. With the same versions and no finding, it makes the same inputs again.
    """

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.kind = kind
        self.outcomes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.seed = seed
        self._folder = folder.absolute()
        self._processes = 0
        self._peak_bytes = 0
        self._slowest_seconds = 0.0
        self._seconds = 0.0

    @property
    def count(self) -> int:
        """Inputs so far."""
        return self.outcomes.total() + self.findings.total()

    def run(self, seconds: float, examples: int | None) -> None:
        """Fuzz until the time is over or so many inputs were checked. After a crash, a new process goes on."""
        start = time.monotonic()
        while (left := start + seconds - time.monotonic()) > 0 and (examples is None or self.count < examples):
            self._run_process(left, None if examples is None else examples - self.count)
        self._seconds = time.monotonic() - start

    def _run_process(self, seconds: float, examples: int | None) -> None:
        inputs = self._folder / f"{self.kind}-{os.getpid()}"
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=worker.fuzz, args=(self.kind, inputs, self.seed + self._processes, seconds, examples, sender), daemon=True
        )
        process.start()
        self._processes += 1
        sender.close()
        try:
            fault = self._watch(process, receiver)
        finally:
            process.kill()
            process.join()
            receiver.close()
        if fault is not None:
            self._save(fault, inputs, (inputs / worker.STDERR).read_text(errors="replace") if (inputs / worker.STDERR).exists() else "")
        shutil.rmtree(inputs, ignore_errors=True)

    def _watch(self, process: Any, messages: Connection) -> str | None:
        """Follow the process to its end. Returns the fault for which it had to be ended, or ended itself."""
        checks = False
        wall, processor = time.monotonic(), 0.0
        while True:
            try:
                message = messages.recv() if messages.poll(0.05) else None
            except EOFError:
                process.join()
                return None if process.exitcode == 0 else f"the process ended with status {process.exitcode}"
            self._peak_bytes = max(self._peak_bytes, used := _used_bytes(process.pid))
            if used > MAX_BYTES:
                return f"more than {MAX_BYTES / 1024**3:.0f} GB of memory"
            if message is not None:
                checks = message.outcome == "begun"
                wall, processor = time.monotonic(), _processor_seconds(process.pid)
                if (fault := self._take(message)) is not None:
                    return fault
            elif checks and _processor_seconds(process.pid) - processor > MAX_SECONDS:
                return f"more than {MAX_SECONDS:.0f} seconds"
            elif time.monotonic() - wall > (limit := _HANG_SECONDS if checks else _BETWEEN_SECONDS):
                return f"nothing happened for {limit:.0f} seconds"

    def _take(self, message: worker.Message) -> str | None:
        self._peak_bytes = max(self._peak_bytes, message.peak_bytes)
        self._slowest_seconds = max(self._slowest_seconds, message.seconds)
        if message.outcome in ("accepted", "refused") and message.peak_bytes > MAX_BYTES:
            return f"more than {MAX_BYTES / 1024**3:.0f} GB of memory"
        if message.outcome in ("accepted", "refused"):
            self.outcomes[message.outcome] += 1
        elif message.outcome != "begun":
            self._save(message.outcome, message.folder, message.traceback)
        return None

    def _save(self, finding: str, inputs: Path, report: str) -> None:
        self.findings[finding] += 1
        number = self.findings[finding]
        if number > _SAVED:
            return
        name = "".join(character if character.isalnum() else "-" for character in finding)[:80]
        target = self._folder / "findings" / self.kind / f"{name}-{number}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        if (inputs / worker.INPUT).exists():
            shutil.copytree(inputs / worker.INPUT, target, dirs_exist_ok=True)
        target.with_suffix(".txt").write_text(f"{finding}\n\n{report}", encoding="utf-8", errors="backslashreplace")

    def summary(self) -> str:
        """The numbers of this kind, and each finding on a line of its own."""
        accepted, refused = self.outcomes["accepted"], self.outcomes["refused"]
        lines = [
            f"{self.kind}: {self.count} inputs in {self._seconds:.0f} s: {accepted} accepted, {refused} refused, "
            f"{self.findings.total()} findings; at most {self._peak_bytes / 1e6:.0f} MB of memory and "
            f"{self._slowest_seconds:.1f} s of processor time for an input; seed {self.seed}"
        ]
        lines += [f"  {number} times: {finding}" for finding, number in self.findings.most_common()]
        return "\n".join(lines)


def _used_bytes(process_id: int) -> int:
    try:
        pages = Path(f"/proc/{process_id}/statm").read_text().split()[1]
    except (OSError, IndexError):  # it has ended
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _processor_seconds(process_id: int) -> float:
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
