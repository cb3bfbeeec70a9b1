"""The phase, learning rate, images and seed of each training step, all functions of the step's number alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from dynamask.config import TrainConfig


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and for which nearby parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Schedule:
    """The plan of a run over a data set of `images` images: phase 1 (no MSM), phase 2 (paper, section 4.1)."""

    config: TrainConfig
    images: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the images that remain are used in other epochs, which have other orders."""
        return max(1, self.images // self.config.batch)

    @property
    def phase1_steps(self) -> int:
        """Steps of phase 1."""
        return round(self.config.phase1_epochs * self.steps_per_epoch)

    @property
    def total_steps(self) -> int:
        """Steps of both phases."""
        return self.phase1_steps + round(self.config.phase2_epochs * self.steps_per_epoch)

    def phase(self, step: int) -> int:
        """1 while the MSM is not trained, 2 while all modules are."""
        return 1 if step < self.phase1_steps else 2

    def epoch(self, step: int) -> float:
        """Epochs of both phases done before `step`."""
        return step / self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate: in proportion to the batch, linear warm-up over the first steps, then falling by the drops or the cosine."""
        warmup = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps > 0 else 1.0
        falling = self._cosine(step) if self.config.cosine else self._drops(step)
        return self.config.learning_rate * self.config.batch / 16 * warmup * falling

    def _drops(self, step: int) -> float:
        """The factor of the learning rate: a tenth after each drop."""
        epoch = (step - self.phase1_steps) / self.steps_per_epoch
        return float(0.1 ** sum(epoch >= drop for drop in self.config.rate_drop_epochs))

    def _cosine(self, step: int) -> float:
        """The factor of the learning rate: 1 until the end of the warm-up, 0 after the last step."""
        warmup = self.config.warmup_steps
        done = max(0, step - warmup) / max(1, self.total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due once `step` steps are done."""
        epochs = self.config.evaluate_every_epochs
        if epochs is None:
            return False
        every = round(epochs * self.steps_per_epoch)
        return step == self.total_steps or (epochs > 0 and step > 0 and step % max(1, every) == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` steps are done."""
        periodic = self.config.checkpoint_every_steps > 0 and step % self.config.checkpoint_every_steps == 0
        return periodic or step % self.steps_per_epoch == 0 or step == self.total_steps or self.evaluates(step)

    def seed(self, step: int, rank: int = 0) -> int:
        """The seed of the step's own randomness (sampled RoIs, Gumbel noise) in the process `rank`."""
        return mixed_seed(self.config.seed, "step", step, *([rank] if rank else []))


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(image index, epoch)` from `first_step` to the schedule's last; of each, every `size`-th from the `rank`-th on.

    Each epoch has its own order, drawn from the seed and the epoch alone, so that a run resumed at any step, by any number of
    processes, has the same images. `turned` says which images are on the transposed canvas; a batch has only images of one kind.
    """

    def __init__(self, schedule: Schedule, first_step: int, rank: int = 0, size: int = 1, turned: Sequence[bool] = ()) -> None:
        self.schedule = schedule
        self.first_step = first_step
        self.rank, self.size = rank, size
        self.turned = turned

    def __len__(self) -> int:
        return max(0, self.schedule.total_steps - self.first_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, per_epoch = self.schedule.config.batch, self.schedule.steps_per_epoch
        order: list[int] = []
        for step in range(self.first_step, self.schedule.total_steps):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or not order:
                order = self._order(epoch)
            whole = order[position * batch : (position + 1) * batch]
            yield [(index, epoch) for index in whole[self.rank :: self.size]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.schedule.config.seed, "epoch", epoch))
        order: list[int] = torch.randperm(self.schedule.images, generator=generator).tolist()
        return self._alike(order) if self.turned else order

    def _alike(self, order: list[int]) -> list[int]:
        """The same order, but in batches of images that are all turned or all not, each placed where its last image stood."""
        batch = self.schedule.config.batch
        batches: list[int] = []
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index in order:
            queue = waiting[self.turned[index]]
            queue.append(index)
            if len(queue) == batch:
                batches += queue
                queue.clear()
        if len(batches) < self.schedule.steps_per_epoch * batch:  # both kinds leave a part of a batch: the larger is filled up
            left = max(waiting.values(), key=len)
            again = [index for index in order if self.turned[index] == self.turned[left[0]] and index not in left]
            batches += [*left, *again[: batch - len(left)]]
        return batches
