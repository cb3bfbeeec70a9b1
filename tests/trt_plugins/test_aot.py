"""Kernels compiled ahead of time: for GPUs that are not there, once, and found again for the GPU that is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import DynaMaskError, InputError
from tests.trt_plugins.cubin import check_contract
from tests.trt_plugins.toy import Toy
from trt_plugins import aot
from trt_plugins.kernels import COMPUTE_CAPABILITIES, CompiledKernel, KernelLibrary
from trt_plugins.operator import KernelSpec, TensorSpec

REPOSITORY = Path(__file__).parents[2]
SPECS = Toy(scale=1).kernels([TensorSpec((None, 8), "float16"), TensorSpec((), "float32")])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def library(cache: Path) -> KernelLibrary:
    assert os.environ["TRITON_INTERPRET"] == "1", "the workers have to take it away"
    return aot.compile_kernels([*SPECS, SPECS[0]], ["8.6", "8.7", "9.0"], processes=1, cache=cache)


def test_kernels_are_compiled_for_gpus_that_are_not_there(library: KernelLibrary) -> None:
    found, scaled = sorted({spec.key for spec in SPECS})
    assert [(kernel.key, kernel.compute_capability) for kernel in library.kernels] == [
        (key, capability) for key in (found, scaled) for capability in ("8.6", "8.7", "9.0")
    ]
    for kernel in library.kernels:
        assert kernel.cubin.startswith(b"\x7fELF")
        assert kernel.entry.encode() in kernel.cubin
        assert kernel.signature == next(spec.signature for spec in SPECS if spec.key == kernel.key)
        assert kernel.num_warps == 1
        assert (kernel.global_scratch, kernel.profile_scratch) == (0, 0)
        assert kernel.registers is None or 0 < kernel.registers < 256
        assert kernel.spills in (None, 0)
        assert str(REPOSITORY).encode() not in kernel.cubin


def test_cubins_take_the_launches_that_are_made(library: KernelLibrary) -> None:
    for kernel in library.kernels:
        check_contract(kernel)


@pytest.mark.parametrize(
    "change",
    [
        {"signature": SPECS[0].signature[:-1]},
        {"signature": (*SPECS[0].signature[:-1], ("threshold", "i64"))},
        {"num_warps": 2},
        {"shared": 49 * 1024},
        {"profile_scratch": 128},
        {"compute_capability": "8.9"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_cubin_that_breaks_the_contract_is_found(library: KernelLibrary, change: dict[str, Any]) -> None:
    kernel = library.for_device("8.6")[SPECS[0].key]
    with pytest.raises(AssertionError):
        check_contract(kernel.model_copy(update=change))


def test_cubins_of_another_targets_ptx_are_those_of_triton(library: KernelLibrary, tmp_path: Path) -> None:
    own = aot.compile_kernels(SPECS, ["8.7"], processes=1, cache=tmp_path)
    assert own.kernels == [kernel for kernel in library.kernels if kernel.compute_capability == "8.7"]


def test_compiled_kernels_are_not_compiled_again(library: KernelLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "ProcessPoolExecutor", None)
    heard: list[tuple[int, int]] = []
    again = aot.compile_kernels(SPECS, ["9.0", "8.7", "8.6"], progress=lambda *done: heard.append(done), cache=cache)
    assert again.kernels == library.kernels
    assert heard == [(6, 6)]


def test_a_damaged_file_in_the_cache_is_ignored(library: KernelLibrary, tmp_path: Path) -> None:
    file = tmp_path / "kernel.json"
    file.write_text(library.kernels[0].model_dump_json())
    assert aot._cached(file) == library.kernels[0]
    file.write_text(file.read_text()[:-40])
    assert aot._cached(file) is None


def test_a_kernel_is_compiled_again_when_its_source_or_the_compiler_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_operators"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").touch()
    (package / "kernel.py").write_text("import triton\nfrom some_operators.sorting import sort\nfrom some_operators import boxes\n")
    (package / "sorting.py").write_text("raise ImportError('nothing is executed')\n")
    (package / "boxes.py").write_text("from some_operators.sorting import sort\n")
    (package / "other.py").touch()
    spec = replace(SPECS[0], module="some_operators.kernel")
    digests = [aot._digest(spec, "8.7"), aot._digest(spec, "8.9"), aot._digest(replace(spec, num_warps=8), "8.7")]
    for name in ("kernel", "sorting", "boxes"):
        with (package / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        digests.append(aot._digest(spec, "8.7"))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "99.0")
        digests.append(aot._digest(spec, "8.7"))
    assert len(set(digests)) == 7
    (package / "other.py").write_text("# not imported\n")
    assert aot._digest(spec, "8.7") == digests[5]


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = KernelSpec("tests.trt_plugins.toy", "broken", (("x", "*i32"), ("n", "i32")), (("BLOCK", 3),))
    misnamed = replace(SPECS[0], signature=SPECS[0].signature[1:])
    for spec, reason in [(broken, "power of 2"), (misnamed, "it takes x, places")]:
        with pytest.raises(DynaMaskError, match=f"toy.{spec.function} does not compile for compute capability 8.0: .*{reason}"):
            aot.compile_kernels([spec], ["8.0"], processes=1, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_without_triton_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="pip install triton"):
        aot.compile_kernels(SPECS, ["8.0"], cache=tmp_path)


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Where the tests run in the background, it is ignored.
sys.path.insert(0, {str(REPOSITORY)!r})
if __name__ == "__main__":
    from pathlib import Path
    from tests.trt_plugins.test_aot import SPECS, aot
    aot.compile_kernels(SPECS, progress=lambda done, total: print(done, flush=True), processes=2, cache=Path({str(tmp_path / "cache")!r}))
""")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "0"
    assert 1 <= int(process.stdout.readline()) <= 4  # The first is ready, for all 8.x perhaps, the rest of twelve is not.
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=20)
    assert process.returncode != 0
    assert messages.strip().endswith("KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # The resource tracker of multiprocessing follows.
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def compiled(key: int, compute_capability: str) -> CompiledKernel:
    return CompiledKernel(
        key=f"kernel-{key:012x}",
        compute_capability=compute_capability,
        entry="kernel",
        signature=(("x", "*fp16"), ("n", "i32")),
        num_warps=4,
        shared=1024,
        global_scratch=0,
        profile_scratch=0,
        registers=40,
        spills=None,
        cubin=f"{key} for {compute_capability}".encode(),
    )


def test_a_library_comes_back_from_its_files(library: KernelLibrary) -> None:
    files = library.to_files()
    kernel = library.kernels[0]
    assert files[f"kernels/{kernel.key}.sm_86.cubin"] == kernel.cubin
    assert json.loads(files["kernels.json"])[0]["compute_capability"] == "8.6"
    assert KernelLibrary.from_files({**files, "engine.bin": b""}).kernels == library.kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels.json": None}, r"has no file kernels.json; build the engine again with dynamask build-engine\."),
        ({"kernels/kernel-000000000001.sm_87.cubin": None}, r"has no file kernels/kernel-000000000001.sm_87.cubin"),
        ({"kernels.json": b"[{"}, r"kernels.json is not a list of kernels \(its text: "),
        ({"kernels.json": b'[{"key": "../../evil-000000000001"}]'}, r"\(0.key: "),
    ],
)
def test_a_library_that_is_not_whole_is_refused(change: dict[str, bytes | None], message: str) -> None:
    files = {name: content for name, content in (KernelLibrary([compiled(1, "8.7")]).to_files() | change).items() if content is not None}
    with pytest.raises(InputError, match=message):
        KernelLibrary.from_files(files)


