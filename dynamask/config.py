"""Typed configuration of a training run: the model, the data and the recipe. Presets are tables of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import InputError, first_line, is_unicode, shortened
from runtime.files import input_path

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


CANVAS_SIDES = "multiples of 32 from 64 to 4096"


def canvas_fits(canvas: tuple[int, int]) -> bool:
    """Whether height and width are as `CANVAS_SIDES` says."""
    return all(side % 32 == 0 and 64 <= side <= 4096 for side in canvas)


class ModelConfig(_Strict):
    """The model's sizes. The defaults are `r50`, the paper's.

    Example:
        >>> dynamask.ModelConfig().backbone, dynamask.PRESETS["lite0"].backbone
        ('resnet50', 'efficientnet_lite0')
    """

    preset: str = "r50"
    """Name of the preset that the other fields started from."""
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
    """The network below the FPN. `_caffe` has a stage's stride in its first 1 x 1 convolution, as weights that descend from MSRA's do."""
    canvas: tuple[int, int] = (800, 1344)
    """Height and width of the letterboxed input, pixels, multiples of 32."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB, of pixels from 0 to 1, subtracted from the input."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of RGB, by which the input is divided."""
    fpn_channels: Count = 256
    """Channels of the image-level FPN."""
    stage_channels: tuple[Count, Count, Count, Count] = (256, 128, 64, 32)
    """Channels of L_tiny, L_small, L_medium, L_large."""
    class_agnostic_largest: bool = False
    """One mask logit for all classes at 112 x 112."""
    box_features: Count = 1024
    """Outputs of each of the box head's two hidden layers."""
    anchor_sizes: tuple[Count, Count, Count, Count, Count] = (32, 64, 128, 256, 512)
    """Side of the anchors at P2 to P6, canvas pixels."""
    proposals_per_level: Count = 1000
    """Anchors with the highest scores that go into NMS from each level, at inference."""
    proposals: Count = 1000
    """Proposals kept after NMS, at inference."""
    proposals_training: Count = 2000
    """Both numbers in training."""
    rois_per_image: Count = 512
    """RoIs sampled in each image for the box loss, at most a quarter of them positive."""
    mask_rois_per_image: Count = 128
    """Largest number of positive RoIs in each image on which the mask branch is trained."""
    detections: Count = 100
    """K, the largest number of detections in an image; the exported graph has this many slots."""
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    """Detections must score more than this."""
    nms_threshold: float = Field(default=0.5, gt=0, le=1)
    """IoU above which NMS drops the detection of the same class that scores less."""
    frozen_stages: Whole = 2
    """First parts of the backbone that are not trained: 0 none, 1 the stem, 2 the stem and the first stage, and so on."""
    mask_head: Literal["dynamask", "maskrcnn"] = "dynamask"
    """`maskrcnn` is Mask R-CNN's head with one grid, `mask_grid`: the baseline of Table 1 (`dynamask/baselines.py`)."""
    mask_grid: Literal[14, 28, 56, 112] | None = None
    """The grid of a `maskrcnn` head: 14, 28, 56 or 112."""
    fusion: Literal["fam", "one_deform", "conv", "add", "half_fam", "coarse", "coarse_add"] = "fam"
    """Module that fuses features in the stages of the r-FPN: the paper's `fam`, or one that it is compared with (`dynamask/fam.py`)."""
    pyramid: Literal["fpn", "panet", "bifpn"] = "fpn"
    """Module between the image-level FPN and the r-FPN: `fpn` is none, the others are those of Table 11."""

    @property
    def canonical_size(self) -> float:
        """Side of a box that takes its RoI feature from P4, canvas pixels: 7 times the smallest anchor's."""
        return 7.0 * self.anchor_sizes[0]

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.mask_head == "maskrcnn") != (self.mask_grid is not None):
            raise ValueError("mask_grid goes with mask_head maskrcnn, and with no other head: give both or neither")
        if self.mask_head == "maskrcnn" and (self.fusion, self.pyramid) != ("fam", "fpn"):
            raise ValueError("fusion and pyramid are parts of the r-FPN, and a maskrcnn head has none: leave them out")
        if not canvas_fits(self.canvas):
            raise ValueError(f"canvas {self.canvas} must be {CANVAS_SIDES}")
        return self


