"""Time and memory of a training step beside torchvision's Mask R-CNN, and the share of a run that waits for images."""

from __future__ import annotations

import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import BasicBlock, Bottleneck

from dynamask.config import PRESETS, Config, parse_config
from dynamask.data.augment import TrainingItems
from dynamask.data.shapes import write_dataset
from dynamask.distributed import World
from dynamask.mask_targets import grid_targets
from dynamask.model import DynaMask
from dynamask.roi import batch_rois
from dynamask.train.datasets import training_and_validation, training_batches
from dynamask.train.learner import Learner, build_learner
from dynamask.train.progress import DivergenceGuard
from dynamask.train.schedule import Schedule
from dynamask.train.steps import StepFault, Stepper
from runtime.errors import DynaMaskError, InputError
from runtime.machine import machine
from runtime.timing import take_turns

PEER = "torchvision Mask R-CNN R50"
PHASES = {"DynaMask, phase 1": 1, "DynaMask, phase 2": 2}
TARGETS = "mask targets"
CLASSES = 80
POSITIVE_SHARE = 0.25
"""Share of positives among the sampled RoIs; the same in both models."""
JITTER = 0.08
"""Share of a box's side: if every edge moves by at most this much, the IoU with the original box is at least 0.7."""
RESIDUAL_SCALE = 0.2
"""Scale of each residual branch: without trained norms, the variance of a random ResNet's features doubles in each block."""
MEMORY_STEPS = 2
"""The second step has the momentum of the first."""

Batch = tuple[Tensor, list[dict[str, Any]]]


def bench_training(
    preset: str = "r50",
    size: tuple[int, int] | None = None,
    batch: int = 2,
    device: str = "auto",
    steps: int = 20,
    warm_up: int = 5,
    rois: int | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Time a whole step (forward, backward, optimiser) of the trainer in both phases, and for `r50` of torchvision's Mask R-CNN.

    All contenders have the same canvases and targets (shapes, written in COCO format and read by the trainer's loader), RoIs, optimiser,
    precision, and random weights of the detector. Boxes near the truths join the RPN's proposals, so that each image has its full share of
    positives, as with a trained detector.

    Args:
        size: height and width of the canvas, pixels; the preset's by default.
        batch: images.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        steps: timed, after `warm_up` that are not.
        rois: sampled per image for the box head; the preset's by default. Those of the mask head change in proportion.
        workers: processes that read images while the loader is measured.

    Returns:
        `step_ms` (medians by contender) and `ratio` (over the peer's); `peak_memory_mb` by contender, each in a process of its own: on a
        GPU what its tensors take, on a CPU by how much the resident set grows, None where it cannot be read; `loader_wait`, the share of
        a run's time (in phase 2) that is waiting for the batch; `targets_ms` and `targets_share` (of the step of phase 2) of the targets
        at the four grids; and what was measured: `preset`, `canvas`, `batch`, `device`, `precision`, `rois` (of an image: `sampled`,
        `positive`, `mask`, and `proposals`), `steps`, `warm_up`, `workers`, `machine`.

    Raises:
        InputError: there is no such preset or GPU, or a number is out of range.
        DynaMaskError: the process of a contender died, or a loss is not finite.
    """
    if min(batch, steps, warm_up) < 1 or workers < 0:
        raise InputError(
            f"A batch of {batch}, {steps} steps, {warm_up} to warm up and {workers} workers measure nothing; "
            "give 1 or more of each, workers 0 or more."
        )
    where = _device(device)
    with tempfile.TemporaryDirectory(prefix="dynamask-bench-") as name:
        config = _config(preset, size, batch, rois, workers, Path(name))
        model = config.model
        _write_images(Path(name), max(16, 2 * batch), model.canvas)
        contenders = [*PHASES, *([PEER] if preset == "r50" else [])]
        # Before this process holds models of its own.
        memory = {contender: _apart(contender, config, where.type) for contender in contenders}
        own = _dynamask(config, where)
        times = _step_times(own, contenders, next(own.batches(1, workers=0)), steps, warm_up)
        wait = _loader_wait(own, steps, warm_up)
    return {
        "preset": preset,
        "canvas": list(model.canvas),
        "batch": batch,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "precision": "float16, mixed" if own.stepper.learner.scaler.is_enabled() else "float32",
        "rois": {
            "sampled": model.rois_per_image,
            "positive": _positives(config),
            "mask": model.mask_rois_per_image,
            "proposals": model.proposals_training,
        },
        "steps": steps,
        "warm_up": warm_up,
        "step_ms": {contender: times[contender] for contender in contenders},
        "ratio": {contender: times[contender] / times[PEER] for contender in PHASES if PEER in times},
        "peak_memory_mb": memory,
        "workers": workers,
        "loader_wait": wait,
        "targets_ms": times[TARGETS],
        "targets_share": times[TARGETS] / times["DynaMask, phase 2"],
        "machine": machine(),
    }


class MaskRCNNPeer(nn.Module):
    """torchvision's `maskrcnn_resnet50_fpn` as it is trained (frozen batch norm, the frozen stages of ours), called as a DynaMask.

    Made with neither weights, that function would build another model, which trains all stages and their batch norm. The canvases
    go past its transform, which would normalise and resize.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        model = config.model
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5 - model.frozen_stages)
        self.model = MaskRCNN(
            backbone,
            num_classes=classes + 1,
            rpn_pre_nms_top_n_train=model.proposals_training,
            rpn_post_nms_top_n_train=model.proposals_training,
            box_batch_size_per_image=model.rois_per_image,
            box_positive_fraction=POSITIVE_SHARE,
        )
        self.phase = 2
        self.statistics: dict[str, float] = {}

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a batch, its arguments as those of `DynaMask`."""
        sizes = [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
        features = self.model.backbone(images)
        proposals, losses = self.model.rpn(ImageList(images, sizes), features, targets)
        _, head_losses = self.model.roi_heads(features, proposals, sizes, targets)
        return {**losses, **head_losses}


def near_truths(boxes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Boxes `[count, 4]` whose IoU with a truth of `[G, 4]` is 0.7 or more, in turn, and its index, `[count] int64`."""
    matched = torch.arange(count if len(boxes) else 0, device=boxes.device) % max(len(boxes), 1)
    chosen = boxes[matched]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    shifts = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)).to(boxes) * 2 - 1
    return chosen + JITTER * shifts * sides, matched


