"""From images to their instances, on whatever target the bundle was built for."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.graph import GRIDS, MSM, SIZE_BASED
from runtime.instances import Instances
from runtime.preprocess import filled_canvas, letterbox_normalise
from runtime.targets.base import Engine, EngineOutput, GridOverride, open_engine, slot_overrides


def load(
    bundle: str | os.PathLike[str] | Bundle, target: str = "auto", budget: float | None = None, threads: int | None = None
) -> Predictor:
    """Open a bundle's engine.

    Args:
        bundle: its folder, or an opened one.
        target: `auto` takes the best that is built.
        budget: mean GMAC an instance to keep to; None lets the model choose freely.
        threads: CPU threads of the engine; None for all cores.

    Raises:
        InputError: the bundle is missing, damaged or not built for the target, the target cannot run here, or a value makes no sense.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    return Predictor(bundle, open_engine(bundle, target, threads), budget)


class Predictor:
    """`predictor(image)` gives `Instances`, `predictor.batch(images)` a list of them. A context manager, for one thread at a time.

    Images are scaled to fit the bundle's canvas, or the nearest to it that the engine takes. Where an engine's canvas may vary, a run has
    the smallest that holds its images, so that no work is done on padding.
    """

    def __init__(self, bundle: Bundle, engine: Engine, budget: float | None = None) -> None:
        if budget is not None:
            _check_budget(budget)
        self.bundle = bundle
        self.engine = engine
        self.budget = budget
        least, _, most = engine.profile.canvas
        height, width = (sorted(sides)[1] for sides in zip(least, bundle.manifest.canvas, most, strict=True))
        self._canvas = height, width
        self._room = np.empty(engine.profile.batch[-1] * 3 * height * width, np.float32)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __call__(
        self, image: npt.NDArray[np.uint8], budget: float | None = None, grid_override: GridOverride = None, min_score: float = 0.0
    ) -> Instances:
        """The instances in an image, by falling score, with `times_ms` of `preprocess`, `detector` and `masks`.

        Args:
            image: `[H, W, 3] uint8` RGB, of any size.
            budget: mean GMAC an instance, for this image; 0 is none, None is the predictor's own.
            grid_override: one value for all slots or `[K]`: 0..3 that grid (14, 28, 56, 112), 4 the size-based rule (Eq. 8),
                -1 or None the model's choice.
            min_score: instances that score this or less are left out before their masks are computed.

        Raises:
            InputError: not such an image, a budget or grid that does not exist, or a class that the bundle's manifest lacks.
        """
        return self.batch([image], budget, grid_override, min_score)[0]

    def batch(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        budget: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
    ) -> list[Instances]:
        """The instances in each of several images, in their order, as many images at a time as the engine takes.

        What is found is what a call for each image finds, but that a budget is the mean over all instances of a run. `detector` and
        `masks` in an image's `times_ms` are its share of the run's.

        Args:
            images: `[H, W, 3] uint8` RGB each, of any sizes.
            budget, grid_override, min_score: as for one image; the same for all.

        Raises:
            InputError: as for one image; nothing has run if the call itself is at fault.
        """
        for image in images:
            _check_image(image)
        if budget:
            _check_budget(budget)
        if grid_override is not None and not np.isin(grid_override, np.arange(MSM, SIZE_BASED + 1)).all():
            raise InputError(f"{grid_override} chooses no grid; give -1 (the model decides), 0..3 (14, 28, 56, 112) or 4 (by size).")
        overrides = slot_overrides(grid_override, self.bundle.manifest.detections)
        budget, most = self.budget if budget is None else budget, self.engine.profile.batch[-1]
        runs = (self._run(images[i : i + most], budget, overrides, min_score) for i in range(0, len(images), most))
        return [instances for run in runs for instances in run]

    def _run(
        self, images: Sequence[npt.NDArray[np.uint8]], budget: float | None, overrides: npt.NDArray[np.int64], min_score: float
    ) -> list[Instances]:
        manifest, count = self.bundle.manifest, len(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        height, width = filled_canvas(sizes, self._canvas, self.engine.profile.canvas[0])
        canvases = self._room[: count * 3 * height * width].reshape(count, 3, height, width)
        scales, preprocess_ms = [], []
        for index, image in enumerate(images):
            start = time.perf_counter()
            _, scale = letterbox_normalise(image, *self._canvas, manifest.mean, manifest.std, out=canvases[index : index + 1])
            scales.append(scale)
            preprocess_ms.append(1000 * (time.perf_counter() - start))
        outputs = self.engine.run(canvases, budget, np.tile(overrides, count), min_score).per_image(count)
        return [self._instances(*of_image) for of_image in zip(outputs, scales, sizes, preprocess_ms, strict=True)]

    def _instances(self, output: EngineOutput, scale: float, size: tuple[int, int], preprocess_ms: float) -> Instances:
        height, width = size
        # Slots come by falling score, empty ones last.
        count = int(np.count_nonzero(output.scores > 0))
        classes = self.bundle.manifest.classes
        if count and (label := int(output.labels[:count].max())) >= len(classes):
            raise InputError(
                f"{self.bundle.path} has {len(classes)} classes in its manifest, and its model found class {label}; export it again."
            )
        logits = {int(slot): mask for slots, masks in output.masks.values() for slot, mask in zip(slots, masks, strict=True)}
        boxes = np.clip(output.boxes[:count] / scale, 0, [width, height, width, height])
        return Instances(
            boxes=boxes.astype(np.float32),
            scores=output.scores[:count],
            labels=output.labels[:count],
            grids=np.array(GRIDS)[output.grids[:count]],
            logits=[logits[slot] for slot in range(count)],
            size=size,
            classes=classes,
            times_ms={"preprocess": preprocess_ms, **output.times_ms},
        )


def _check_image(image: npt.NDArray[np.uint8]) -> None:
    shape = getattr(image, "shape", None)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        kind = f"{shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"an image is needed as [H, W, 3] uint8 RGB, and this is {kind}; read files with dynamask.read_image.")


def _check_budget(budget: float) -> None:
    if not (budget > 0 and np.isfinite(budget)):
        raise InputError(f"a budget of {budget} GMAC cannot be kept to; give a positive number, or none.")
