"""Compiles Triton kernels ahead of time; no GPU is needed.

Only worker processes load Triton: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runtime.errors import DynaMaskError, InputError
from runtime.files import atomic_path, user_cache
from trt_plugins.kernels import COMPUTE_CAPABILITIES, CompiledKernel, KernelLibrary
from trt_plugins.operator import KernelSpec
from trt_plugins.tensorrt import version_numbers

MINIMUM_TRITON = (3, 5)
"""Kernels of earlier ones take one pointer to scratch memory in place of two."""
MAX_PROCESSES = 8
"""A worker holds about 300 MB."""


def compile_kernels(
    specs: Iterable[KernelSpec],
    capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> KernelLibrary:
    """Compile each kernel for each compute capability, in worker processes. Kernels in the cache are not compiled again.

    Args:
        specs: the kernels; duplicates are compiled once.
        capabilities: `8.6`, …
        processes: number of worker processes; None is one for each CPU, 8 at most.
        progress: called with the number of finished kernels and the total, at the start and after each kernel.
        cache: a folder; None is `dynamask/kernels` in the user's cache folder.

    Raises:
        InputError: Triton is not installed, or too old.
        DynaMaskError: a kernel does not compile (names it and the compute capability), or the cache cannot be written.
    """
    folder = cache or user_cache("kernels")
    files = {
        (spec, capability): folder / f"{_digest(spec, capability)}.json"
        for spec in {spec.key: spec for spec in specs}.values()
        for capability in dict.fromkeys(capabilities)
    }
    kernels = {job: kernel for job, file in files.items() if (kernel := _cached(file)) is not None}
    missing = [job for job in files if job not in kernels]

    def report() -> None:
        if progress is not None:
            progress(len(kernels), len(files))

    report()
    for spec, compiled in _compile_all(_jobs(missing), processes or min(os.cpu_count() or 1, MAX_PROCESSES)):
        for kernel in compiled:
            kernels[spec, kernel.compute_capability] = kernel
            with atomic_path(files[spec, kernel.compute_capability]) as temporary:
                temporary.write_text(kernel.model_dump_json(), encoding="utf-8")
        report()
    return KernelLibrary(kernels.values())


Job = tuple[KernelSpec, tuple[str, ...]]
"""A kernel, and compute capabilities for which Triton makes the same PTX."""


def _jobs(missing: Iterable[tuple[KernelSpec, str]]) -> list[Job]:
    """Triton's PTX for 8.0, 8.6, 8.7 and 8.9 differs only in the name of the target (`tests/trt_plugins/test_aot.py`): it is made once."""
    jobs: dict[tuple[KernelSpec, str], list[str]] = {}
    for spec, capability in missing:
        jobs.setdefault((spec, "8" if capability.startswith("8.") else capability), []).append(capability)
    return [(spec, tuple(capabilities)) for (spec, _), capabilities in jobs.items()]


