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
"""For one input."""
_SAVED = 3
"""Inputs saved of each finding."""
_START_SECONDS = 120.0
"""For imports, and for making inputs."""


class Campaign:
    """The inputs of one kind, and what came of them.

    Attributes:
        outcomes: `accepted` and `refused` -> number of inputs.
        findings: name of a finding -> number of inputs.
    """

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.kind = kind
        self.outcomes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self._folder = folder.absolute()
        self._seed = seed
        self._peak_bytes = 0
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
        self._seed += 1
        inputs = self._folder / f"{self.kind}-{os.getpid()}"
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=worker.fuzz, args=(self.kind, inputs, self._seed, seconds, examples, sender), daemon=True)
        process.start()
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
        running_since, limit = time.monotonic(), _START_SECONDS
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
                # Between inputs, Hypothesis makes the next ones, and may make many that were seen before.
                running_since, limit = time.monotonic(), MAX_SECONDS if message.outcome == "begun" else _START_SECONDS
                if (fault := self._take(message)) is not None:
                    return fault
            elif time.monotonic() - running_since > limit:
                return f"more than {limit:.0f} seconds"

    def _take(self, message: worker.Message) -> str | None:
        self._peak_bytes = max(self._peak_bytes, message.peak_bytes)
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
            f"{self.kind}: {self.count} inputs in {self._seconds:.0f} s: {accepted} accepted, "
            f"{refused} refused, {self.findings.total()} findings; at most {self._peak_bytes / 1e6:.0f} MB of memory"
        ]
        lines += [f"  {number} times: {finding}" for finding, number in self.findings.most_common()]
        return "\n".join(lines)


def _used_bytes(process_id: int) -> int:
    try:
        pages = Path(f"/proc/{process_id}/statm").read_text().split()[1]
    except (OSError, IndexError):  # it has ended
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
