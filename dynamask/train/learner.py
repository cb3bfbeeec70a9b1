"""The model of a run and its optimiser: new from the weights that the configuration names, or as a saved state has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from dynamask.config import Config
from dynamask.model import DynaMask, build_model
from dynamask.train.checkpoint import TrainingState, is_checkpoint, load_checkpoint, load_tensors, restore_momentum, start_from
from dynamask.weights import load_weights
from runtime.errors import InputError
from runtime.files import input_path

MASK_BRANCH = "mask_branch."
"""Prefix of the names of the tensors that are not the detector's."""


@dataclass
class Learner:
    """A model, its optimiser, and the scaler of its loss where there is mixed precision."""

    model: DynaMask
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    """Disabled on a CPU."""


def build_learner(
    config: Config,
    classes: list[dict[str, Any]],
    device: torch.device,
    state: TrainingState | None = None,
    state_path: Path | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> Learner:
    """The learner of a run at its first step, or where `state` (read from `state_path`) left off.

    Raises:
        InputError: the weights cannot be read, or do not fit the model.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(config, classes)
    if state is None:
        load_initial_weights(model, config, message)
    else:
        load_tensors(model, state.weights, state_path or "the saved state")
    model.to(device)
    optimizer = torch.optim.SGD(parameter_groups(model, config), lr=0.0, momentum=config.train.momentum)
    scaler = GradScaler(device.type, enabled=device.type == "cuda")
    if state is not None:
        restore_momentum(model, optimizer, state.momentum)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
    return Learner(model, optimizer, scaler)


def load_initial_weights(model: DynaMask, config: Config, message: Callable[[str], None]) -> None:
    """Load the weights that `config.weights` names: those of a DynaMask checkpoint that fit, or a backbone's or detector's from elsewhere.

    Raises:
        InputError: the file cannot be read, or lacks a part of the detector in a run that keeps the detector.
    """
    source = config.weights
    if is_checkpoint(source):
        without = MASK_BRANCH if config.weights_part == "detector" else None
        random = start_from(model, load_checkpoint(source), source, without, model.classes)
        unfit = [name for name in random if not name.startswith(MASK_BRANCH)]
        if unfit and config.keeps_detector:
            raise InputError(
                f"{source} has no {unfit[0]} that fits this model, whose detector is to be kept: give a checkpoint of the same preset and "
                "classes, or train the detector too (train.frozen_detector=false, weights_part=all)."
            )
        rest = f"; {len(random)} tensors, of the mask branch or of another shape, start from random values" if random else ""
        message(f"Started from {source}{rest}.")
    elif config.keeps_detector:
        fault = "is no DynaMask checkpoint" if input_path(source).is_file() else "is not a file"
        raise InputError(
            f"{source} {fault}, and the run keeps the detector of one: give --weights a model.safetensors of `dynamask train`."
        )
    else:
        message(f"Started from {load_weights(model, source)}.")


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The trained parameters, by their weight decay and their learning rate's factor.

    Norms and biases, all that has one dimension, have no weight decay; the MSM has a learning rate of its own.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("msm" in name, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.train.weight_decay if decays else 0.0,
            "rate_factor": config.train.msm_rate_factor if msm else 1.0,
        }
        for (msm, decays), parameters in groups.items()
    ]
