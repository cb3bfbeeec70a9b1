"""Typed configuration: what a model is, what it learns from and how. Presets are tables of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import InputError

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


CANVAS_SIDES = "multiples of 32 from 64 to 4096"


def canvas_fits(canvas: tuple[int, int]) -> bool:
    """Whether height and width are what `CANVAS_SIDES` says."""
    return all(side % 32 == 0 and 64 <= side <= 4096 for side in canvas)


class ModelConfig(_Strict):
    """The model's sizes. The defaults are `r50`, the paper's."""

    preset: str = "r50"
    backbone: Literal[
        "resnet18",
        "resnet50",
        "resnet50_caffe",
        "resnet101",
        "resnet101_caffe",
        "resnext101_32x8d",
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
    ] = "resnet50"
    """`_caffe` has a stage's stride in its first 1 x 1 convolution, for weights that descend from MSRA's (docs/training.md)."""
    canvas: tuple[int, int] = (800, 1344)
    """Height and width of the letterboxed input, pixels, divisible by 32."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    fpn_channels: Count = 256
    stage_channels: tuple[Count, Count, Count, Count] = (256, 128, 64, 32)
    """Channels of L_tiny, L_small, L_medium, L_large."""
    class_agnostic_largest: bool = False
    """One mask logit for all classes at 112 x 112."""
    box_features: Count = 1024
    anchor_sizes: tuple[Count, Count, Count, Count, Count] = (32, 64, 128, 256, 512)
    """Anchor side in pixels at P2..P6."""
    proposals_per_level: Count = 1000
    """Anchors kept per level before NMS, at inference."""
    proposals: Count = 1000
    """Proposals kept after NMS, at inference."""
    proposals_training: Count = 2000
    rois_per_image: Count = 512
    """RoIs sampled for the box loss, a quarter of them positive."""
    mask_rois_per_image: Count = 128
    """At most this many positives an image reach the mask branch in training."""
    detections: Count = 100
    """K, the fixed number of detection slots of the exported graph."""
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    nms_threshold: float = Field(default=0.5, gt=0, le=1)
    frozen_stages: Whole = 2
    """Backbone stages without gradient: 0 none, 1 the stem, 2 also the first stage."""
    mask_head: Literal["dynamask", "maskrcnn"] = "dynamask"
    """`maskrcnn`: Mask R-CNN's plain head at `mask_grid`, the baseline of Table 1 (`dynamask/baselines.py`)."""
    mask_grid: Literal[14, 28, 56, 112] | None = None
    """The one grid of a `maskrcnn` head."""
    fusion: Literal["fam", "one_deform", "conv", "add"] = "fam"
    """What the stages of the r-FPN fuse with: the paper's module, or one that it is compared with (`dynamask/fam.py`)."""
    pyramid: Literal["fpn", "panet", "bifpn"] = "fpn"
    """What the i-FPN goes through before the stages crop from it (Table 11)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.mask_head == "maskrcnn") != (self.mask_grid is not None):
            raise ValueError("mask_grid is given with mask_head maskrcnn, and with no other head")
        if self.mask_head == "maskrcnn" and (self.fusion, self.pyramid) != ("fam", "fpn"):
            raise ValueError("fusion and pyramid belong to the r-FPN, which a maskrcnn head has not")
        if not canvas_fits(self.canvas):
            raise ValueError(f"canvas {self.canvas} must be {CANVAS_SIDES}")
        return self


class DataConfig(_Strict):
    """What is learnt from and judged on: COCO files, a published data set by its folder, or `shapes`, generated when the run starts."""

    kind: Literal["shapes", "coco", "lvis", "cityscapes"] = "shapes"
    root: Path | None = None
    """The folder of COCO 2017, LVIS v1 or Cityscapes, laid out as published (docs/training.md); for `coco`, in place of the four paths."""
    train_annotations: Path | None = None
    train_images: Path | None = None
    val_annotations: Path | None = None
    val_images: Path | None = None
    shapes_train: Count = 2000
    """Generated images to learn from (kind `shapes`)."""
    shapes_val: Count = 200
    shapes_seed: Whole = 0
    scale_jitter: tuple[float, float] = (0.8, 1.0)
    """Range of the image's scale relative to the canvas, sampled per image in training; what exceeds the canvas is cropped, at random."""
    flip: bool = True
    copy_paste: float = Field(default=0.0, ge=0, le=1)
    """Probability that instances of another image are pasted on an image in training (`dynamask/data/augment.py`)."""
    portrait_batches: bool = False
    """In training, collect images that lie across the canvas in batches of their own, on the transposed canvas (kind `coco`)."""
    workers: Whole = 0

    @model_validator(mode="after")
    def _check_jitter(self) -> DataConfig:
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"scale_jitter {self.scale_jitter} must be two rising positive numbers")
        return self

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        files = (self.train_annotations, self.train_images, self.val_annotations, self.val_images)
        if any(file is not None for file in files) and (self.root is not None or self.kind in ("lvis", "cityscapes")):
            raise ValueError("root takes the place of the annotations and images of each part: give only one of the two")
        return self


