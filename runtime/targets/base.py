"""The interfaces of targets and engines, and the output of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError
from runtime.graph import COST_CONTROLS, GRIDS, MSM

if TYPE_CHECKING:
    from runtime.bundle import Bundle, Manifest, Profile
    from runtime.costs import MeasuredCosts
    from runtime.paste import Frame, PackedMask

GridOverride = int | npt.NDArray[np.int64] | None
"""One value for all slots or one for each: -1 the model decides, 0..3 that grid, 4 the size-based rule; None is -1."""
Masks = dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
"""Grid (14, 28, 56, 112) -> its slots `[n]`, rising, and their mask logits `[n, grid, grid]`."""


@dataclass(frozen=True, eq=False)
class EngineOutput:
    """The detection slots of B images, one image after the other, and the masks of those that are filled.

    Each image has K slots, by falling score: slot k of image b is row `K b + k`.
    """

    boxes: npt.NDArray[np.float32]
    """`[B * K, 4]`, xyxy in canvas pixels."""
    scores: npt.NDArray[np.float32]
    """`[B * K]`; 0 in an empty slot."""
    labels: npt.NDArray[np.int64]
    """`[B * K]`; -1 in an empty slot."""
    grids: npt.NDArray[np.int64]
    """`[B * K]`: 0..3; -1 in an empty slot."""
    masks: Masks
    times_ms: Mapping[str, float]
    """`detector` and `masks`, milliseconds; and `paste`, if the engine pasted the masks."""
    pasted: Mapping[int, PackedMask] = field(default_factory=dict)
    """Row -> its mask in the pixels of its image, of the rows that the engine pasted; these are not in `masks`."""

    def first_fault(self, images: int, slots: int) -> str | None:
        """The first way in which this is not the output for so many images with K = `slots`; None if there is none."""
        rows = images * slots
        for name, shape, kind in (("boxes", (rows, 4), "f"), ("scores", (rows,), "f"), ("labels", (rows,), "i"), ("grids", (rows,), "i")):
            values = getattr(self, name)
            if values.shape != shape or values.dtype.kind != kind:
                return f"{name} has the shape {list(values.shape)}, type {values.dtype}"
        for grid, (places, logits) in self.masks.items():
            if places.ndim != 1 or logits.shape != (len(places), grid, grid) or (places.dtype.kind, logits.dtype.kind) != ("i", "f"):
                return f"masks_{grid} has the shape {list(logits.shape)}, type {logits.dtype}, for {places.size} slots"
        by_image = (self.scores > 0).reshape(images, slots)
        if (by_image[:, 1:] > by_image[:, :-1]).any():
            return "an empty slot is before a filled one"
        filled = np.flatnonzero(by_image)
        if not np.isfinite(self.boxes[filled]).all():
            return "a box is not finite"
        if (self.labels[filled] < 0).any() or not np.isin(self.grids[filled], range(len(GRIDS))).all():
            return "an instance has no class or no grid"
        with_mask = np.concatenate([np.fromiter(self.pasted, np.int64), *(places for places, _ in self.masks.values())])
        if not np.isin(filled, with_mask).all():
            return "an instance has no mask"
        return None

    def per_image(self, count: int) -> list[EngineOutput]:
        """The output of each of the run's `count` images, with slots from 0 on. Each gets an equal share of the run's `times_ms`."""
        slots = len(self.scores) // count
        times_ms = {part: ms / count for part, ms in self.times_ms.items()}
        return [self._rows(slots * image, slots * (image + 1), times_ms) for image in range(count)]

    def _rows(self, start: int, stop: int, times_ms: Mapping[str, float]) -> EngineOutput:
        rows, masks = slice(start, stop), {}
        for grid, (slots, logits) in self.masks.items():
            mine = slice(*np.searchsorted(slots, (start, stop)))
            masks[grid] = (slots[mine] - start, logits[mine])
        pasted = {row - start: mask for row, mask in self.pasted.items() if start <= row < stop}
        return EngineOutput(self.boxes[rows], self.scores[rows], self.labels[rows], self.grids[rows], masks, times_ms, pasted)


class Engine(Protocol):
    """A bundle's model, loaded for one target; a context manager that frees it at its end.

    An engine serves one thread at a time; `Predictor` has a lock for that.
    """

    target: str
    manifest: Manifest
    profile: Profile
    """The batches and canvases that a run takes; fewer images than the minimum are allowed."""
    costs: MeasuredCosts | None
    """The times that the bundle has of it."""
    threads: int
    """CPU threads; 0 where they do not matter."""
    processor: str
    """The name of the processor or GPU that runs it."""
    takes_costs: bool
    """Whether its graph has `COST_CONTROLS`, and can keep budgets in milliseconds."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def close(self) -> None:
        """Free the engine; it cannot run any more."""

    def run(
        self,
        image: npt.NDArray[np.float32],
        budget_gmacs: float | None = None,
        grid_override: GridOverride = None,
        min_score: float = 0.0,
        frames: Sequence[Frame] | None = None,
        masks_ms: float | None = None,
    ) -> EngineOutput:
        """Detect and segment the images of a run.

        Args:
            image: `[B, 3, H, W] float32`, normalised canvases, as many and as large as the profile has.
            budget_gmacs: the largest mean cost of an instance's mask over all images of the run, in GMAC; None or 0 sets no limit.
            grid_override: one value for all slots or `[B * K]`.
            min_score: detections with this score or less are dropped before the mask branch.
            frames: the B images that the canvases were made of. An engine that can, pastes the masks into them on its device
                (`EngineOutput.pasted`); without frames all masks are logits.
            masks_ms: the largest time of the mask branch in this run, in milliseconds, as `costs` predict it; in place of `budget_gmacs`.

        Raises:
            InputError: no such input, a limit in milliseconds without `costs` or without `takes_costs`, more images or another canvas than
                the profile has, overrides for another number of slots, or the engine is closed.
        """


