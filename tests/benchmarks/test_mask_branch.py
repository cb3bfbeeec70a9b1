"""The benchmark of mask branches: the timed graphs compute what PyTorch's modules do; wrong calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.mask_branch import measurement as bench
from benchmarks.mask_branch.measurement import bench_mask_branch
from dynamask.config import LITE0
from dynamask.detector import Detections
from dynamask.mask_branch import DynamicMaskBranch
from dynamask.model import build_mask_branch
from runtime.errors import InputError
from runtime.graph import DETECTIONS, PYRAMID


@torch.no_grad()
def test_the_timed_graph_is_the_mask_branch() -> None:
    model = LITE0.model_copy(update={"canvas": (64, 96), "fusion": "half_fam"})
    branch = build_mask_branch(model, bench.CLASSES).eval()
    assert isinstance(branch, DynamicMaskBranch)
    random = np.random.default_rng(0)
    override = np.array([3, 0, 2, 1, 2])
    values = {**bench._values(model, 5, random), "budget": np.array(0, np.float32), "grid_override": override[::-1].copy()}
    found = bench._binder(bench._Dynamic(branch, (64, 96)), values, threads=1)(override)()
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    detections = Detections(*(tensors[name] for name in DETECTIONS))
    wanted = branch.segment([tensors[name] for name in PYRAMID], detections, (64, 96), branch.gmac_budget(), torch.from_numpy(override))
    for ours, theirs in zip(found, (wanted.grids, *wanted.slots, *wanted.logits), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=1e-4)


def test_figures_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CANVASES", {"lite0": (64, 64)})
    result = bench_mask_branch("lite0", ["add"], instances=4, distribution=(1, 1, 1, 1), threads=1, repeats=1)
    figures = result["fusions"]["add"]
    assert figures["ratio"] == figures["routed_ms"] / result["peer_ms"]
    gmacs = build_mask_branch(LITE0.model_copy(update={"fusion": "add"}), bench.CLASSES).grid_gmacs()
    assert result["distribution"] == [1, 1, 1, 1] and figures["mean_gmacs"] == pytest.approx(sum(gmacs) / 4)


@pytest.mark.parametrize(("preset", "fusions", "said"), [("lite9", ["fam"], "lite9 has no canvas"), ("lite0", ["sum"], "sum is no fusion")])
def test_a_wrong_name_is_refused(preset: str, fusions: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        bench_mask_branch(preset, fusions, 4, (1, 1, 1, 1), 1, 1)
