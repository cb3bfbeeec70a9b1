"""The whole chain of an engine on host memory: the target, the plugins and the launcher, over the lowered graph, beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from dynamask.model import DynaMask
from export.engine import build_engine
from runtime.bundle import Bundle, Profile
from runtime.targets.base import Engine
from runtime.targets.registry import open_engine
from tests.export.chain import check_output, open_chain
from tests.export.portable import CANVAS, create_bundle
from trt_plugins.deform_conv import operator as deform_conv
from trt_plugins.deform_conv.operator import Tiling, tiling
from trt_plugins.engine import TensorRTEngine
from trt_plugins.operator import DType
from trt_plugins.roi_align import operator as roi_align

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore:Conversion of an array with ndim:DeprecationWarning:triton"
)
PAIRS = Profile(batch=(1, 2, 2), canvas=(CANVAS,) * 3)


@pytest.fixture(scope="module", autouse=True)
def large_tiles() -> Iterator[None]:
    """Programs of the two slowest kernels compute more at a time than on a GPU: Triton's interpreter takes its time for each program."""

    def wider(outputs: int, dtype: DType) -> Tiling:
        return replace(tiling(outputs, dtype), block_p=1024)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform_conv, "tiling", wider)
        patch.setattr(roi_align, "BLOCK_BINS", 1024)
        patch.setattr(roi_align, "BLOCK_ITEMS", 16384)
        yield


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(portable: onnx.ModelProto, model: DynaMask, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_bundle(tmp_path_factory.mktemp("chain"), portable, model)


@pytest.fixture(scope="module")
def peer(bundle: Path, precision: str) -> Iterator[Engine]:
    build_engine(bundle, "onnxruntime", precision)
    with open_engine(Bundle.open(bundle), "onnxruntime", 1) as engine:
        yield engine


@pytest.fixture(scope="module")
def chain(bundle: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorRTEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with open_chain(bundle, precision, None, patch) as engine:
            yield engine
            driver: Any = engine._driver
        assert not driver.arena.blocks, "memory that was not freed"


def image(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, 3, *CANVAS), np.float32)


def score_of(peer: Engine, rank: int) -> float:
    """A score that so many instances of the image exceed."""
    scores = np.sort(peer.run(image(5)).scores)[::-1]
    return float(scores[rank - 1] + scores[rank]) / 2


@pytest.mark.parametrize("case", ["mixed", "one grid", "none", "full set"])
def test_an_engine_agrees_with_onnx_runtime(chain: TensorRTEngine, peer: Engine, precision: str, case: str) -> None:
    few = score_of(peer, 4)
    options: dict[str, dict[str, Any]] = {
        "mixed": {"min_score": few, "grid_override": np.arange(20) % 4},
        "one grid": {"min_score": few, "grid_override": 1},
        "none": {"min_score": 1.0},
        "full set": {"grid_override": 0},
    }
    found, expected = chain.run(image(5), **options[case]), peer.run(image(5), **options[case])
    check_output(found, expected, precision)
    counts = {grid: len(slots) for grid, (slots, _) in found.masks.items()}
    wanted = {"mixed": [1, 1, 1, 1], "one grid": [0, 4, 0, 0], "none": [0, 0, 0, 0], "full set": [20, 0, 0, 0]}
    assert list(counts.values()) == wanted[case]
    launched = set(chain._driver.launched)  # type: ignore[attr-defined]
    assert {"choose_grids", "list_stage", "fill_slots", "merge_levels"} <= launched
    assert found.times_ms["detector"] > 0


def test_the_model_chooses_the_grids_on_a_budget(chain: TensorRTEngine, peer: Engine, precision: str) -> None:
    options = {"min_score": score_of(peer, 3), "budget_gmacs": 0.03}
    check_output(chain.run(image(5), **options), peer.run(image(5), **options), precision)


def test_a_batch_of_two_agrees_with_each_alone(
    bundle: Path, peer: Engine, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = score_of(peer, 3)
    overrides = np.arange(40) % 3
    images = [image(5), np.zeros((1, 3, *CANVAS), np.float32)]
    with open_chain(bundle, precision, PAIRS, monkeypatch) as engine:
        together = engine.run(np.concatenate(images), min_score=few, grid_override=overrides)
    for each, found, override in zip(images, together.per_image(2), (overrides[:20], overrides[20:]), strict=True):
        check_output(found, peer.run(each, min_score=few, grid_override=override), precision)
