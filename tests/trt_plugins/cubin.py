"""What a cubin says of its kernel: the ELF header and the section `.nv.info.<entry>`, whose attributes NVIDIA's cuobjdump prints."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from trt_plugins.driver import argument_offsets
from trt_plugins.kernels import CompiledKernel
from trt_plugins.launcher import argument_types

KPARAM_INFO, PARAM_CBANK, REQNTID, CLUSTER_ATTRIBUTES = 0x17, 0x0A, 0x10, frozenset((0x3E, 0x3F, 0x40, 0x41))
"""EIATTR_KPARAM_INFO, EIATTR_PARAM_CBANK, EIATTR_REQNTID; EIATTR_CTA_PER_CLUSTER and its relatives."""
EM_CUDA = 190
CUDA_ABI, NEWER_ABI = 51, 65
"""ELFOSABI_CUDA, and that of compute capabilities from 10.0 on."""
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system keeps in each block, from compute capability 9.0 on."""
REGISTERS = 65536
"""Of a multiprocessor, on every GPU since Kepler."""


@dataclass(frozen=True)
class Cubin:
    """One kernel's contract with whoever launches it."""

    machine: int
    """The ELF machine: 190 is CUDA."""
    abi: int
    """The ELF header's OS ABI."""
    compute_capability: int
    """87 for 8.7; 90 for 9.0 and its architecture-specific form."""
    parameters: tuple[tuple[int, int], ...]
    """Offset and size in bytes of each parameter."""
    parameter_bytes: int
    """Size of all parameters."""
    threads: tuple[int, int, int]
    """Threads of a block that the kernel requires."""
    static_shared: int
    """Bytes of shared memory that the cubin itself declares."""
    clustered: bool
    """Whether it asks for clusters of blocks."""


def read_cubin(elf: bytes, entry: str) -> Cubin:
    """The contract of a cubin's kernel."""
    assert elf[:4] == b"\x7fELF" and elf[4] == 2, "64-bit ELF"
    sections = dict(_sections(elf))
    attributes = list(_attributes(sections[f".nv.info.{entry}"]))
    infos = {}
    for kind, value in attributes:
        if kind == KPARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", value)
            infos[ordinal] = offset, packed >> 18
    (bank,) = [value for kind, value in attributes if kind == PARAM_CBANK]
    (required,) = [value for kind, value in attributes if kind == REQNTID]
    flags = struct.unpack_from("<I", elf, 0x30)[0]
    return Cubin(
        machine=struct.unpack_from("<H", elf, 0x12)[0],
        abi=elf[7],
        compute_capability=(flags >> 8) & 0xFF if elf[8] >= 8 else flags & 0xFF,
        parameters=tuple(infos[index] for index in range(len(infos))),
        parameter_bytes=struct.unpack("<IHH", bank)[2],
        threads=struct.unpack("<III", required),
        static_shared=len(sections.get(f".nv.shared.{entry}", b"")),
        clustered=any(kind in CLUSTER_ATTRIBUTES for kind, _ in attributes),
    )


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, start + index * size) for index in range(count)]
    names = elf[headers[names_at][4] :][: headers[names_at][5]]
    for name, kind, _, _, offset, length, *_ in headers:
        content = bytes(length) if kind == 8 else elf[offset : offset + length]
        yield names[name : names.index(b"\0", name)].decode(), content


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a section: a format, a kind and a value, whose length a format of 4 gives."""
    place = 0
    while place < len(section):
        form, kind = section[place], section[place + 1]
        length = struct.unpack_from("<H", section, place + 2)[0] if form == 4 else 0
        yield kind, section[place + 4 : place + 4 + length] if form == 4 else section[place + 2 : place + 4]
        place += 4 + length


def check_contract(kernel: CompiledKernel) -> None:
    """Whether a compiled kernel takes the launch that the launcher and the driver make of it, and nothing else."""
    found, types = read_cubin(kernel.cubin, kernel.entry), argument_types(kernel)
    where = f"{kernel.key} for {kernel.compute_capability}"
    packed = zip(argument_offsets(types), map(struct.calcsize, types), strict=True)
    assert found.parameters == tuple(packed), f"{where}: offsets and sizes of its parameters"
    assert found.parameter_bytes == struct.calcsize(types), where
    assert found.threads == (32 * kernel.num_warps, 1, 1), where
    assert kernel.shared + found.static_shared <= 48 * 1024 and found.static_shared <= RESERVED_SHARED, where
    assert (kernel.global_scratch, kernel.profile_scratch, kernel.spills) == (0, 0, 0), where
    assert kernel.registers is not None and kernel.registers * 32 * kernel.num_warps <= REGISTERS, f"{where}: a block does not fit"
    assert not found.clustered, where
    assert (found.machine, found.compute_capability) == (EM_CUDA, int(kernel.compute_capability.replace(".", ""))), where
    assert found.abi == (NEWER_ABI if float(kernel.compute_capability) >= 10 else CUDA_ABI), where
