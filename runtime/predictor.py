"""From images to their instances, with the engine of a bundle."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.graph import GRIDS, MSM, SIZE_BASED
from runtime.instances import ClassName, Instances
from runtime.paste import Frame, PackedMask
from runtime.preprocess import filled_canvas, letterbox_normalise
from runtime.targets.base import Engine, EngineOutput, GridOverride, check_counts_ms, slot_overrides
from runtime.targets.registry import open_engine


def load(
    bundle: str | os.PathLike[str] | Bundle,
    target: str = "auto",
    budget_gmacs: float | None = None,
    threads: int | None = None,
    budget_ms: float | None = None,
) -> Predictor:
    """Open a bundle and load its engine.

    Args:
        bundle: its folder, the name of a model that comes with the package (`everyday`), or an opened one.
        target: `onnxruntime`, `tensorrt-rtx` or `tensorrt`; `auto` takes the best one that is built and runs here.
        budget_gmacs: the largest mean cost of an instance's mask, in GMAC; None or 0 sets no limit. The bundle's manifest has the cost
            of each grid (`predictor.bundle.manifest.grid_gmacs`).
        threads: CPU threads of the engine; None takes all cores.
        budget_ms: the largest predicted time of a frame, in milliseconds, in place of `budget_gmacs`; None or 0 sets no limit. It needs
            the times that `dynamask calibrate` measures.

    Raises:
        InputError: the bundle is missing, damaged or not built for the target, the target cannot run here, a value is out of range, or a
            budget in milliseconds cannot be kept.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle, threads=1) as predictor:
        ...     instances = predictor(image)
        >>> instances.boxes.shape == (len(instances), 4)
        True
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    return Predictor(bundle, open_engine(bundle, target, threads), budget_gmacs, budget_ms)


