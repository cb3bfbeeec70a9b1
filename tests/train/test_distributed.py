"""Two processes under torchrun, on the CPU: the gradients of the whole batch, one that is killed, and resuming."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dynamask.config import load_config
from dynamask.distributed import World
from dynamask.train.checkpoint import load_state
from dynamask.train.trainer import train
from runtime.errors import InputError
from tests.train.gradients import gradients
from tests.train.runs import ENVIRONMENT, FIELDS, ROOT, TORCHRUN, tiny


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    command = [*TORCHRUN, str(ROOT / "tests" / "train" / "gradients.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=600)
    for phase in (1, 2):
        shared, whole = load_file(tmp_path / f"phase{phase}.safetensors"), gradients(phase, World())
        assert shared.keys() >= whole.keys()
        errors = {name: float((shared[name] - gradient).norm()) for name, gradient in whole.items()}
        assert math.hypot(*errors.values()) <= 1e-5 * math.hypot(*(float(gradient.norm()) for gradient in whole.values()))
        # Each part too: sums of many terms that cancel, in float32, leave more of an error in some biases.
        assert all(error <= 1e-3 * max(float(whole[name].norm()), 1e-2) for name, error in errors.items())


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_resuming_finishes_it(tmp_path: Path) -> None:
    output = tmp_path / "run"
    fields = {**FIELDS, "train.phase2_epochs": 40, "train.checkpoint_every_steps": 1}
    settings = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    command = [*TORCHRUN, "-m", "cli.main", "train", "--config", "lite0-shapes", "--output", str(output), *settings]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        deadline = time.monotonic() + 600
        while not (output / "state.safetensors").exists():
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1][-2000:]
            time.sleep(0.2)
        os.kill(worker(run.pid, rank=1), signal.SIGKILL)
        said = run.communicate(timeout=600)[1]
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL) received" in said
    step = load_state(output / "state.safetensors").progress["step"]
    assert 1 <= step < 123

    shorter = load_config(str(output / "config.yaml"), {"train.phase2_epochs": step // 3 + 1})
    result = train(shorter, output, resume=True, quiet=True)  # by one process: the batches are the same
    assert not result["interrupted"]
    assert result["steps"] == result["total_steps"] > step


def worker(parent: int, rank: int) -> int:
    """The process that torchrun has started as `rank`."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                variables = dict(part.partition("=")[::2] for part in (process / "environ").read_text().split("\0"))
                status = (process / "status").read_text()
            except OSError:
                continue
            if variables.get("RANK") == str(rank) and f"PPid:\t{parent}\n" in status:
                return int(process.name)
    raise AssertionError(f"no worker of rank {rank} under {parent}")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr("dynamask.train.trainer.joined", lambda: nullcontext(World(size=4)))
    with pytest.raises(InputError, match=r"train\.batch is 2, which 4 processes cannot share equally"):
        train(tiny(), tmp_path / "run", quiet=True)
