"""Training in several processes that `torchrun` has started; in a single process nothing here has an effect.

PyTorch's DistributedDataParallel averages the processes' gradients. That is the gradient of the whole batch only if each process's loss
is a mean over the same number of items. The mask branch's losses are means over instances, and processes differ in their number.
`instances_per_process` and `batch_mean` make them equal to those of one process with the whole batch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import InputError

PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others; they wait while the first one evaluates."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restarted: bool = False
    """torchrun has started the run again after a failure."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, evaluates and reports."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must call."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, values: Tensor) -> Tensor:
        """The processes' mean of a tensor without gradient."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def gather(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of all processes, in each of them; all must call. Exchanged as JSON, because nothing is unpickled."""
        if self.size == 1:
            return entries
        text = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)], device=self.device))
        longest = max(int(length) for length in lengths)
        if longest == len("[]"):
            return []
        padded = functional.pad(text, (0, longest - len(text)))
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded)
        texts = (bytes(row[: int(length)].tolist()) for row, length in zip(rows, lengths, strict=True))
        return [entry for text in texts for entry in json.loads(text)]

    def lost_process(self, error: RuntimeError) -> bool:
        """Whether an error says that another process of the run has ended."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that `torchrun` has started, for the time of the block; without torchrun, a world of one process.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    gpu = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(device=torch.device("cuda" if gpu else "cpu"))
        return
    local = int(os.environ["LOCAL_RANK"])
    if gpu:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "give --nproc-per-node as many as there are GPUs."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        yield World(dist.get_rank(), dist.get_world_size(), device, restarts > 0)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def averaged(model: nn.Module, world: World) -> Iterator[nn.Module]:
    """The model, with its gradients averaged over the processes in `backward`. Steps may differ in the parameters that they use."""
    if world.size == 1:
        yield model
        return
    parallel = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    try:
        yield parallel
    finally:
        # Freed while the process group is there. A traceback may hold `parallel` for longer, and a reducer that was the last to hold the
        # group would wait, with Python's lock, for a thread of the group that waits for the lock (torch 2.11).
        del parallel.reducer, parallel.logger


def instances_per_process(count: int, device: torch.device) -> float:
    """The mean number of instances in a process; `count` in a single process."""
    if _size() == 1:
        return float(count)
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return float(total) / _size()


def batch_mean(rows: Tensor) -> Tensor:
    """The mean of rows `[N, K]` over the rows of all processes -> `[K]`; 0 if there is none.

    Its gradient reaches this process's rows, scaled so that after DistributedDataParallel's averaging it is that of the whole batch.
    """
    count = max(instances_per_process(len(rows), rows.device) * _size(), 1.0)
    own = rows.sum(dim=0) / count
    if _size() == 1:
        return own
    whole = own.detach().clone()
    dist.all_reduce(whole)
    return whole + _size() * (own - own.detach())


def _size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
