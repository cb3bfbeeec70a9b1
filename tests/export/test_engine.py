"""Engines built for real, on a machine that needs no GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from dynamask.model import DynaMask
from export import engine, serialized_engine
from export.engine import build_engine
from export.lowering import lower
from export.precision import to_fp16
from export.seams import FACTS
from export.serialized_engine import build_serialized
from runtime.bundle import MANIFEST, MODEL, Bundle, Profile
from runtime.errors import DynaMaskError, InputError
from runtime.graph import GRIDS, INPUTS
from runtime.targets.registry import open_engine
from tests.export.portable import create_bundle
from tests.trt_plugins.cubin import check_contract
from trt_plugins.engine import ENGINE
from trt_plugins.kernels import KernelLibrary
from trt_plugins.paste_masks.operator import paste_kernel
from trt_plugins.tensorrt import load

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def folder(portable: onnx.ModelProto, model: DynaMask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_bundle(tmp_path_factory.mktemp("engine"), portable, model)


@pytest.fixture(scope="module", autouse=True)
def without_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No GPU is at hand and nothing was built before, whatever this machine has."""

    def no_driver() -> None:
        raise InputError("no driver")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "open_driver", no_driver)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compile_kernels", lambda *_, **__: KernelLibrary([]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Nothing is compiled and built: the compute capabilities of each build that would have been."""
    found: list[tuple[str, ...]] = []

    def compile_nothing(specs: Any, capabilities: Any, progress: Any) -> KernelLibrary:
        found.append(tuple(capabilities))
        return KernelLibrary([])

    monkeypatch.setattr(engine, "compile_kernels", compile_nothing)
    monkeypatch.setattr(engine, "build_serialized", lambda target, model, file, library, ranges, progress: file.write_bytes(b"an engine"))
    return found


@pytest.fixture(scope="module")
def built(folder: Path) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """One engine with its kernels, and the progress that was reported."""
    steps: list[tuple[str, int, int]] = []
    return build_engine(folder, "tensorrt-rtx", "fp16", ["8.9"], progress=lambda *step: steps.append(step)), steps


def test_an_engine_holds_every_kernel_that_its_plugins_launch(built: Any, folder: Path, portable: onnx.ModelProto) -> None:
    result, _ = built
    entry = Bundle.open(folder).engine("tensorrt-rtx")
    files = {Path(name).relative_to("engines/tensorrt-rtx").as_posix(): (folder / name).read_bytes() for name in entry.files}
    assert result["precision"] == entry.precision == "fp16" and not result["reused"]
    assert result["bytes"] == sum(map(len, files.values())) and len(files[ENGINE]) > 100_000
    lowered = lower(to_fp16(portable))
    wanted = {spec.key for placed in lowered.operators for spec in placed.operator.kernels(placed.inputs)}
    wanted |= {paste_kernel(grid).key for grid in GRIDS}
    library = KernelLibrary.from_files(files)
    assert library.for_device("8.9").keys() == wanted
    for kernel in library.kernels:
        check_contract(kernel)
    assert {row["kernel"] for row in result["kernels"]} == wanted
    assert all(row["compute_capability"] == "8.9" and row["spills"] == 0 and row["shared"] <= 99 * 1024 for row in result["kernels"])


def test_the_result_lists_plugins_rewrites_and_kernels(built: Any, portable: onnx.ModelProto) -> None:
    result, _ = built
    assert result["plugins"] == ["DeformConv", "Detections", "MsmRoute", "Proposals", "RoiAlign"]
    deform_convs = Counter(node.op_type for node in portable.graph.node)["DeformConv"]
    assert result["plugin_nodes"]["DeformConv"] == deform_convs and result["plugin_nodes"]["RoiAlign"] == 5
    assert {rewrite["name"]: rewrite["count"] for rewrite in result["rewrites"]}["DeformConv"] == deform_convs
    assert result["versions"]["tensorrt-rtx"] and result["versions"]["triton"] and result["seconds"] > 0


def test_progress_counts_kernels_and_the_builders_phases(built: Any) -> None:
    _, steps = built
    kernels = [done for phase, done, _ in steps if phase == "Compiling kernels"]
    assert kernels == list(range(len(kernels))) and len(kernels) > 10
    last = {phase: (done, total) for phase, done, total in steps}
    assert len(last) > 3 and all(done == total for done, total in last.values())


def test_an_unchanged_engine_is_kept(built: Any, folder: Path, calls: list[tuple[str, ...]]) -> None:
    before = Bundle.open(folder).manifest
    again = build_engine(folder, "tensorrt-rtx", "fp16", ["8.9"])
    assert again["reused"] and not calls and Bundle.open(folder).manifest == before
    same = {name for name in built[0] if name not in ("seconds", "reused")}
    assert {name: again[name] for name in same} == {name: built[0][name] for name in same}