class Predictor:
    """A bundle with its loaded engine: `predictor(image)` gives `Instances`, `predictor.batch(images)` a list of them.

    Several threads may share a predictor; their calls take turns. It is a context manager that frees the engine at its end; a closed
    predictor refuses to run.

    Images are scaled to fit the bundle's canvas, or the nearest size that the engine takes. If the engine takes canvases of several
    sizes, each run has the smallest one that holds its images, so that little work is done on padding.

    A budget in milliseconds (`budget_ms`) limits the predicted time of each frame: the detector's measured median, and the mask branch's
    time by the grids of all its instances (`runtime.costs.MeasuredCosts`). Scaling to the canvas and pasting the masks are not in it. The
    graph chooses the best grids that keep to it, or 14 for all instances if none do. `instances.predicted_ms` holds the prediction.

    Attributes:
        bundle: the opened `Bundle`; its `manifest` has the classes, the canvas and the cost of each grid.
        engine: the engine that runs.
        budget_gmacs: the budget of calls that give none, in GMAC per instance; 0 sets no limit.
        budget_ms: the same in milliseconds of a frame; at most one of the two is set.
    """

    def __init__(self, bundle: Bundle, engine: Engine, budget_gmacs: float | None = None, budget_ms: float | None = None) -> None:
        self.bundle = bundle
        self.engine = engine
        self.check_budget(budget_gmacs, budget_ms)
        self.budget_gmacs, self.budget_ms = budget_gmacs or 0.0, budget_ms or 0.0
        smallest, _, largest = engine.profile.canvas
        height, width = (sorted(sides)[1] for sides in zip(smallest, bundle.manifest.canvas, largest, strict=True))
        self._canvas = height, width
        self._buffer = np.empty(engine.profile.batch[-1] * 3 * height * width, np.float32)
        # The buffer and most engines hold one run at a time.
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine, after the run in progress. Later calls are refused; closing twice does no harm."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

    def check_budget(self, budget_gmacs: float | None = None, budget_ms: float | None = None) -> None:
        """Check that a budget can be kept.

        Raises:
            InputError: a value is out of range, both are given, or one in milliseconds cannot be kept: no times were measured, the bundle
                is of an earlier version, or the detector alone takes longer.
        """
        for name, budget in (("GMAC", budget_gmacs), ("milliseconds", budget_ms)):
            if budget is not None and not 0 <= budget < np.inf:
                raise InputError(f"a budget of {budget} {name} cannot be kept; give a positive number, or 0 for no limit.")
        if not budget_ms:
            return
        if budget_gmacs:
            raise InputError(f"a budget is in GMAC or in milliseconds; leave out one of {budget_gmacs:g} GMAC and {budget_ms:g} ms.")
        costs = check_counts_ms(self.engine)
        if budget_ms < costs.frame_ms({}):
            most = self.bundle.manifest.detections
            raise InputError(
                f"a budget of {budget_ms:g} ms cannot be kept: a frame without instances takes {costs.frame_ms({}):.1f} ms, of which the "
                f"detector {costs.detector_ms.p50:.1f}; the smallest that can be kept is {_rounded_up(costs.least_ms())} ms with one "
                f"instance and {_rounded_up(costs.least_ms(most))} ms with {most}."
            )

    def costs_notice(self) -> str | None:
        """A sentence if the engine's times were measured on another machine or with another number of threads, else None."""
        costs = self.engine.costs
        different = None if costs is None else costs.difference(platform.node(), self.engine.processor, self.engine.threads)
        if different is None:
            return None
        target = f" --target {self.engine.target}"
        return f"The times of {self.bundle.path} {different}: predictions may be off; run dynamask calibrate {self.bundle.path}{target}."

    def __call__(
        self,
        image: npt.NDArray[np.uint8],
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
        budget_ms: float | None = None,
    ) -> Instances:
        """The instances in an image, by falling score, with `times_ms` of `preprocess`, `detector` and `masks`, and of `paste` if the
        engine pastes masks.

        Args:
            image: `[H, W, 3] uint8` RGB, of any size.
            budget_gmacs: the largest mean cost of an instance's mask in this image, in GMAC; 0 sets no limit, None takes the
                predictor's own.
            grid_override: one value for all detection slots or `[K] int64`: 0 to 3 for that grid (14, 28, 56, 112), 4 for the
                size-based rule (paper, Eq. 8), -1 or None for the model's choice.
            min_score: instances with this score or less are left out, and no mask is computed for them.
            budget_ms: the largest predicted time of this frame, in milliseconds, in place of `budget_gmacs`; if only one of the two is
                given, the predictor's own budgets do not count.

        Raises:
            InputError: the image has another shape or type, the budget or grid does not exist, the predictor is closed, or the model
                found a class that the bundle's manifest lacks.

        Example:
            >>> import dynamask
            >>> with dynamask.load(bundle) as predictor:
            ...     sure = predictor(image, min_score=0.5)
            ...     coarse = predictor(image, grid_override=0)
            >>> bool((sure.scores > 0.5).all()), set(coarse.grids.tolist()) <= {14}
            (True, True)
        """
        return self.batch([image], budget_gmacs, grid_override, min_score, budget_ms)[0]

    def batch(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
        budget_ms: float | None = None,
    ) -> list[Instances]:
        """The instances in each of several images, in their order; the engine runs on as many images at a time as it takes.

        The result is that of a call for each image, with one exception: a budget limits the mean over all instances of a run.
        The engine's times in an image's `times_ms` are its share of the run's.

        Args:
            images: `[H, W, 3] uint8` RGB each, of any sizes.
            budget_gmacs: as for one image; the same for all.
            grid_override: as for one image; the same for all.
            min_score: as for one image; the same for all.
            budget_ms: as for one image; the time of a run is at most as many times this as it has images.

        Raises:
            InputError: as for one image. All images and values are checked before the first run.

        Example:
            >>> import dynamask
            >>> with dynamask.load(bundle) as predictor:
            ...     first, second = predictor.batch([image, image[:, ::-1]])
            >>> first.size == second.size == image.shape[:2]
            True
        """
        for image in images:
            _check_image(image)
        self.check_budget(budget_gmacs, budget_ms)
        if grid_override is not None and not np.isin(grid_override, np.arange(MSM, SIZE_BASED + 1)).all():
            raise InputError(
                f"a grid_override of {grid_override} does not exist; give {MSM} (the model decides), "
                f"0 to {len(GRIDS) - 1} ({', '.join(map(str, GRIDS))}) or {SIZE_BASED} (by size)."
            )
        overrides = slot_overrides(grid_override, self.bundle.manifest.detections)
        if budget_gmacs is None and budget_ms is None:
            budget_gmacs, budget_ms = self.budget_gmacs, self.budget_ms
        most = self.engine.profile.batch[-1]
        parts = (images[i : i + most] for i in range(0, len(images), most))
        runs = (self._run(part, budget_gmacs or 0.0, overrides, min_score, budget_ms) for part in parts)
        return [instances for run in runs for instances in run]

    def _run(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        budget_gmacs: float,
        overrides: npt.NDArray[np.int64],
        min_score: float,
        budget_ms: float | None,
    ) -> list[Instances]:
        manifest, count = self.bundle.manifest, len(images)
        masks_ms = count * (budget_ms - check_counts_ms(self.engine).detector_ms.p50) if budget_ms else None
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        height, width = filled_canvas(sizes, self._canvas, self.engine.profile.canvas[0])
        frames, preprocess_ms = [], []
        with self._lock:
            if self._closed:
                raise InputError(f"this predictor of {self.bundle.path} is closed; open the bundle again with dynamask.load.")
            canvases = self._buffer[: count * 3 * height * width].reshape(count, 3, height, width)
            for index, image in enumerate(images):
                start = time.perf_counter()
                _, scale = letterbox_normalise(image, *self._canvas, manifest.mean, manifest.std, out=canvases[index : index + 1])
                frames.append(Frame(scale, sizes[index]))
                preprocess_ms.append(1000 * (time.perf_counter() - start))
            output = self.engine.run(canvases, budget_gmacs, np.tile(overrides, count), min_score, frames, masks_ms)
        if (fault := output.first_fault(count, manifest.detections)) is not None:
            raise InputError(f"{self.bundle.path}: the outputs of its model do not fit together ({fault}); export it again.")
        outputs = output.per_image(count)
        found = [self._instances(*of_image) for of_image in zip(outputs, frames, preprocess_ms, strict=True)]
        if (costs := self.engine.costs) is not None:
            counts = Counter(grid for instances in found for grid in instances.grids.tolist())
            for instances in found:
                instances.predicted_ms = {"detector": costs.detector_ms.p50, "masks": costs.masks_ms(counts) / count}
        return found

    def _instances(self, output: EngineOutput, frame: Frame, preprocess_ms: float) -> Instances:
        count = int(np.count_nonzero(output.scores > 0))
        classes = self.bundle.manifest.classes
        if count and (label := int(output.labels[:count].max())) >= len(classes):
            raise InputError(
                f"{self.bundle.path} has {len(classes)} classes in its manifest, and its model found class {label}; export it again."
            )
        return to_instances(output, frame, classes, {"preprocess": preprocess_ms, **output.times_ms})


