"""The progress of a run: everything besides the model that changes from step to step and is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

DIVERGED = 10.0
"""A run has diverged when its mean loss is this many times its lowest in the phase (or 1, if the lowest was below)."""
LOSS_MEMORY = 0.98
"""Weight of the past in that mean: a single loss diverges only if it is 500 times as high."""


@dataclass
class DivergenceGuard:
    """Detects that the loss diverges. It is saved with the run, so that a resumed run decides as an uninterrupted one does."""

    phase: int = 0
    mean: float = 0.0
    lowest: float = 0.0

    def diverges(self, phase: int, loss: float) -> bool:
        """Add the loss of a step, and return whether the mean has diverged. Each phase has a mean of its own, because its losses differ."""
        if phase != self.phase:
            self.phase, self.mean, self.lowest = phase, loss, loss
        self.mean = LOSS_MEMORY * self.mean + (1 - LOSS_MEMORY) * loss
        self.lowest = min(self.lowest, self.mean)
        return self.mean > DIVERGED * max(self.lowest, 1.0)


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Spent in the run so far, in all its parts."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `epoch`, `calibrated` and the figures of each evaluation; `step` alone in processes that do not evaluate."""
    skipped: set[int] = field(default_factory=set)
    """Indices, in the data set, of the images that could not be read."""
    guard: DivergenceGuard = field(default_factory=DivergenceGuard)
    calibration: dict[str, Any] | None = None
    """Of the MSM, once done: after which `step`, `requested` and found `detections`, and the figures of `calibrate`."""

    @property
    def evaluated(self) -> bool:
        """Whether the model of this step has been evaluated."""
        return any(entry["step"] == self.step for entry in self.evaluations)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the state file."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "skipped": sorted(self.skipped),
            "loss_watch": asdict(self.guard),
            "calibration": self.calibration,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        return cls(
            step=data["step"],
            seconds=data["seconds"],
            evaluations=data["evaluations"],
            skipped=set(data.get("skipped", [])),
            guard=DivergenceGuard(**data.get("loss_watch", {})),
            calibration=data.get("calibration"),
        )