class TrainConfig(_Strict):
    """The recipe (paper, section 4.1)."""

    batch: Count = 16
    warm_epochs: NotNegative = 1.0
    """Phase 1: no MSM, the mask loss at all four grids."""
    epochs: NotNegative = 12.0
    """Phase 2: all modules."""
    switch_instances: Whole = 0
    """Ours: so many detections on training images teach the switch what each grid is worth, after the last step
    (`dynamask/train/switch.py`); 0 leaves it as phase 2 did. A Mask R-CNN head has none."""
    rate: Positive = 0.02
    """Learning rate at a batch of 16; scaled in proportion to the batch."""
    drops: tuple[NotNegative, ...] = (8.0, 11.0)
    """Epochs of phase 2 after which the rate falls tenfold."""
    warmup_steps: Whole = 500
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: NotNegative = 1e-4
    clip_norm: Positive = 10.0
    edge_weight: NotNegative = 0.1
    """lambda 1 of Eq. 7."""
    regularisation_weight: NotNegative = 0.4
    """lambda 2 of Eq. 7."""
    budget: Positive = 1.0
    """C_t of Eq. 5, in the paper's unit, in which 112 x 112 costs 1.40: `budget / 1.4` is its share of the largest grid's cost."""
    temperature: Positive = 1.0
    """tau of Eq. 2."""
    msm_rate_factor: NotNegative = 1.0
    """The MSM's learning rate over the others'."""
    seed: Whole = 0
    checkpoint_every: Whole = 500
    """Steps between checkpoints (one is also written at each epoch's end and on Ctrl-C)."""
    evaluate_every: NotNegative = 1.0
    """Epochs between evaluations; 0 evaluates only at the end."""
    evaluate_images: Count = 100
    pictures: int = Field(default=4, ge=0, le=4)
    """Validation images drawn at each evaluation, beside the training curves (docs/training.md); 0 draws nothing."""
    threads: Whole = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    frozen_detector: bool = False
    """Only the mask branch learns, on the detector of the DynaMask checkpoint that `weights` names."""