class DataConfig(_Strict):
    """The data set: COCO files, a published data set by its folder, or `shapes`, which is generated when the run starts."""

    kind: Literal["shapes", "coco", "lvis", "cityscapes"] = "shapes"
    """Format of the data set."""
    root: Path | None = None
    """Folder of COCO 2017, LVIS v1 or Cityscapes, laid out as published; with kind `coco`, the four paths below can be given instead."""
    train_annotations: Path | None = None
    """COCO file of the training images."""
    train_images: Path | None = None
    """Folder of the training images."""
    val_annotations: Path | None = None
    """COCO file of the validation images."""
    val_images: Path | None = None
    """Folder of the validation images."""
    shapes_train: Count = 2000
    """Generated training images (kind `shapes`)."""
    shapes_val: Count = 200
    """Generated validation images (kind `shapes`)."""
    shapes_seed: Whole = 0
    """Seed of the generated images (kind `shapes`)."""
    scale_jitter: tuple[float, float] = (0.8, 1.0)
    """Range from which each training image's scale is drawn, relative to the scale at which it fits the canvas; above 1, a random part
    of the image is cropped."""
    flip: bool = True
    """Mirror half of the training images, drawn at random."""
    copy_paste: float = Field(default=0.0, ge=0, le=1)
    """Probability that instances of another image are pasted on a training image."""
    color_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Brightness, contrast and saturation of each training image are multiplied by numbers drawn from 1 - this to 1 + this."""
    portrait_batches: bool = False
    """Train on images that would fit the transposed canvas better in batches of their own, on that canvas (kind `coco`)."""
    workers: Whole = 0
    """Processes that prepare the training images; 0 prepares them in the training process."""

    @model_validator(mode="after")
    def _check_jitter(self) -> DataConfig:
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"scale_jitter {self.scale_jitter} must be two positive numbers, the smaller one first")
        return self

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        files = (self.train_annotations, self.train_images, self.val_annotations, self.val_images)
        if any(file is not None for file in files) and (self.root is not None or self.kind in ("lvis", "cityscapes")):
            raise ValueError("root stands for all four paths of annotations and images: give either root or the paths")
        return self


class TrainConfig(_Strict):
    """The recipe (paper, section 4.1)."""

    batch: Count = 16
    """Images in a step, over all processes."""
    phase1_epochs: NotNegative = 1.0
    """Epochs of phase 1: the mask branch learns at all four grids, without the MSM."""
    phase2_epochs: NotNegative = 12.0
    """Epochs of phase 2, after phase 1: all modules learn."""
    calibration_detections: Whole = 0
    """Number of training detections used to calibrate the MSM after training; 0 disables (`dynamask/train/calibration.py`)."""
    calibration_costs: Path | None = None
    """Bundle, or file of `dynamask calibrate --json`, whose milliseconds per instance are the costs in the calibration; null for GMAC."""
    learning_rate: Positive = 0.02
    """Learning rate at a batch of 16; scaled in proportion to the batch."""
    rate_drop_epochs: tuple[NotNegative, ...] = (8.0, 11.0)
    """Epochs of phase 2 after which the learning rate falls to a tenth."""
    cosine: bool = False
    """Let the learning rate fall to 0 along half a cosine over the steps after the warm-up, in place of the drops
    (Loshchilov and Hutter 2017)."""
    warmup_steps: Whole = 500
    """First steps of the run, over which the learning rate rises linearly."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of SGD; norms and biases have none."""
    clip_norm: Positive = 10.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    edge_weight: NotNegative = 0.1
    """λ1 of Eq. 7, the weight of the edge loss."""
    regularisation_weight: NotNegative = 0.4
    """λ2 of Eq. 7, the weight of the budget and entropy losses."""
    target_paper_gmacs: Positive = 1.0
    """C_t of Eq. 5: the mean cost of an instance's mask, in the unit in which 112 x 112 costs the paper's 1.40 GMAC."""
    temperature: Positive = 1.0
    """τ of the Gumbel-softmax (Eq. 2)."""
    msm_rate_factor: NotNegative = 1.0
    """Learning rate of the MSM, relative to that of the other modules."""
    seed: Whole = 0
    """Seed of all randomness in the run."""
    checkpoint_every_steps: Whole = 500
    """Steps between checkpoints. One is also written at each epoch's end, at each evaluation and on Ctrl-C; 0 writes only these."""
    evaluate_every_epochs: NotNegative | None = 1.0
    """Epochs between evaluations; 0 evaluates only at the end, null never."""
    evaluate_images: Count = 100
    """Validation images in an evaluation: the first ones."""
    pictures: int = Field(default=4, ge=0, le=4)
    """Validation images drawn at each evaluation, together with the training curves; 0 draws nothing."""
    threads: Whole = 0
    """CPU threads of PyTorch; 0 leaves its own choice."""
    frozen_detector: bool = False
    """Train only the mask branch, on the detector of the DynaMask checkpoint that `weights` names."""