class Target(Protocol):
    """A kind of engine, known by its name: `onnxruntime`, `tensorrt-rtx`, `tensorrt`."""

    name: str

    def check_installed(self) -> None:
        """Raise `InputError` if the target's library is not installed or does not load."""

    def check_device(self) -> None:
        """Raise `InputError` if the device that the target's engines run on, or its driver, is missing; loads no large library."""

    def open(self, bundle: Bundle, threads: int | None) -> Engine:
        """The bundle's engine for this target, loaded.

        Args:
            threads: CPU threads, or None for the target's own choice; a target that runs elsewhere ignores it.

        Raises:
            InputError: the engine is not built or does not load, or the library, the driver or the device is missing.
        """

    def status(self) -> dict[str, Any]:
        """Whether this machine can run the target, for `dynamask doctor`.

        Returns:
            `available` (whether engines run here), `version` of the library or None, and `note`: one sentence on what it does here, or
            how to get it.
        """


def check_fits(shape: Sequence[int], profile: Profile, bundle: Path, target: str) -> None:
    """Check that the engine of a bundle for a target, with this profile, takes an input of this shape.

    Raises:
        InputError: the shape is not `[B, 3, H, W]`, has more images than the profile, or a canvas outside of it.
    """
    images, smallest, largest = profile.batch[-1], profile.canvas[0], profile.canvas[-1]
    batched = len(shape) == 4 and 1 <= shape[0] <= images and shape[1] == 3
    if batched and all(low <= side <= high and side % 32 == 0 for side, low, high in zip(shape[2:], smallest, largest, strict=True)):
        return
    sizes = " to ".join(dict.fromkeys(f"{height}x{width}" for height, width in (smallest, largest)))
    raise InputError(
        f"The engine for {target} of {bundle} takes [B, 3, H, W] with B up to {images} and HxW of {sizes}, multiples of 32, not "
        f"{list(shape)}; give such an input, or build another engine with dynamask build-engine {bundle} "
        f"--target {'tensorrt-rtx' if target == 'onnxruntime' else target}, --batch and --size."
    )


def mask_limits(engine: Engine, budget_gmacs: float | None, masks_ms: float | None) -> dict[str, npt.NDArray[np.float32]]:
    """The inputs `budget`, `total_budget` and `costs` of a run, as `Engine.run` describes them.

    Raises:
        InputError: milliseconds are asked for, and the engine cannot count in them (`check_counts_ms`).
    """
    if masks_ms is None:
        own = [engine.manifest.grid_gmacs[grid] for grid in GRIDS]
        limits, costs = (budget_gmacs or 0.0, 0.0), np.array([own, [0.0] * len(GRIDS)], np.float32)
    else:
        limits, costs = (0.0, masks_ms), check_counts_ms(engine).graph_costs()
    total_budget, costs_name = COST_CONTROLS
    return {"budget": np.array(limits[0], np.float32), total_budget: np.array(limits[1], np.float32), costs_name: costs}


def check_counts_ms(engine: Engine) -> MeasuredCosts:
    """The measured times of an engine that can keep budgets in milliseconds.

    Raises:
        InputError: its graph counts in GMAC alone, or its times were not measured.
    """
    if not engine.takes_costs:
        raise InputError(
            f"The engine for {engine.target} is of a model that counts in GMAC alone, as earlier versions exported it: export the bundle "
            "again to give a budget in milliseconds."
        )
    if engine.costs is None:
        raise InputError(
            f"The times of the engine for {engine.target} were not measured, so that no budget in milliseconds can be kept; "
            f"run dynamask calibrate BUNDLE --target {engine.target}."
        )
    return engine.costs


def closed_engine(bundle: Path, target: str) -> InputError:
    """The error for a run of an engine after its `close`."""
    return InputError(f"this engine for {target} of {bundle} is closed; open the bundle again with dynamask.load.")


def slot_overrides(grid_override: GridOverride, slots: int) -> npt.NDArray[np.int64]:
    """The override of every slot of a run, `[slots]`.

    Raises:
        InputError: neither one value nor one for each slot is given.
    """
    given = np.asarray(MSM if grid_override is None else grid_override)
    if given.shape not in ((), (slots,)):
        raise InputError(f"grid_override has the shape {list(given.shape)} for {slots} slots; give one value, or one for each of them.")
    return np.full(slots, given, np.int64)