def _compile_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[KernelSpec, list[CompiledKernel]]]:
    if not jobs:
        return
    with (
        tempfile.TemporaryDirectory(prefix="dynamask-triton-") as scratch,
        ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"), _start_worker, (scratch,)) as pool,
    ):
        futures = {pool.submit(_compile, *job): job[0] for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DynaMaskError(
                "A worker process that compiled kernels was killed, perhaps for lack of memory; free some memory and build again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(scratch: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback.
    os.dup2(2, 1)  # Triton prints errors to standard output, which may carry a result.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = scratch
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # Line information holds this machine's paths.


def _compile(spec: KernelSpec, capabilities: Sequence[str]) -> list[CompiledKernel]:
    try:
        return _compile_here(spec, capabilities)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise DynaMaskError(
            f"{spec.module}.{spec.function} does not compile for compute capability {' or '.join(capabilities)}: "
            f"{type(error).__name__}: {reason[-1]}"
        ) from error


def _compile_here(spec: KernelSpec, capabilities: Sequence[str]) -> list[CompiledKernel]:
    import triton
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(spec.module), spec.function)
    types, constants = dict(spec.signature), dict(spec.constants)
    names: list[str] = function.arg_names
    if [name for name in names if name not in constants] != list(types) or not constants.keys() <= set(names):
        raise ValueError(f"it takes {', '.join(names)}, not {', '.join([*types, *constants])}")
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(index,): constants[name] for index, name in enumerate(names) if name in constants},
        # "D": divisible by 16, as TensorRT's addresses are; `trt_plugins.plugin` checks them.
        attrs={(index,): BaseBackend.parse_attr("D") for index, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    target = GPUTarget("cuda", int(capabilities[0].replace(".", "")), 32)
    # Fused multiply-adds are explicit, because their default changes with Triton 3.10.
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubins = {capabilities[0]: compiled.asm["cubin"]}
    cubins |= {other: _assemble(tools / "ptxas", compiled.asm["ptx"], other) for other in capabilities[1:]}
    return [_kernel(spec, capability, compiled.metadata, cubin, tools / "cuobjdump") for capability, cubin in cubins.items()]


def _assemble(ptxas: Path, ptx: str, capability: str) -> bytes:
    """The cubin of PTX that was made for another compute capability, as Triton's own call makes it."""
    name = f"sm_{capability.replace('.', '')}"
    with tempfile.TemporaryDirectory(prefix="dynamask-") as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(re.sub(r"(?m)^\.target sm_\w+", f".target {name}", ptx), encoding="utf-8")
        options = ["-lineinfo", "-suppress-debug-info"]
        done = subprocess.run([ptxas, *options, f"--gpu-name={name}", source, "-o", cubin], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ptxas: {done.stderr.strip()}")
        return cubin.read_bytes()


def _kernel(spec: KernelSpec, capability: str, metadata: Any, cubin: bytes, cuobjdump: Path) -> CompiledKernel:
    registers, spills = _resources(cuobjdump, cubin)
    return CompiledKernel(
        key=spec.key,
        compute_capability=capability,
        entry=metadata.name,
        signature=spec.signature,
        # Triton may add warps of its own to those asked for.
        num_warps=metadata.num_warps,
        shared=metadata.shared,
        global_scratch=metadata.global_scratch_size,
        profile_scratch=metadata.profile_scratch_size,
        registers=registers,
        spills=spills,
        cubin=cubin,
    )


def _resources(cuobjdump: Path, cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of local memory per thread, as NVIDIA's tool reads them from a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # Not every build of Triton brings it.
            return None, None
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return usage.get("REG"), usage["STACK"] + usage["LOCAL"] if {"STACK", "LOCAL"} <= usage.keys() else None


def _cached(file: Path) -> CompiledKernel | None:
    try:
        return CompiledKernel.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):  # Missing, or written by another version.
        return None


def _digest(spec: KernelSpec, capability: str) -> str:
    """SHA-256 of all that a compiled kernel depends on: its form, the sources of its module and this one, Triton's version, the target."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("Compiling kernels needs Triton, which is not installed; run pip install triton.") from None
    if version_numbers(triton) < MINIMUM_TRITON:
        required = ".".join(map(str, MINIMUM_TRITON))
        raise InputError(f"Compiling kernels needs Triton {required} or later, not {triton}; run pip install --upgrade triton.")
    sources = [Path(__file__).read_bytes(), *_sources(spec.module)]
    fields = [spec.key, capability, triton, *(hashlib.sha256(source).hexdigest() for source in sources)]
    return hashlib.sha256("\n".join(fields).encode()).hexdigest()


def _sources(module: str) -> list[bytes]:
    """The text of a module and of those of its own package and of `runtime` that it imports, directly or not, without executing them."""
    packages = {module.split(".")[0], "runtime"}
    sources: dict[Path, bytes] = {}
    waiting = [module]
    while waiting:
        file = _file(waiting.pop())
        if file is None or file in sources:
            continue
        sources[file] = file.read_bytes()
        for node in ast.walk(ast.parse(sources[file])):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
        waiting = [name for name in waiting if name.split(".")[0] in packages]
    return [sources[file] for file in sorted(sources)]


def _file(module: str) -> Path | None:
    # `find_spec` is asked for the package alone: for the whole name it would import the modules' parents, and with them Triton.
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
