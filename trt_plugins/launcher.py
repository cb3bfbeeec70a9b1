"""Launches an engine's compiled kernels for its plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import DynaMaskError, InputError
from trt_plugins.detections.operator import KERNELS as DETECTIONS_KERNELS
from trt_plugins.driver import Driver
from trt_plugins.kernels import CompiledKernel, KernelInfo
from trt_plugins.operator import Buffer, KernelSpec, Launch

_LETTERS = {"i32": "i", "i64": "q", "fp32": "f"}
"""A scalar argument's type in Triton -> in Python's `struct`."""


class KernelLauncher:
    """Launches the compiled kernels of an engine for its plugins. A kernel is loaded at its first launch.

    After each kernel of `Detections` it records the event `detected`; its last record marks the beginning of the mask branch.
    """

    def __init__(self, driver: Driver, kernels: Mapping[str, CompiledKernel], detected: Any, remedy: str) -> None:
        self._driver = driver
        self._kernels = kernels
        self._detected = detected
        self._remedy = remedy
        self._loaded: dict[KernelSpec, Any] = {}

    def __call__(self, launch: Launch, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Enqueue a launch, with the addresses of the plugin's inputs, outputs and workspace.

        Raises:
            InputError: the engine was built without this kernel.
            DynaMaskError: CUDA failed.
        """
        spec = launch.kernel
        if spec not in self._loaded:
            self._loaded[spec] = self._load(spec)
        tensors = {"input": inputs, "output": outputs}

        def value(argument: Buffer | int | float) -> int | float:
            if not isinstance(argument, Buffer):
                return argument
            return workspace + argument.offset if argument.kind == "workspace" else tensors[argument.kind][argument.index]

        # The last two arguments are Triton's scratch memory, which these kernels do not use.
        self._driver.launch(self._loaded[spec], launch.grid, stream, [*map(value, launch.arguments), 0, 0])
        if spec.module == DETECTIONS_KERNELS:
            self._driver.record(self._detected, stream)

    def unload(self) -> None:
        """Free the kernels. TensorRT keeps plugins alive that refer to this launcher."""
        self._loaded.clear()
        self._kernels = {}
        self._detected = None

    def _load(self, spec: KernelSpec) -> Any:
        kernel = self._kernels.get(spec.key)
        if kernel is None:
            raise InputError(f"The engine was built by another version of DynaMask, without the kernel {spec.key}; {self._remedy}")
        if kernel.global_scratch or kernel.profile_scratch:
            raise DynaMaskError(f"The kernel {spec.key} needs scratch memory of Triton, which engines do not have.")
        return self._driver.load_kernel(kernel.cubin, kernel.entry, argument_types(kernel), 32 * kernel.num_warps, kernel.shared)


def argument_types(kernel: KernelInfo) -> str:
    """The types of a kernel's arguments for `Driver.load_kernel`: those of its signature, and two pointers to Triton's scratch memory."""
    return "".join("P" if kind.startswith("*") else _LETTERS[kind] for _, kind in kernel.signature) + "PP"