def test_control_c_ends_the_builder_and_changes_nothing(built: Any, folder: Path, without_kernels: None) -> None:
    before = Bundle.open(folder).manifest
    phases: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(folder, "tensorrt-rtx", "fp32", ["12.0"], progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(phases) == 1 and Bundle.open(folder).manifest == before and not multiprocessing.active_children()


def test_other_kernels_another_precision_or_damage_build_again(folder: Path, calls: list[tuple[str, ...]]) -> None:
    both = ("8.0", "8.6")
    assert not build_engine(folder, "tensorrt-rtx", "fp16", ["8.6"])["reused"]
    assert not build_engine(folder, "tensorrt-rtx", "fp16", ["8.6", "8.0", "8.6"])["reused"]
    assert not build_engine(folder, "tensorrt-rtx", "fp32", both)["reused"]
    (folder / "engines" / "tensorrt-rtx" / ENGINE).write_bytes(b"an enginE")
    assert not build_engine(folder, "tensorrt-rtx", "fp32", both)["reused"]
    assert calls == [("8.6",), both, both, both]
    assert build_engine(folder, "tensorrt-rtx", "fp32", both)["reused"]


def test_another_profile_builds_again_and_is_in_the_manifest(folder: Path, calls: list[tuple[str, ...]]) -> None:
    own = ((128, 160),) * 3
    assert build_engine(folder, "tensorrt-rtx", "fp32", ["8.6"])["profile"] == {"batch": [1, 1, 1], "canvas": [[128, 160]] * 3}
    wide = build_engine(folder, "tensorrt-rtx", "fp32", ["8.6"], (1, 2, 4), ((64, 96), *own[1:]))
    assert not wide["reused"] and wide["profile"] == {"batch": [1, 2, 4], "canvas": [[64, 96], [128, 160], [128, 160]]}
    assert Bundle.open(folder).engine("tensorrt-rtx").profile == Profile(batch=(1, 2, 4), canvas=((64, 96), *own[1:]))
    assert not build_engine(folder, "tensorrt-rtx", "fp32", ["8.6"], (1, 3, 4), ((64, 96), *own[1:]))["reused"]


def test_without_a_gpu_kernels_are_for_all(folder: Path, calls: list[tuple[str, ...]]) -> None:
    build_engine(folder, "tensorrt-rtx")
    assert calls == [("8.0", "8.6", "8.7", "8.9", "9.0", "12.0")]


def test_fp32_is_built(folder: Path, without_kernels: None) -> None:
    halved = Bundle.open(folder).manifest.files[MODEL].bytes / 2
    result = build_engine(folder, "tensorrt-rtx", "fp32", ["9.0"])
    assert result["precision"] == "fp32" and result["bytes"] > halved and result["plugin_nodes"]["MsmRoute"] == 1


def change_lowered(monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.GraphProto], object]) -> None:
    def lower_and_change(model: onnx.ModelProto, profile: Profile) -> Any:
        lowered = lower(model, profile)
        change(lowered.model.graph)
        return lowered

    monkeypatch.setattr(engine, "lower", lower_and_change)