class Config(_Strict):
    """The whole configuration of a training run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model's sizes."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The data set."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The recipe."""
    weights: str = "imagenet"
    """Weights to start from: `imagenet` (of the backbone), `none` (random), or a file: a backbone, a detector of another library, or a
    DynaMask checkpoint."""
    weights_part: Literal["all", "detector"] = "all"
    """Part of a DynaMask checkpoint to load: `detector` leaves the mask branch at random weights, to compare mask heads on one detector."""

    @property
    def keeps_detector(self) -> bool:
        """Whether the run needs the whole detector of a DynaMask checkpoint."""
        return self.train.frozen_detector or self.weights_part == "detector"

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.keeps_detector and self.weights in ("imagenet", "none"):
            raise ValueError(f"weights {self.weights!r} have no trained detector, which this run keeps: give a DynaMask checkpoint")
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

LITE_COCO = TrainConfig(batch=4, learning_rate=0.02, warmup_steps=100, msm_rate_factor=4.0, calibration_detections=12_000)
"""For EfficientNet-Lite on one small GPU or a CPU. At 2.5 times this learning rate the classifier does not learn
(docs/results/coco-mini.md)."""

LITE0_SHAPES = Config(
    model=LITE0.model_copy(update={"frozen_stages": 4, "mask_rois_per_image": 5}),
    data=DataConfig(kind="shapes", shapes_train=8000, workers=1),
    train=TrainConfig(
        batch=4,
        learning_rate=0.05,
        warmup_steps=100,
        phase1_epochs=0.8,
        phase2_epochs=0.7,
        rate_drop_epochs=(0.5, 0.62),
        regularisation_weight=0.1,
        target_paper_gmacs=1.0,
        msm_rate_factor=4.0,
        calibration_detections=12_000,
    ),
)
"""The recipe on shapes, whose masks are exact. Plans of ablations start from the same fields under a name of their own, `lite0-ablations`:
a better recipe for shapes is a new entry, and leaves rows trained before comparable."""

CONFIGS: dict[str, Config] = {
    **{f"{model.preset}-coco": Config(model=model, data=DataConfig(kind="coco")) for model in (R50, R101, X101, R18)},
    "lite0-shapes": LITE0_SHAPES,
    "lite0-ablations": LITE0_SHAPES,
    "lite0-coco": Config(model=LITE0.model_copy(update={"canvas": (384, 384)}), data=DataConfig(kind="coco"), train=LITE_COCO),
    "lite1-coco": Config(model=LITE1, data=DataConfig(kind="coco"), train=LITE_COCO),
    "lite2-coco": Config(model=LITE2, data=DataConfig(kind="coco"), train=LITE_COCO),
}
"""Named configurations, for `dynamask train --config NAME`."""


NO_EFFECT_ON_WEIGHTS = frozenset(
    {
        "data.workers",
        "train.checkpoint_every_steps",
        "train.evaluate_every_epochs",
        "train.evaluate_images",
        "train.pictures",
        "train.threads",
    }
)
"""Fields that do not change which weights a run comes to."""
LATER_STEPS_ONLY = frozenset({"train.phase2_epochs", "train.rate_drop_epochs", "train.calibration_detections", "train.calibration_costs"})
"""Fields that change only what is still to be done."""
MAY_CHANGE_ON_RESUME = NO_EFFECT_ON_WEIGHTS | LATER_STEPS_ONLY

_MAX_VALUES = 100_000
"""In a YAML file, aliases followed: a few lines of them can stand for more values than any memory holds."""

EARLIER_NAMES = {
    "train.budget": "train.target_paper_gmacs",
    "train.switch_instances": "train.calibration_detections",
    "train.rate": "train.learning_rate",
    "train.drops": "train.rate_drop_epochs",
    "train.warm_epochs": "train.phase1_epochs",
    "train.epochs": "train.phase2_epochs",
    "train.evaluate_every": "train.evaluate_every_epochs",
    "train.checkpoint_every": "train.checkpoint_every_steps",
}
"""Fields by the names that they had in earlier versions: checkpoints, YAML files and `--set` may still use them."""


def load_config(name_or_file: str, overrides: dict[str, Any] | None = None, notify: Callable[[str], None] | None = None) -> Config:
    """Load the configuration of a training run.

    Args:
        name_or_file: a name of `dynamask.config.CONFIGS` or a YAML file (docs/training.md).
        overrides: fields to change, by their path: `{"train.batch": 3}`.
        notify: called with a sentence for each field that is given by the name it had in an earlier version (`EARLIER_NAMES`).

    Raises:
        InputError: no such name or file, not YAML, a field that does not exist or does not fit, or one that is given by both its names.

    Example:
        >>> config = dynamask.load_config("lite0-coco", {"train.batch": 2})
        >>> config.train.batch, config.model.canvas
        (2, (384, 384))
    """
    if name_or_file in CONFIGS:
        tree = CONFIGS[name_or_file].model_dump(mode="json")
    elif input_path(name_or_file).is_file():
        tree = with_current_names(_read_fields(Path(name_or_file)), name_or_file, notify)
    else:
        raise InputError(f"{name_or_file} is neither a file nor a named configuration: choose one of {', '.join(CONFIGS)}.")
    return parse_config(_replace(tree, current_overrides(overrides or {}, "--set", notify)), name_or_file)