def _config(preset: str, size: tuple[int, int] | None, batch: int, rois: int | None, workers: int, folder: Path) -> Config:
    if preset not in PRESETS:
        raise InputError(f"There is no preset {preset}: choose one of {', '.join(PRESETS)}.")
    model = PRESETS[preset]
    fields = model.model_dump(mode="json") | {"canvas": list(size or model.canvas)}
    if rois is not None:
        masks = model.mask_rois_per_image * rois // model.rois_per_image
        if masks < 1:
            raise InputError(
                f"{rois} RoIs an image leave none for the mask head; give {model.rois_per_image // model.mask_rois_per_image} or more."
            )
        fields |= {"rois_per_image": rois, "mask_rois_per_image": masks}
    files = {f"{part}_annotations": str(folder / "instances.json") for part in ("train", "val")}
    folders = {f"{part}_images": str(folder / "images") for part in ("train", "val")}
    data = {"kind": "coco", "workers": workers, **files, **folders}
    train = {"batch": batch, "phase1_epochs": 1, "phase2_epochs": 10_000}
    return parse_config({"model": fields, "data": data, "train": train, "weights": "none"}, "The benchmark's configuration")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"{name} is no device to train on: give auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU (dynamask doctor says why): give --device cpu.")
    return torch.device(name)


def _write_images(folder: Path, count: int, canvas: tuple[int, int]) -> None:
    """Shapes in COCO format, with as many classes as COCO."""
    path = write_dataset(folder, count, 0, *canvas)
    tree = json.loads(path.read_text(encoding="utf-8"))
    used = {category["id"] for category in tree["categories"]}
    spare = [number for number in range(1, CLASSES + len(used) + 1) if number not in used]
    tree["categories"] += [{"id": number, "name": f"spare {number}"} for number in spare[: CLASSES - len(used)]]
    path.write_text(json.dumps(tree), encoding="utf-8")


def _positives(config: Config) -> int:
    return int(POSITIVE_SHARE * config.model.rois_per_image)


@dataclass
class Contender:
    """A model with the trainer's data and steps."""

    config: Config
    items: TrainingItems
    stepper: Stepper

    @property
    def model(self) -> DynaMask:
        return self.stepper.learner.model

    @property
    def device(self) -> torch.device:
        return self.stepper.world.device

    def batches(self, phase: int, workers: int) -> Iterator[Batch]:
        """The batches from the first step of a phase on."""
        return training_batches(self.items, self.stepper.schedule, self._first_step(phase), workers, self.stepper.world)

    def step(self, phase: int, batch: Batch) -> None:
        """Take the first step of a phase, and wait until it is done. It always samples the same RoIs."""
        try:
            self.stepper.take(self.model, self._first_step(phase), *batch)
        except StepFault as fault:
            raise DynaMaskError(f"A step of the benchmark failed: {fault}.") from fault
        _await(self.device)

    def _first_step(self, phase: int) -> int:
        return 0 if phase == 1 else self.stepper.schedule.phase1_steps