def test_the_error_of_a_plugin_is_the_one_raised(folder: Path, without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_inputs(graph: onnx.GraphProto) -> None:
        del next(node for node in graph.node if node.op_type == "DynaMaskDeformConv").input[2:]

    change_lowered(monkeypatch, two_inputs)
    with pytest.raises(InputError, match=r"stages/0/align.*DeformConv"):
        build_engine(folder, "tensorrt-rtx", "fp32", ["8.0"])


def test_a_graph_that_tensorrt_does_not_take_fails(folder: Path, without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "Conv").input[0] = "nowhere"

    change_lowered(monkeypatch, no_source)
    with pytest.raises(DynaMaskError, match=r"tensorrt_rtx .* does not take the graph \(.+\)"):
        build_engine(folder, "tensorrt-rtx", "fp32", ["8.0"])


class Ends:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_builder_that_aborts_fails(tmp_path: Path) -> None:
    library: Any = Ends()
    with pytest.raises(DynaMaskError, match=r"tensorrt-rtx aborted or was killed.*exit status 3"):
        build_serialized("tensorrt-rtx", tmp_path / MODEL, tmp_path / ENGINE, library, {}, lambda phase, done, total: None)


def test_a_graph_of_an_earlier_version_is_refused(portable: onnx.ModelProto, model: DynaMask, tmp_path: Path) -> None:
    earlier = onnx.ModelProto()
    earlier.CopyFrom(portable)
    onnx.helper.set_model_props(earlier, {})
    folder = create_bundle(tmp_path, earlier, model)
    with pytest.raises(InputError, match=f"{FACTS}.*export the bundle again"):
        build_engine(folder, "tensorrt-rtx")


def test_a_manifest_of_another_graph_is_refused(portable: onnx.ModelProto, model: DynaMask, tmp_path: Path) -> None:
    other = create_bundle(tmp_path, portable, model)
    build_engine(other, "onnxruntime")
    manifest = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps(manifest | {"canvas": [160, 160]}))
    with pytest.raises(InputError, match=r"manifest\.json says a canvas of \(160, 160\).*export the bundle again"):
        build_engine(other, "tensorrt-rtx")
    with pytest.raises(InputError, match=r"manifest\.json says a canvas of 160x160.*export the bundle again"):
        open_engine(Bundle.open(other), "onnxruntime")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tensorrt-rtx", "int8"), "int8 is not a precision.*fp32 or fp16"),
        (("tensorrt-rtx", "fp32", ["89"]), "89 is not a compute capability.*8.9"),
        (("tensorrt-rtx", "fp32", ["7.5"]), "7.5 is not a compute capability.*8.0, 8.6"),
        (("onnxruntime", "fp32", ["8.9"]), "onnxruntime runs on the CPU.*leave it out"),
        (("cuda",), "cuda is not a target"),
        (("onnxruntime", "fp32", [], (1, 1, 2)), "onnxruntime takes one image at a time on the bundle's canvas of 128x160"),
        (("tensorrt-rtx", "fp32", [], (4, 2, 8)), r"No engine has the batch 4:2:8"),
        (("tensorrt-rtx", "fp32", [], (1, 1, 1), ((128, 150),) * 3), "No engine has the canvas .*multiples of 32"),
        (("tensorrt-rtx", "fp32", [], (1, 1, 999)), "msm_route.*MsmRoute"),
    ],
)
def test_a_wrong_call_is_refused(arguments: Any, sentence: str, folder: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        build_engine(folder, *arguments)


def test_onnx_runtime_runs_fp16(folder: Path, model: DynaMask) -> None:
    """What it takes and gives is that of fp32; its weights take half the bytes; its results are rounded ones."""
    image = np.random.default_rng(5).standard_normal((1, 3, *model.config.model.canvas)).astype(np.float32)
    found, sizes = {}, {}
    for precision in ("fp32", "fp16"):
        result = build_engine(folder, "onnxruntime", precision)
        assert result["precision"] == precision and result["plugins"] == [] and not result["reused"]
        sizes[precision] = result["bytes"]
        with open_engine(Bundle.open(folder), "onnxruntime", 1) as opened:
            found[precision] = opened.run(image, grid_override=2)
    assert sizes["fp16"] < 0.8 * sizes["fp32"]
    single, half = found["fp32"], found["fp16"]
    assert half.masks[56][1].dtype == half.boxes.dtype == np.float32 and len(half.masks[56][0]) == len(single.masks[56][0]) > 10
    assert 0 < np.abs(half.scores - single.scores).max() < 0.01


def test_building_loads_neither_pytorch_nor_triton_nor_tensorrt_before_it_must() -> None:
    code = (
        "import sys, export.engine; from trt_plugins.registry import OPERATORS; assert len(list(OPERATORS.values())) == 5; "
        "assert not {'torch', 'triton', 'tensorrt_rtx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("profile", [None, Profile(batch=(1, 2, 4), canvas=((64, 96), (128, 160), (128, 160)))])
def test_an_engine_has_a_profile_even_where_nothing_varies(portable: onnx.ModelProto, tmp_path: Path, profile: Profile | None) -> None:
    trt, profiles = load("tensorrt-rtx"), []

    class Builder(trt.Builder):  # type: ignore[name-defined, misc]
        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            names = [network.get_input(index).name for index in range(network.num_inputs)]
            assert config.num_optimization_profiles == len(profiles) == 1
            ranges.update((name, tuple(map(tuple, profiles[0].get_shape(name)))) for name in names)
            return b"an engine"

        def create_optimization_profile(self) -> Any:
            profiles.append(super().create_optimization_profile())
            return profiles[-1]

    lowered, ranges = lower(portable, profile), {}
    onnx.save(lowered.model, tmp_path / MODEL)
    proxy: Any = ModuleType(trt.__name__)
    proxy.__getattr__, proxy.Builder = lambda name: getattr(trt, name), Builder
    builder = serialized_engine._Builder(proxy, lambda phase, done, total: None)
    builder.build(tmp_path / MODEL, tmp_path / ENGINE, lowered.ranges, None, None)
    assert ranges == lowered.ranges and set(ranges) == set(INPUTS)
