"""Kernels compiled ahead of time, and the files that hold them. An engine launches them without Triton."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from runtime.errors import InputError

COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "12.0")
"""The compute capabilities that kernels are compiled for by default: A100, RTX 30, Jetson Orin, RTX 40, H100 and H200, RTX 50."""
KNOWN_CAPABILITIES = (*COMPUTE_CAPABILITIES[:5], "10.0", "10.3", "11.0", "12.0", "12.1")
"""All compute capabilities from 8.0 on: also data-centre Blackwell and Thor."""
INDEX = "kernels.json"
TEGRA = frozenset({(8, 7), (11, 0)})
"""Orin and Thor."""

ComputeCapability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
"""`8.7`"""


class KernelInfo(BaseModel):
    """The parameters of a launch, and figures from the compiler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, Field(pattern=r"^\w+-[0-9a-f]{12}$")]
    """The `KernelSpec`'s."""
    compute_capability: ComputeCapability
    entry: str
    """The function's name in the cubin."""
    signature: tuple[tuple[str, str], ...]
    """The arguments of the `KernelSpec`, in order. Two pointers to Triton's scratch memory follow them; null if their sizes are 0."""
    num_warps: int
    """Warps per block, of 32 threads each."""
    shared: int
    """Dynamic shared memory per block, in bytes."""
    global_scratch: int
    """Bytes of global memory per block, or 0."""
    profile_scratch: int
    """Bytes of global memory per block for Triton's profiler, or 0."""
    registers: int | None
    """Registers per thread; None if unknown."""
    spills: int | None
    """Bytes of local memory per thread (spilled registers and arrays); None if unknown."""

    @property
    def file(self) -> str:
        """The cubin's name beside the index."""
        return f"kernels/{self.key}.sm_{self.compute_capability.replace('.', '')}.cubin"


class CompiledKernel(KernelInfo):
    """One kernel for one compute capability."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    cubin: Annotated[bytes, Field(repr=False)]

    @property
    def info(self) -> KernelInfo:
        """The same without the cubin."""
        return KernelInfo(**self.model_dump(exclude={"cubin"}))


_INDEX = TypeAdapter(list[KernelInfo])


class KernelLibrary:
    """Compiled kernels of an engine, for one or several compute capabilities."""

    def __init__(self, kernels: Iterable[CompiledKernel]) -> None:
        self.kernels = sorted(kernels, key=lambda kernel: (kernel.key, _version(kernel.compute_capability)))

    @property
    def compute_capabilities(self) -> list[str]:
        """The compute capabilities of its kernels, the lowest first."""
        return sorted({kernel.compute_capability for kernel in self.kernels}, key=_version)

    def to_files(self) -> dict[str, bytes]:
        """Name -> content: an index in JSON, and one file per kernel."""
        files = {kernel.file: kernel.cubin for kernel in self.kernels}
        return {INDEX: _INDEX.dump_json([kernel.info for kernel in self.kernels], indent=2) + b"\n", **files}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> KernelLibrary:
        """The library in files of `to_files`; other files are ignored.

        Raises:
            InputError: the index or a kernel is missing, or the index is damaged.
        """
        again = "build the engine again with dynamask build-engine"
        try:
            return cls(CompiledKernel(**info.model_dump(), cubin=files[info.file]) for info in _INDEX.validate_json(files[INDEX]))
        except KeyError as missing:
            raise InputError(f"The engine has no file {missing.args[0]}; {again}.") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "its text"
            raise InputError(f"The engine's {INDEX} is not a list of kernels ({place}: {first['msg']}); {again}.") from None

    def for_device(self, compute_capability: str) -> dict[str, CompiledKernel]:
        """Key -> the kernel to load on a GPU: compiled for its compute capability, or for the highest one whose kernels run on it.

        Raises:
            InputError: no compiled form of a kernel runs on that GPU.
        """
        device = _version(compute_capability)
        # Sorted: of those that run on the device, the highest comes last.
        fitting = {kernel.key: kernel for kernel in self.kernels if _runs_on(_version(kernel.compute_capability), device)}
        if any(kernel.key not in fitting for kernel in self.kernels):
            raise InputError(
                f"The engine's kernels are compiled for compute capability {', '.join(self.compute_capabilities)}, and this GPU's is "
                f"{compute_capability}; build it again with dynamask build-engine --compute-capability {compute_capability}."
            )
        return fitting


def _version(compute_capability: str) -> tuple[int, int]:
    major, minor = compute_capability.split(".")
    return int(major), int(minor)


def _runs_on(built: tuple[int, int], device: tuple[int, int]) -> bool:
    """Whether a cubin for one compute capability runs on a GPU of another.

    A cubin for X.y runs on X.z with z >= y, "only for the desktop": not on Tegra, not from Tegra to the desktop, nor back (CUDA C++
    Programming Guide, "Binary Compatibility"). From 9.0 on, Triton compiles for the architecture-specific targets (`sm_90a`, `sm_120a`),
    whose code runs on that compute capability alone (same guide, "Feature Set Compiler Targets").
    """
    if built == device:
        return True
    return built[0] == device[0] == 8 and built[1] < device[1] and not {built, device} & TEGRA