# Device -> what runs on it, written out from NVIDIA's rules: minor versions upwards on the desktop, nothing else's on Tegra (8.7, 11.0),
# and nothing but its own where Triton compiles for an architecture's own features (9.0 and later).
RUNS = {
    "8.0": {"8.0"},
    "8.6": {"8.0", "8.6"},
    "8.7": {"8.7"},
    "8.9": {"8.0", "8.6", "8.9"},
    "9.0": {"9.0"},
    "10.0": {"10.0"},
    "10.3": {"10.3"},
    "11.0": {"11.0"},
    "12.0": {"12.0"},
    "12.1": {"12.1"},
}


@given(st.dictionaries(st.integers(0, 9), st.sets(st.sampled_from(sorted(RUNS)), min_size=1), min_size=1), st.sampled_from(sorted(RUNS)))
def test_a_device_gets_the_highest_that_runs_on_it(built: dict[int, set[str]], device: str) -> None:
    library = KernelLibrary(compiled(key, capability) for key, capabilities in built.items() for capability in capabilities)
    fitting = {f"kernel-{key:012x}": capabilities & RUNS[device] for key, capabilities in built.items()}
    if all(fitting.values()):
        chosen = {key: kernel.compute_capability for key, kernel in library.for_device(device).items()}
        assert chosen == {key: max(capabilities, key=float) for key, capabilities in fitting.items()}
    else:
        with pytest.raises(
            InputError, match=f"this GPU's is {device}; build it again with dynamask build-engine --compute-capability {device}"
        ):
            library.for_device(device)


def test_the_usual_capabilities_serve_the_gpus_they_are_for() -> None:
    library = KernelLibrary(compiled(1, capability) for capability in COMPUTE_CAPABILITIES)
    assert all(library.for_device(capability) for capability in COMPUTE_CAPABILITIES)
    with pytest.raises(InputError, match=r"are compiled for compute capability 8.0, 8.6, 8.7, 8.9, 9.0, 12.0, and this GPU's is 7.5"):
        library.for_device("7.5")


def test_an_earlier_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "3.4.0")
    with pytest.raises(InputError, match=r"needs Triton 3\.5 or later, not 3\.4\.0; run pip install --upgrade triton"):
        aot.compile_kernels(SPECS, ["8.0"], cache=tmp_path)
