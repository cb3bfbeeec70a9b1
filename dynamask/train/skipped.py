"""Training images that could not be read: they are counted and listed, and a run with too many of them ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.data.augment import TOLERATED_SHARE, TrainingItems
from dynamask.distributed import World
from dynamask.train.metrics import Metrics
from dynamask.train.progress import Progress
from runtime.errors import InputError


@dataclass
class SkippedImages:
    """Lists the images that could not be read; each process has the images of all."""

    output: Path
    items: TrainingItems
    progress: Progress
    metrics: Metrics
    world: World

    def note(self, targets: list[dict[str, Any]]) -> None:
        """Count and list the images that were skipped on the way to a batch.

        Args:
            targets: of the batch; `skipped` holds `index` and `reason` of each skipped image.

        Raises:
            InputError: more than a tenth of the images have been skipped.
        """
        entries = self.world.gather([entry for target in targets for entry in target["skipped"]])
        new = {entry["index"]: entry for entry in entries if entry["index"] not in self.progress.skipped}
        if not new:
            return
        self.progress.skipped |= set(new)
        self.metrics.skipped(list(new.values()))
        count, total = len(self.progress.skipped), len(self.items)
        if count > self.items.tolerated:
            latest = list(new.values())[-1]["reason"].rstrip(".")
            raise InputError(
                f"{count} of the {total} training images are broken, more than {TOLERATED_SHARE:.0%} ({latest}): "
                f"repair those listed in {self.output / 'skipped.jsonl'}, or remove them from the annotations."
            )
