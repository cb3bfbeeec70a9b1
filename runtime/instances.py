"""`Instances`, the result type of the runtime: the instances of an image, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import supervision

    from runtime.paste import Crop, PackedMask


@dataclass(frozen=True)
class ClassName:
    """A class: its COCO category id and its name."""

    id: int
    name: str


@dataclass(eq=False)
class Instances:
    """N instances of one image, by falling score.

    Example:
        >>> import dynamask
        >>> with dynamask.load(bundle) as predictor:
        ...     instances = predictor(image)
        >>> sure = instances[instances.scores > 0.5]  # an index, a slice or a boolean mask
        >>> sure.masks.shape == (len(sure), *image.shape[:2])
        True
        >>> sorted(sure.to_coco(image_id=1)[0])
        ['bbox', 'category_id', 'grid', 'image_id', 'score', 'segmentation']
    """

    boxes: npt.NDArray[np.float32]
    """`[N, 4]`, xyxy in the image's pixels."""
    scores: npt.NDArray[np.float32]
    """`[N]`, 0 to 1."""
    labels: npt.NDArray[np.int64]
    """`[N]`, index into `classes`."""
    grids: npt.NDArray[np.int64]
    """`[N]`: the mask grid of each instance, 14, 28, 56 or 112."""
    mask_data: Sequence[npt.NDArray[np.float32] | PackedMask]
    """N masks as the engine gave them: logits `[g, g] float32` with g as in `grids`, or bits, from an engine that pastes on its device.
    `crops`, `masks` and everything else here take either."""
    size: tuple[int, int]
    """The image's height and width, pixels."""
    classes: Sequence[ClassName]
    times_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of `preprocess`, `detector` and `masks`; of `paste` in a stream or if the engine pasted the masks; in a stream also of
    `total`."""
    predicted_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of `detector` and `masks` as the engine's measured costs predict them; empty where none were measured."""

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | npt.NDArray[Any] | Sequence[int]) -> Instances:
        """The instances at an index, a slice, a list of indices or a boolean mask `[N]`, in that order."""
        chosen = np.atleast_1d(np.arange(len(self))[index])
        return Instances(
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            grids=self.grids[chosen],
            mask_data=[self.mask_data[i] for i in chosen],
            size=self.size,
            classes=self.classes,
            times_ms=self.times_ms,
            predicted_ms=self.predicted_ms,
        )

    @cached_property
    def _crops(self) -> list[Crop]:
        from runtime.paste import PackedMask, mask_crop

        return [
            data.crop() if isinstance(data, PackedMask) else mask_crop(data, box, *self.size)
            for data, box in zip(self.mask_data, self.boxes, strict=True)
        ]

    def crops(self) -> Iterator[Crop]:
        """For each instance `(x0, y0, mask [h, w] bool)`: its mask inside its box, whose first pixel is `(x0, y0)` of the image.

        The crops are computed at the first call and kept.
        """
        yield from self._crops

    @property
    def masks(self) -> npt.NDArray[np.bool_]:
        """Masks of the image's size, `[N, height, width] bool`, drawn at each access; `crops()` needs far less memory."""
        masks = np.zeros((len(self), *self.size), bool)
        for mask, (x0, y0, crop) in zip(masks, self.crops(), strict=True):
            mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
        return masks

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, one for each instance.

        Returns:
            `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`, `segmentation` (compressed RLE) and `grid`.
        """
        from runtime.paste import encode_crop

        return [
            {
                "image_id": image_id,
                "category_id": self.classes[label].id,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "segmentation": encode_crop(crop, *self.size),
                "grid": grid,
            }
            for box, label, score, grid, crop in zip(
                self.boxes.tolist(), self.labels.tolist(), self.scores.tolist(), self.grids.tolist(), self.crops(), strict=True
            )
        ]

    def to_supervision(self) -> supervision.Detections:
        """The instances as `supervision.Detections`, with masks, and with `grid` and `class_name` in `data`.

        Raises:
            InputError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            from runtime.errors import InputError

            raise InputError("supervision is not installed; install it with pip install supervision.") from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={"grid": self.grids, "class_name": np.array([self.classes[label].name for label in self.labels], dtype=str)},
        )
