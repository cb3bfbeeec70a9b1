"""From an image to its instances, on whatever target the bundle was built for."""

from __future__ import annotations

import os
import time
from types import TracebackType

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.instances import GRIDS, Instances
from runtime.preprocess import letterbox_normalise
from runtime.targets.base import Engine, EngineOutput, GridOverride, open_engine


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
    """`predictor(image)` gives `Instances`. A context manager, for one thread at a time."""

    def __init__(self, bundle: Bundle, engine: Engine, budget: float | None = None) -> None:
        if budget is not None:
            _check_budget(budget)
        self.bundle = bundle
        self.engine = engine
        self.budget = budget
        self._canvas = np.zeros((1, 3, *bundle.manifest.canvas), np.float32)

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
            InputError: not such an image, or a budget or grid that does not exist.
        """
        _check_image(image)
        if budget:
            _check_budget(budget)
        if grid_override is not None and not np.isin(grid_override, np.arange(-1, 5)).all():
            raise InputError(f"{grid_override} chooses no grid; give -1 (the model decides), 0..3 (14, 28, 56, 112) or 4 (by size).")
        manifest = self.bundle.manifest
        start = time.perf_counter()
        canvas, scale = letterbox_normalise(image, *manifest.canvas, manifest.mean, manifest.std, out=self._canvas)
        preprocess_ms = 1000 * (time.perf_counter() - start)
        output = self.engine.run(canvas, self.budget if budget is None else budget, grid_override, min_score)
        return self._instances(output, scale, (image.shape[0], image.shape[1]), preprocess_ms)

    def _instances(self, output: EngineOutput, scale: float, size: tuple[int, int], preprocess_ms: float) -> Instances:
        height, width = size
        # Slots come by falling score, empty ones last.
        count = int(np.count_nonzero(output.scores > 0))
        logits = {int(slot): mask for slots, masks in output.masks.values() for slot, mask in zip(slots, masks, strict=True)}
        boxes = np.clip(output.boxes[:count] / scale, 0, [width, height, width, height])
        return Instances(
            boxes=boxes.astype(np.float32),
            scores=output.scores[:count],
            labels=output.labels[:count],
            grids=np.array(GRIDS)[output.grids[:count]],
            logits=[logits[slot] for slot in range(count)],
            size=size,
            classes=self.bundle.manifest.classes,
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
