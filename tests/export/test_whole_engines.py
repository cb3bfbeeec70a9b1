"""The presets' whole engines, built for real: every operator in, every kernel compiled for every GPU that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.engine import build_engine
from export.export import export_bundle
from runtime.bundle import Bundle
from tests.trt_plugins.cubin import check_contract
from trt_plugins.engine import ENGINE
from trt_plugins.kernels import COMPUTE_CAPABILITIES, KernelLibrary

pytest.importorskip("tensorrt_rtx")

SHARED_BYTES = 48 * 1024
"""Of shared memory a block: what every GPU gives without being asked for more."""


@pytest.fixture(scope="module", params=["lite0", "r50"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / request.param
    export_bundle(request.param, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_is_built_and_its_kernels_keep_within_bounds(bundle: Path, precision: str) -> None:
    result = build_engine(bundle, "tensorrt-rtx", precision)
    assert result["plugin_nodes"] == {"DeformConv": 6, "Detections": 1, "MsmRoute": 1, "Proposals": 1, "RoiAlign": 5}
    entry = Bundle.open(bundle).engine("tensorrt-rtx")
    assert entry.precision == precision
    assert entry.files[f"engines/tensorrt-rtx/{ENGINE}"].bytes > 1e6

    compiled = result["kernels"]
    by_capability = {cc: {k["kernel"] for k in compiled if k["compute_capability"] == cc} for cc in COMPUTE_CAPABILITIES}
    assert all(kernels == by_capability["8.0"] and len(kernels) > 10 for kernels in by_capability.values())
    assert [k for k in compiled if k["spills"] or k["registers"] > 255 or k["shared"] > SHARED_BYTES] == []
    files = {name.removeprefix("engines/tensorrt-rtx/"): (bundle / name).read_bytes() for name in entry.files}
    for kernel in KernelLibrary.from_files(files).kernels:
        check_contract(kernel)