def to_instances(output: EngineOutput, frame: Frame, classes: Sequence[ClassName], times_ms: dict[str, float]) -> Instances:
    """The instances in the slots of one image, with boxes in the image's pixels, clipped to the image.

    Args:
        output: of one image; filled slots come first.
        frame: the image's size and scale.
        classes: as in `Instances`.
        times_ms: as in `Instances`.
    """
    count = int(np.count_nonzero(output.scores > 0))
    data: dict[int, npt.NDArray[np.float32] | PackedMask] = dict(output.pasted)
    data |= {int(slot): mask for slots, masks in output.masks.values() for slot, mask in zip(slots, masks, strict=True)}
    return Instances(
        boxes=frame.boxes(output.boxes[:count]),
        scores=output.scores[:count],
        labels=output.labels[:count],
        grids=np.array(GRIDS)[output.grids[:count]],
        mask_data=[data[slot] for slot in range(count)],
        size=frame.size,
        classes=classes,
        times_ms=times_ms,
    )


def _check_image(image: npt.NDArray[np.uint8]) -> None:
    shape = getattr(image, "shape", None)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        kind = f"{shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"an image must be [H, W, 3] uint8 RGB, and this is {kind}; read files with dynamask.read_image.")


def _rounded_up(ms: float) -> float:
    """To tenths, so that the number is a budget that can be kept."""
    return math.ceil(10 * ms) / 10