def load_run_config(run: Path, overrides: dict[str, Any] | None = None, notify: Callable[[str], None] | None = None) -> Config:
    """The configuration of the run in a folder, with fields replaced; runs of earlier versions are read, too.

    Args:
        overrides: as for `load_config`.
        notify: as for `load_config`; not called for the names in the run's own file, which no user wrote.

    Raises:
        InputError: the folder holds no run, or a field does not exist or does not fit.
    """
    path = input_path(run / "config.yaml")
    if not path.is_file():
        raise InputError(f"{run} holds no run: name the folder of one with --output, or begin one with --config.")
    tree = with_current_names(_read_fields(path), str(path))
    return parse_config(_replace(tree, current_overrides(overrides or {}, "--set", notify)), str(path))


def with_current_names(tree: dict[str, Any], where: str, notify: Callable[[str], None] | None = None) -> dict[str, Any]:
    """A configuration in which fields have the names of this version (`EARLIER_NAMES`).

    Raises:
        InputError: the configuration, which stands in `where`, gives a field by both names.
    """
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for section, fields in tree.items():
        if isinstance(fields, dict):
            paths = {f"{section}.{name}": value for name, value in fields.items()}
            tree[section] = {path.removeprefix(f"{section}."): value for path, value in current_overrides(paths, where, notify).items()}
    return tree


def current_overrides(overrides: dict[str, Any], where: str, notify: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Fields by their path (`train.batch`), those with an earlier name by that of this version.

    Args:
        where: the place that gives them, for sentences.
        notify: as for `load_config`.

    Raises:
        InputError: a field is given by both names.
    """
    fields = {}
    for path, value in overrides.items():
        current = EARLIER_NAMES.get(path, path)
        if current != path and current in overrides:
            raise InputError(f"{where}: {path} and {current} are the same field: give only {current}.")
        if current != path and notify is not None:
            notify(f"{where}: {path} is now named {current}; the earlier name is still read.")
        fields[current] = value
    return fields


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate plain data as a `Config`.

    Raises:
        InputError: names `where` the data stood, and the first field that does not fit.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {first_error(error)}; docs/training.md lists the fields.") from error


def first_error(error: ValidationError) -> str:
    """The first field that does not fit, why, and its value, unless that is a whole section."""
    first = error.errors()[0]
    field = shortened(".".join(map(str, first["loc"])))
    given = "" if first["type"] == "value_error" else f" (given: {repr(first['input'])[:80]})"
    reason = shortened(first["msg"].removeprefix("Value error, "), 400)
    return f"{field}: {reason}{given}".removeprefix(": ")


def first_difference(before: Config, now: Config, ignored: frozenset[str]) -> tuple[str, str, str] | None:
    """The first field, by name, whose value differs, with both values as JSON; None if all but the `ignored` fields are equal."""
    old, new = _flat(before), _flat(now)
    for name in sorted(old):
        if name not in ignored and old[name] != new[name]:
            return name, old[name], new[name]
    return None


def _flat(config: Config) -> dict[str, str]:
    """`{"train.batch": "16"}`: values as JSON, by the names that `--set` takes."""
    fields: dict[str, str] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            fields |= {f"{name}.{leaf}": json.dumps(item) for leaf, item in value.items()}
        else:
            fields[name] = json.dumps(value)
    return fields


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as `parse_yaml` gives it.

    Raises:
        InputError: the file cannot be read, or as `parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """YAML as plain data.

    Raises:
        InputError: names `where` the text stood: it is not YAML, is nested too deeply, refers to itself, stands for more than
            `_MAX_VALUES` values, or holds a whole number of more than 64 bits or half a surrogate pair.
    """
    try:
        tree = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply: write fields as in docs/training.md.") from None
    except Exception as error:  # PyYAML raises ValueError, KeyError and others for dates and numbers that do not exist.
        said = shortened(first_line(error))
        raise InputError(f"{where} is not YAML ({said}): write fields as in docs/training.md, and quote texts.") from error
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _MAX_VALUES:
            raise InputError(f"{where} refers to itself, or holds more than {_MAX_VALUES} values: write it without * and &.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{where} holds a whole number of more than 64 bits: give a smaller one.")
        if isinstance(value, str) and not is_unicode(value):
            raise InputError(f"{where} holds half a surrogate pair ({shortened(value)}), which is no character: correct that text.")
        waiting += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return tree


def _read_fields(path: Path) -> dict[str, Any]:
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no fields at its top level; write model:, data:, train: sections.")
    return tree


def _replace(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"{shortened(key)} names no field: {shortened(section)} holds a value, not fields.")
        node[leaf] = value
    return tree