class Config(_Strict):
    """One training run, whole."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    weights: str = "imagenet"
    """`imagenet`, `none`, or a file: backbone weights (`.pth`, `.safetensors`) or a DynaMask checkpoint."""
    weights_part: Literal["all", "detector"] = "all"
    """`detector`: of a DynaMask checkpoint all but the mask branch, which begins afresh: mask heads compared on one detector."""

    @property
    def keeps_detector(self) -> bool:
        """Whether the run stands on the whole detector of a DynaMask checkpoint."""
        return self.train.frozen_detector or self.weights_part == "detector"

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.keeps_detector and self.weights in ("imagenet", "none"):
            raise ValueError(f"weights {self.weights!r} hold no trained detector to keep: name a DynaMask checkpoint")
        return self


R50 = ModelConfig()
R101 = ModelConfig(preset="r101", backbone="resnet101")
X101 = ModelConfig(preset="x101", backbone="resnext101_32x8d")
R18 = ModelConfig(
    preset="r18",
    backbone="resnet18",
    canvas=(512, 512),
    fpn_channels=128,
    stage_channels=(128, 64, 32, 16),
    box_features=512,
    anchor_sizes=(16, 32, 64, 128, 256),
    proposals_per_level=500,
    proposals=300,
    proposals_training=1000,
    rois_per_image=256,
    mask_rois_per_image=32,
)
LITE0 = ModelConfig(
    preset="lite0",
    backbone="efficientnet_lite0",
    canvas=(320, 320),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    fpn_channels=64,
    stage_channels=(64, 32, 16, 8),
    box_features=256,
    anchor_sizes=(16, 32, 64, 128, 256),
    proposals_per_level=300,
    proposals=200,
    proposals_training=400,
    rois_per_image=64,
    mask_rois_per_image=8,
)

LITE1 = LITE0.model_copy(update={"preset": "lite1", "backbone": "efficientnet_lite1", "canvas": (384, 384)})
LITE2 = LITE0.model_copy(update={"preset": "lite2", "backbone": "efficientnet_lite2", "canvas": (448, 448)})

PRESETS: dict[str, ModelConfig] = {preset.preset: preset for preset in (R50, R101, X101, R18, LITE0, LITE1, LITE2)}

LITE_COCO = TrainConfig(batch=4, rate=0.02, warmup_steps=100, msm_rate_factor=4.0, switch_instances=12_000)
"""For EfficientNet-Lite on one small GPU or a CPU; at 2.5 times the rate the classes are not learnt (docs/results/coco-mini.md)."""

CONFIGS: dict[str, Config] = {
    **{f"{model.preset}-coco": Config(model=model, data=DataConfig(kind="coco")) for model in (R50, R101, X101, R18)},
    "lite0-shapes": Config(
        model=LITE0.model_copy(update={"frozen_stages": 4, "mask_rois_per_image": 5}),
        data=DataConfig(kind="shapes", shapes_train=8000, workers=1),
        train=TrainConfig(
            batch=4,
            rate=0.05,
            warmup_steps=100,
            warm_epochs=0.8,
            epochs=0.7,
            drops=(0.5, 0.62),
            regularisation_weight=0.1,
            budget=1.0,
            msm_rate_factor=4.0,
            switch_instances=12_000,
        ),
    ),
    "lite0-coco": Config(model=LITE0.model_copy(update={"canvas": (384, 384)}), data=DataConfig(kind="coco"), train=LITE_COCO),
    "lite1-coco": Config(model=LITE1, data=DataConfig(kind="coco"), train=LITE_COCO),
    "lite2-coco": Config(model=LITE2, data=DataConfig(kind="coco"), train=LITE_COCO),
}
"""Named configurations, for `dynamask train --config NAME`."""


def load_config(name_or_file: str, overrides: dict[str, Any] | None = None) -> Config:
    """A named configuration or a YAML file, with `{"train.epochs": 3}`-style overrides applied.

    Raises:
        InputError: no such name or file, not YAML, or a field that does not exist or does not fit.
    """
    if name_or_file in CONFIGS:
        tree = CONFIGS[name_or_file].model_dump(mode="json")
    else:
        path = Path(name_or_file)
        if not path.is_file():
            raise InputError(f"{name_or_file} is neither a file nor a configuration; choose one of {', '.join(CONFIGS)}.")
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}; write fields as in docs/training.md.") from error
        if not isinstance(tree, dict):
            raise InputError(f"{path} holds no fields at its top level; write model:, data:, train: sections.")
    for key, value in (overrides or {}).items():
        node = tree
        *folders, leaf = key.split(".")
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise InputError(f"{key} names no field: {folder} holds a value, not fields.")
        node[leaf] = value
    return parse_config(tree, name_or_file)


def parse_config(tree: Any, where: str) -> Config:
    """Validate plain data as a `Config`.

    Raises:
        InputError: names the first field that does not fit and where it stood.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {misfit(error)}; dynamask/config.py says what each field takes.") from error


def misfit(error: ValidationError) -> str:
    """The first field that does not fit, why, and what was given, unless that is a whole section."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    given = "" if first["type"] == "value_error" else f" (given: {repr(first['input'])[:80]})"
    return f"{field}: {first['msg'].removeprefix('Value error, ')}{given}".removeprefix(": ")
