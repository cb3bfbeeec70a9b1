"""Reports of a run: to `log.jsonl`, TensorBoard and the terminal while it trains, and to `metrics.json` at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamask.train.log import ProgressReport, RunLog, losses_by_epoch
from dynamask.train.progress import Progress
from dynamask.train.schedule import Schedule
from runtime.files import write_json


class Metrics:
    """Reports steps, evaluations and skipped images, and keeps the run's time."""

    def __init__(self, output: Path, report: ProgressReport, progress: Progress, schedule: Schedule, is_main: bool) -> None:
        """`is_main`: whether this is the first process of the run, the only one that writes a log."""
        self.log = RunLog(output, progress.step) if is_main else None
        self.report, self.progress = report, progress
        self.batch = schedule.config.batch
        self._started = time.monotonic() - progress.seconds
        report.start(progress.step, schedule.total_steps)

    def keep_time(self) -> None:
        """Bring `progress.seconds` up to date."""
        self.progress.seconds = time.monotonic() - self._started

    def step(self, record: dict[str, Any]) -> None:
        """Report a step that was done."""
        self.keep_time()
        if self.log is not None:
            self.log.step({**record, "seconds": round(self.progress.seconds, 3)})
        self.report.step(record, self.batch)

    def skipped(self, entries: list[dict[str, Any]]) -> None:
        """Report images skipped on the way to the next step."""
        if self.log is not None:
            self.log.skipped({"step": self.progress.step + 1, **entry} for entry in entries)
        for entry in entries:
            self.report.message(f"Skipped: {entry['reason']}")

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Write the figures of an evaluation to TensorBoard."""
        if self.log is not None:
            self.log.evaluation(entry)

    def picture(self, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Show a picture `[H, W, 3] uint8` RGB in TensorBoard."""
        if self.log is not None:
            self.log.picture(name, image, self.progress.step)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def message(self, text: str) -> None:
        """Print a line to the terminal."""
        self.report.message(text)


def write_metrics(output: Path, progress: Progress, schedule: Schedule, data: dict[str, Any]) -> dict[str, Any]:
    """Write `metrics.json` of a run that has ended, or was interrupted, and return it; `data` has the counts of the data sets."""
    best = output / "best.safetensors"
    result = {
        "steps": progress.step,
        "total_steps": schedule.total_steps,
        "interrupted": interrupted(progress, schedule),
        "losses": losses_by_epoch(output),
        "ap_by_epoch": [{name: value for name, value in entry.items() if name != "uniform"} for entry in progress.evaluations],
        "uniform": progress.evaluations[-1].get("uniform") if progress.evaluations else None,
        "calibration": progress.calibration,
        "skipped": len(progress.skipped),
        "data": data,
        "checkpoint": str(output / "model.safetensors"),
        "best": str(best) if best.exists() else None,
        "seconds": round(progress.seconds, 1),
    }
    write_json(output / "metrics.json", result)
    return result


def interrupted(progress: Progress, schedule: Schedule) -> bool:
    """Whether steps, or the evaluation after the last one, are still to be done."""
    return progress.step < schedule.total_steps or (schedule.evaluates(progress.step) and not progress.evaluated)
