"""The log of a run: a line of JSON for each step, TensorBoard events, and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from runtime.files import atomic_path, unwritable

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss that the terminal shows."""
LINE_SECONDS = 10.0
"""Pause between two lines of progress where standard error is no terminal."""


class RunLog:
    """`log.jsonl` and `tensorboard/` of an output folder, continued from `first_step`.

    Lines of later steps, written by a run that was killed before its next checkpoint, are dropped, because those steps are done again. The
    same holds for `skipped.jsonl`, which exists only if an image was skipped.
    """

    def __init__(self, output: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.skipped_path = output / "log.jsonl", output / "skipped.jsonl"
        with _disk(self.path):
            for path in (self.path, self.skipped_path):
                if path == self.path or path.exists():
                    kept = [line for line in read_lines(path) if line["step"] <= first_step]
                    with atomic_path(path) as temporary:
                        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """Write the record of a step: its numbers at the top level, and the dictionaries of numbers in it by `group/name`."""
        with _disk(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._scalars(record["step"], {name: value for name, value in record.items() if name not in ("step", "phase")})

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write the AP figures of an evaluation to TensorBoard."""
        with _disk(self.path):
            self._scalars(record["step"], {f"val_{name}": record[name] for name in ("segm", "bbox", "share")})
            self._board.flush()

    def skipped(self, records: Iterable[dict[str, Any]]) -> None:
        """Write images that could not be read: a line of `step`, `index` (in the data set) and `reason` each."""
        with _disk(self.skipped_path), self.skipped_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def picture(self, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """Show a picture `[H, W, 3] uint8` RGB in TensorBoard."""
        with _disk(self.path):
            self._board.add_image(f"pictures/{name}", image, step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            self._board.close()

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            for leaf, number in value.items() if isinstance(value, dict) else [("", value)]:
                if number is not None:  # there is no AP without annotations
                    self._board.add_scalar(f"{name}/{leaf}" if leaf else name, number, step)


def losses_by_epoch(output: Path) -> list[dict[str, float]]:
    """The mean of each loss over each epoch in `log.jsonl`, with the epoch's number, from 1."""
    epochs: dict[int, list[dict[str, float]]] = defaultdict(list)
    for line in read_lines(output / "log.jsonl"):
        epochs[int(line["epoch"]) + 1].append({"total": line["loss"], **line["losses"]})
    means = []
    for epoch, rows in sorted(epochs.items()):
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row[name] for row in rows if name in row] for name in names}
        means.append({"epoch": epoch, **{name: sum(column) / len(column) for name, column in columns.items()}})
    return means


class ProgressReport:
    """Loss (smoothed), rate, images per second and time left: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        self._loss: float | None = None
        self._images = 0
        self._started = self._spoken = time.monotonic()
        self._first_step = 0

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, step: int, total: int) -> None:
        """Start to count at `step` of `total`; called again for the calibration."""
        self._first_step, self._total = step, total
        self._started = self._spoken = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=step)
        elif self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("training", total=total, completed=step, figures="")
            self._bar.start()

    def step(self, record: dict[str, Any], images: int) -> None:
        """Count a step of `images` images."""
        self._loss = record["loss"] if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * record["loss"]
        self._images += images
        now = time.monotonic()
        per_second = self._images / max(now - self._started, 1e-9)
        figures = f"loss {self._loss:.3f}  rate {record['rate']:.2g}  {per_second:.1f} images/s"
        done = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures, description=f"phase {record['phase']}")
        elif now - self._spoken >= LINE_SECONDS or done == self._total:
            self._spoken = now
            left = (now - self._started) / (done - self._first_step) * (self._total - done)
            self.message(f"step {done}/{self._total}  epoch {record['epoch']:.2f}  phase {record['phase']}  {figures}  {left:.0f} s left")

    def calibration(self, done: int, total: int) -> None:
        """Count detections for the calibration of the MSM."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures="", description="calibrating the MSM")
        elif now - self._spoken >= LINE_SECONDS or done == total:
            self._spoken = now
            self.message(
                f"calibrating the MSM: {done}/{total} detections  {(now - self._started) / max(done, 1) * (total - done):.0f} s left"
            )

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def save_batch(path: Path, images: Tensor, targets: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    """Write a batch to `path` (safetensors), whole or not at all, so that its step can be examined.

    It holds `images [B, 3, H, W] float32`, `ids [B] int64` (of the images), `counts [B] int64` (instances of each), and the instances
    of all images one after the other: `boxes [G, 4] float32`, `labels [G] int64`, `masks [G, H, W] uint8`; `fields` are JSON in its
    metadata.

    Raises:
        DynaMaskError: the disk is full or the folder cannot be written.
    """
    tensors = {name: torch.cat([target[name] for target in targets]).cpu().contiguous() for name in ("boxes", "labels", "masks")}
    tensors["images"] = images.cpu().contiguous()
    tensors["ids"] = torch.tensor([target["image_id"] for target in targets])
    tensors["counts"] = torch.tensor([len(target["labels"]) for target in targets])
    with atomic_path(path) as temporary:
        # Written by Python, because the error of safetensors for a full disk is no OSError.
        temporary.write_bytes(safetensors.torch.save(tensors, {name: json.dumps(value) for name, value in fields.items()}))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file; none if there is no file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut short
            yield json.loads(line)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
