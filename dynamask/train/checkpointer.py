"""Writes the checkpoints of a run, and the state from which it resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamask.config import MAY_CHANGE_ON_RESUME, Config, first_difference
from dynamask.distributed import World
from dynamask.train.checkpoint import TrainingState, load_state, save_checkpoint, save_state
from dynamask.train.learner import Learner
from dynamask.train.progress import Progress
from dynamask.train.schedule import Schedule
from runtime.errors import InputError
from runtime.files import atomic_path, check_folder, input_path

STATE_FILE = "state.safetensors"


@dataclass
class Checkpointer:
    """Saves a run into its output folder; only in the first process of the run."""

    output: Path
    config: Config
    learner: Learner
    schedule: Schedule
    progress: Progress
    world: World

    def write_config(self) -> None:
        """Write `config.yaml`, the whole configuration."""
        if self.world.is_main:
            with atomic_path(self.output / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def save_if_due(self) -> None:
        """Save after the steps at which the schedule says so."""
        if self.schedule.saves(self.progress.step):
            self.save()

    def save(self) -> None:
        """Write the state, then `model.safetensors`: if the second cannot be written, the run can still resume from the first."""
        if not self.world.is_main:
            return
        fields = {"config": self.config.model_dump(mode="json"), "classes": self.learner.model.classes}
        fields |= {"scaler": self.learner.scaler.state_dict(), "progress": self.progress.to_json()}
        save_state(self.output / STATE_FILE, self.learner.model, self.learner.optimizer, fields)
        self._save_model("model.safetensors", {"step": self.progress.step, "epoch": self.schedule.epoch(self.progress.step)})

    def save_best(self, entry: dict[str, Any]) -> None:
        """Write `best.safetensors`, with its evaluation."""
        self._save_model("best.safetensors", {name: entry[name] for name in ("step", "epoch", "segm")})

    def _save_model(self, name: str, extra: dict[str, Any]) -> None:
        save_checkpoint(self.output / name, self.learner.model, self.config, self.learner.model.classes, extra)


def state_to_resume(config: Config, output: Path, resume: bool) -> TrainingState | None:
    """The state of the run in `output`; None for a new run, for which `output` must be free.

    Raises:
        InputError: there is no run to resume, the folder holds another run, or a field differs that is not in `MAY_CHANGE_ON_RESUME`.
    """
    path = input_path(output / STATE_FILE)
    if not resume:
        if path.exists():
            raise InputError(f"{output} already holds a run: pass --resume to continue it, or choose another --output.")
        check_folder(output)
        return None
    if not path.exists():
        raise InputError(f"{path} does not exist: there is nothing to resume; leave --resume out to begin a run.")
    state = load_state(path)
    changed = first_difference(state.config, config, MAY_CHANGE_ON_RESUME)
    if changed is not None:
        name, before, now = changed
        raise InputError(f"{output} was trained with {name} {before}, not {now}: resume with the same value, or choose another --output.")
    return state