def _dynamask(config: Config, device: torch.device) -> Contender:
    """DynaMask before its first step, with damped weights and its full share of positives."""
    items, val_set = training_and_validation(config)
    learner = build_learner(config, val_set.classes, device)
    for block in learner.model.backbone.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.constant_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight, RESIDUAL_SCALE)
    _join_truths(learner.model, config)
    return Contender(config, items, Stepper(learner, Schedule(config.train, len(items)), DivergenceGuard(), World(device=device)))


def _peer_of(own: Contender) -> Contender:
    """torchvision's model with the same detector and data."""
    peer = MaskRCNNPeer(own.config, len(own.model.classes)).to(own.device)
    tensors, shared = peer.model.state_dict(), own.model.state_dict()
    peer.model.load_state_dict(tensors | {name: tensor for name, tensor in shared.items() if name in tensors})
    _join_truths(peer.model, own.config)
    weights = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    recipe, stepper = own.config.train, own.stepper
    group = {"params": weights, "weight_decay": recipe.weight_decay, "rate_factor": 1.0}
    optimizer = torch.optim.SGD([group], lr=0.0, momentum=recipe.momentum)
    scaler = GradScaler(own.device.type, enabled=stepper.learner.scaler.is_enabled())
    learner = Learner(cast(DynaMask, peer), optimizer, scaler)
    return Contender(own.config, own.items, Stepper(learner, stepper.schedule, DivergenceGuard(), stepper.world))


def _join_truths(model: Any, config: Config) -> None:
    """Let boxes near the truths join what the RPN proposes: the random one's proposals hardly meet an instance."""
    count = _positives(config)

    def joined(module: nn.Module, inputs: tuple[Any, ...], output: tuple[list[Tensor], dict[str, Tensor]]) -> Any:
        proposals, losses = output
        return [torch.cat([near_truths(t["boxes"], count)[0], p]) for t, p in zip(inputs[2], proposals, strict=True)], losses

    model.rpn.register_forward_hook(joined)


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step_times(own: Contender, contenders: Sequence[str], batch: Batch, steps: int, warm_up: int) -> dict[str, float]:
    """Medians in milliseconds, of the contenders' steps and of the mask targets that a step makes."""
    models = {name: _peer_of(own) if name == PEER else own for name in contenders}
    calls: dict[str, Callable[[], None]] = {
        name: functools.partial(model.step, PHASES.get(name, 2), batch) for name, model in models.items()
    }
    calls[TARGETS] = _targets(own, batch[1])
    return {name: statistics.median(times) for name, times in take_turns(calls, steps, warm_up).items()}


def _targets(own: Contender, targets: list[dict[str, Any]]) -> Callable[[], None]:
    """The targets at four grids of a full share of positives."""
    device, count = own.device, own.config.model.mask_rois_per_image
    near = [near_truths(target["boxes"].to(device), count) for target in targets]
    masks = [target["masks"].to(device) for target in targets]
    rois = batch_rois([boxes for boxes, _ in near])
    matched = torch.cat([sum(map(len, masks[:i])) + own for i, (_, own) in enumerate(near)])

    def rasterise() -> None:
        grid_targets(torch.cat(masks), rois, matched)
        _await(device)

    return rasterise


def _loader_wait(own: Contender, steps: int, warm_up: int) -> float:
    """The share of the time of a run of phase 2 that is waiting for its batches."""
    waits, busy = [], []
    batches = own.batches(2, own.config.data.workers)
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        batch = next(batches)
        read = time.perf_counter()
        own.step(2, batch)
        waits.append(read - start)
        busy.append(time.perf_counter() - read)
    waiting = sum(waits[warm_up:])
    return waiting / (waiting + sum(busy[warm_up:]))


def _apart(contender: str, config: Config, device: str) -> float | None:
    """`_peak_memory` in a new process, so that no other contender's memory hides its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_memory, contender, config, device).result()
    except BrokenProcessPool as error:
        raise DynaMaskError(
            f"The process of {contender} died, most likely for want of memory; give a smaller --size, --batch or --rois."
        ) from error


def _peak_memory(contender: str, config: Config, device: str) -> float | None:
    """What a few steps of the contender take at most, with weights and momentum, in MB (1e6 bytes)."""
    where = torch.device(device)
    before = _peak_resident()
    subject = _dynamask(config, where)
    batch = next(subject.batches(1, workers=0))
    if contender == PEER:
        subject = _peer_of(subject)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    for _ in range(MEMORY_STEPS):
        subject.step(PHASES.get(contender, 2), batch)
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 1e6
    after = _peak_resident()
    return None if before is None or after is None else (after - before) / 1e6


def _peak_resident() -> int | None:
    """The largest resident set of this process so far, in bytes, where Linux tells it. What `getrusage` tells may be the parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return next(1024 * int(line.split()[1]) for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
